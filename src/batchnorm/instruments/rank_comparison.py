"""Ranks compared: how far the stored statistics of the processes differ that train one model, while they train.

After common steps, the same on every rank, each rank leaves a copy of its stored statistics as a notice
(``processes.notices``). The first rank reads the copies some steps later, when all have arrived. No rank waits, so a
rank that does not watch, or has ended, is only missing from the comparison.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from batchnorm.instruments.look_schedule import Schedule
from batchnorm.instruments.snapshots import Layers, Snapshot
from batchnorm.instruments.training_events import TrainingEvent, not_watching, stopped_watching
from batchnorm.processes.notices import Notices
from batchnorm.processes.stored_differences import differences_in_sd
from batchnorm.record import Record

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FIRST = 10  # steps before the first comparison, if ``every`` is larger
_SECONDS = 1.0  # how long the first rank waits for the last copies, at the end

Found = tuple[Record | None, list[TrainingEvent]]

_going_on: Counter[str] = Counter()  # comparisons of this process that have not ended, by group and layers


@final
@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What one rank stores after a step: means and variances, each (channels,), in float64."""

    step: int
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, step: int, layers: Layers) -> Statistics:
        """The present statistics of a model's layers; NaN where they cannot be read."""
        now = Snapshot.of(layers).cpu()
        return cls(step, now.mean, now.var)

    def packed(self) -> bytes:
        """The statistics as bytes: the step, then the values."""
        return self.step.to_bytes(8, "big") + torch.cat([self.mean, self.var]).numpy().tobytes()

    @classmethod
    def unpacked(cls, content: bytes) -> Statistics:
        """The statistics of ``packed``."""
        values = torch.frombuffer(bytearray(content[8:]), dtype=torch.float64)
        return cls(int.from_bytes(content[:8], "big"), *values.chunk(2))


@final
class RankComparison:
    """The comparison of a model's stored statistics on the ranks of a group.

    Args:
        group: The process group, of several ranks.
        layers: The batch norm layers of this rank's model.
        every: Steps between comparisons, the same on all ranks.

    Raises:
        RuntimeError: If the process group has no store.
    """

    def __init__(self, group: ProcessGroup, layers: Layers, every: int) -> None:
        self._layers, self._every = layers, every
        self._models = f"{group.group_name}/{_digest(layers)}"
        self._notices = Notices(group, f"{_digest(layers)}/{_going_on[self._models]}")  # two equal models: 0 and 1
        _going_on[self._models] += 1
        self._open: int | None = None  # the step of the copies that are still to be compared
        self._unheard: set[int] = set()  # ranks that were reported as missing
        self._broken: set[int] = set()  # ranks whose NaN was reported

    def stepped(self, step: int, schedule: Schedule) -> Found:
        """Leave this rank's copy if one is due after this step of the training; otherwise look for those of others.

        A copy that would bring the cost above the budget is not made: then this rank is missing from a comparison.

        Raises:
            RuntimeError: If the store of the process group fails.
        """
        if not (step % self._every == 0 or (step == _FIRST < self._every)):
            return self._looked(step)
        if not schedule.affords("ranks"):
            return None, []
        with schedule.looking("ranks"):
            return self._left(step)

    def _left(self, step: int) -> Found:
        """Leave this rank's copy; on the first rank, first compare the copies of the step before, complete or not."""
        found = self._compared() if self._notices.is_first and self._open is not None else (None, [])
        self._notices.leave(self._number(step), Statistics.of(step, self._layers).packed())
        self._open = step
        return found

    def _looked(self, step: int) -> Found:
        """Compare the copies of all ranks if they are there; looks 1, 2, 4, 8, ... steps after they were left."""
        waited = step - (self._open or step)
        if not self._notices.is_first or self._open is None or waited & (waited - 1):
            return None, []
        last, number = self._notices.last(), self._number(self._open)
        is_complete = len(last) == len(self._notices.ranks) and min(last.values()) >= number
        return self._compared() if is_complete else (None, [])

    def finished(self) -> Found:
        """Compare the last copies, and wait for them up to a second."""
        if not self._notices.is_first or self._open is None:
            return None, []
        self._notices.wait(self._number(self._open), _SECONDS)
        return self._compared()

    def end(self) -> None:
        """Give the place in the store to a later comparison of such layers."""
        _going_on[self._models] -= 1

    def _number(self, step: int) -> int:
        """The number of a step's notices, the same on all ranks: consecutive for steps that are ``every`` apart."""
        return step // self._every

    def _compared(self) -> Found:
        step, self._open = self._open or 0, None
        notices = {rank: Statistics.unpacked(each) for rank, each in self._notices.read(self._number(step)).items()}
        of_ranks = {rank: each for rank, each in notices.items() if each.step == step}
        events = [*self._about_silence(step, of_ranks), *self._about_nan(of_ranks)]
        if len(of_ranks) < 2:
            return None, events
        rows = {name: _rounded(row) for name, row in self._rows(of_ranks).items()}
        about = {"ranks_compared": float(len(of_ranks))}
        return Record(step, self._layers.names, rows, about, "lab", time.time()), events

    def _rows(self, of_ranks: Mapping[int, Statistics]) -> dict[str, Tensor]:
        """The differences of the ranks, rms over the channels of each layer; NaN if a rank's channel has NaN."""
        means, variances = (
            torch.stack([getattr(each, name) for each in of_ranks.values()]) for name in ("mean", "var")
        )
        eps = self._layers.each(self._layers.numbers("eps", math.nan))
        by_means, by_sds = differences_in_sd(means, variances, eps)
        return {"rank_means": self._rms(by_means), "rank_sds": self._rms(by_sds)}

    def _rms(self, values: Tensor) -> Tensor:
        return torch.stack([part.square().mean().sqrt() for part in values.split(self._layers.sizes)])

    def _about_silence(self, step: int, of_ranks: Mapping[int, Statistics]) -> list[TrainingEvent]:
        """Events for ranks without a copy, once for each rank: those that never left one, and those that stopped."""
        missing = {*self._notices.ranks} - of_ranks.keys() - self._unheard
        self._unheard |= missing
        stopped = missing & self._notices.last().keys()
        silent = sorted(missing - stopped)
        events = [TrainingEvent(not_watching(silent))] if silent else []
        return events + ([TrainingEvent(stopped_watching(sorted(stopped), step))] if stopped else [])

    def _about_nan(self, of_ranks: Mapping[int, Statistics]) -> list[TrainingEvent]:
        """One event for each other rank with NaN or infinity; the first rank reports its own elsewhere."""
        events = []
        for rank, own in of_ranks.items():
            finite = [bool(p.isfinite().all()) for p in (own.mean + own.var).split(self._layers.sizes)]
            if rank == self._notices.rank or all(finite) or rank in self._broken:
                continue
            self._broken.add(rank)
            layer = self._layers.names[finite.index(False)]
            events.append(TrainingEvent(f"a stored mean or variance is NaN or infinite on rank {rank}", layer, "BN102"))
        return events


def _digest(layers: Layers) -> str:
    return hashlib.sha256(json.dumps([layers.names, layers.sizes]).encode()).hexdigest()[:16]


def _rounded(row: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in row.tolist()]
