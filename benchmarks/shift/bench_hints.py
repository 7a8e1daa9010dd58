"""What alarms hint at, on shifts of the inputs and of the shares of classes: python benchmarks/shift/bench_hints.py.

A hundred streams for each change, of 400 clean observations and then changed ones, each to its alarm. Written to
benchmarks/results/shift_hints.json.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_shift import ALPHA, CLEAN_BEFORE, MOST
from pools import ROUND, drawn, observations, prepared
from report import save
from worlds import WORLDS

from batchnorm.lecture.verdicts import environment
from batchnorm.shift.stream import LOGGER, Stream

STREAMS = 100


def main() -> None:
    torch.set_num_threads(1)
    LOGGER.setLevel("CRITICAL")
    results: dict[str, Any] = {"environment": environment(), "streams": STREAMS, "alpha": ALPHA, "worlds": {}}
    for name, world in WORLDS.items():
        for kind in ("checkpoint", "calibrated"):
            _, monitor = prepared(world, calibration=1000 if kind == "calibrated" else 0)
            clean = observations(monitor, world.clean, 10_000, seed=7)
            for shift, sampler in world.shifts.items():
                hints = hinted(monitor.reference, clean, observations(monitor, sampler, 10_000, seed=8))
                results["worlds"].setdefault(name, {}).setdefault(kind, {})[shift] = hints
                print(f"{name:<8}{kind:<12}{shift:<22}{hints}", flush=True)
    save("shift_hints", results)


def hinted(reference: Any, clean: Any, shifted: Any) -> dict[str, int]:
    """How many streams' alarms said what."""
    random = torch.Generator().manual_seed(16)
    return dict(Counter(of_stream(reference, clean, shifted, random) for _ in range(STREAMS)))


def of_stream(reference: Any, clean: Any, shifted: Any, random: torch.Generator) -> str:
    stream = Stream(reference, "example", alpha=ALPHA, arl=None)
    for step in range((CLEAN_BEFORE + MOST) // ROUND):
        pool = clean if step < CLEAN_BEFORE // ROUND else shifted
        stream.observe(*(part[:, 0] for part in drawn(pool, ROUND, 1, random)))
        if stream.alarm is not None:
            return stream.alarm.hint or "no hint"
    return "no alarm"


if __name__ == "__main__":
    main()
