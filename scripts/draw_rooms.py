"""Draw the rooms of the package and list their files: python scripts/draw_rooms.py [--check].

A room is a package or a single file directly in src/batchnorm. The picture docs/rooms.svg has a row for each layer of
pyproject.toml's import table. It has a line from each room down to each room that it imports, unless a chain of other
lines leads there. CONTRIBUTING.md gets, between two marks, a line for each file of more than 100 lines: the first
paragraph of its docstring. With --check nothing is written, and the exit status is 1 if a file is not up to date.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "batchnorm"
PICTURE, GUIDE = ROOT / "docs" / "rooms.svg", ROOT / "CONTRIBUTING.md"
MARKS = "<!-- files: python scripts/draw_rooms.py -->\n", "<!-- end of files -->\n"
LONG = 100  # a file with more lines is listed
WIDTH, ROW, BOX = 1000, 62, (120, 30)  # sizes in the picture, in points
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222;text-anchor:middle}rect{fill:#f4f6f8;stroke:#7a8794}"
    "path{fill:none;stroke:#7a8794;stroke-opacity:.55}@media(prefers-color-scheme:dark){text{fill:#eee}"
    "rect{fill:#23292f;stroke:#9aa7b4}path{stroke:#9aa7b4}}"
)


def layers() -> list[list[str]]:
    """The rooms of each layer; a layer comes before the layers that it imports."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = table["tool"]["importlinter"]["contracts"]
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def imports(rooms: list[str]) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    graph = grimp.build_graph("batchnorm", cache_dir=None)
    for room in rooms:
        if (SOURCE / room).is_dir():
            graph.squash_module(f"batchnorm.{room}")
    imported = {room: graph.find_modules_directly_imported_by(f"batchnorm.{room}") for room in rooms}
    return {
        room: {name.removeprefix("batchnorm.") for name in names} & (set(rooms) - {room})
        for room, names in imported.items()
    }


def shortest(known: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Pairs of a room and a room that it imports, without those that a chain of other imports implies."""
    below: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in below:
            below[room] = known[room].union(*map(reach, known[room]))
        return below[room]

    for room, names in known.items():
        implied = set().union(*map(reach, names))
        yield from ((room, name) for name in sorted(names - implied))


def picture() -> str:
    """The picture as SVG: rooms as boxes, and lines from each room down to the rooms that it imports."""
    table = layers()
    places = {
        room: (WIDTH * _across(level, at, len(row)), ROW * (level + 0.6))
        for level, row in enumerate(table)
        for at, room in enumerate(row)
    }
    lines = [_line(places[a], places[b]) for a, b in shortest(imports(list(places)))]
    boxes = [_box(room, *place) for room, place in places.items()]
    size = f"{WIDTH} {ROW * len(table):g}"
    title = "<title>Rooms of batchnorm; a line leads down to what a room imports</title>"
    parts = [title, f"<style>{STYLE}</style>", *lines, *boxes]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">' + "\n".join(parts) + "</svg>\n"


def _across(level: int, at: int, rooms: int) -> float:
    """The position of a room in its row, from 0 to 1; single rooms alternate, so that lines can pass beside them."""
    return (at + 1) / (rooms + 1) if rooms > 1 else (0.35, 0.5, 0.65)[level % 3]


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (u, v) = (start[0], start[1] + BOX[1] / 2), (end[0], end[1] - BOX[1] / 2)
    return f'<path d="M{x:g} {y:g}C{x:g} {y + ROW / 2:g} {u:g} {v - ROW / 2:g} {u:g} {v:g}"/>'


def _box(room: str, x: float, y: float) -> str:
    width, height = BOX
    rectangle = f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="5"/>'
    return f'{rectangle}<text x="{x:g}" y="{y + 4.5:g}">{escape(room)}</text>'


def files() -> str:
    """A list of the long files of each room, in the order of the layers."""
    rooms = [room for row in layers() for room in row]
    return "\n".join(part for room in rooms if (part := _files_of(room)))


def _files_of(room: str) -> str:
    folder = SOURCE / room
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    lines = [f"- `{path.relative_to(SOURCE)}`: {first_sentence(path)}" for path in paths if _lines(path) > LONG]
    return f"**{room}**\n\n" + "\n".join(lines) + "\n" if lines else ""


def first_sentence(path: Path) -> str:
    """The first paragraph of a file's docstring, in one line, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").rstrip(".")


def _lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def main() -> int:
    """Write the picture and the list, or, with --check, print which of them is not up to date."""
    guide = GUIDE.read_text(encoding="utf-8")
    before, rest = guide.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    wanted = {GUIDE: f"{before}{MARKS[0]}\n{files()}\n{MARKS[1]}{after}", PICTURE: picture()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        print("\n".join(f"{path.relative_to(ROOT)} is not up to date" for path in stale))
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
