"""A step on micro-batches compared with one on the whole batch: python benchmarks/bench_micro_batches.py [--quick].

ResNet-20 in float64 on 64 images, as one batch and as 8 micro-batches of 8. For each way of accumulation: how far its
gradients, loss and stored statistics are from those of the whole batch, the peak of memory above what was there before,
and the time of a step. Each row comes from a process of its own. And how wrong gradients with constant statistics are
for each parameter of a network with two layers of batch norm. Written to benchmarks/results/micro_batches.json.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench_memory import SMALL_BLOCKS, peak_of
from networks import NETWORKS
from report import save
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import bench
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment

Micro = tuple[Tensor, Tensor]
IMAGES, MICROS = 64, 8


def main() -> None:
    if len(sys.argv) == 3:  # a way and its number of rounds: this is a process of its own
        print(json.dumps(_measured(sys.argv[1], int(sys.argv[2]))))
        return
    is_quick = "--quick" in sys.argv
    rows = []
    for way in WAYS:
        rows.append({"way": way, **_in_own_process(way, 1 if is_quick else 3)})
        print(_told(rows[-1]), flush=True)
    two = _two_layers()
    print("two layers, constant statistics:", ", ".join(f"{name} {wrong:.0%}" for name, wrong in two.items()))
    data = {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rows": rows, "two_layers": two}
    save("micro_batches-quick" if is_quick else "micro_batches", data)


def _whole(model: nn.Module, batch: Micro) -> None:
    _loss(model(batch[0]), batch).backward()


def _step(model: nn.Module, batch: Micro) -> None:
    with bn.step(model):
        for micro in _split(batch):
            (_loss(model(micro[0]), micro) / MICROS).backward()


def _joined(**options: Any) -> Callable[[nn.Module, Micro], object]:
    return lambda model, batch: bn.step_backward(model, _split(batch), _loss, **options)


WAYS: dict[str, Callable[[nn.Module, Micro], object]] = {
    "whole batch": _whole,
    "step": _step,
    "constant": _joined(gradient="constant"),
    "exact": _joined(),
    "exact, 2 segments": _joined(segments=2),
    "exact, 4 segments": _joined(segments=4),
}


def _loss(output: Tensor, batch: Micro) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _split(batch: Micro) -> list[Micro]:
    return list(zip(*(t.chunk(MICROS) for t in batch), strict=True))


def _measured(way: str, rounds: int) -> dict[str, Any]:
    make, classes, (_, *sizes) = NETWORKS["ResNet-20"]
    shape = (IMAGES, *sizes)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = (
        bn.convert(make()).double(),
        (torch.randn(shape, dtype=torch.float64), torch.arange(shape[0]) % classes),
    )
    whole = copy.deepcopy(model)
    WAYS[way](model, batch)
    _whole(whole, batch)
    errors = _errors(model, whole)
    del whole

    def step() -> None:
        model.zero_grad(set_to_none=True)
        WAYS[way](model, batch)

    seconds, peaks = [], []
    with timing.others() as busy:
        for _ in range(rounds):
            start = time.perf_counter()
            peaks.append(peak_of(step))
            seconds.append(time.perf_counter() - start)
    return {
        **errors,
        "peak_mb": max(peaks),
        "rounds": rounds,
        "seconds": median(seconds),
        "fastest_seconds": min(seconds),
        **busy,
    }


def _errors(model: nn.Module, whole: nn.Module) -> dict[str, float]:
    """Distances from the whole batch, relative to the whole batch's norm: of all gradients, and of all statistics."""
    gradients = [[p.grad.flatten() for p in each.parameters() if p.grad is not None] for each in (model, whole)]
    statistics = [[b.flatten() for b in each.buffers() if b.is_floating_point()] for each in (model, whole)]
    return {"gradient_error": _distance(*gradients), "statistics_error": _distance(*statistics)}


def _distance(values: list[Tensor], exact: list[Tensor]) -> float:
    a, b = torch.cat(values), torch.cat(exact)
    return float((a - b).norm() / b.norm())


def _two_layers() -> dict[str, float]:
    """For each parameter of two linear layers with batch norm behind, how wrong gradients with constants are."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), bn.BatchNorm1d(32, act="relu"), nn.Linear(32, 10), bn.BatchNorm1d(10)]
    model, batch = nn.Sequential(*layers).double(), (torch.randn(128, 16, dtype=torch.float64), torch.arange(128) % 10)
    whole = copy.deepcopy(model)
    bn.step_backward(model, _split(batch), _loss, gradient="constant")
    _whole(whole, batch)
    return {
        name: _distance([p.grad.flatten()], [q.grad.flatten()])
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True)
        if p.grad is not None
        and q.grad is not None
        and q.grad.norm() > 1e-9  # biases before batch norm have gradient 0
    }


def _in_own_process(way: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, way, str(rounds)]
    done = subprocess.run(command, env=os.environ | SMALL_BLOCKS, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _told(row: dict[str, Any]) -> str:
    return (
        f"{row['way']:<18} gradients {row['gradient_error']:.1e}, statistics {row['statistics_error']:.1e}, "
        f"{row['peak_mb']:6.0f} MB, {row['seconds']:5.2f} s (others {row.get('others') or 0:.0%})"
    )


if __name__ == "__main__":
    main()
