"""What exact statistics cost beside torch's update_bn: python benchmarks/bench_recalibration.py [--quick].

``update_bn`` averages the statistics of batches in one pass in train mode. ``recalibrate`` measures each layer behind
finished ones: with forwards that wait for each other, and with forwards that are restarted for each layer. The same
rounds, the same batches in memory; the bits of both ways are compared. Written to
benchmarks/results/recalibration.json.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from bench_overhead import spread_of
from networks import resnet20, resnet50
from report import save, spread, tell_load
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from batchnorm import bench, recalibrate
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment

# name: model, examples, size of images, size of batches
CASES = {
    "ResNet-20, 8x8": (resnet20, 1500, 8, 128),
    "ResNet-20, 32x32": (resnet20, 1500, 32, 128),
    "ResNet-50, 64x64": (resnet50, 384, 64, 32),
}


def main() -> None:
    is_quick = "--quick" in sys.argv
    torch.manual_seed(0)
    torch.set_num_threads(2)
    rows = [_row(name, 3 if is_quick else 5) for name in (list(CASES)[:1] if is_quick else CASES)]
    tell_load(rows)
    data = {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rows": rows}
    save("recalibration-quick" if is_quick else "recalibration", data)


def _row(name: str, rounds: int) -> dict[str, Any]:
    make, examples, size, batch = CASES[name]
    model, batches = make(), torch.randn(examples, 3, size, size).split(batch)
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    sides = {
        "update_bn": timing.timed(lambda: update_bn(batches, model)),
        "waiting": timing.timed(lambda: recalibrate(model, batches)),
    }
    with timing.others() as busy:
        run = timing.race(sides, rounds=rounds)
    ratio = spread_of(run.ratio({"waiting": 1}, {"update_bn": 1}))
    restarted, is_same = _restarted(model, batches)
    seconds = {f"{side}_s": spread_of(run.time({side: 1})) for side in sides}
    row = {
        "case": name, "layers": layers, "examples": examples, "batch": batch, "rounds": rounds, **seconds,
        "ratio": ratio, "restarted_s": restarted, "same_bits": is_same, **busy,
    }  # fmt: skip
    times = f"update_bn {row['update_bn_s']['median']:.3f} s, waiting {row['waiting_s']['median']:.3f} s"
    print(f"{name:<18} {layers} layers: {times} = {spread(ratio)} x update_bn; restarted {restarted:.2f} s; "
          f"{'the same bits' if is_same else 'OTHER BITS'}", flush=True)  # fmt: skip
    return row


def _restarted(model: nn.Module, batches: tuple[Tensor, ...]) -> tuple[float, bool]:
    """Seconds of the way that restarts forwards, once, and whether it stores the bits of the way that waits."""
    waited, restarted = copy.deepcopy(model), copy.deepcopy(model)
    assert recalibrate(waited, batches).restarted == ""
    start = time.perf_counter()
    recalibrate(restarted, batches, memory=0)
    seconds = time.perf_counter() - start
    return seconds, all(map(torch.equal, waited.buffers(), restarted.buffers()))


if __name__ == "__main__":
    main()
