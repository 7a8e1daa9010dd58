"""Times our layers against everything else that computes batch norm here: python benchmarks/bench_speed.py [--quick].

Prints every case and the goals, and writes benchmarks/results/speed.json (--quick: speed-quick.json). Contestants take
turns within rounds, as ``batchnorm.bench`` does it; other libraries take theirs in processes of their own. All run with
two threads and an allocator that keeps large blocks; one row shows what that allocator does.
"""

from __future__ import annotations

import copy
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from contest import layer_row, question, times
from goals import ENTRIES, Entry, judged
from networks import NETWORKS, training_step, without_norm
from peers import PEERS, Peer
from report import save, tell_goals, tell_load, tell_row, told

import batchnorm as bn
from batchnorm import bench, paired_timing
from batchnorm.experiment.environment import environment
from batchnorm.surgery import convert

if TYPE_CHECKING:
    from collections.abc import Iterator

THREADS = 2
FULL = {"rounds": 31, "budget": 5.0}  # of a case; it ends after so many seconds
QUICK = {"rounds": 5, "budget": 0.5}


def main() -> None:
    quick, start = "--quick" in sys.argv, time.perf_counter()
    torch.set_num_threads(THREADS)
    tuning = bn.tune_allocator()
    limits = QUICK if quick else FULL
    with _peers() as peers:
        rows = [
            tell_row(layer_row(entry, peers, compiled=entry.compiled and not quick, **limits))
            for entry in ENTRIES
            if entry.quick or not quick
        ]
    rows += [
        tell_row(_network_row(name, channels_last=last, quick=quick))
        for name in NETWORKS
        for last in (False, True)
        if not quick or (name == "ResNet-20" and not last)
    ]
    goals = judged(rows)
    effect = None if quick else _allocator_effect(**limits)
    tell_goals(goals)
    tell_load(rows)
    versions = {p.name: {"not measured": p.missing} if p.missing else {"version": p.version} for p in peers}
    data = {"environment": environment(), "threads": THREADS, "quick": quick, "peers": versions}
    data |= {"tuned": bool(tuning), "not_tuned": tuning.reason}
    data |= {"rows": rows, "goals": goals, "allocator": effect, "seconds": round(time.perf_counter() - start)}
    save("speed-quick" if quick else "speed", {"schema_version": bench.SCHEMA_VERSION} | data)


@contextmanager
def _peers() -> Iterator[list[Peer]]:
    peers = [Peer(name, THREADS) for name in PEERS]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def _network_row(name: str, *, channels_last: bool, quick: bool) -> dict[str, Any]:
    """One training step: torch.nn's network, ours converted from it, ours that keeps less, and one without norms."""
    make, classes, shape = NETWORKS[name]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    theirs, x = make().to(memory_format=layout), torch.randn(shape).contiguous(memory_format=layout)
    models = {
        "ours": convert(theirs, fuse=True, example=x[:8]),
        "ours, memory saved": convert(theirs, fuse=True, example=x[:8], memory="save"),
        "torch": theirs,
        "no norm": without_norm(copy.deepcopy(theirs)),
    }
    steps = {side: paired_timing.timed(training_step(model, x, classes)) for side, model in models.items()}
    with paired_timing.others() as busy:
        run = paired_timing.race(steps, rounds=3 if quick else 21, budget=30)
    return {
        "case": name,
        "words": f"training step of {name}",
        "shape": list(shape),
        "dtype": "float32",
        "channels_last": channels_last,
        "bytes": x.nbytes,
        "rounds": len(run.seconds["ours"]),
        **busy,
        "contestants": {side: times(run, side, {}) for side in models},
    }


def _allocator_effect(**limits: Any) -> dict[str, Any]:
    """One step on 51 MB in four processes: ours and torch's, under glibc's own settings and tuned."""
    entry = Entry("step", (64, 64, 56, 56))
    sides = [("ours", True), ("torch", True), ("ours", False), ("torch", False)]
    names = {side: side[0] + (", tuned" if side[1] else ", default") for side in sides}
    workers = {names[side]: Peer("torch", THREADS, tuned=side[1]) for side in sides}
    try:
        for (side, _), worker in zip(sides, workers.values(), strict=True):
            worker.prepare(question(entry) | {"side": side})
        run = paired_timing.race({name: worker.round for name, worker in workers.items()}, **limits)
    finally:
        for worker in workers.values():
            worker.close()
    print("\nBN + ReLU forward + backward, 64x64x56x56, allocator by default and tuned")
    result = {name: _allocated(run, name) for name in workers}
    for name, values in result.items():
        print(f"    {name:<16} {told(values)}")
    return {"case": entry.case, "shape": list(entry.shape), "contestants": result}


def _allocated(run: paired_timing.Race, name: str) -> dict[str, Any]:
    """As contest.times, relative to ours under the tuned allocator."""
    renamed = paired_timing.Race({{"ours, tuned": "ours"}.get(key, key): values for key, values in run.seconds.items()})
    return times(renamed, {"ours, tuned": "ours"}.get(name, name), {})


if __name__ == "__main__":
    main()
