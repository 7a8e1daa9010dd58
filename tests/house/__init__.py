"""What the package shows, prints, writes and reads, recorded; a redesign of the source tree leaves it as it is.

``surface.json``, ``outputs.json`` and ``files/`` were made by the code of before. ``tests/test_house.py`` compares them
with what the code of now does. From the folder ``tests``:

- ``python -m house.record`` shows what differs; with ``--words`` it accepts differences of wording and nothing else,
  with ``--all`` every one. ``--long`` also runs the claims of the lecture that take minutes.
- ``python -m house.files`` writes what is missing in ``files/``; what is there stays as it was written.
- ``python -m house.bugs`` plants each bug of ``bugs.toml`` in a copy of the tree, and says which tests find it.
- ``python -m house.sizes`` prints the sizes of the source tree.
"""
