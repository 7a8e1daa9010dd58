"""Other detectors on the same streams: python benchmarks/shift/bench_peers.py.

Peers need reference data and features, so they get what ours gets by itself: 1,000 clean examples and the means of the
last batch norm layer's channels. Each runs in the Python that an environment variable names (BENCH_PYTHON_ALIBI,
BENCH_PYTHON_TORCHDRIFT, BENCH_PYTHON_FROUROS), as they do not share one. Written to
benchmarks/results/shift_peers.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_shift import ALPHA
from peer_worker import DETECTORS, ERT, WINDOW
from pools import observations, prepared
from report import save
from worlds import SHAPES

from batchnorm.lecture.verdicts import environment
from batchnorm.shift.stream import LOGGER, Stream

STREAMS, LOOKS, LAST = 40, 23, 32  # 23 windows of 64: 1,472 examples
PYTHONS = {
    "alibi-detect": "BENCH_PYTHON_ALIBI",
    "torchdrift": "BENCH_PYTHON_TORCHDRIFT",
    "frouros": "BENCH_PYTHON_FROUROS",
}


def main() -> None:
    torch.set_num_threads(1)
    LOGGER.setLevel("CRITICAL")
    length = WINDOW * LOOKS
    monitors = {kind: prepared(SHAPES, calibration=n)[1] for kind, n in (("checkpoint", 0), ("calibrated", 1000))}
    samplers = {"clean": SHAPES.clean, **SHAPES.shifts}
    seen = {
        name: observations(monitors["checkpoint"], s, STREAMS * length, seed=31 + i)
        for i, (name, s) in enumerate(samplers.items())
    }
    results: dict[str, Any] = {
        f"ours, {kind}": {name: ours(monitor, *seen[name]) for name in samplers} for kind, monitor in monitors.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        reference = observations(monitors["checkpoint"], SHAPES.clean, 1000, seed=30)[0]
        np.save(f"{folder}/reference.npy", reference[:, -LAST:].numpy())
        for name, (z, _) in seen.items():
            np.save(f"{folder}/streams-{name}.npy", z[:, -LAST:].reshape(STREAMS, length, LAST).numpy())
        for name in DETECTORS:
            results[name] = asked(name, folder)
    rows = {
        name: {shift: told(times) for shift, times in found.items()} if isinstance(found, dict) else found
        for name, found in results.items()
    }
    for name, row in rows.items():
        print(
            f"{name:<26}",
            "; ".join(f"{s} {v['rang']}/{STREAMS} {v['median']}" for s, v in row.items())
            if isinstance(row, dict)
            else row,
            flush=True,
        )
    save(
        "shift_peers",
        {
            "environment": environment(),
            "streams": STREAMS,
            "looks": LOOKS,
            "window": WINDOW,
            "alpha": ALPHA,
            "ert": ERT,
            "rows": rows,
        },
    )


def ours(monitor: Any, z: torch.Tensor, q: torch.Tensor) -> list[int | None]:
    """Examples until it rang, of each stream."""
    times = []
    for zs, qs in zip(z.chunk(STREAMS), q.chunk(STREAMS), strict=True):
        stream = Stream(monitor.reference, "example", alpha=ALPHA, arl=None)
        for start in range(0, len(zs), 8):
            stream.observe(zs[start : start + 8], qs[start : start + 8])
            if stream.alarm is not None:
                break
        times.append(stream.alarm and stream.alarm.observations)
    return times


def asked(name: str, folder: str) -> Any:
    """A peer's answer, or why there is none."""
    python = os.environ.get(PYTHONS[name.split(" ", maxsplit=1)[0]])
    if not python:
        return f"not measured: {PYTHONS[name.split(' ', maxsplit=1)[0]]} is not set"
    worker = Path(__file__).with_name("peer_worker.py")
    done = subprocess.run([python, str(worker), name, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"not measured: {done.stderr.strip().splitlines()[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def told(times: list[int | None]) -> dict[str, Any]:
    """How many rang, and the median over those that did."""
    rang = [t for t in times if t is not None]
    return {"rang": len(rang), "median": statistics.median(rang) if rang else None}


if __name__ == "__main__":
    main()
