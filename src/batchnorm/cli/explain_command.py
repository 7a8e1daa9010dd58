"""``batchnorm explain`` and ``batchnorm rules``: the rules' pages and their table."""

from __future__ import annotations

import json
import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import click

from batchnorm.cli.settings import codes, complete
from batchnorm.rules import FAMILIES, RULES
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchnorm.rules.finding import Rule

_FAMILY = len("BN1")
_FORMATS = click.Choice(("full", "md", "json"))


@click.command()
@click.argument("rule", nargs=-1, shell_complete=complete)
@click.option("--all", "every", is_flag=True, help="Every rule.")
@click.option("--output-format", type=_FORMATS, default="full", show_default=True, help="What is printed.")
def explain(rule: tuple[str, ...], every: bool, output_format: str) -> None:
    """Show a rule's page: what it finds, why that is bad, how it is found, and what mends it.

    RULE is a code (BN101), the beginning of codes (BN1) or a name (never-updated-statistics).
    """
    wanted = _wanted(rule)
    if not wanted and not every:
        raise ValueError(
            "explain needs a rule, got none. For example batchnorm explain BN101; batchnorm rules lists all."
        )
    chosen = [r for code, r in RULES.items() if every or code.startswith(wanted)]
    if output_format == "json":
        click.echo(json.dumps([as_dict(r) for r in chosen], indent=1))
    elif output_format == "md":
        click.echo(markdown(chosen) if every else "\n\n".join(map(_section, chosen)))
    else:
        click.echo("\n\n".join(f"{r.code} {r.slug} ({r.severity})\n\n{r.page}" for r in chosen))


def _wanted(rule: tuple[str, ...]) -> tuple[str, ...]:
    """Codes of what was named; where a code is none, the ones that begin like it are told."""
    for name in (part.strip() for text in rule for part in text.split(",")):
        begins_a_code = any(code.startswith(name.upper()) for code in RULES)
        if not begins_a_code and (alike := _alike(name.upper())):
            raise ValueError(f"no rule {name!r}. Did you mean {listed(alike)}?")
    return codes(rule)


def _alike(name: str) -> list[str]:
    """Codes that share the longest beginning with the name, and of those the nearest; none outside its family.

    Families come first since a digit is lost more easily than it is swapped for another: BN13 is BN103 or BN113, and
    not BN213, whose letters are as near.
    """
    ranks = {code: (_shared(name, code), SequenceMatcher(None, name, code).ratio()) for code in RULES}
    best = max(ranks.values())
    return [code for code, rank in ranks.items() if rank == best] if best[0] >= _FAMILY else []


def _shared(name: str, code: str) -> int:
    """How many characters both begin with."""
    return max(length for length in range(len(name) + 1) if code.startswith(name[:length]))


@click.command()
@click.option("--output-format", type=_FORMATS, default="full", show_default=True, help="What is printed.")
def rules(output_format: str) -> None:
    """List every rule of the doctor."""
    if output_format == "json":
        click.echo(json.dumps([as_dict(rule) for rule in RULES.values()], indent=1))
    elif output_format == "md":
        rows = [f"| {r.code} | {r.slug} | {r.severity} | {r.title} |" for r in RULES.values()]
        click.echo("\n".join(["| code | name | severity | finds |", "|---|---|---|---|", *rows]))
    else:
        width = max(len(rule.slug) for rule in RULES.values())
        click.echo("\n".join(f"{r.code}  {r.slug:{width}}  {r.severity!s:7}  {r.title}" for r in RULES.values()))


def as_dict(rule: Rule) -> dict[str, Any]:
    """A rule's row and page."""
    head, sections = parts(rule)
    return {
        "code": rule.code,
        "slug": rule.slug,
        "severity": str(rule.severity),
        "needs": list(rule.needs),
        "title": head,
        **{name.lower(): text for name, text in sections},
    }


def parts(rule: Rule) -> tuple[str, list[tuple[str, str]]]:
    """A page's first sentence, and its sections by title."""
    found = re.split(r"^(\w+):$", rule.page, flags=re.MULTILINE)
    dedented = [re.sub(r"^ {4}", "", text.strip("\n"), flags=re.MULTILINE).rstrip() for text in found[2::2]]
    return rule.title, list(zip(found[1::2], dedented, strict=True))


def markdown(chosen: Iterable[Rule]) -> str:
    """All pages as one document, by family."""
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
    head, sections = parts(rule)
    lines = [f"### {rule.code} {rule.slug}", "", f"{head} ({rule.severity})"]
    for name, text in sections:
        lines += ["", f"**{name}.** {text}" if name != "Example" else f"**{name}.**\n\n```text\n{text}\n```"]
    return "\n".join(lines)
