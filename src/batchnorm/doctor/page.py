"""A diagnosis as HTML: a page that stands alone, or a piece for a notebook. No script; text and tables come first."""

from __future__ import annotations

import re
from html import escape
from itertools import chain
from typing import TYPE_CHECKING

from batchnorm import __version__
from batchnorm.doctor.text import groups, headline, place, plain, reasons, summary
from batchnorm.rules import FAMILIES, RULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchnorm.doctor.diagnosis import Diagnosis, LayerRow
    from batchnorm.rules.finding import Finding

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --error: #b3261e; --warning: #8a5a00; --info: #35618e; }
@media (prefers-color-scheme: dark) { :root { --error: #ff9d94; --warning: #ffc766; --info: #9ecbff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
section { border-left: 4px solid var(--line); padding: 0 0 0 1rem; margin: 1.25rem 0; }
section.error { border-color: var(--error); } section.warning { border-color: var(--warning); }
section.info { border-color: var(--info); } h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.error h3 b { color: var(--error); } .warning h3 b { color: var(--warning); } .info h3 b { color: var(--info); }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; margin: .25rem 0; } dd { margin: 0; }
code, pre { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; } summary { cursor: pointer; }
@media print { details:not([open]) { display: none; } body { margin: 0; max-width: none; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_COLUMNS = ("layer", "kind", "mode", "channels", "batches", "mean", "variance", "gamma", "eps", "momentum", "gap / sd")
_NUMBERS = 3  # the first columns are words


def _text(text: str) -> str:
    """Text that may come from the target as HTML text, without control characters."""
    return escape(plain(text))


def page(diagnosis: Diagnosis) -> str:
    """One HTML file."""
    title = _text(f"batchnorm doctor: {diagnosis.target}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{_body(diagnosis, pages=True)}\n</main>\n</body>\n</html>\n"
    )


def fragment(diagnosis: Diagnosis) -> str:
    """The same without page, styles and rule pages, for a notebook."""
    return _body(diagnosis, pages=False)


def _body(diagnosis: Diagnosis, *, pages: bool) -> str:
    verdict = "no error" if diagnosis.ok else "errors found"
    parts = [
        f"<p>{_text(headline(diagnosis))}</p>\n<p><strong>{verdict}</strong>: {_text(summary(diagnosis))}</p>",
        *(f"<p>{_text(note)}</p>" for note in diagnosis.notes),
        *(_finding(group, pages=pages) for group in groups(diagnosis.findings)),
        _layers(diagnosis.layers),
        _not_checked(diagnosis),
    ]
    if pages:
        parts.append(_made(diagnosis))
    return "\n".join(filter(None, parts))


def _finding(group: Sequence[Finding], *, pages: bool) -> str:
    first = group[0]
    rows = [
        ("measured", "<br>".join(_text(f"{place(f)}: {f.measured}") for f in group)),
        ("limit", _text(first.limit)),
        ("so", _text(first.consequence)),
        ("fix", "<br>".join(f"<code>{_text(remedy)}</code>" for remedy in dict.fromkeys(f.remedy for f in group))),
        *([("where", _text(first.where))] if first.where else []),
    ]
    listing = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    more = f"<details><summary>About {first.code}</summary>{_rule(first.code)}</details>" if pages else ""
    return (
        f'<section class="{first.severity}"><h3><b>{first.severity} {_text(first.code)}</b> {_text(first.slug)}</h3>'
        f"<dl>{listing}</dl>{more}</section>"
    )


def _rule(code: str) -> str:
    """A rule's page: its sections with their titles."""
    rule = RULES[code]
    parts = re.split(r"^(\w+):$", rule.page, flags=re.MULTILINE)
    sections = zip(parts[1::2], parts[2::2], strict=True)
    text = "".join(f"<h4>{_text(name)}</h4><pre>{escape(_dedented(body))}</pre>" for name, body in sections)
    return f"<p>{_text(rule.title)}</p>{text}"


def _dedented(text: str) -> str:
    return re.sub(r"^ {4}", "", text.strip("\n"), flags=re.MULTILINE).rstrip()


def _layers(rows: Sequence[LayerRow]) -> str:
    if not rows:
        return "<p>No batch norm layer.</p>"
    head = "".join(f"<th{' class=n' if i >= _NUMBERS else ''}>{name}</th>" for i, name in enumerate(_COLUMNS))
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        f'<h2>Layers</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(row: LayerRow) -> str:
    words = (row.name or "model", row.kind, row.mode or "–")
    numbers = (
        f"{row.channels:,}", _number(row.batches), *map(_range, (row.mean_range, row.var_range, row.gamma_range)),
        _number(row.eps), _number(row.momentum), _number(row.gap),
    )  # fmt: skip
    cells = (f"<td>{_text(str(word))}</td>" for word in words)
    return "".join(chain(cells, (f"<td class=n>{text}</td>" for text in numbers)))


def _range(values: tuple[float, float] | None) -> str:
    return "–" if values is None else f"{values[0]:.3g} to {values[1]:.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _not_checked(diagnosis: Diagnosis) -> str:
    if not diagnosis.not_checked:
        return ""
    items = "".join(f"<li>{_text(reason)}: {_links(codes)}</li>" for reason, codes in reasons(diagnosis).items())
    return f"<h2>Not checked</h2><ul>{items}</ul>"


def _links(codes: Iterable[str]) -> str:
    return ", ".join(f'<abbr title="{_text(RULES[code].slug)}">{code}</abbr>' for code in codes)


def _made(diagnosis: Diagnosis) -> str:
    families = ", ".join(f"{code} {words}" for code, words in FAMILIES.items())
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    return (
        f"<h2>How this was made</h2><p>batchnorm {__version__}, {_text(versions)}. Nothing in the target was changed. "
        f"Codes: {families}. <code>batchnorm explain CODE</code> shows a rule.</p>"
    )
