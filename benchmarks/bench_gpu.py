"""Time of our Triton kernels against torch's batch norm on a GPU: python benchmarks/bench_gpu.py [--quick].

Four sides take turns in every round, on the same tensors in the same memory layout: our layers with the Triton kernels
(ours), torch.nn's layers as they are, which is cuDNN or MIOpen where torch takes it (cudnn), the same without cuDNN
(eager) and compiled by torch.compile (compiled). Layout "planes" is contiguous; "rows" is channels_last, or (N, C).

Prints a table and writes benchmarks/results/gpu_<card>.json: for every device, dtype, layout, shape and case the median
time of each side and the median over rounds of the ratio cudnn / ours (above 1: ours is faster), with its quartiles.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn

PLANES = ((32, 64, 56, 56), (128, 256, 14, 14), (32, 512, 7, 7), (8, 16, 256, 256), (256, 64, 112, 112))
ROWS = ((256, 64), (1024, 512), (65536, 128))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = ("train forward + backward", "train forward + backward, residual and relu", "eval forward")
CALLS = 10  # timed together, so that the clock's steps of half a microsecond do not show
RESULTS = Path(__file__).parent / "results"
FASTER = Path(__file__).parents[1] / "src" / "batchnorm" / "kernels" / "faster.json"


class AddRelu(nn.Module):
    """torch.nn's layer and, where a residual comes, what follows it in a residual network."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, residual=None):
        y = self.layer(x)
        return y if residual is None else torch.relu(y + residual)


def sides(shape, case):
    """Name to layer; each has parameters and statistics of its own."""
    name = {2: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
    act = "relu" if "relu" in case else None
    layers = {"ours": getattr(bn, name)(shape[1], act=act)}
    for side in ("cudnn", "eager", "compiled"):
        layers[side] = AddRelu(getattr(nn, name)(shape[1]))
    torch.compiler.reset()  # each shape is compiled for itself, not for any size
    layers["compiled"] = torch.compile(layers["compiled"], dynamic=False)
    return {side: layer.cuda().train("train" in case) for side, layer in layers.items()}


def tensors(shape, dtype, layout, case):
    """x, residual or None, gradient."""
    x, residual, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    if layout == "rows" and len(shape) == 4:
        x, residual, grad = (t.to(memory_format=torch.channels_last) for t in (x, residual, grad))
    train = "train" in case
    return x.requires_grad_(train), residual.requires_grad_(train) if "residual" in case else None, grad


def milliseconds(side, layer, x, residual, grad):
    """Time of one call on the GPU, or on the CPU where that cannot launch as fast as the GPU computes."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wanted = [t for t in (x, residual, *layer.parameters()) if t is not None]
    with torch.backends.cudnn.flags(enabled=side != "eager"), torch.set_grad_enabled(layer.training):
        torch.cuda.synchronize()
        start.record()
        for _ in range(CALLS):
            y = layer(x, residual)
            if layer.training:
                torch.autograd.grad(y, wanted, grad)
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / CALLS


def measure(dtype, layout, shape, case, rounds):
    layers, given = sides(shape, case), tensors(shape, dtype, layout, case)
    for side, layer in layers.items():  # compiled, and caches of memory filled
        milliseconds(side, layer, *given)
    times = {side: [] for side in layers}
    for _ in range(rounds):
        for side, layer in layers.items():
            times[side].append(milliseconds(side, layer, *given))
    low, middle, high = statistics.quantiles([c / o for c, o in zip(times["cudnn"], times["ours"], strict=True)], n=4)
    return {
        "device": torch.cuda.get_device_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "shape": list(shape),
        "case": case,
        **{f"{side}_ms": statistics.median(values) for side, values in times.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def line(row):
    what = f"{row['dtype']:>8} {row['layout']:6} {'x'.join(map(str, row['shape'])):>14}  {row['case']:<43}"
    times = "  ".join(f"{side} {row[f'{side}_ms']:8.4f}" for side in ("ours", "cudnn", "eager", "compiled"))
    return f"{what} ms: {times}  {row['ratio']:5.2f}x"


def write(rows, rounds):
    from batchnorm.experiment.environment import environment

    versions = environment() | {"kernels": "triton", "cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
    versions["cudnn"] = str(torch.backends.cudnn.version())
    target = RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', rows[0]['device'].lower())}.json"
    RESULTS.mkdir(exist_ok=True)
    fresh = target.with_suffix(".new")
    fresh.write_text(json.dumps({"environment": versions, "rounds": rounds, "rows": rows}, indent=1) + "\n")
    fresh.replace(target)
    print(f"wrote {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")


def faster(rows):
    """What kernels/faster.json says of a device: type and layout to the number of values from which on ours wins.

    Ours wins where three rounds of four were faster than cuDNN's in every train case of that size or larger.
    """
    wins = {}
    for row in sorted(rows, key=lambda row: -math.prod(row["shape"])):
        if row["case"].startswith("train"):
            kind = wins.setdefault(row["device"], {}).setdefault(f"{row['dtype']} {row['layout']}", {})
            size = math.prod(row["shape"])
            kind[size] = kind.get(size, True) and row["ratio_quartiles"][0] > 1
    table = {}
    for device, kinds in wins.items():
        for kind, sizes in kinds.items():
            won = list(itertools.takewhile(sizes.get, sizes))  # from the largest size down
            if won:
                table.setdefault(device, {})[kind] = won[-1]
    return table


def prefer(rows):
    """Put what was measured into the table that chooses kernels."""
    table = json.loads(FASTER.read_text()) | {rows[0]["device"]: faster(rows).get(rows[0]["device"], {})}
    fresh = FASTER.with_suffix(".new")
    fresh.write_text(json.dumps(table, indent=1) + "\n")
    fresh.replace(FASTER)


def main():
    if not torch.cuda.is_available():
        print("bench_gpu needs a CUDA or ROCm GPU and a torch build for it, and found none.", file=sys.stderr)
        return 2
    os.environ["BATCHNORM_KERNELS"] = "triton"  # read when the layers are first used
    rounds, rows = 10 if "--quick" in sys.argv else 50, []
    for shape, layout in [(s, "planes") for s in PLANES] + [(s, "rows") for s in PLANES + ROWS]:
        for dtype in DTYPES:
            for case in CASES:
                rows.append(measure(dtype, layout, shape, case, rounds))
                print(line(rows[-1]), flush=True)
    write(rows, rounds)
    prefer(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
