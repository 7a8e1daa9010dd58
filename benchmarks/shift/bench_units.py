"""Streams whose neighbours are alike, counted by the example and by the batch: python benchmarks/shift/bench_units.py.

Clean shapes that come in runs of one class. By the example the promise does not hold, and the monitor has to warn; by
the batch of 100 it holds. Written to benchmarks/results/shift_units.json.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_shift import ALPHA, false_alarms
from pools import ROUND, observations, prepared
from report import save
from worlds import SHAPES

from batchnorm.experiment.environment import environment
from batchnorm.shift.stream import LOGGER, Stream

RUNS = (1, 10, 50)
EXAMPLES, STREAMS = 1504, 100  # counted by the example
BATCH, BATCHES, MANY = 100, 104, 2000  # counted by the batch: 10,400 examples in each of 2,000 streams
POOL = 20_000


def main() -> None:
    torch.set_num_threads(1)
    LOGGER.setLevel("CRITICAL")
    _, monitor = prepared(SHAPES)
    z, q = observations(monitor, SHAPES.clean, POOL, seed=7)
    by_class = [(y_of() == label).nonzero().flatten() for label in range(4)]
    rows: dict[str, Any] = {}
    for run in RUNS:
        random = torch.Generator().manual_seed(run)
        rows[str(run)] = {
            "example": by_example(monitor.reference, z, q, by_class, run, random),
            "batch": by_batch(monitor.reference, z, q, by_class, run, random),
        }
        print(f"runs of {run}: {rows[str(run)]}", flush=True)
    save("shift_units", {"environment": environment(), "alpha": ALPHA, "batch": BATCH, "runs": rows})


def y_of() -> Tensor:
    """Classes of the pool's examples, which ``observations`` draws a thousand at a time."""
    random = torch.Generator().manual_seed(7)
    return torch.cat([SHAPES.clean(1000, random)[1] for _ in range(POOL // 1000)])


def in_runs(by_class: list[Tensor], run: int, n: int, random: torch.Generator) -> Tensor:
    """Examples of the pool in runs of a class each, (n,)."""
    runs = []
    for label in torch.randint(4, (math.ceil(n / run),), generator=random).tolist():
        members = by_class[label]
        runs.append(members[torch.randint(len(members), (run,), generator=random)])
    return torch.cat(runs)[:n]


def by_example(
    reference: Any, z: Tensor, q: Tensor, by_class: list[Tensor], run: int, random: torch.Generator
) -> dict[str, Any]:
    """How many streams rang, and how many warned of the unit."""
    rang = warned = 0
    for _ in range(STREAMS):
        stream = Stream(reference, "example", alpha=ALPHA, arl=None)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for part in in_runs(by_class, run, EXAMPLES, random).split(ROUND):
                stream.observe(z[part], q[part])
        rang += stream.alarm is not None
        warned += any("neighbouring observations are alike" in str(warning.message) for warning in heard)
    return {"streams": STREAMS, "rang": rang, "warned": warned}


def by_batch(
    reference: Any, z: Tensor, q: Tensor, by_class: list[Tensor], run: int, random: torch.Generator
) -> dict[str, Any]:
    """How many of many streams rang whose observations are means of batches."""
    batches = in_runs(by_class, run, BATCH * POOL // 4, random).split(BATCH)
    pool = torch.stack([z[part].mean(0) for part in batches]), torch.stack([q[part].mean(0) for part in batches])
    return false_alarms(reference, pool, MANY, BATCHES)


if __name__ == "__main__":
    main()
