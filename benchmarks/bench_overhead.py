"""What a call costs when there is almost nothing to compute: python benchmarks/bench_overhead.py [--quick].

Microseconds of one call on a tensor of 64 values, ours and torch.nn's in the same rounds, written to
benchmarks/results/overhead.json.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from report import save, spread, tell_load

from batchnorm import bench
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment

SHAPES = ((8, 8), (2, 8, 2, 2))
MODES = {
    "forward": "train forward, no gradients",
    "relu": "the same + ReLU",
    "pass": "training step: forward + backward",
    "step": "the same + ReLU",
    "eval": "eval + ReLU",
}


def main() -> None:
    rounds = 11 if "--quick" in sys.argv else 101
    torch.set_num_threads(2)
    rows = [_row(mode, shape, rounds) for shape in SHAPES for mode in MODES]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        times = f"ours {row['ours_us']['median']:7.1f} us  torch {row['torch_us']['median']:7.1f} us"
        print(f"{shape:>8}  {row['words']:<36} {times}  {spread(row['ratio'])} x ours")
    tell_load(rows)
    data = {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rounds": rounds, "rows": rows}
    save("overhead-quick" if "--quick" in sys.argv else "overhead", data)


def _row(mode: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    field = bench.contestants(bench.CASES[mode], bench.CaseInputs.of(shape))
    with timing.others() as busy:
        run = timing.race({side: field[side] for side in ("ours", "torch")}, rounds=rounds)
    times = {f"{side}_us": spread_of(run.time({side: 1}), 1e6) for side in run.seconds}
    ratio = spread_of(run.ratio({"torch": 1}, {"ours": 1}))
    return {"case": mode, "words": MODES[mode], "shape": list(shape), **times, "ratio": ratio, **busy}


def spread_of(found: timing.Spread, unit: float = 1.0) -> dict[str, float]:
    return {"median": unit * found.median, "low": unit * found.low, "high": unit * found.high}


if __name__ == "__main__":
    main()
