"""torch itself as a worker, for settings that a process has once: the allocator's."""

from __future__ import annotations

import os

from worker import serve


def load():
    import torch

    import batchnorm as bn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if os.environ["BENCH_TUNED"] == "1":
        bn.tune_allocator()
    return torch.__version__


def prepare(case):
    from batchnorm import bench

    kind, side = bench.CASES[case["case"]], case["side"]
    inputs = bench.CaseInputs.of(case["shape"], case["dtype"], channels_last=case["channels_last"])
    layer = bench.layers(case["shape"], case["dtype"], kind)[side]
    run = layer if side == "ours" else bench.composed(kind, layer)
    return bench.call(kind, run, list(layer.parameters()), inputs), {}


if __name__ == "__main__":
    serve(load, prepare)
