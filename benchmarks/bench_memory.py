"""Memory that training needs: python benchmarks/bench_memory.py.

Each number comes from a process of its own, which reads what the system says about its resident memory; every block
of 64 KB or more goes back to the system at once there, so that nothing kept for later counts. Written to
benchmarks/results/memory.json:

- a BN + ReLU training step on 51 MB: the peak above what was there before;
- ResNet-20, batch 128: what the forward pass keeps for the backward pass, and the peak of a whole step.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, training_step
from report import save

from batchnorm import bench
from batchnorm.experiment.environment import environment
from batchnorm.surgery import convert

MEGABYTE = 1e6
STEP = (64, 64, 56, 56)
SIDES = {"step": ("ours", "torch", "torch in place"), "ResNet-20": ("ours", "ours, memory saved", "torch")}
SMALL_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def main() -> None:
    if len(sys.argv) == 3:  # what and side: this is a process of its own
        print(json.dumps(_network(sys.argv[2]) if sys.argv[1] == "ResNet-20" else _step(sys.argv[2])))
        return
    if not Path("/proc/self/clear_refs").exists():
        print("not measured: this system does not tell a process its peak of memory")
        return
    rows = [{"what": what, "side": side, **_in_own_process(what, side)} for what in SIDES for side in SIDES[what]]
    for row in rows:
        numbers = ", ".join(f"{key.removesuffix('_mb')} {row[key]:7.1f} MB" for key in row if key.endswith("_mb"))
        print(f"{row['what']:<10} {row['side']:<20} {numbers}")
    save(
        "memory-quick" if "--quick" in sys.argv else "memory",
        {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rows": rows},
    )


def _in_own_process(what: str, side: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, what, side],
        env=os.environ | SMALL_BLOCKS,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _step(side: str) -> dict[str, float]:
    case, inputs = bench.CASES["step"], bench.CaseInputs.of(STEP)
    layer = bench.layers(STEP, "float32", case)["ours" if side == "ours" else "torch"]
    run = layer if side == "ours" else bench.composed(case, layer, inplace=side == "torch in place")
    call = bench.call(case, run, list(layer.parameters()), inputs)
    call()
    return {"x_mb": inputs.x.nbytes / MEGABYTE, "peak_mb": peak_of(call)}


def _network(side: str) -> dict[str, float]:
    make, classes, shape = NETWORKS["ResNet-20"]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    if side != "torch":
        model = convert(model, fuse=True, example=x[:8], memory="save" if "saved" in side else None)
    step = training_step(model, x, classes)
    step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    before = resident("VmRSS")
    result = model(x)
    kept = resident("VmRSS") - before
    del result
    return {"kept_mb": kept, "peak_mb": peak_of(step)}


def peak_of(call: Any) -> float:
    """Megabytes by which the resident memory rises at most while ``call`` runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / MEGABYTE


if __name__ == "__main__":
    main()
