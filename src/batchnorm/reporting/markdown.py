"""Markdown: blocks as text for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from batchnorm.reporting.blocks import Block, CommandText, Facts, Items, Text, TextTable
from batchnorm.reporting.text import plain


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown, with an empty line between them."""
    return "\n\n".join("\n".join(_block(block)) for block in blocks)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Text():
            strong = f"**{cell(block.strong)}**" if block.strong else ""
            yield ": ".join(filter(None, (strong, cell(block.words))))
        case CommandText():
            ticks = "``" if "`" in block.line else "`"
            yield f"{cell(block.name)}: {ticks}{plain(block.line)}{ticks}"
        case Items():
            yield from (f"{cell(block.title)}:", "") if block.title else ()
            yield from (f"- {cell(item)}" for item in block.items)
        case TextTable():
            yield from (f"**{cell(block.title)}**", "") if block.title else ()
            yield from (row(block.head), "|" + "---|" * len(block.head), *map(row, block.rows))
        case Facts():
            yield f"### {cell(block.title)}"
            yield from (f"\n{cell(name)}: {cell(text)}" for name, text in block.facts)
            yield from (f"\n**{name}.**\n\n```text\n{text}\n```" for name, text in block.pages)


def row(cells: Iterable[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def cell(text: str) -> str:
    """The text with Markdown's special characters escaped, also the characters of tables."""
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_|[]":
        text = text.replace(mark, "\\" + mark)
    return text
