"""Paired timing: contestants, which are timed calls, take turns in rounds, and their times are compared within a round.

The speed of a shared machine changes from one second to the next, so only times of one round are compared. A round runs
every contestant once, in a random order. The ratio of two contestants is the median over rounds of the ratios within a
round. Other programs on the machine slow down every call, and most of all a call that waits for all of its threads. So
the share of the processors that other programs use is measured.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

Contestant = Callable[[], float]  # calls something, and returns the seconds of one call

ROUNDS = 21
BUSY = 0.05  # if other programs use a larger share of all processors, results say so
_LEAST_ROUNDS = 3
_IDLE = (3, 4)  # idle and iowait in the first line of /proc/stat


def timed(one_call: Callable[[], object], *, aimed_seconds: float = 2e-3) -> Contestant:
    """A contestant that repeats a call for about ``aimed_seconds``, but at most 1,000 times.

    The call is first made three times: to warm up, and to estimate its time.
    """

    def contestant(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            one_call()
        return (time.perf_counter() - start) / repeats

    one_call()
    repeats = max(1, min(ceil(aimed_seconds / max(contestant(2), 1e-9)), 1000))
    return lambda: contestant(repeats)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Race:
    """Seconds of one call of every contestant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, parts: Mapping[str, int]) -> Spread:
        """Seconds of a weighted sum of contestants; ``parts`` has the weight of each, by name."""
        return Spread.of(self._sums(parts))

    def ratio(self, above: Mapping[str, int], below: Mapping[str, int]) -> Spread:
        """The ratio of two weighted sums of contestants, computed within each round."""
        return Spread.of([a / b for a, b in zip(self._sums(above), self._sums(below), strict=True)])

    def _sums(self, parts: Mapping[str, int]) -> list[float]:
        rounds = zip(*(self.seconds[part] for part in parts), strict=True)
        return [sum(w * s for w, s in zip(parts.values(), seconds, strict=True)) for seconds in rounds]


def race(contestants: Mapping[str, Contestant], *, rounds: int, budget: float = float("inf")) -> Race:
    """Runs every contestant once in each of ``rounds`` rounds; after ``budget`` seconds and 3 rounds it stops early.

    Raises:
        ValueError: If ``rounds`` is less than 3.
    """
    if rounds < _LEAST_ROUNDS:
        raise ValueError(
            f"rounds must be {_LEAST_ROUNDS} or more, because a spread is shown, got {rounds}. Pass {ROUNDS}."
        )
    order, shuffle, end = list(contestants), random.Random(0).shuffle, time.perf_counter() + budget  # noqa: S311
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)  # so that no contestant always runs after the same one, with its data in the caches
        for name in order:
            seconds[name].append(contestants[name]())
    return Race(seconds)


@contextmanager
def others(workers: Sequence[int] = ()) -> Iterator[dict[str, float]]:
    """A block that measures which share of all processors other programs use.

    At the end of the block the dictionary that it yields has the share as ``others``; if the system does not report it,
    the dictionary stays empty. Other programs are all but this process and the processes with the ids ``workers``.
    """
    shares: dict[str, float] = {}
    before, start = _seconds_of_others(workers), time.perf_counter()
    yield shares
    after, passed = _seconds_of_others(workers), time.perf_counter() - start
    if before is not None and after is not None:
        shares["others"] = round(max(after - before, 0) / (passed * (os.cpu_count() or 1)), 3)


def _seconds_of_others(workers: Sequence[int]) -> float | None:
    """Processor seconds of other programs since the machine started; None if the system does not report them.

    On a virtual machine they include the time that its host gave to others ("steal").
    """
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = sum(_seconds(pid) for pid in (os.getpid(), *workers))
    except (OSError, ValueError):
        return None
    return (sum(fields) - sum(fields[i] for i in _IDLE)) / ticks - own


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime
