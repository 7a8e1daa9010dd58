"""Blocks: the parts of a text, a Markdown document or a page. Every string in them is plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.reporting.severity import Severity


@final
@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph that may begin with words in bold."""

    words: str = ""
    strong: str = ""


@final
@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: Sequence[str]
    title: str = ""


@final
@dataclass(frozen=True, slots=True)
class TextTable:
    """A table. Its first ``words`` columns contain words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int
    title: str = ""


@final
@dataclass(frozen=True, slots=True)
class Facts:
    """Pairs of a name and a text, such as the facts of one finding; ``code`` has the names whose texts are code.

    ``pages`` are pairs of a title and a preformatted text. An HTML page shows them in a fold titled ``summary``,
    Markdown shows them after the facts, and plain text leaves them out.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    severity: Severity | None = None
    code: Sequence[str] = ()
    summary: str = ""
    pages: Sequence[tuple[str, str]] = ()


@final
@dataclass(frozen=True, slots=True)
class CommandText:
    """A command or a path, which always stays on one line."""

    name: str
    line: str


Block = Text | Items | TextTable | Facts | CommandText
