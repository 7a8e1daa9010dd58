"""Time of one call of our layers against torch.nn's in the same rounds: python benchmarks/bench_layers.py [--quick].

Prints a table and writes benchmarks/results/layers.json: machine, versions, median time of each side and the median
over rounds of the ratio torch.nn / ours (above 1: ours is faster), with its quartiles. The machine is shared, so only
ratios of one run mean anything.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn
from batchnorm.lecture.verdicts import environment

SHAPES = ((256, 64), (256, 512), (32, 64, 56, 56), (128, 16, 32, 32))
RESULTS = Path(__file__).parent / "results" / "layers.json"


def layers(shape):
    names = {2: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
    return {"ours": getattr(bn, names)(shape[1]), "torch": getattr(nn, names)(shape[1])}


def step(layer, x, grad, *, train):
    layer.train(train)
    start = time.perf_counter()
    y = layer(x)
    if train:
        y.backward(grad)
    return time.perf_counter() - start


def measure(shape, *, train, rounds):
    pair = layers(shape)
    x = torch.randn(shape, requires_grad=train)
    grad = torch.randn(shape)
    for layer in pair.values():
        step(layer, x, grad, train=train)
    seconds = {name: [] for name in pair}
    for _ in range(rounds):
        for name, layer in pair.items():
            with torch.set_grad_enabled(train):
                seconds[name].append(step(layer, x, grad, train=train))
    ratios = [theirs / ours for theirs, ours in zip(seconds["torch"], seconds["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "shape": list(shape),
        "case": "train forward + backward" if train else "eval forward",
        "ours_ms": 1e3 * statistics.median(seconds["ours"]),
        "torch_ms": 1e3 * statistics.median(seconds["torch"]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def main():
    rounds = 10 if "--quick" in sys.argv else 50
    rows = [measure(shape, train=train, rounds=rounds) for shape in SHAPES for train in (True, False)]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        times = f"{row['ours_ms']:9.3f} ms  torch.nn {row['torch_ms']:9.3f} ms"
        print(f"{shape:>14}  {row['case']:<25} {times}  {row['ratio']:5.2f}x")
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = RESULTS.with_suffix(".new")
    fresh.write_text(json.dumps({"environment": environment(), "rounds": rounds, "rows": rows}, indent=1) + "\n")
    fresh.replace(RESULTS)
    print(f"wrote {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


if __name__ == "__main__":
    main()
