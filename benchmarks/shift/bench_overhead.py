"""What the shift monitor costs: python benchmarks/shift/bench_overhead.py. ResNet-18, (16, 3, 96, 96), eval mode.

One forward pass of every arm in each round: not monitored, as the monitor comes (4 examples of a batch, 1 % of the
time), the same calibrated, 4 examples of every batch, and all examples of every batch. Then what one update with eight
observations of the network's 4,800 channels takes, from the checkpoint and calibrated, on one thread, in turns. Written
to benchmarks/results/shift_overhead.json.
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
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment
from batchnorm.shift.stream import Stream

ROUNDS, UPDATES, SHAPE = 120, 500, (16, 3, 96, 96)
CALIBRATED = "calibrated, as it comes"
ALWAYS = 64  # batches of which 4 examples are looked at whatever the budget
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
        for turn in range(-ALWAYS, ROUNDS):
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
    measured = {"rows": rows, "updates": updates([monitors["as it comes"], monitors[CALIBRATED]])}
    save("shift_overhead", {"environment": environment(), "rounds": ROUNDS, "shape": list(SHAPE), **measured})


def updates(monitors: list[Any]) -> list[dict[str, Any]]:
    """Milliseconds of an update of the evidence and all that a stream keeps, and what it and the reference take."""
    torch.set_num_threads(1)
    streams = [Stream(m.reference, "example", alpha=0.01, arl=None) for m in monitors]
    taken: list[list[float]] = [[] for _ in streams]
    channels = len(streams[0].reference.mean)
    with timing.others() as busy:
        for turn in range(UPDATES):
            z = 0.3 * torch.randn(8, channels, dtype=torch.float64)
            for stream, seconds in zip(streams, taken, strict=True):
                start = time.perf_counter()
                stream.observe(z, z.square())
                if turn >= 8:
                    seconds.append(time.perf_counter() - start)
    return [_update(stream, seconds) | busy for stream, seconds in zip(streams, taken, strict=True)]


def _update(stream: Stream, seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(1e3 * taken for taken in seconds)
    bytes_of = [sum(x.nbytes for x in held.values()) for held in (stream.state().tensors, stream.reference.tensors())]
    row = {
        "source": stream.reference.source, "channels": len(stream.reference.mean), "observations": 8,
        "p50_ms": ordered[len(ordered) // 2], "least_ms": ordered[0], "p99_ms": ordered[int(0.99 * len(ordered))],
        "state_bytes": bytes_of[0], "reference_bytes": bytes_of[1],
    }  # fmt: skip
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return row


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
