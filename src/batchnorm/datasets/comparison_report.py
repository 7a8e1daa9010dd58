"""The report of a comparison of two data sets, for all output formats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.datasets.figures import figure, percent
from batchnorm.reporting.blocks import Block, Items, Text, TextTable
from batchnorm.reporting.json_values import Json, to_json
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import many

if TYPE_CHECKING:
    from batchnorm.datasets.comparison import Comparison, Effect, FeatureDifferences

_MOST_ROWS = 50  # of the table; the format json has all
_RULES = {
    "mean-differs": "The mean of a feature differs by more than the limit and more than noise.",
    "spread-differs": "The standard deviation of a feature differs by more than the limit and more than noise.",
    "missing-values-differ": "The share of NaN, infinities or nulls of a feature differs.",
    "feature-missing": "Only one of both data sets has a feature.",
    "too-few-values": "A feature has too few values to judge its mean and spread.",
}
_RULE_OF = {"mean": "mean-differs", "spread": "spread-differs"}
_KINDS = {"nan": "NaN", "infinite": "infinite", "null": "null"}


def report(comparison: Comparison, a: str, b: str) -> Report:
    """The report for all formats.

    Args:
        comparison: What was compared.
        a: The name of the reference data.
        b: The name of the other data.
    """
    rows = list(_rows(comparison, b))
    checks = [Check(name=code, rows=[row for row in rows if row.rule == code], output=_RULES[code]) for code in _RULES]
    return Report(
        command="batchnorm stats --compare", target=f"{a} {b}", identified_by="dataAndFeature/v1",
        headline=headline(comparison), rows=rows, lines=[f"{row.severity}: {row.words}" for row in rows],
        rules=[RuleWords(code=code, title=title) for code, title in _RULES.items()],
        suites=[Suite(name="stats", checks=checks)], records=list(_records(comparison)),
        json=lambda: to_json(as_json(comparison, a, b)), document=list(_document(comparison, rows, a, b)),
    )  # fmt: skip


def headline(comparison: Comparison) -> str:
    """The result in one sentence."""
    features = len(comparison.all_data.names)
    different = int(comparison.all_data.differs.sum())
    groups = sum(bool(part.differs.any()) for part in comparison.groups)
    unjudged = int(comparison.all_data.unjudged.sum())
    parts = [f"{different:,} of {many(features, 'feature')} {'differs' if different == 1 else 'differ'}"]
    parts += [f"{groups:,} of {many(len(comparison.groups), 'group')} with differences"] if comparison.groups else []
    only = len(comparison.only_a) + len(comparison.only_b)
    parts += [f"{many(only, 'feature')} on one side only"] if only else []
    parts += [f"{many(unjudged, 'feature')} with too few values to judge mean and spread"] if unjudged else []
    return "; ".join(parts)


def _rows(comparison: Comparison, b: str) -> Iterator[Row]:
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        for name in names:
            yield _row("feature-missing", name, f"{name}: only {side} has this feature", b)
    for part in comparison.parts:
        for i in np.flatnonzero(part.differs | part.unjudged):
            yield from _rows_of(part, int(i), b)


def _rows_of(part: FeatureDifferences, i: int, b: str) -> Iterator[Row]:
    place = _place(part, i)
    for kind, effect in part.effects.items():
        if effect.differs[i]:
            yield _row(_RULE_OF.get(kind, "missing-values-differ"), place, f"{place}: {_words(kind, part, i)}", b)
    if part.unjudged[i]:
        counts = f"{int(part.a.count[i]):,} values in A and {int(part.b.count[i]):,} in B"
        words = f"{place}: too few values to judge mean and spread, {counts}"
        yield _row("too-few-values", place, words, b, Severity.WARNING)


def _row(rule: str, place: str, words: str, b: str, severity: Severity = Severity.ERROR) -> Row:
    return Row(rule=rule, severity=severity, place=place, words=words, identity=(b, place, rule))


def _place(part: FeatureDifferences, i: int) -> str:
    return part.names[i] if part.group is None else f"{part.names[i]} in group {part.group}"


def _words(kind: str, part: FeatureDifferences, i: int) -> str:
    """One effect of a feature: "mean moved by 0.31 (error 0.01) standard deviations, from 2 to 5"."""
    effect = part.effects[kind]
    if kind == "mean":
        old, new = figure(float(part.a.mean[i])), figure(float(part.b.mean[i]))
        return f"mean moved by {_with_error(effect, i)} standard deviations of A, from {old} to {new}"
    if kind == "spread":
        old, new = figure(float(part.a.std[i])), figure(float(part.b.std[i]))
        return f"standard deviation changed from {old} to {new}, its logarithm by {_with_error(effect, i)}"
    old, new = (percent(_share(side, kind, i)) for side in (part.a, part.b))
    return f"share of {_KINDS[kind]} values changed from {old} to {new}"


def _with_error(effect: Effect, i: int) -> str:
    size, error = float(effect.size[i]), float(effect.error[i])
    return figure(size, 3) if math.isnan(error) else f"{figure(size, 3)} (error {figure(error, 2)})"


def _share(side: object, kind: str, i: int) -> float:
    return float(getattr(side, f"{kind}_share")[i])


def _document(comparison: Comparison, rows: Sequence[Row], a: str, b: str) -> Iterator[Block]:
    yield Text(headline(comparison))
    first, second = (f"{many(number, 'row')}" for number in comparison.rows)
    yield Text(
        f"A is {a} ({first}), B is {b} ({second}). A difference counts beyond {comparison.limit:g} standard deviations "
        f"of A and {comparison.z:.2f} standard errors, so that chance gives any with probability "
        f"{comparison.alpha:g} at most, if examples are independent."
    )
    yield _table(comparison.all_data)
    yield Text(
        "mean (sd): change of the mean in sd of A. sd ratio: that of B to A, with the error of its logarithm. missing: "
        "change of the share of NaN, Inf and null. range: by how many sd of A the values of B go beyond those of A."
    )
    differences = [row.words for row in rows]
    if differences:
        yield Items(differences[:_MOST_ROWS], title=f"Differences{_cut(len(differences))}")
    for side, names in (("A", comparison.groups_only_a), ("B", comparison.groups_only_b)):
        if names:
            yield Items(names[:_MOST_ROWS], title=f"Groups that only {side} has{_cut(len(names))}")


def _table(part: FeatureDifferences) -> TextTable:
    """The features with the largest differences first."""
    mean, spread = part.effects["mean"], part.effects["spread"]
    sizes = np.nan_to_num(np.fmax(np.abs(mean.size), np.abs(spread.size)), posinf=np.inf)
    order = sorted(range(len(part.names)), key=lambda i: (not part.differs[i], -sizes[i], i))[:_MOST_ROWS]
    rows = [
        (part.names[i], "differs" if part.differs[i] else "not judged" if part.unjudged[i] else "-",
         figure(float(mean.size[i]), 3), figure(float(mean.error[i]), 2), figure(_exp(float(spread.size[i])), 3),
         figure(float(spread.error[i]), 2), _signed(part.missing[i]), _beyond(part, i))
        for i in order
    ]  # fmt: skip
    head = ("feature", "verdict", "mean (sd)", "error", "sd ratio", "error", "missing", "range")
    return TextTable(head, rows, words=2, title=f"Features{_cut(len(part.names))}:")


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value) if not math.isnan(value) else math.nan


def _signed(share: float) -> str:
    return "-" if math.isnan(share) or share == 0 else f"{'+' if share > 0 else '-'}{percent(abs(float(share)))}"


def _beyond(part: FeatureDifferences, i: int) -> str:
    """The excess of B's range in standard deviations of A: "-0.5 +2.1"; "-" if there is none."""
    std = float(part.a.std[i])
    sides = [(sign, float(excess[i])) for sign, excess in (("-", part.below), ("+", part.above))]
    return " ".join(f"{sign}{figure(size / std if std else math.inf, 2)}" for sign, size in sides if size > 0) or "-"


def _cut(number: int) -> str:
    return f" (the first {_MOST_ROWS} of {number:,}; --output-format json has all)" if number > _MOST_ROWS else ""


def as_json(comparison: Comparison, a: str, b: str) -> dict[str, Json]:
    """The comparison for other programs."""
    return {
        "kind": "batchnorm.stats-comparison",
        "a": a,
        "b": b,
        "rows": list(comparison.rows),
        "limit": comparison.limit,
        "alpha": comparison.alpha,
        "z": comparison.z,
        "beyond": comparison.beyond,
        "only_a": list(comparison.only_a),
        "only_b": list(comparison.only_b),
        "groups_only_a": list(comparison.groups_only_a),
        "groups_only_b": list(comparison.groups_only_b),
        "features": list(_records(comparison)),
    }


def _records(comparison: Comparison) -> Iterator[dict[str, Json]]:
    for part in comparison.parts:
        for i, name in enumerate(part.names):
            yield {
                "feature": name,
                "group": part.group,
                "differs": bool(part.differs[i]),
                "judged": not bool(part.unjudged[i]),
                "a": _side(part.a, i),
                "b": _side(part.b, i),
                **{kind: _effect(effect, i) for kind, effect in part.effects.items()},
            }


def _side(side: object, i: int) -> dict[str, Json]:
    names = ("count", "mean", "std", "minimum", "maximum", "nan", "infinite", "null")
    return {name: getattr(side, name)[i].item() for name in names}


def _effect(effect: Effect, i: int) -> dict[str, Json]:
    return {"size": float(effect.size[i]), "error": float(effect.error[i]), "differs": bool(effect.differs[i])}
