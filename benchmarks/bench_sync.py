"""What synchronization costs: python benchmarks/bench_sync.py [--quick].

Two processes on gloo, one thread each. In the same rounds: a training step of a layer with ``sync=True``, of torch.nn's
layer and of our layer, which are local, all in DistributedDataParallel, and two float32 all-reduces of as
many bytes as the layer exchanges in its forward and backward pass. Written to benchmarks/results/sync.json.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_overhead import spread_of
from report import save, spread, tell_load
from torch import distributed, multiprocessing, nn

from batchnorm import bench
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment
from batchnorm.layers import LAYERS

# inputs of each of the processes
SHAPES = ((64, 512), (8, 64, 56, 56), (8, 256, 14, 14), (2, 2048, 7, 7))
WORLD = 2


def main() -> None:
    is_quick = "--quick" in sys.argv
    rounds = 11 if is_quick else 51
    store = distributed.TCPStore("127.0.0.1", 0, WORLD, is_master=True, wait_for_workers=False)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(
        _rank, (store.port, rounds, SHAPES[:2] if is_quick else SHAPES, results), WORLD, start_method="spawn"
    )
    rows = results.get()
    tell_load(rows)
    data = {
        "schema_version": bench.SCHEMA_VERSION,
        "environment": environment(),
        "processes": WORLD,
        "backend": "gloo",
        "rounds": rounds,
        "rows": rows,
    }
    save("sync-quick" if is_quick else "sync", data)


def _rank(rank: int, port: int, rounds: int, shapes: tuple[tuple[int, ...], ...], results: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    store = distributed.TCPStore("127.0.0.1", port, WORLD, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    processes = [None] * WORLD
    distributed.all_gather_object(processes, os.getpid())
    rows = [_row(shape, rounds, processes) for shape in shapes]
    if rank == 0:
        results.put(rows)
    distributed.barrier()
    distributed.destroy_process_group()


def _row(shape: tuple[int, ...], rounds: int, processes: list[Any]) -> dict[str, Any]:
    sides = _sides(shape)
    for run in sides.values():  # the first exchange compares layers, and the first backward pass makes buckets
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with timing.others(processes) as busy:
        for _ in range(rounds):
            for name, run in sides.items():
                distributed.barrier()
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    race = timing.Race(seconds)
    times = {f"{name}_ms": 1e3 * race.time({name: 1}).median for name in sides}
    row = {
        "shape": list(shape),
        **times,
        "to_local": spread_of(race.ratio({"sync": 1}, {"torch_local": 1})),
        "exchange_to_all_reduce": spread_of(race.ratio({"sync": 1, "local": -1}, {"all_reduce": 1})),
        "bytes": list(_bytes(shape[1])),
        **busy,
    }
    if distributed.get_rank() == 0:
        milliseconds = ", ".join(f"{name} {times[f'{name}_ms']:.2f}" for name in sides)
        print(f"{'x'.join(map(str, shape)):<14} ms: {milliseconds}; sync {spread(row['to_local'])} x local", flush=True)
    return row


def _sides(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    kind = LAYERS[max(len(shape) - 3, 0)]
    ours, theirs = (nn.parallel.DistributedDataParallel(layer) for layer in (kind(shape[1], sync=True), _theirs(shape)))
    buffers = [torch.zeros(count // 4) for count in _bytes(shape[1])]
    return {
        "sync": _step(ours, shape),
        "local": _step(nn.parallel.DistributedDataParallel(kind(shape[1])), shape),
        "torch_local": _step(theirs, shape),
        "all_reduce": lambda: [distributed.all_reduce(buffer) for buffer in buffers],
    }


def _theirs(shape: tuple[int, ...]) -> nn.Module:
    return (nn.BatchNorm2d if len(shape) > 3 else nn.BatchNorm1d)(shape[1])


def _step(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    return lambda: layer(x).backward(grad)


def _bytes(channels: int) -> tuple[int, int]:
    """Bytes of a rank's message in the forward and in the backward pass: float64, with a fingerprint and a size."""
    return 8 * (2 + 3 * channels), 8 * (1 + 2 * channels)


if __name__ == "__main__":
    main()
