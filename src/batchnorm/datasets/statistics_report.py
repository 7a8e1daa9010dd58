"""The report of the statistics of a data set, for all output formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.datasets.figures import figure, percent
from batchnorm.datasets.findings import RULES, DataFinding, findings, scales
from batchnorm.datasets.statistics_files import as_json
from batchnorm.reporting.blocks import Block, CommandText, Items, Text, TextTable
from batchnorm.reporting.json_values import to_json
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.text import many

if TYPE_CHECKING:
    from batchnorm.datasets.column_statistics import ColumnStatistics
    from batchnorm.datasets.data_statistics import DataStatistics, Partial

_MOST_ROWS = 100  # of a table; the format json has all
_GROUP_COLUMNS = 3
_COUNTS = {"NaN": "nan", "Inf": "infinite", "null": "null"}


def report(statistics: DataStatistics, target: str, *, written: str = "", next_step: str = "") -> Report:
    """The report for all formats.

    Args:
        statistics: What was measured.
        target: The data, in words.
        written: The file of the statistics; "" if they were not written.
        next_step: A command or a line of code that uses them.
    """
    found = findings(statistics)
    rows = [_row(each, target) for each in found]
    records = [{"rule": each.rule, "column": each.column, "words": each.words} for each in found]
    return Report(
        command="batchnorm stats", target=target, identified_by="dataAndColumn/v1", headline=headline(statistics),
        fail_on=None, rows=rows, lines=[f"{row.severity.name.lower()}: {row.words}" for row in rows],
        rules=[RuleWords(code=code, title=rule.title, severity=rule.severity) for code, rule in RULES.items()],
        suites=[Suite(name="stats", checks=list(_checks(rows)))],
        records=records, json=lambda: to_json({**as_json(statistics), "findings": records}),
        document=list(_document(statistics, found, written, next_step)),
    )  # fmt: skip


def headline(statistics: DataStatistics) -> str:
    """The result in one sentence."""
    columns = statistics.columns
    features = sum(column.mean.size for column in columns.values())
    size = f"{many(statistics.rows, 'row')}, {many(len(columns), 'column')}"
    size += f", {many(features, 'feature')}" if features != len(columns) else ""
    size += f", {many(len(statistics.groups), 'group')}" if statistics.by else ""
    apart = scales(statistics)
    return f"{size}: {_state(columns)}" + (f"; scales differ {figure(apart[0], 2)}-fold" if apart else "")


def _state(columns: Mapping[str, ColumnStatistics]) -> str:
    """What is wrong with the values, in few words."""
    everything = sum(int(column.values.sum()) for column in columns.values())
    bad = {word: sum(int(getattr(column, name).sum()) for column in columns.values()) for word, name in _COUNTS.items()}
    constant = sum(int(((c.count > 1) & (c.minimum == c.maximum)).sum()) for c in columns.values())
    parts = [f"{many(constant, 'feature')} constant"] if constant else []
    parts += [f"{percent(number / everything)} {word}" for word, number in bad.items() if number]
    return ", ".join(parts) or "all values are finite, no feature is constant"


def _row(found: DataFinding, target: str) -> Row:
    return Row(
        rule=found.rule, severity=RULES[found.rule].severity, place=found.column or "data", words=found.words,
        identity=(target, found.column, found.rule),
    )  # fmt: skip


def _checks(rows: Sequence[Row]) -> Iterator[Check]:
    for code, rule in RULES.items():
        yield Check(name=code, rows=[row for row in rows if row.rule == code], output=rule.title)


def _document(
    statistics: DataStatistics, found: Sequence[DataFinding], written: str, next_step: str
) -> Iterator[Block]:
    yield Text(headline(statistics))
    numbers = {name: column for name, column in statistics.columns.items() if column.mean.size == 1}
    vectors = {name: column for name, column in statistics.columns.items() if column.mean.size != 1}
    if numbers:
        yield _table(numbers)
    if vectors:
        yield _vector_table(vectors)
    if statistics.groups:
        yield _group_table(statistics)
    if found:
        yield Items([each.words for each in found[:_MOST_ROWS]], title="What matters")
    if written:
        yield CommandText("wrote", written)
    if next_step:
        yield CommandText("next", next_step)


def _table(columns: Mapping[str, ColumnStatistics]) -> TextTable:
    shown = _present(columns)
    head = ("column", "count", "mean", "std", "min", "max", *shown)
    rows = [
        (name, f"{int(c.count.sum()):,}", *(_one(getattr(c, key)) for key in ("mean", "std", "minimum", "maximum")),
         *(f"{int(getattr(c, _COUNTS[word]).sum()):,}" for word in shown))
        for name, c in list(columns.items())[:_MOST_ROWS]
    ]  # fmt: skip
    return TextTable(head, rows, words=1, title=_cut("Columns of numbers", len(columns)))


def _vector_table(columns: Mapping[str, ColumnStatistics]) -> TextTable:
    """The table of columns of vectors, with the ranges of their features."""
    shown = _present(columns)
    head = ("column", "shape", "mean", "std", "min", "max", *shown)
    rows = [
        (name, "x".join(map(str, c.shape)), _range(c.mean), _range(c.std), _least(c.minimum), _most(c.maximum),
         *(f"{int(getattr(c, _COUNTS[word]).sum()):,}" for word in shown))
        for name, c in list(columns.items())[:_MOST_ROWS]
    ]  # fmt: skip
    return TextTable(head, rows, words=1, title=_cut("Columns of vectors: ranges over their features", len(columns)))


def _group_table(statistics: DataStatistics) -> TextTable:
    """Rows and means of the largest groups, for the columns whose means differ most between groups."""
    chosen = _differing(statistics)
    groups = sorted(statistics.groups.items(), key=lambda each: (-each[1].rows, each[0]))
    rows = [
        (name, f"{group.rows:,}", *(_one(group.columns[column].mean) for column in chosen))
        for name, group in groups[:_MOST_ROWS]
    ]
    heads = [f"{column} ({percent(share)})" for column, share in chosen.items()]
    title = f"Groups by {statistics.by}, and means; in brackets the share of the variance that is between groups"
    return TextTable(("group", "rows", *heads), rows, words=1, title=_cut(title, len(groups)))


def _differing(statistics: DataStatistics) -> dict[str, float]:
    """The columns of numbers with the largest shares of their variance between groups, and these shares."""
    shares = {name: _between(name, c, list(statistics.groups.values())) for name, c in statistics.columns.items()}
    known = [(share, name) for name, share in shares.items() if share is not None]
    return {name: share for share, name in sorted(known, reverse=True)[:_GROUP_COLUMNS]}


def _between(name: str, column: ColumnStatistics, groups: Sequence[Partial]) -> float | None:
    """1 - (sum of m2 within groups) / m2; None if the column has vectors or is constant."""
    if column.mean.size != 1 or not (all_of_it := float(column.m2.sum())) > 0 or np.isinf(all_of_it):
        return None
    within = sum(float(group.columns[name].m2.sum()) for group in groups if name in group.columns)
    return min(1.0, max(0.0, 1 - within / all_of_it))


def _present(columns: Mapping[str, ColumnStatistics]) -> list[str]:
    """The kinds of values that are no numbers and occur."""
    return [word for word, name in _COUNTS.items() if any(getattr(c, name).any() for c in columns.values())]


def _cut(title: str, number: int) -> str:
    more = f" (the first {_MOST_ROWS} of {number:,}; --output-format json has all)" if number > _MOST_ROWS else ""
    return f"{title}{more}:"


def _one(values: np.ndarray) -> str:
    return figure(float(values.reshape(-1)[0]))


def _range(values: np.ndarray) -> str:
    least, most = _least(values), _most(values)
    return least if least == most else f"{least} to {most}"


def _least(values: np.ndarray) -> str:
    return figure(float(np.nanmin(values)), 3) if np.isfinite(values).any() else "-"


def _most(values: np.ndarray) -> str:
    return figure(float(np.nanmax(values)), 3) if np.isfinite(values).any() else "-"
