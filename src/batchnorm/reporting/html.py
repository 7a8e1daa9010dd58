"""HTML: blocks as a page, or as a fragment for a notebook. It has no script, and is readable without its styles."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from batchnorm.reporting.blocks import Block, CommandText, Facts, Items, Text, TextTable
from batchnorm.reporting.page_shell import shell
from batchnorm.reporting.text import plain


def page(command: str, target: str, headline: str, blocks: Sequence[Block]) -> str:
    """One HTML file: the command as heading, the result in one sentence, then the blocks.

    A first block that says the result again is left out.
    """
    head = f'<header>\n<h1>{_text(command)}</h1>\n<p class="headline">{_text(headline)}</p>\n</header>'
    title = f"{command}: {target}" if target else command
    blocks = blocks[1:] if blocks and blocks[0] in (Text(headline), Text(strong=headline)) else blocks
    return shell(title, f"{head}\n{fragment(blocks)}", styles=("blocks",))


def fragment(blocks: Sequence[Block]) -> str:
    """The HTML of the blocks, without a page around them and without styles."""
    return "\n".join(_block(block) for block in blocks)


def _block(block: Block) -> str:
    match block:
        case Text():
            strong = f"<strong>{_text(block.strong)}</strong>" if block.strong else ""
            return f"<p>{': '.join(filter(None, (strong, _text(block.words))))}</p>"
        case CommandText():
            return f"<p>{_text(block.name)}: <code>{_text(block.line)}</code></p>"
        case Items():
            items = "".join(f"<li>{_text(item)}</li>" for item in block.items)
            return f'{_title(block.title)}<ul class="items">{items}</ul>'
        case TextTable():
            return f"{_title(block.title)}{_table(block)}"
        case Facts():
            return _facts(block)


def _title(title: str) -> str:
    return f"<h2>{_text(title.rstrip(':'))}</h2>" if title else ""


def _table(table: TextTable) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ("" if i < table.words else " class=n" for i in range(len(row)))
        tags = (f"<{tag}{kind}>{_text(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=True))
        return f"<tr>{''.join(tags)}</tr>"

    body = "".join(cells(row, "td") for row in table.rows)
    head = f"<thead>{cells(table.head, 'th')}</thead>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title or "Table")}">'
        f'<table class="data">{head}<tbody>{body}</tbody></table></div>'
    )


def _facts(block: Facts) -> str:
    severity = "" if block.severity is None else str(block.severity)
    word = f"<b>{severity}</b> " if severity else ""
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_lines(text, name in block.code)}</dd>" for name, text in block.facts)
    pages = "".join(f"<h4>{_text(name)}</h4><pre>{escape(text)}</pre>" for name, text in block.pages)
    more = f"<details><summary>{_text(block.summary)}</summary>{pages}</details>" if pages else ""
    return f'<section class="finding {severity}"><h3>{word}{_text(block.title)}</h3><dl>{facts}</dl>{more}</section>'


def _lines(text: str, code: bool) -> str:
    lines = map(_text, text.split("\n"))
    return "<br>".join(f"<code>{line}</code>" for line in lines) if code else "<br>".join(lines)


def _text(text: str) -> str:
    return escape(plain(text))
