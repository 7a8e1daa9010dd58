"""``python -m house.bugs``: plants each bug of ``bugs.toml`` in a copy of the tree, and says which tests find it.

A bug is found if a test of its ``found_by`` fails with it. A test whose name has moved to another file is looked for
there; where none of the names is left, all tests that are not slow are run. Without bugs all these tests must pass.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click

_ROOT = Path(__file__).parents[2]
_COPIED = ("src", "tests", "docs", "examples", "acceptance", "benchmarks", "README.md", "pyproject.toml")
# the installed package finds the modules of its own tree before those of any other
_OWN_TREE = (
    "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
)
_PYTEST = ("-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly")
_PASSED, _FAILED = 0, 1
# all but the slow ones, and the one that looks for the texts that were just replaced
_ALL = ("tests", "-m", "not slow", "-k", "not test_a_bug_can_be_planted")


@dataclass(frozen=True)
class Bug:
    """A text that stands once in src, what it is replaced by, what that breaks, and tests that find it."""

    room: str
    text: str
    instead: str
    breaks: str
    found_by: tuple[str, ...]

    def place(self, source: Path) -> Path:
        """The file that has the text.

        Raises:
            ValueError: If it does not stand there exactly once.
        """
        files = {path: path.read_text(encoding="utf-8").count(self.text) for path in source.rglob("*.py")}
        if sum(files.values()) != 1:
            raise ValueError(f"a bug's text must stand once in src, got {sum(files.values())} times: {self.text}")
        return max(files, key=lambda path: files[path])


def bugs() -> list[Bug]:
    """All of them."""
    text = (Path(__file__).parent / "bugs.toml").read_text(encoding="utf-8")
    return [Bug(**each | {"found_by": tuple(each["found_by"])}) for each in tomllib.loads(text)["bug"]]


class Tree:
    """A copy of the working tree, with the compiled kernels of this environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "src"
        for name in _COPIED:
            copy = shutil.copytree if (_ROOT / name).is_dir() else shutil.copy
            copy(_ROOT / name, folder / name)
        native = importlib.util.find_spec("batchnorm._native")
        if native is not None and native.origin:
            shutil.copy(native.origin, self.source / "batchnorm")
        (folder / "sitecustomize.py").write_text(_OWN_TREE, encoding="utf-8")
        self._environment = os.environ | {
            "PYTHONPATH": f"{folder}{os.pathsep}{self.source}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def test(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of pytest."""
        command = [sys.executable, *_PYTEST, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def where(self, tests: tuple[str, ...]) -> list[str]:
        """The tests by the files that they are in now; of those that are in none, nothing."""
        return [place for test in tests if (place := self._now(*test.split("::")))]

    def _now(self, file: str, name: str) -> str:
        definition = re.compile(rf"^\s*def {re.escape(name)}\(", re.MULTILINE)
        files = sorted((self.folder / "tests").rglob("test_*.py"), key=lambda path: path.name != file)
        found = (path for path in files if definition.search(path.read_text(encoding="utf-8")))
        return next((f"{path.relative_to(self.folder)}::{name}" for path in found), "")


def planted(tree: Tree, bug: Bug) -> str:
    """The name of a test that finds a bug, "" if none does."""
    path = bug.place(tree.source)
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(bug.text, bug.instead), encoding="utf-8")
    try:
        tests = tree.where(bug.found_by)
        code, output = tree.test(*(tests or _ALL))
    finally:
        path.write_text(before, encoding="utf-8")
    if code not in {_PASSED, _FAILED}:
        raise RuntimeError(f"pytest ended with {code} for {bug.text!r}:\n{output[-2000:]}")
    names = re.findall(r"^FAILED tests/([^\s\[]+)", output, re.MULTILINE)
    return names[0] if code == _FAILED and names else ""


@click.command()
@click.option("--only", default="", help="Bugs whose room, text or description contains this.")
@click.option("--unplanted/--no-unplanted", default=True, help="Whether the tests are run without bugs first.")
def main(only: str, unplanted: bool) -> None:
    """Plant each bug and run the tests that should find it."""
    chosen = [bug for bug in bugs() if only in f"{bug.room} {bug.text} {bug.breaks}"]
    with tempfile.TemporaryDirectory(prefix="house") as folder:
        tree = Tree(Path(folder))
        if unplanted:
            tests = dict.fromkeys(test for bug in chosen for test in tree.where(bug.found_by))
            code, output = tree.test(*tests)
            if code != _PASSED:
                raise click.ClickException(f"the tests fail without bugs:\n{output[-2000:]}")
        missed = 0
        for number, bug in enumerate(chosen, start=1):
            start = time.perf_counter()
            try:
                found, told = planted(tree, bug), "NOT FOUND"
            except ValueError as error:
                found, told = "", f"NOT PLANTED, {error}"
            missed += not found
            seconds = time.perf_counter() - start
            click.echo(f"{number:2} {seconds:5.1f} s  {bug.room}: {bug.breaks}\n            {found or told}")
    click.echo(f"{len(chosen) - missed} of {len(chosen)} found")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
