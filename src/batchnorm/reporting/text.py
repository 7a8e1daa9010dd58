"""Plain text: blocks as lines of one width, tables in columns, and every string escaped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap

from batchnorm.reporting.blocks import Block, CommandText, Facts, Items, Text, TextTable

_IN_A_FILE = 80
_NARROWEST, _WIDEST = 40, 100  # sentences are hard to read in wider lines
_SHORTEST = 5  # the least width of a column whose names are cut or whose words are broken into lines
_GAP = "  "


def plain(text: str) -> str:
    """The text with every unprintable character escaped: such a character could control a terminal or begin a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def columns(*, to_file: bool = False) -> int:
    """The width of lines: 80 for a file, otherwise the terminal's, but from 40 to 100."""
    width = _IN_A_FILE if to_file else shutil.get_terminal_size((_IN_A_FILE, 24)).columns
    return min(max(width, _NARROWEST), _WIDEST)


def wrapped(text: str, width: int, hang: int = 0, *, indent: int = 0, breaks: bool = True) -> list[str]:
    """Plain text in lines; it is escaped before it is wrapped, so that a name in it cannot begin a new line.

    Args:
        text: One paragraph.
        width: Number of columns of a line.
        hang: Spaces before every line but the first.
        indent: Spaces before the first line.
        breaks: Whether a word that is longer than a line is broken.
    """
    return wrap(
        plain(text), width, initial_indent=" " * indent, subsequent_indent=" " * hang, break_on_hyphens=False,
        break_long_words=breaks,
    )  # fmt: skip


def many(number: int, word: str) -> str:
    """A number with its noun, in the plural unless it is 1: "1 batch", "1,200 examples"."""
    plural = word + ("es" if word.endswith("ch") else "s")
    return f"{number:,} {word if number == 1 else plural}"


def aligned(table: TextTable, width: int) -> list[str]:
    """The lines of a table; each column is as wide as its cells, and numbers are aligned to the right.

    If the table is wider than ``width``, the widest column of words becomes narrower. In the first column, which has
    names, cells are cut at their beginning; in another column they are broken into lines.
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
    """The blocks as plain text, with an empty line between them."""
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
