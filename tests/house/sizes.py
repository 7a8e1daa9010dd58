"""``python -m house.sizes``: how large the source tree is, in the figures that a redesign is judged by.

Lines of statements are those that hold code: no blank line, comment or docstring counts. Names that every package has
(``__init__``, ``__main__``) are not counted as used twice. A circle is a set of modules that import each other, at the
top of a file or inside of functions; packages, which hand on the names of their modules, are left out.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click

_ROOT = Path(__file__).parents[2]
_LONG = 30
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


class File:
    """A Python file: its text, its syntax tree, the name of its module."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        parts = path.relative_to(source).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.module = ".".join(parts[:-1] if self.is_package else parts)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def lines_of_statements(self) -> int:
        docstrings = {line for node in ast.walk(self.tree) for line in _docstring(node)}
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        code = {line for t in tokens if t.type not in _NO_CODE for line in range(t.start[0], t.end[0] + 1)}
        return len(code - docstrings)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node

    def classes(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                yield node.name

    def imports(self, modules: set[str], *, types: bool) -> set[str]:
        """Modules of the package that this one needs when it runs; with ``types`` also those that its types name."""
        nodes = ast.walk(self.tree) if types else _running(self.tree)
        found = {name for node in nodes for name in self._named(node)}
        known = {next((n for n in (name, name.rpartition(".")[0]) if n in modules), "") for name in found}
        return known - {"", self.module}

    def _named(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = self.module.split(".") if self.is_package else self.module.split(".")[:-1]
            start = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _docstring(node: ast.AST) -> range:
    """Lines of a docstring, or of another string that stands alone."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return range(0)


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _running(node)


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, from its def to its end, without its docstring."""
    whole = (function.end_lineno or function.lineno) - function.lineno + 1
    return whole - len(_docstring(function.body[0]))


def circles(files: list[File], *, types: bool) -> list[list[str]]:
    """Sets of modules that need each other, by Tarjan's algorithm."""
    files = [file for file in files if not file.is_package]
    modules = {file.module for file in files}
    needs = {file.module: sorted(file.imports(modules, types=types)) for file in files}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in needs[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(circle := stack[at:]) > 1:
                found.append(sorted(circle))
            del stack[at:]

    for module in needs:
        if module not in index:
            visit(module)
    return found


def _twice(places: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, place in places:
        found[name].append(place)
    return {name: where for name, where in sorted(found.items()) if len(where) > 1}


def _tests() -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in (_ROOT / "tests").rglob("*.py"))


@click.command()
@click.option("--names", is_flag=True, help="Also name what is long, used twice or in a circle.")
def main(names: bool) -> None:
    """Print the sizes of src."""
    source = _ROOT / "src"
    files = [File(path, source) for path in sorted(source.rglob("*.py"))]
    long = [(f"{f.module}.{g.name}", _length(g)) for f in files for g in f.functions() if _length(g) > _LONG]
    named = _twice((f.path.stem, f.module) for f in files if not f.path.stem.startswith("__"))
    classes = _twice((name, f.module) for f in files for name in f.classes())
    running, typed = (circles(files, types=types) for types in (False, True))
    tests = list(_tests())
    figures = {
        "lines of src": sum(f.lines for f in files),
        "lines of statements": sum(f.lines_of_statements for f in files),
        "files": len(files),
        f"functions over {_LONG} lines": len(long),
        "Any": sum(len(re.findall(r"\bAny\b", f.text)) for f in files),
        "names of files used twice": len(named),
        "names of classes used twice": len(classes),
        "circles of imports": len(running),
        "circles with imports for types": len(typed),
        "lines of tests": sum(text.count("\n") for text in tests),
        "test functions": sum(len(re.findall(r"^ *def test_", text, re.MULTILINE)) for text in tests),
    }
    for name, value in figures.items():
        click.echo(f"{value:7,}  {name}")
    if names:
        for title, rows in (("long", long), ("files", named.items()), ("classes", classes.items()), ("circles", typed)):
            click.echo(f"\n{title}")
            for row in rows:
                click.echo(f"  {row}")


if __name__ == "__main__":
    main()
