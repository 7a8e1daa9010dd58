"""Move modules of the package and change their names everywhere: python scripts/move_modules.py TABLE.toml.

The table has a section ``[moves]`` of old and new dotted names, without "batchnorm.", and a section ``[packages]`` with
the docstring of each new package. Files move with ``git mv``. In Python files, imports change, and the variables under
which a file uses a module; in all files, dotted names and paths change. Other names of modules, for example names that
code builds at run time, must be changed by hand.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "batchnorm"
TEXTS = {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".txt", ".html", ".cpp", ".hpp", ".h", ""}
Edit = tuple[int, int, str]  # start, end, and the new text between them
MARK = "\0."  # marks a name that is new already


def main(table: str) -> None:
    """Move all modules in the table."""
    read = tomllib.loads(Path(table).read_text())
    moves: dict[str, str] = read["moves"]
    for name, docstring in read["packages"].items():
        folder = PACKAGE / name.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "__init__.py").exists():
            (folder / "__init__.py").write_text(f'"""{docstring}"""\n')
            git("add", str(folder / "__init__.py"))
    before = {f"batchnorm.{old}": f"batchnorm.{new}" for old, new in moves.items()}
    for path in tracked():
        move_names(path, before)
    for old, new in moves.items():
        git("mv", str(file_of(old)), str(file_of(new)))


def file_of(name: str) -> Path:
    """A module's file."""
    return PACKAGE / f"{name.replace('.', '/')}.py"


def git(*words: str) -> str:
    """Run git and return its output."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def tracked() -> Iterator[Path]:
    """Text files of the repository, except those that keep old names: changelog, results, records, scripts."""
    for name in git("ls-files").splitlines():
        path = ROOT / name
        kept = name.startswith(("benchmarks/results/", "tests/house/", "scripts/")) or name == "CHANGELOG.md"
        if path.suffix in TEXTS and path.is_file() and not path.is_symlink() and not kept:
            yield path


def move_names(path: Path, moves: dict[str, str]) -> None:
    """Change the names of moved modules in a file."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return
    moved = text
    if path.suffix == ".py":
        edits = list(edits_of(text, moves, path))
        for start, end, new in sorted(edits, reverse=True):
            moved = moved[:start] + new + moved[end:]
    moved = in_text(moved, moves).replace(MARK, "")
    if moved != text:
        path.write_text(moved)


def in_text(text: str, moves: dict[str, str]) -> str:
    """The text with new dotted names and new paths of files."""
    names = "|".join(re.escape(old) for old in sorted(moves, key=len, reverse=True))
    text = re.sub(rf"(?<![\w.])({names})(?![\w(])", lambda found: moves[found[1]], text)
    paths = {f"{old.replace('.', '/')}.py": f"{new.replace('.', '/')}.py" for old, new in moves.items()}
    names = "|".join(re.escape(old) for old in sorted(paths, key=len, reverse=True))
    return re.sub(rf"(?<![\w/])((?:src/)?)({names})", lambda found: found[1] + paths[found[2]], text)


def edits_of(text: str, moves: dict[str, str], path: Path) -> Iterator[Edit]:
    """The edits of a Python file: its imports of moved modules, and the places that use the imported names."""
    tree = ast.parse(text)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def at(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    renamed: dict[str, str] = {}
    rooms = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module == "batchnorm" for alias in node.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            new = moves.get(f"batchnorm.{node.value.id}.{node.attr}")
            if new is not None and new.rpartition(".")[0] == f"batchnorm.{node.value.id}":
                start = at(node.end_lineno or 0, node.end_col_offset or 0) - len(node.attr)
                yield start, start + len(node.attr), new.rpartition(".")[2]
        if not isinstance(node, ast.ImportFrom) or not node.module or not node.module.startswith("batchnorm"):
            continue
        if not any(f"{node.module}.{alias.name}" in moves for alias in node.names):
            continue
        kept, lines = [], []
        for alias in node.names:
            new = moves.get(f"{node.module}.{alias.name}")
            said = f" as {alias.asname}" if alias.asname else ""
            if new is None:
                kept.append(alias.name + said)
                continue
            room, _, name = new.rpartition(".")
            lines.append(f"from {MARK}{room} import {name}{said}")
            if not alias.asname and name != alias.name:
                renamed[alias.name] = name
        if kept:
            lines.insert(0, f"from {node.module} import {', '.join(kept)}")
        indent = "\n" + " " * node.col_offset
        yield at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0), indent.join(lines)
    for node in uses(tree, set(renamed), path):
        yield at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0), renamed[node.id]


def uses(tree: ast.AST, names: set[str], path: Path) -> Iterator[ast.Name]:
    """The places that use imported names, except in functions with a variable of this name, which are printed."""
    if not names:
        return
    hidden: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        own = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
        own |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name in own & names:
            print(f"{path.relative_to(ROOT)}:{function.lineno}: {name} is a variable here")
            hidden |= {id(n) for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name}
    for node in ast.walk(tree):
        is_used = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        if is_used and node.id in names and id(node) not in hidden:
            yield node


if __name__ == "__main__":
    main(*sys.argv[1:])
