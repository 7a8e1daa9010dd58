"""Error and time of merging the moments of up to 1,000 ranks: python benchmarks/scale/merge_orders.py

Every rank has 1,000 rows of 64 channels. Values are multiples of 2^-22, so their exact mean and sum of squared
deviations are fractions of integers, with which the merged moments are compared. The moments are merged in rank order,
as recalibrate does over ranks, in random order, and in pairs, as the pieces of a data set are. Written to
benchmarks/results/scale-merge.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import save

from batchnorm import bench
from batchnorm.experiment.environment import environment
from batchnorm.moments import Moments

ROWS, CHANNELS = 1000, 64
RANKS = (1, 10, 100, 1000)
UNIT = 2.0**-22
# name: the mean, the standard deviation in units, and how far means of ranks are apart, in standard deviations
DATA = {"A": (10**6, 2**16, 0.0), "B": (10**9, 2**16, 0.0), "A, ranks differ": (10**6, 2**16, 3.0)}


def main() -> None:
    rows = [row for name in DATA for row in rows_of(name)]
    for row in rows:
        print(
            f"{row['data']:<16} {row['ranks']:>5} ranks, {row['order']:<10} variance {row['var_error']:.1e}, "
            f"mean {row['mean_error']:.1e} sd, {row['ms']:.2f} ms",
            flush=True,
        )
    size = {"rows_per_rank": ROWS, "channels": CHANNELS, "unit": "2^-22"}
    save("scale-merge", {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), **size, "rows": rows})


def rows_of(name: str) -> list[dict[str, object]]:
    """The errors for every number of ranks and order."""
    offset, deviation, apart = DATA[name]
    random = np.random.default_rng(0)
    parts, sums, squares = [], [], []
    for _ in range(max(RANKS)):
        middle = random.normal() * apart * deviation
        units = np.rint(random.normal(middle, deviation, (ROWS, CHANNELS))).astype(np.int64)
        parts.append(Moments.of(torch.from_numpy(offset + units * UNIT)))
        sums.append(units.sum(0))
        squares.append((units**2).sum(0))
    found = []
    for ranks in RANKS:
        count = ranks * ROWS
        first, second = (np.sum(values[:ranks], axis=0).tolist() for values in (sums, squares))
        exact = [(Fraction(s, count), Fraction(q) - Fraction(s * s, count)) for s, q in zip(first, second, strict=True)]
        for order, merge in ORDERS.items():
            found.append({"data": name, "ranks": ranks, "order": order, **errors(merge, parts[:ranks], exact, offset)})
    return found


def errors(
    merge: Callable[[Sequence[Moments]], Moments],
    parts: Sequence[Moments],
    exact: Sequence[tuple[Fraction, Fraction]],
    offset: int,
) -> dict[str, float]:
    """The largest errors over the channels, and the median time of five merges."""
    times = []
    for _ in range(5):
        start = perf_counter()
        whole = merge(parts)
        times.append(1e3 * (perf_counter() - start))
    unit, count = Fraction(1, 2**22), len(parts) * ROWS
    var, mean = [], []
    for got_mean, got_m2, (middle, m2) in zip(whole.mean.tolist(), whole.m2.tolist(), exact, strict=True):
        var.append(abs(Fraction(got_m2) / (m2 * unit**2) - 1))
        mean.append(abs(Fraction(got_mean) - offset - middle * unit) / Fraction(float(m2 * unit**2 / count) ** 0.5))
    return {"var_error": float(max(var)), "mean_error": float(max(mean)), "ms": median(times)}


def in_rank_order(parts: Sequence[Moments]) -> Moments:
    """One after another."""
    return reduce(add, parts)


def in_random_order(parts: Sequence[Moments]) -> Moments:
    """One after another, shuffled."""
    order = np.random.default_rng(1).permutation(len(parts))
    return reduce(add, [parts[index] for index in order])


def in_pairs(parts: Sequence[Moments]) -> Moments:
    """Neighbours, then neighbours of the results, until one is left."""
    while len(parts) > 1:
        parts = [reduce(add, parts[start : start + 2]) for start in range(0, len(parts), 2)]
    return parts[0]


ORDERS = {"rank order": in_rank_order, "random": in_random_order, "in pairs": in_pairs}

if __name__ == "__main__":
    main()
