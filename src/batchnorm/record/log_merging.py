"""Merge the logs of replicas of one model into one log: of ranks, servers or seeds, from files or an object store.

Looks are aligned by their steps, and the values of one step are joined by ``joined_values``. Each replica counts once
at a step. Copies of a log have the same ``id``, so a log that is given twice, and steps that are in a log and in its
continuation elsewhere, count once. All lines are read into memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from uuid import uuid4

from batchnorm.files.remote import Address, is_remote, listed, opened
from batchnorm.record.joined_values import joined, joined_rows, number_of, way_of
from batchnorm.record.log_entry import Line
from batchnorm.record.log_reading import STREAM, Log
from batchnorm.record.log_writing import Writer, difference_of_layers

_TIERS = ("free", "probe", "lab")
_ORDER = ("progress", *_TIERS, "event")  # of lines with one step
_KEPT = ("model", "parameters", "schedule", "versions", "quantities")  # fields of ``start`` that a merged log has too


@final
@dataclass(frozen=True, slots=True)
class MergedLogs:
    """What ``merge_logs`` wrote.

    Attributes:
        folder: The folder of the merged log.
        replicas: The logs that were merged, by address, one for each replica.
        looks: Number of merged looks: lines of the kinds free, probe and lab.
        notes: Sentences about what was lost, counted once, or left out.
    """

    folder: Path
    replicas: tuple[str, ...]
    looks: int
    notes: tuple[str, ...]


@final
@dataclass(slots=True)
class _Replica:
    """The lines of one replica: by kind and step for looks and progress."""

    name: str
    start: Line
    ids: frozenset[str]
    reason: str = ""  # of the end; "" if the log has no end
    lines: dict[tuple[str, int], Line] = field(default_factory=dict)
    events: dict[str, Line] = field(default_factory=dict)  # by their contents

    @property
    def count(self) -> int:
        return len(self.ids)


def merge_logs(addresses: Iterable[Address], output: str | os.PathLike[str]) -> MergedLogs:
    """Merge the run logs of replicas of one model into a new log, and return what was merged.

    Logs that are damaged or cut off are read as far as they are whole, logs without a whole ``start`` line are left
    out, and ``notes`` says so. The logs are not changed. Arrays, which are percentiles of one replica's examples, are
    not merged. The new folder appears when it is complete.

    Args:
        addresses: Folders of logs, folders of such folders, patterns with * and ?, or addresses of fsspec such as
            s3://bucket/runs/*.
        output: The folder of the merged log, which must not exist. Its parent must.

    Raises:
        FileNotFoundError: If an address has no log, or the parent of ``output`` does not exist.
        ValueError: If the logs are of different models, other quantities or schema versions, naming what differs; if a
            replica is in two merged logs; if no log has lines; or if ``output`` exists.
        TypeError: If ``addresses`` is a single path.
        OSError: If an address cannot be read, or the log cannot be written.
        ModuleNotFoundError: If fsspec, or its package for a protocol, is not installed.
    """
    if isinstance(addresses, (str, os.PathLike)):
        raise TypeError(f"merge_logs needs a list of addresses, got {addresses!r}. Put it into a list.")
    place = _free(Path(output))
    with ExitStack() as stack:
        notes: list[str] = []
        logs = [(name, log) for name, log in _logs(addresses, stack) if _has_start(name, log, notes)]
        if not logs:
            raise ValueError(f"expected logs with lines, got {'; '.join(notes) or 'no address'}. Give logs of runs.")
        _check_schemas(logs)
        replicas = _replicas(logs, notes)
        notes += [f"{name}: {lost}" for name, log in logs if (lost := _lost(log))]
        lines, left_out = _merged(replicas)
        notes += _about_left_out(left_out, logs)
        _write(place, logs[0][1].start, replicas, lines)
    return MergedLogs(
        place, tuple(each.name for each in replicas), sum(kind in _TIERS for kind, _ in lines), tuple(notes)
    )


def _free(output: Path) -> Path:
    if output.exists():
        raise ValueError(f"{output} exists already. Name a new folder for the merged log.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: there is no folder {output.parent}. Make it first.")
    return output


# -- reading -----------------------------------------------------------------------------------------------------------


def _logs(addresses: Iterable[Address], stack: ExitStack) -> Iterator[tuple[str, Log]]:
    """The logs at the addresses with their names, each file once; remote logs are copied into a temporary folder."""
    seen: set[str] = set()
    for address in addresses:
        found = [each for each in listed(address) if each.replace("\\", "/").rpartition("/")[2] == STREAM]
        if not found:
            raise FileNotFoundError(
                f"expected run logs at {os.fspath(address)}, got no {STREAM} there. Give folders that "
                "watch(model, log=...) writes to."
            )
        for file in found:
            if file not in seen:
                seen.add(file)
                yield file[: -len(STREAM) - 1] or ".", Log(_local(file, stack))


def _local(file: str, stack: ExitStack) -> Path:
    """The folder of a log; for a remote log, that of a copy."""
    if not is_remote(file):
        return Path(file).parent
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="batchnorm-merge-")))
    with opened(file) as source, (folder / STREAM).open("wb") as target:
        shutil.copyfileobj(source, target)
    return folder


def _has_start(name: str, log: Log, notes: list[str]) -> bool:
    """Whether a log has a whole ``start`` line; if not, note that it is left out."""
    if not log.start:
        notes.append(f"{name}: left out, without a whole start line ({_lost(log) or 'it is empty'})")
    return bool(log.start)


def _lost(log: Log) -> str:
    """What of a log was not read, in words; "" if all of it was."""
    damaged = f"{log.damaged} damaged line{'s' * (log.damaged != 1)} skipped" if log.damaged else ""
    cut = f"the last {log.unfinished} bytes are a line that was cut off" if log.unfinished else ""
    return ", ".join(filter(None, (damaged, cut)))


# -- schemas -----------------------------------------------------------------------------------------------------------


def schema_hash(start: Line) -> str:
    """A digest of what logs must have in common to be merged: version, layers with settings, quantities."""
    layers = [[layer.get(key) for key in ("name", "channels", "kind", "eps", "momentum")] for layer in _layers(start)]
    content = [start.get("schema_version"), layers, start.get("quantities")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _layers(start: Line) -> list[Line]:
    layers = start.get("layers")
    return [each for each in layers if isinstance(each, dict)] if isinstance(layers, list) else []


def _check_schemas(logs: Sequence[tuple[str, Log]]) -> None:
    name, first = logs[0]
    for other_name, other in logs[1:]:
        if schema_hash(other.start) == schema_hash(first.start):
            continue
        if difference := _difference(first.start, other.start):
            raise ValueError(
                f"logs of one model can be merged, got {name} and {other_name}, which differ: {difference}. Merge the "
                "logs of each model by themselves."
            )


def _difference(first: Line, other: Line) -> str:
    """How a log differs from another, in words; "" if it only lacks fields that older versions did not write."""
    for key in ("schema_version", "quantities"):
        values = first.get(key), other.get(key)
        if None not in values and values[0] != values[1]:
            versions = [
                str((each.get("versions") or {}).get("batchnorm", "an unknown version")) for each in (first, other)
            ]
            return f"{key.replace('_', ' ')} {values[1]} (batchnorm {versions[1]}), not {values[0]} ({versions[0]})"
    return difference_of_layers(_layers(other), _layers(first), ("name", "channels", "kind", "eps", "momentum"))


# -- replicas ----------------------------------------------------------------------------------------------------------


def _replicas(logs: Sequence[tuple[str, Log]], notes: list[str]) -> list[_Replica]:
    """The logs by replica; of copies, the lines of the longest count first."""
    copies: dict[str, list[tuple[str, Log]]] = defaultdict(list)
    for name, log in logs:
        copies[log.identity].append((name, log))
    replicas = [_replica(own, each) for own, each in copies.items()]
    for each in copies.values():
        notes += [f"{name} is a copy of {each[0][0]}: its steps count once" for name, _ in each[1:]]
    owner: dict[str, str] = {}
    for replica in replicas:
        for own in replica.ids:
            if own in owner:
                raise ValueError(
                    f"each replica counts once, got one (id {own}) that is in {owner[own]} and in {replica.name}, a "
                    "merged log. Merge the logs of the replicas anew."
                )
            owner[own] = replica.name
    return replicas


def _replica(own: str, copies: Sequence[tuple[str, Log]]) -> _Replica:
    start = copies[0][1].start
    ids = [each for each in start.get("replicas") or [] if isinstance(each, str)]
    replica = _Replica(copies[0][0], start, frozenset(ids or [own]))
    for _, log in sorted(copies, key=lambda each: each[1].step):  # a later line replaces an earlier one
        _read(log, replica)
    return replica


def _read(log: Log, replica: _Replica) -> None:
    for kind in (*_TIERS, "progress"):
        for row in log.rows(kind):
            if _is_whole(row, kind, len(log.layers)):
                replica.lines[kind, row["step"]] = row
            else:
                log.damaged += 1
    for row in log.rows("event"):
        if _is_step(row):
            replica.events[json.dumps(row, sort_keys=True)] = row
    if log.is_finished and (ends := log.rows("end")):
        replica.reason = str(ends[-1].get("reason") or "finished")


def _is_step(row: object) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0


def _is_whole(row: Any, kind: str, layers: int) -> bool:
    """Whether a line has a step and numbers of the expected form."""
    if not _is_step(row) or not isinstance(row.get("values"), dict):
        return False
    values = row["values"].values()
    if kind == "progress":
        return all(map(_is_number, values))
    model = row.get("model") or {}
    rows = all(isinstance(v, list) and len(v) == layers and all(map(_is_number, v)) for v in values)
    return rows and isinstance(model, dict) and all(map(_is_number, model.values()))


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


# -- merging -----------------------------------------------------------------------------------------------------------


def _merged(replicas: Sequence[_Replica]) -> tuple[list[tuple[str, Line]], set[str]]:
    """The merged lines, each with its kind, in the order of steps; and the names of quantities that were left out."""
    left_out: set[str] = set()
    found = []
    for kind, step in {key for each in replicas for key in each.lines}:
        rows = [(each.lines[kind, step], each.count) for each in replicas if (kind, step) in each.lines]
        found.append((kind, _of_step(kind, step, rows, left_out)))
    for each in replicas:
        found += [("event", {**row, "message": f"{each.name}: {row.get('message')}"}) for row in each.events.values()]
    return sorted(found, key=lambda line: (line[1]["step"], _ORDER.index(line[0]))), left_out


def _of_step(kind: str, step: int, rows: Sequence[tuple[Line, int]], left_out: set[str]) -> Line:
    """The line for the lines that replicas wrote at one step."""
    seconds = max(_seconds(row) for row, _ in rows)
    if kind == "progress":
        values = joined([(row["values"], n) for row, n in rows], lambda _: "mean", set())
        return {"step": step, "seconds": seconds, "cost": _cost(rows), "values": values}
    weighted = [(row, int(_number((row.get("model") or {}).get("replicas")) or n)) for row, n in rows]
    values = joined_rows([(row["values"], n) for row, n in weighted], left_out)
    model = [({k: v for k, v in (row.get("model") or {}).items() if k != "replicas"}, n) for row, n in weighted]
    about = joined(model, way_of, left_out) | {"replicas": sum(n for _, n in weighted)}
    return {"step": step, "seconds": seconds, "values": values, "model": about}


def _seconds(row: Line) -> float:
    return _number(row.get("seconds")) or 0.0


def _cost(rows: Sequence[tuple[Line, int]]) -> float | None:
    return number_of([(_number(row.get("cost")), n) for row, n in rows], "mean")


def _number(value: object) -> float | None:
    return float(value) if value is not None and _is_number(value) else None  # type: ignore[arg-type]


def _about_left_out(left_out: set[str], logs: Sequence[tuple[str, Log]]) -> list[str]:
    arrays = ["percentiles"] if any(log.count("arrays") for _, log in logs) else []
    names = [*sorted(left_out), *arrays]
    return [f"left out, since they describe one replica: {', '.join(names)}. Read them in its log"] if names else []


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(place: Path, start: Line, replicas: Sequence[_Replica], lines: Iterable[tuple[str, Line]]) -> None:
    """Write the log into a folder beside ``place``, and give the folder its name when it is complete."""
    folder = place.with_name(f".{place.name}.{uuid4().hex[:8]}")
    about = {key: start[key] for key in _KEPT if key in start}
    about |= {"replicas": sorted(own for each in replicas for own in each.ids), "merged": [r.name for r in replicas]}
    times = [time for each in replicas if (time := _number(each.start.get("time"))) is not None]
    try:
        writer = Writer(folder, _layers(start), **about, **({"time": min(times)} if times else {}))
        for kind, line in lines:
            writer.copy(kind, line)
        ended = [each.reason for each in replicas if each.reason]
        if len(ended) == len(replicas):
            writer.end(max((line["step"] for _, line in lines), default=0), "; ".join(dict.fromkeys(ended)))
        writer.close()
        folder.rename(place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
