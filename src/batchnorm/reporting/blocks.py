"""Blocks: what a text, a Markdown document or a page is made of. Every string in them is plain text."""

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
    """A table. The first ``words`` columns are words, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int
    title: str = ""


@final
@dataclass(frozen=True, slots=True)
class Facts:
    """Names with texts, such as one finding; ``code`` has the names whose texts are code.

    ``pages`` are titles with preformatted texts, which a page shows folded below ``summary``.
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
    """A command or a path, which is never broken into lines."""

    name: str
    line: str


Block = Text | Items | TextTable | Facts | CommandText
