"""Other detectors on the same streams: python benchmarks/shift/bench_peers.py [--quick | --times] [PEER, WORLD, SIZE].

A hundred clean streams of 2,000 examples of each of seventeen worlds, each with clean examples of its own to compare
with (1,000, or 200 where a sequential test takes so few), and forty that change after 384 where a world has shifts.
What peers are given is told in ``peer_worker`` and ``CONDITIONAL``: what a network computes anyway, since none of them
watches layers. Ours has the same examples, and the checkpoint. Packages run in the Python that an environment variable
names, as they do not share one. With --times, what one example takes beside ours. Written to
benchmarks/results/shift_peers.json, where peers and worlds that are not measured stay as they were.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import conditional
import numpy as np
import torch
from bench_shift import ALL, ALPHA
from peer_worker import DETECTORS, ERT, WINDOW
from pools import ROUND, Streams, observations, prepared
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import FOLDER, save

from batchnorm.experiment.environment import environment
from batchnorm.shift.principal_components import halves
from batchnorm.shift.stream import LOGGER, Stream

STREAMS, CHANGED, LENGTH, BEFORE = 100, 40, 2000, 6 * WINDOW
POOL = 20_000
SIZES = (1000, 200)
BESIDE = 50
BLOCKS = 21  # of 64 examples each, that times are the medians of
PYTHONS = {
    "alibi-detect": "BENCH_PYTHON_ALIBI",
    "torchdrift": "BENCH_PYTHON_TORCHDRIFT",
    "frouros": "BENCH_PYTHON_FROUROS",
    "online-cp": "BENCH_PYTHON_SEQUENTIAL",
    "ville": "BENCH_PYTHON_SEQUENTIAL",
    "expectation": "BENCH_PYTHON_SEQUENTIAL",
}
OURS = {"ours, checkpoint": 0, "ours, calibrated with 1000": 1000, "ours, calibrated with 200": 200}
# what conditional martingales are given, and whether ties are broken at random
CONDITIONAL = {
    "conditional martingale, entropy": ("entropy", False),
    "conditional martingale, features": ("features", False),
    "conditional martingale, our scores": ("scores", False),
    "conditional martingale, our scores, ties broken": ("scores", True),
}
SEQUENTIAL = ("online-cp", "ville", "expectation")  # also with 200


def main() -> None:
    torch.set_num_threads(1)
    LOGGER.setLevel("CRITICAL")
    names = [name for name in ALL if name in sys.argv] or list(ALL)
    peers = [peer for peer in peers_() if peer in sys.argv] or peers_()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            of = Observed(name, quick="--quick" in sys.argv)
            of.save(Path(folder))
            for peer in peers if "--times" not in sys.argv else []:
                for row, found in measured(peer, of, folder).items():
                    keep(["rows", row, name], found)
                    print(f"{name:<22}{row:<52}{found if isinstance(found, str) else line(found)}", flush=True)
            if "--times" in sys.argv:
                keep(["times", name], times(peers, of, folder))


def peers_() -> list[str]:
    """All of them, ours among them."""
    return [*OURS, *CONDITIONAL, *DETECTORS]


def sizes_() -> list[int]:
    """Clean examples to compare with, if a peer takes few."""
    return [n for n in SIZES if str(n) in sys.argv] or list(SIZES)


def keep(where: list[str], found: Any) -> None:
    """Into the file, beside what is there."""
    path = FOLDER / "shift_peers.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {"environment": environment(), "streams": STREAMS, "changed": CHANGED, "length": LENGTH}
    results |= {"before": BEFORE, "window": WINDOW, "alpha": ALPHA, "ert": ERT}
    place = results
    for name in where[:-1]:
        place = place.setdefault(name, {})
    place[where[-1]] = found
    save("shift_peers", results)


class Observed:
    """A world's observations, and which of them each stream is made of.

    Args:
        name: Of the world.
        quick: A tenth of the streams.
    """

    def __init__(self, name: str, *, quick: bool = False) -> None:
        self.world, streams = ALL[name], STREAMS // (10 if quick else 1)
        self.changed = CHANGED // (10 if quick else 1)
        self.net, self.monitor = prepared(self.world)
        samplers = {"clean": self.world.clean, **self.world.shifts}
        sizes = {of: POOL if of == "clean" else POOL // 5 for of in samplers}
        seeds = {of: 31 + i for i, of in enumerate(samplers)}
        self.pools = {of: observations(self.monitor, s, sizes[of], seed=seeds[of]) for of, s in samplers.items()}
        self.entropies = {of: entropies(self.net, s, sizes[of], seed=seeds[of]) for of, s in samplers.items()}
        random = torch.Generator().manual_seed(17)
        self.calibration = torch.randint(POOL, (streams, max(SIZES)), generator=random)
        self.clean = torch.randint(POOL, (streams, LENGTH), generator=random)
        self.shifted = torch.randint(POOL // 5, (self.changed, LENGTH - BEFORE), generator=random)
        self.known: dict[tuple[int, int], Any] = {}

    def save(self, folder: Path) -> None:
        """For the workers."""
        last = self.monitor.reference.sizes[-1]
        arrays = {f"features.{of}": z[:, -last:].float().numpy() for of, (z, _) in self.pools.items()}
        arrays |= {f"entropy.{of}": values.float().numpy() for of, values in self.entropies.items()}
        arrays |= {name: getattr(self, name).numpy() for name in ("calibration", "clean", "shifted")}
        np.savez(folder / "world.npz", before=np.array(BEFORE), **arrays)

    def streams(self, of: str, pool: dict[str, Any]) -> list[Any]:
        """Rows of every stream: clean ones, or clean ones and then changed ones."""
        if of == "clean":
            return [pool["clean"][at] for at in self.clean]
        changed = zip(self.clean[: self.changed], self.shifted, strict=True)
        return [torch.cat([pool["clean"][at[:BEFORE]], pool[of][to]]) for at, to in changed]


@torch.no_grad()
def entropies(net: Any, sampler: Any, n: int, seed: int) -> torch.Tensor:
    """Entropy of the network's predictions for the examples that ``observations`` sees, (n,)."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.cat([net(sampler(min(1000, n - i), random)[0]) for i in range(0, n, 1000)])
    return torch.distributions.Categorical(logits=logits.double()).entropy()


def measured(peer: str, of: Observed, folder: str) -> dict[str, Any]:
    """Rows of a peer: with 1,000 clean examples and, if it takes them, with 200."""
    if peer in OURS:
        return {peer: told({change: ours(of, change, OURS[peer]) for change in of.pools})}
    if peer in CONDITIONAL:
        return {
            f"{peer}, {n}": told({change: by_conditional(of, change, n, *CONDITIONAL[peer]) for change in of.pools})
            for n in sizes_()
        }
    sizes = sizes_() if peer.startswith(SEQUENTIAL) else SIZES[:1]
    found = {f"{peer}, {n}": asked(peer, folder, n) for n in sizes}
    return {row: times if isinstance(times, str) else told(times["world"]) for row, times in found.items()}


def ours(of: Observed, change: str, calibration: int) -> list[int | None]:
    """Examples until it rang, of each stream; looked at after every 8."""
    z = torch.stack(of.streams(change, {name: pool[0] for name, pool in of.pools.items()}), 1)
    q = torch.stack(of.streams(change, {name: pool[1] for name, pool in of.pools.items()}), 1)
    times: list[int | None] = []
    for start in range(0, z.shape[1], BESIDE):
        at = slice(start, start + BESIDE)
        own = [known(of, i, calibration) for i in range(start, min(start + BESIDE, z.shape[1]))]
        beside, rang = Streams(own), [None] * len(own)
        for i in range(0, LENGTH, ROUND):
            reached = beside.observe(z[i : i + ROUND, at], q[i : i + ROUND, at]) >= -math.log(ALPHA)
            rang = [r or (i + ROUND if now else None) for r, now in zip(rang, reached.tolist(), strict=True)]
            if all(rang):
                break
        times += rang
    return times


def known(of: Observed, stream: int, calibration: int) -> Any:
    """The reference of one stream."""
    if not calibration:
        return of.monitor.reference
    if (stream, calibration) not in of.known:
        at, (z, q) = of.calibration[stream, :calibration], of.pools["clean"]
        of.known[stream, calibration] = of.monitor.reference.calibrated(z[at], q[at])
    return of.known[stream, calibration]


def by_conditional(of: Observed, change: str, size: int, given: str, is_broken: bool) -> list[int | None]:
    """Examples until the martingale of each stream reached 1 / alpha."""
    streams = scored(of, change, size, given)
    times: list[int | None] = []
    random = np.random.default_rng(2) if is_broken else None
    while chunk := [next(streams, None) for _ in range(BESIDE)]:
        if not (chunk := [pair for pair in chunk if pair is not None]):
            break
        u = np.stack([conditional.placed(*pair, random) for pair in chunk], 1)
        reached = conditional.walked(u, len(chunk[0][0]), ALPHA) >= -math.log(ALPHA)
        times += [int(one.argmax()) + 1 if one.any() else None for one in reached.T]
    return times


def scored(of: Observed, change: str, size: int, given: str) -> Any:
    """Reference and stream of scores, for each stream: (n, scores), (examples, scores)."""
    last = of.monitor.reference.sizes[-1]
    if given == "scores":
        z, q = ({name: pool[i] for name, pool in of.pools.items()} for i in (0, 1))
        for i, (zs, qs) in enumerate(zip(of.streams(change, z), of.streams(change, q), strict=True)):
            at = of.calibration[i, :size]
            own, rest = known(of, i, size).clean.scores, at[halves(size)[1]]
            reference = own.of(z["clean"][rest], q["clean"][rest])
            kept = reference.amin(0) < reference.amax(0)  # layers of few channels have components that are always 0
            yield reference[:, kept].numpy(), own.of(zs, qs)[:, kept].numpy()
        return
    pool = {name: values[:, None] for name, values in of.entropies.items()}
    pool = pool if given == "entropy" else {name: z[:, -last:] for name, (z, _) in of.pools.items()}
    for i, stream in enumerate(of.streams(change, pool)):
        yield pool["clean"][of.calibration[i, :size]].numpy(), stream.numpy()


def asked(name: str, folder: str, size: int) -> Any:
    """A peer's answer, or why there is none."""
    if isinstance(command := command_of(name, folder, size), str):
        return command
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"not measured: {done.stderr.strip().splitlines()[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def command_of(name: str, folder: str, size: int) -> list[str] | str:
    """The command of a worker, or why there is none."""
    variable = PYTHONS[name.split(" ", maxsplit=1)[0]]
    if not (python := os.environ.get(variable)):
        return f"not measured: {variable} is not set"
    return [python, str(Path(__file__).with_name("peer_worker.py")), name, folder, str(size)]


def told(found: dict[str, list[int | None]]) -> dict[str, Any]:
    """Clean streams that rang, with the upper end of the exact 95 % interval; delays of the others."""
    rang = sum(t is not None for t in found["clean"])
    interval = stats.binomtest(rang, len(found["clean"])).proportion_ci(0.9, method="exact")
    told: dict[str, Any] = {"clean": {"streams": len(found["clean"]), "rang": rang, "upper_95": interval.high}}
    for change, times in found.items():
        if change != "clean":
            told[change] = delay(times)
    return told


def delay(times: list[int | None]) -> dict[str, Any]:
    """Examples from the change to the alarm: the median over streams that had not rung before it, if half did."""
    early = sum(t is not None and t <= BEFORE for t in times)
    late = sorted(math.inf if t is None else t - BEFORE for t in times if t is None or t > BEFORE)
    median = statistics.median(late) if late else math.inf
    rang = sum(math.isfinite(t) for t in late)
    return {"streams": len(times), "early": early, "rang": rang, "median": median if math.isfinite(median) else None}


def line(found: dict[str, Any]) -> str:
    """On a terminal."""
    clean = found["clean"]
    parts = [f"clean {clean['rang']} of {clean['streams']} (up to {clean['upper_95']:.1%})"]
    parts += [f"{of} {row['median']} ({row['rang']})" for of, row in found.items() if of != "clean"]
    return "; ".join(parts)


def times(peers: list[str], of: Observed, folder: str) -> dict[str, Any]:
    """Time of one example beside ours calibrated with 1,000: ratios of medians of blocks in turn."""
    found: dict[str, Any] = {}
    for peer in peers:
        with ExitStack() as stack:
            own = clock(fed(of, max(SIZES)), of)
            other = of_peer(peer, of, folder, stack)
            found[peer] = other if isinstance(other, str) else compared(other, own)
        print(f"{peer:<52}{found[peer]}", flush=True)
    return found


def compared(other: Callable[[], float], own: Callable[[], float]) -> dict[str, float] | str:
    """Microseconds of one example, theirs and ours; the first block of each is not counted."""
    try:
        pairs = [(other(), own()) for _ in range(BLOCKS)][1:]
    except ValueError:
        return "not measured: its worker ended"
    theirs, mine = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return {"ratio": theirs / mine, "us": theirs / WINDOW * 1e6, "ours_us": mine / WINDOW * 1e6}


def of_peer(peer: str, of: Observed, folder: str, stack: ExitStack) -> Callable[[], float] | str:
    """Seconds of a peer's next 64 examples, whenever it is called; or why there are none."""
    if peer in OURS:
        return clock(fed(of, OURS[peer]), of)
    if peer in CONDITIONAL:
        return clock(fed_conditional(of, CONDITIONAL[peer][0]), of)
    if isinstance(command := command_of(peer, folder, max(SIZES)), str):
        return command
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = stack.enter_context(subprocess.Popen([*command, "--times"], text=True, **pipes))  # type: ignore[call-overload]

    def answered() -> float:
        print(file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    return answered


def clock(feed: Callable[[torch.Tensor], None], of: Observed) -> Callable[[], float]:
    """Seconds of the next 64 examples, whenever it is called."""
    blocks = iter(of.clean[:, :WINDOW])

    def timed() -> float:
        at = next(blocks)
        start = time.perf_counter()
        feed(at)
        return time.perf_counter() - start

    return timed


def fed(of: Observed, calibration: int) -> Callable[[torch.Tensor], None]:
    """Ours, eight examples at a time."""
    stream = Stream(known(of, 0, calibration), "example", alpha=ALPHA, arl=None)
    z, q = of.pools["clean"]

    def feed(at: torch.Tensor) -> None:
        for eight in at.split(ROUND):
            stream.observe(z[eight], q[eight])

    return feed


def fed_conditional(of: Observed, given: str) -> Callable[[torch.Tensor], None]:
    """A conditional martingale, eight examples at a time from one to the next."""
    reference, _ = next(scored(of, "clean", max(SIZES), given))
    ordered, (z, q), last = np.sort(reference, 0), of.pools["clean"], of.monitor.reference.sizes[-1]
    own, at = known(of, 0, max(SIZES)).clean.scores, of.calibration[0]
    varied = own.of(z[at], q[at])
    kept = varied.amin(0) < varied.amax(0)
    eps = conditional.band(len(reference), ALPHA / reference.shape[1])
    state = [np.zeros(reference.shape[1]), np.ones(reference.shape[1]), np.zeros(reference.shape[1])]

    def feed(at: torch.Tensor) -> None:
        for eight in at.split(ROUND):
            if given == "scores":
                rows = own.of(z[eight], q[eight])[:, kept].numpy()
            else:
                rows = (of.entropies["clean"][eight, None] if given == "entropy" else z[eight, -last:]).numpy()
            for row in rows:
                u = np.array([np.searchsorted(column, x, "right") for column, x in zip(ordered.T, row, strict=True)])
                u = u / len(ordered)
                state[2] += np.log(conditional.factor(u, np.where(np.abs(state[0]) < conditional.C, 0, state[0]), eps))
                state[0], state[1] = conditional.stepped(u, state[0], state[1], eps)

    return feed


if __name__ == "__main__":
    main()
