"""What the shift monitor costs: python benchmarks/shift/bench_overhead.py. ResNet-18, (16, 3, 96, 96), eval mode.

One forward pass of every arm in each round: not monitored, as the monitor comes (4 examples of a batch, 1 % of the
time), the same calibrated, 4 examples of every batch, and all examples of every batch. Written to
benchmarks/results/shift_overhead.json.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from networks import resnet18
from report import save, spread, tell_load

from batchnorm import ShiftMonitor, recalibrate
from batchnorm import rounds as timing
from batchnorm.lecture.verdicts import environment

ROUNDS, SHAPE = 120, (16, 3, 96, 96)
CALIBRATED = "calibrated, as it comes"
ARMS: dict[str, dict[str, Any] | None] = {
    "not monitored": None,
    "as it comes": {},
    CALIBRATED: {},
    "4 of every batch": {"budget": None},
    "all of every batch": {"budget": None, "examples": None},
}


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = resnet18()
    recalibrate(model, [torch.randn(SHAPE) for _ in range(4)])
    model.eval()
    monitors = {name: None if more is None else ShiftMonitor(model, **more) for name, more in ARMS.items()}
    monitors[CALIBRATED].calibrate([torch.randn(SHAPE) for _ in range(13)])
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    with torch.no_grad(), timing.others() as busy:
        for turn in range(-3, ROUNDS):
            x = torch.randn(SHAPE)
            first = turn % len(ARMS)
            names = list(ARMS)[first:] + list(ARMS)[:first]
            for name in names:
                taken = _pass(model, monitors[name], x)
                if turn >= 0:
                    seconds[name].append(taken)
    rows = [_row(name, seconds, monitors[name]) | busy for name in ARMS]
    for row in rows:
        print(f"{row['arm']:<26} {row['p50_ms']:7.1f} ms  {spread(row['ratio'])} x not monitored, cost {row['cost']}")
    tell_load(rows)
    save("shift_overhead", {"environment": environment(), "rounds": ROUNDS, "shape": list(SHAPE), "rows": rows})


def _pass(model: torch.nn.Module, monitor: ShiftMonitor | None, x: torch.Tensor) -> float:
    if monitor is not None:
        monitor.start()
    start = time.perf_counter()
    model(x)
    taken = time.perf_counter() - start
    while monitor is not None and monitor._handles:  # as stop, which would count what is waiting
        monitor._handles.pop().remove()
    return taken


def _row(name: str, seconds: dict[str, list[float]], monitor: ShiftMonitor | None) -> dict[str, Any]:
    ratios = timing.Spread.of([a / b for a, b in zip(seconds[name], seconds["not monitored"], strict=True)])
    return {
        "arm": name,
        "p50_ms": 1e3 * sorted(seconds[name])[len(seconds[name]) // 2],
        "ratio": {"median": ratios.median, "low": ratios.low, "high": ratios.high},
        "cost": None if monitor is None else round(monitor.cost, 4),
        "observations": None if monitor is None else monitor.stream.evidence.observations,
    }


if __name__ == "__main__":
    main()
