"""``batchnorm explain`` and ``batchnorm rules``: the pages of rules, and the table of all rules."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from textwrap import indent
from typing import TYPE_CHECKING

import click

from batchnorm.cli import shared_options as options
from batchnorm.cli.settings import complete
from batchnorm.reporting import formats
from batchnorm.reporting.blocks import Facts, TextTable
from batchnorm.reporting.rows import Report
from batchnorm.reporting.text import aligned, many, wrapped
from batchnorm.rules import FAMILIES, RULES
from batchnorm.rules.codes import codes
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchnorm.reporting.blocks import Block
    from batchnorm.reporting.json_values import Json
    from batchnorm.rules.finding import Rule

_FAMILY = len("BN1")
_INDENT = " " * 4  # before the text of a section
_TABLE = ("code", "name", "severity", "finds")


@click.command()
@click.argument("rule", nargs=-1, shell_complete=complete)
@click.option("--all", "every", is_flag=True, help="Show every rule.")
@options.printed_format
def explain(rule: tuple[str, ...], every: bool, output_format: str) -> None:
    """Show the page of a rule: the fault, why it is bad, how it is found, and how to mend it.

    RULE is a code (BN101), the beginning of codes (BN1) or a name (never-updated-statistics).
    """
    prefixes = _wanted(rule)
    if not prefixes and not every:
        raise ValueError(
            "explain needs a rule, got none. Give one, such as batchnorm explain BN101; batchnorm rules lists all."
        )
    selected = [r for code, r in RULES.items() if every or code.startswith(prefixes)]
    text = markdown(selected) if every else "\n\n".join(map(_section, selected))
    facts = [Facts(f"{r.code} {r.slug}", [("finds", r.title)], r.severity, pages=r.sections) for r in selected]
    report = _report("explain", selected, facts, full=lambda width: _pages(selected, width), md=lambda: text)
    click.echo(formats.rendered(report, output_format))


def _pages(chosen: Iterable[Rule], width: int) -> str:
    """The pages of rules as plain text. Examples are code, whose lines stay as they are."""
    return "\n\n".join("\n".join(_page(rule, width)) for rule in chosen)


def _page(rule: Rule, width: int) -> Iterator[str]:
    yield from (f"{rule.code} {rule.slug} ({rule.severity})", "", *wrapped(rule.title, width))
    for name, text in rule.sections:
        yield from ("", f"{name}:")
        yield from indent(text, _INDENT).split("\n") if name == "Example" else _paragraphs(text, width)


def _paragraphs(text: str, width: int) -> Iterator[str]:
    for number, paragraph in enumerate(text.split("\n\n")):
        yield from ([""] if number else [])
        yield from wrapped(" ".join(paragraph.split()), width, len(_INDENT), indent=len(_INDENT))


def _wanted(rule: tuple[str, ...]) -> tuple[str, ...]:
    """The codes of the named rules. The error for an unknown code offers codes that begin like it."""
    for name in (part.strip() for text in rule for part in text.split(",")):
        begins_a_code = any(code.startswith(name.upper()) for code in RULES)
        if not begins_a_code and (alike := _alike(name.upper())):
            raise ValueError(f"no rule {name!r}. Did you mean {listed(alike)}?")
    return codes(rule)


def _alike(name: str) -> list[str]:
    """The codes that share the longest beginning with ``name``, of these the most similar; [] if no family matches.

    The beginning counts most, because people omit a digit more often than they mistype a digit: BN13 means BN103 or
    BN113, not BN213, although all three are equally similar.
    """
    ranks = {code: (_shared(name, code), SequenceMatcher(None, name, code).ratio()) for code in RULES}
    best = max(ranks.values())
    return [code for code, rank in ranks.items() if rank == best] if best[0] >= _FAMILY else []


def _shared(name: str, code: str) -> int:
    """Length of the beginning that ``name`` and ``code`` share."""
    return max(length for length in range(len(name) + 1) if code.startswith(name[:length]))


@click.command()
@options.printed_format
def rules(output_format: str) -> None:
    """List every rule of the doctor."""
    rows = [(rule.code, rule.slug, str(rule.severity), rule.title) for rule in RULES.values()]
    table = TextTable(_TABLE, rows, words=4)
    report = _report("rules", RULES.values(), [table], full=lambda width: "\n".join(aligned(table, width)[1:]))
    click.echo(formats.rendered(report, output_format))


def _report(
    name: str, chosen: Iterable[Rule], document: Sequence[Block], *, full: Callable[[int], str] | None = None,
    md: Callable[[], str] | None = None,
) -> Report:  # fmt: skip
    """A report about rules. It has no rows, because nothing was examined."""
    chosen = list(chosen)
    records = list(map(as_dict, chosen))
    return Report(
        command=f"batchnorm {name}", target="rules", headline=f"{many(len(chosen), 'rule')} of the doctor",
        json=lambda: json.dumps(records, indent=1), records=records, rules=[rule.words for rule in chosen],
        lines=[f"{rule.code} {rule.severity} {rule.slug}: {rule.title}" for rule in chosen], document=document,
        full=full, md=md,
    )  # fmt: skip


def as_dict(rule: Rule) -> dict[str, Json]:
    """A rule's row and page."""
    return {
        "code": rule.code,
        "slug": rule.slug,
        "severity": str(rule.severity),
        "needs": list(rule.needs),
        "title": rule.title,
        **{name.lower(): text for name, text in rule.sections},
    }


def markdown(chosen: Iterable[Rule]) -> str:
    """The pages of rules as one Markdown document, by family."""
    lines = [
        "# Rules",
        "",
        "What `batchnorm doctor` looks for. `batchnorm explain --all --output-format md` prints this page.",
    ]
    family = ""
    for rule in chosen:
        if rule.code[:3] != family:
            family = rule.code[:3]
            lines += ["", f"## {family}: {FAMILIES[family].capitalize()}"]
        lines += ["", _section(rule)]
    return "\n".join(lines)


def _section(rule: Rule) -> str:
    lines = [f"### {rule.code} {rule.slug}", "", f"{rule.title} ({rule.severity})"]
    for name, text in rule.sections:
        lines += ["", f"**{name}.** {text}" if name != "Example" else f"**{name}.**\n\n```text\n{text}\n```"]
    return "\n".join(lines)
