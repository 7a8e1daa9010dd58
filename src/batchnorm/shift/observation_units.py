"""Units: what counts as one observation, so that dependent examples count once.

A bet is fair only if an observation cannot be predicted from earlier ones. Frames of a video, rows of a sorted file and
requests of one session can be predicted; averages of them hardly can. The mean of several examples' z has at most their
largest variance, however they depend on each other, so the reference's bounds hold for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from batchnorm.call_types import Batch
from batchnorm.shift.layer_observer import random_rows
from batchnorm.shift.stream_state import StreamState

_WINDOW = 64  # longer than the runs of similar examples in a sorted file
_CHANNELS = 256

Unit = str | Callable[[Batch], Sequence[Hashable]]


def name_of(unit: Unit) -> str:
    """The reference's name for the unit.

    Raises:
        ValueError: If it is not a unit.
    """
    if callable(unit):
        return "key"
    if unit not in {"example", "batch"}:
        raise ValueError(f"unit must be 'example', 'batch' or a function of the inputs that gives keys, got {unit!r}.")
    return unit


@final
@dataclass(slots=True, eq=False)
class _OpenObservation:
    """Examples collected so far for one observation.

    Args:
        key: Their common key; None in batches.
        z: Sum of channel means, (channels,).
        q: Sum of energies, (channels,).
        examples: Number of examples.
        is_whole: Whether certainly no example of the run was missed.
    """

    key: Hashable
    z: Tensor
    q: Tensor
    examples: int = 1
    is_whole: bool = True

    def add(self, z: Tensor, q: Tensor, examples: int = 1) -> None:
        self.z, self.q, self.examples = self.z + z, self.q + q, self.examples + examples


@final
class Grouping:
    """Groups examples into observations: each example alone, one per batch, or one per run of equal keys.

    The last run of keys stays open until another key comes. Means of few examples vary more than means of many, so
    compared observations must have the same number of examples.

    Args:
        unit: What one observation is.
        examples: Number of examples in an observation of unit "batch": drawn at random from one batch, or collected
            from small batches in a row; 0 takes every whole batch.
        is_strict: Whether only whole runs of keys are observations.
    """

    def __init__(self, unit: Unit, examples: int = 0, *, is_strict: bool = False) -> None:
        self.name = name_of(unit)
        self._keys_of = unit if callable(unit) else None
        self._examples, self._is_strict = examples, is_strict
        self._open: _OpenObservation | None = None
        self._missed = False  # since the last example
        self._draws = 0

    def of(self, z: Tensor, q: Tensor, inputs: Batch, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Complete observations, from means and energies of examples, (n, channels) each.

        Args:
            z: Channel means.
            q: Energies.
            inputs: The model's inputs.
            rows: Rows of the inputs that hold the examples; None for the first ones.

        Raises:
            ValueError: If the unit's function returns too few keys.
        """
        if self.name == "example" or not len(z):
            return z, q
        if self._keys_of is None:
            return self._of_batch(z, q)
        given, rows = list(self._keys_of(inputs)), range(len(z)) if rows is None else rows
        if len(given) <= rows[-1]:
            raise ValueError(
                f"unit's function must return a key for each example, {rows[-1] + 1} or more, got {len(given)}."
            )
        taken = [self._take(given[row], *example) for row, *example in zip(rows, z, q, strict=True)]
        closed = [run for run in taken if run is not None]
        if not closed:
            return z[:0], q[:0]
        means = [(run.z / run.examples, run.q / run.examples) for run in closed]
        return torch.stack([mean for mean, _ in means]), torch.stack([energy for _, energy in means])

    def missed(self) -> None:
        """Record that examples passed unobserved: a run that may contain them is not whole."""
        self._missed = self._is_strict
        if self._open is not None:
            self._open.is_whole &= not self._is_strict

    def _of_batch(self, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self._examples or len(z)
        if len(z) >= wanted:
            self._draws += 1
            rows = random_rows(len(z), wanted, self._draws) or slice(None)
            return z[rows].mean(0, keepdim=True), q[rows].mean(0, keepdim=True)
        run = self._open or _OpenObservation(None, torch.zeros_like(z[0]), torch.zeros_like(q[0]), 0)
        few = min(len(z), wanted - run.examples)
        run.add(z[:few].sum(0), q[:few].sum(0), few)
        self._open = run if run.examples < wanted else None
        return (z[:0], q[:0]) if self._open else (run.z[None] / wanted, run.q[None] / wanted)

    def _take(self, key: Hashable, z: Tensor, q: Tensor) -> _OpenObservation | None:
        """The run that this example ended, if any."""
        missed, self._missed = self._missed, False
        if self._open is not None and self._open.key == key:
            self._open.add(z, q)
            return None
        done, self._open = self._open, _OpenObservation(key, z, q, is_whole=not missed)
        return done if done is not None and done.is_whole else None

    def state(self) -> StreamState:
        """The run that is open."""
        about: dict[str, bool] = {"missed": self._missed}
        if (run := self._open) is None:
            return StreamState({}, {"open": None, "grouping": about})
        told = {"key": run.key, "examples": run.examples, "is_whole": run.is_whole}
        return StreamState({"open.z": run.z.clone(), "open.q": run.q.clone()}, {"open": told, "grouping": about})

    def put(self, state: StreamState) -> None:
        """Go on from a state."""
        told, tensors = state.about["open"], state.tensors
        self._missed = state.about.get("grouping", {}).get("missed", False)  # older files lack it
        self._open = None if told is None else _OpenObservation(z=tensors["open.z"], q=tensors["open.q"], **told)


@final
class Autocorrelation:
    """Correlation of neighbouring observations, in windows of 64 and pooled over channels.

    In each window, around its own mean, r = sum_t z_t z_(t+1) / sum_t z_t^2 + 1 / 64; the second term corrects the bias
    from subtracting the window's own mean. r is the mean over windows, so a shift in the middle of a stream affects one
    window only. Its standard error is at most 1 / sqrt(n), so ``is_wrong`` says that the unit is too small if r is
    above 0.1 + 4 / sqrt(n), after at least two windows.
    """

    def __init__(self) -> None:
        self.count = 0  # observations in whole windows
        self._open: Tensor | None = None  # (fewer than 64, channels)
        self._sum = 0.0  # of the windows' correlations

    def add(self, z: Tensor, center: Tensor, spread: Tensor) -> None:
        """Add observations in order, (n, channels), with center and spread per channel; of many channels, some."""
        step = -(-z.shape[1] // _CHANNELS)
        z = (z[:, ::step] - center[::step]) / spread[::step]
        rows = z if self._open is None else torch.cat([self._open, z])
        while len(rows) >= _WINDOW:
            self._sum += _correlation(rows[:_WINDOW])
            self.count += _WINDOW
            rows = rows[_WINDOW:]
        self._open = rows.clone()

    @property
    def r(self) -> float:
        """The correlation; 0 before there is a window."""
        return self._sum * _WINDOW / self.count if self.count else 0.0

    @property
    def is_wrong(self) -> bool:
        """Whether neighbouring observations are correlated beyond chance."""
        return self.count >= 2 * _WINDOW and self.r > 0.1 + 4 / self.count**0.5

    def state(self) -> StreamState:
        """The windows so far."""
        tensors = {} if self._open is None else {"auto.open": self._open.clone()}
        return StreamState(tensors, {"auto": {"count": self.count, "sum": self._sum}})

    def put(self, state: StreamState) -> None:
        """Go on from a state."""
        self.count, self._sum = state.about["auto"]["count"], state.about["auto"]["sum"]
        self._open = state.tensors.get("auto.open")


def _correlation(z: Tensor) -> float:
    """Lag-1 correlation of one window, (64, channels)."""
    centered = z - z.mean(0)
    squares = float(centered.square().sum())
    return float((centered[1:] * centered[:-1]).sum()) / squares + 1 / len(z) if squares else 0.0
