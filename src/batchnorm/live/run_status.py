"""The status of a training: its step, its speed, the cost of measuring, and whether it still runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from batchnorm.live.page_data import is_step, number, text
from batchnorm.record import Log
from batchnorm.record.log_entry import JsonValue

# a running training writes once a second; a first step that compiles, or a validation, takes longer
_SILENCE = 30.0  # seconds without a new line
_PROGRESS_LINES = 12  # progress lines for the mean speed
_LOCKS = Path("/proc/locks")


def status(log: Log) -> dict[str, JsonValue]:
    """The training's status as numbers, and its state: "finished", "writing" or "silent"."""
    progress = log.rows("progress", first=max(0, log.count("progress") - _PROGRESS_LINES))
    updated = _updated(log, progress)
    state, reason = _state(log, updated)
    return {
        "step": log.step,
        "rate": _rate(log, progress),
        "cost": number(progress[-1].get("cost")) if progress else None,
        "updated": updated,
        "now": time.time(),
        "state": state,
        "reason": reason,
        "damaged": log.damaged,
        "measured_on": measured_on(log.start),
    }


def measured_on(start: Mapping[str, JsonValue]) -> str:
    """Whose batches a log describes, such as "rank 0 of 4" or "3 replicas"; "" if its training has one process."""
    if isinstance(replicas := start.get("replicas"), list):
        return f"{len(replicas)} replicas"
    ranks, rank = start.get("ranks"), start.get("rank")
    if not isinstance(ranks, list) or not is_step(rank):
        return ""
    synchronized, layers = number(start.get("synchronized")) or 0, start.get("layers")
    shared = f"; all ranks in {synchronized:g} synchronized layers" if synchronized else ""
    is_shared = isinstance(layers, list) and synchronized == len(layers)
    others = len(ranks) if ranks == [*range(len(ranks))] else f"ranks {', '.join(map(str, ranks))}"
    return f"all {len(ranks)} ranks" if is_shared else f"rank {rank} of {others}{shared}"


def _updated(log: Log, progress: list[dict[str, JsonValue]]) -> float:
    """Unix time of the last line with a time; if there is none, that of the file, which copying may have changed."""
    last = [*progress[-1:]]
    for kind in ("free", "probe", "lab", "event", "end"):
        last += log.rows(kind, first=max(0, log.count(kind) - 1))
    times = [seconds for row in last if (seconds := number(row.get("seconds"))) and seconds > 0]
    return max(times) if times else (log.folder / "record.jsonl").stat().st_mtime


def _rate(log: Log, progress: list[dict[str, JsonValue]]) -> float | None:
    """Steps per second over the last progress lines of this start.

    None if there are fewer than two such lines, or if the last line is not later than the first.
    """
    start = number(log.start.get("time")) or 0.0
    marks = [(number(row.get("seconds")), number(row.get("step"))) for row in progress]
    points = [(at, step) for at, step in marks if at is not None and step is not None and at >= start]
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


def _state(log: Log, updated: float) -> tuple[str, str]:
    if log.is_finished:
        ends = log.rows("end", first=log.count("end") - 1)
        return "finished", (text(ends[-1].get("reason")) if ends else None) or "finished"
    if _is_held(log.folder / "record.jsonl") or time.time() - updated < _SILENCE:
        return "writing", ""
    return "silent", ""


def _is_held(path: Path) -> bool:
    """Whether a process on this machine holds the writer's lock on the log; the lock itself is not touched.

    False on systems without /proc/locks. Trying the lock would be simpler, but a training that starts at that moment
    could not get the lock.
    """
    with suppress(OSError):
        inode = f":{path.stat().st_ino} "
        return any("FLOCK" in line and " WRITE " in line and inode in line for line in _LOCKS.read_text().splitlines())
    return False
