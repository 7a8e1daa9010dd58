"""Rounds: contestants that take turns, and what their times say about each other.

A shared machine changes from one second to the next, so times compare within a round only. A round runs every
contestant once, in an order of its own, and a ratio is the median over rounds of the ratios inside each. A machine that
others use at the same time favours whoever does not wait for all of its threads, so their share is measured.
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

Contestant = Callable[[], float]  # runs, and returns the seconds of one call

ROUNDS = 21
BUSY = 0.05  # share of all processors in use by others from which on results say so
_LEAST_ROUNDS = 3
_IDLE = (3, 4)  # idle and iowait in the first line of /proc/stat


def timed(one_call: Callable[[], object], *, at_least: float = 2e-3) -> Contestant:
    """A contestant that repeats a call, warmed up here, until it has taken about ``at_least`` so many seconds."""

    def contestant(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            one_call()
        return (time.perf_counter() - start) / repeats

    one_call()
    repeats = max(1, min(ceil(at_least / max(contestant(2), 1e-9)), 1000))
    return lambda: contestant(repeats)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of two values or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Race:
    """Seconds of one call of every contestant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, parts: Mapping[str, int]) -> Spread:
        """Seconds of a weighted sum of contestants."""
        return Spread.of(self._sums(parts))

    def ratio(self, above: Mapping[str, int], below: Mapping[str, int]) -> Spread:
        """The ratio of two weighted sums of contestants, taken inside each round."""
        return Spread.of([a / b for a, b in zip(self._sums(above), self._sums(below), strict=True)])

    def _sums(self, parts: Mapping[str, int]) -> list[float]:
        rounds = zip(*(self.seconds[part] for part in parts), strict=True)
        return [sum(w * s for w, s in zip(parts.values(), seconds, strict=True)) for seconds in rounds]


def race(contestants: Mapping[str, Contestant], *, rounds: int, budget: float = float("inf")) -> Race:
    """Every contestant once in each of ``rounds`` rounds; fewer, but 3, once ``budget`` seconds are used up."""
    if rounds < _LEAST_ROUNDS:
        raise ValueError(
            f"rounds must be {_LEAST_ROUNDS} or more, got {rounds}: fewer show no spread. Leave it out for {ROUNDS}."
        )
    order, shuffle, end = list(contestants), random.Random(0).shuffle, time.perf_counter() + budget  # noqa: S311
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)  # nobody always finds the caches as the same neighbour left them
        for name in order:
            seconds[name].append(contestants[name]())
    return Race(seconds)


@contextmanager
def others(workers: Sequence[int] = ()) -> Iterator[dict[str, float]]:
    """A dictionary that at the end of the block has ``others``: their share of all processors.

    This process and those with the given ids do not count; where the system does not tell, the dictionary stays empty.
    """
    found: dict[str, float] = {}
    before, start = _foreign(workers), time.perf_counter()
    yield found
    after, passed = _foreign(workers), time.perf_counter() - start
    if before is not None and after is not None:
        found["others"] = round(max(after - before, 0) / (passed * (os.cpu_count() or 1)), 3)


def _foreign(workers: Sequence[int]) -> float | None:
    """Processor seconds since the start of the machine that were not ours, stolen ones of a host included."""
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
