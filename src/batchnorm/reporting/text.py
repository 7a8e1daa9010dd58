"""Plain text: escaped, wrapped at one width, in columns."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap

from batchnorm.reporting.blocks import Block, CommandText, Facts, Items, Text, TextTable

_IN_A_FILE = 80
_NARROWEST, _WIDEST = 40, 100  # sentences are hard to read in wider lines
_SHORTEST = 5  # characters that are left of a name, and of a cell that is broken into lines
_GAP = "  "


def plain(text: str) -> str:
    """Text without characters that steer a terminal, begin a line, are not seen, or cannot be written to a file."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def columns(*, to_file: bool = False) -> int:
    """The width to wrap at: of the terminal within limits, or of a file."""
    width = _IN_A_FILE if to_file else shutil.get_terminal_size((_IN_A_FILE, 24)).columns
    return min(max(width, _NARROWEST), _WIDEST)


def wrapped(text: str, width: int, hang: int = 0, *, indent: int = 0, breaks: bool = True) -> list[str]:
    """Plain text in lines: escaped before it is wrapped, so that no line begins where a name would have it.

    Args:
        text: One paragraph.
        width: Columns of a line.
        hang: Spaces before every line but the first.
        indent: Spaces before the first line.
        breaks: Whether a word that is longer than a line is broken.
    """
    return wrap(
        plain(text), width, initial_indent=" " * indent, subsequent_indent=" " * hang, break_on_hyphens=False,
        break_long_words=breaks,
    )  # fmt: skip


def many(number: int, word: str) -> str:
    """A number of things: "1 batch", "1,200 examples"."""
    plural = word + ("es" if word.endswith("ch") else "s")
    return f"{number:,} {word if number == 1 else plural}"


def aligned(table: TextTable, width: int) -> list[str]:
    """A table in columns as wide as their cells; numbers end together.

    Where that is wider than ``width``, the widest column of words becomes narrower: names, which stand first, are cut
    at their beginning, and other words are broken into lines.
    """
    rows = [[plain(cell) for cell in row] for row in (table.head, *table.rows)]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widest = max(range(table.words), key=sizes.__getitem__)
    spare = width - sum(sizes) - len(_GAP) * (len(sizes) - 1)
    sizes[widest] = min(sizes[widest], max(_SHORTEST, sizes[widest] + spare))
    return [line for row in rows for line in _lines(row, sizes, widest, table.words)]


def _lines(row: Sequence[str], sizes: Sequence[int], widest: int, words: int) -> Iterator[str]:
    cells = [[cell] for cell in row]
    size = sizes[widest]
    if widest:
        cells[widest] = wrap(row[widest], size, break_on_hyphens=False) or [""]
    elif len(row[0]) > size:
        cells[0] = [f"…{row[0][1 - size :]}"]
    for parts in zip_longest(*cells, fillvalue=""):
        placed = zip(parts, sizes, strict=True)
        yield _GAP.join(p.ljust(n) if i < words else p.rjust(n) for i, (p, n) in enumerate(placed)).rstrip()


def paragraphs(blocks: Sequence[Block], width: int) -> str:
    """Blocks as text, with an empty line between them."""
    return "\n\n".join("\n".join(_block(block, width)) for block in blocks)


def _block(block: Block, width: int) -> list[str]:
    match block:
        case Text():
            return wrapped(": ".join(filter(None, (block.strong, block.words))), width)
        case CommandText():
            return [plain(f"{block.name}: {block.line}")]
        case Items():
            head = wrapped(f"{block.title}:", width) if block.title else []
            return head + [line for item in block.items for line in wrapped(f"- {item}", width, 4, indent=2)]
        case TextTable():
            return [*wrapped(block.title, width), *aligned(block, width)]
        case Facts():
            facts = [line for name, text in block.facts for line in wrapped(f"{name}: {text}", width, 6, indent=2)]
            return [*wrapped(block.title, width), *facts]
