"""The values of replicas at one step, joined: for each quantity in the way that ``quantities.toml`` names.

With values x_r of the replicas r, and the number n_r of replicas behind each value (1, unless it was merged before):

    mean       sum n_r x_r / sum n_r            rms        sqrt(sum n_r x_r^2 / sum n_r)
    harmonic   sum n_r / sum (n_r / x_r)        odds       p with p / (1 - p) = the mean of x_r / (1 - x_r)
    largest    max x_r                          each       left out: it describes the examples of one replica
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from batchnorm.record.log_entry import plain
from batchnorm.record.quantities import QUANTITIES

_DIGITS = 5  # of a joined number: more than its parts have in a log

Weighted = Sequence[tuple[float, float]]  # values, each with the number of replicas behind it


def _mean(values: Weighted) -> float:
    return math.fsum(n * x for x, n in values) / math.fsum(n for _, n in values)


def _harmonic(values: Weighted) -> float:
    return 0.0 if any(x <= 0 for x, _ in values) else 1 / _mean([(1 / x, n) for x, n in values])


def _odds(values: Weighted) -> float:
    if any(x >= 1 for x, _ in values):
        return 1.0
    odds = _mean([(x / (1 - x), n) for x, n in values])
    return odds / (1 + odds)


WAYS: dict[str, Callable[[Weighted], float]] = {
    "mean": _mean,
    "rms": lambda values: math.sqrt(_mean([(x * x, n) for x, n in values])),
    "harmonic": _harmonic,
    "odds": _odds,
    "largest": lambda values: max(x for x, _ in values),
}


def way_of(quantity: str) -> str:
    """How values of a quantity are joined; "each" for a quantity that is not in the table, such as a user's."""
    return QUANTITIES[quantity].merges if quantity in QUANTITIES else "each"


def joined(
    rows: Sequence[tuple[Mapping[str, float | None], int]], way: Callable[[str], str], left_out: set[str]
) -> dict[str, float | None]:
    """Numbers by name, joined over replicas; None if no replica has a number.

    Args:
        rows: The numbers of each replica by name, with the number of replicas behind them.
        way: Returns how the values of a name are joined.
        left_out: The names that are not joined are added to it.
    """
    names = dict.fromkeys(name for values, _ in rows for name in values)
    left_out |= {name for name in names if way(name) not in WAYS}
    return {
        name: number_of([(values.get(name), n) for values, n in rows], way(name))
        for name in names if name not in left_out
    }  # fmt: skip


def joined_rows(
    rows: Sequence[tuple[Mapping[str, Sequence[float | None]], int]], left_out: set[str]
) -> dict[str, list[float | None]]:
    """``joined`` for quantities with one number for each layer."""
    names = dict.fromkeys(name for values, _ in rows for name in values)
    left_out |= {name for name in names if way_of(name) not in WAYS}
    columns = {name: [(values[name], n) for values, n in rows if name in values] for name in names}
    return {
        name: [
            number_of([(row[i], n) for row, n in column], way_of(name)) for i in range(len(column[0][0]))
        ]
        for name, column in columns.items() if name not in left_out
    }  # fmt: skip


def number_of(values: Sequence[tuple[float | None, int]], way: str) -> float | None:
    """The values joined in one of ``WAYS``; None without values, or if the result is too large for a float."""
    known = [(x, float(n)) for x, n in values if x is not None]
    try:
        return plain(WAYS[way](known), _DIGITS) if known else None
    except (ArithmeticError, ValueError):  # a log may hold any finite number
        return None
