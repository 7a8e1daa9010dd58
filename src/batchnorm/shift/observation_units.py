"""Units: what counts as one observation, so that dependent examples count once.

A bet is fair only if an observation cannot be predicted from earlier ones. Frames of a video, rows of a sorted file and
requests of one session can be predicted; their averages hardly can be. The variance of a mean of several examples' z is
at most the largest variance of these z, however they depend on each other, so the reference's bounds hold for it too.
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

_WINDOW = 64  # observations in a window; runs of similar examples must be shorter to be noticed
_CHANNELS = 256  # most channels whose correlation is measured

Unit = str | Callable[[Batch], Sequence[Hashable]]


def name_of(unit: Unit) -> str:
    """The reference's name for the unit: "example", "batch", or "key" for a function.

    Raises:
        ValueError: If ``unit`` is not a unit.
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
        key: The key of all these examples; None for unit "batch".
        z: Sum of channel means, (channels,).
        q: Sum of energies, (channels,).
        examples: Number of examples.
        is_whole: Whether it is certain that all examples of the run were observed.
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
    """Groups examples into observations: one per example, per batch, or per run of neighbouring examples with one key.

    The last run stays open until another key comes. Means of few examples vary more than means of many, so with a
    calibrated reference and unit "batch" all observations have the same number of examples.

    Args:
        unit: What one observation is.
        examples: Number of examples in an observation of unit "batch": drawn at random from one batch, or collected
            from small batches in a row. 0: every whole batch is an observation.
        is_strict: Whether only whole runs of keys are observations.
    """

    def __init__(self, unit: Unit, examples: int = 0, *, is_strict: bool = False) -> None:
        self.name = name_of(unit)
        self._keys_of = unit if callable(unit) else None
        self._examples, self._is_strict = examples, is_strict
        self._open: _OpenObservation | None = None
        self._missed = False  # whether examples passed unobserved since the last observed example
        self._draws = 0

    def of(self, z: Tensor, q: Tensor, inputs: Batch, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Complete observations, from means and energies of examples, (n, channels) each.

        Args:
            z: Channel means.
            q: Energies.
            inputs: The model's inputs.
            rows: Rows of the inputs that are these examples; None for the first rows.

        Raises:
            ValueError: If the unit's function returns too few keys.
        """
        if self.name == "example" or not len(z):
            return z, q
        if self._keys_of is None:
            return self._of_batch(z, q)
        keys, rows = list(self._keys_of(inputs)), range(len(z)) if rows is None else rows
        if len(keys) <= rows[-1]:
            raise ValueError(
                f"unit's function must return a key for each example, {rows[-1] + 1} or more, got {len(keys)}. "
                "Return a list with one key per row of the inputs."
            )
        ends = [self._take(keys[row], *example) for row, *example in zip(rows, z, q, strict=True)]
        runs = [run for run in ends if run is not None]
        if not runs:
            return z[:0], q[:0]
        means = [(run.z / run.examples, run.q / run.examples) for run in runs]
        return torch.stack([mean for mean, _ in means]), torch.stack([energy for _, energy in means])

    def missed(self) -> None:
        """Record that examples passed unobserved: a run that may contain such examples is not whole."""
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
        """Add an example; return the run that it ended, or None if it ended no run or that run is not whole."""
        missed, self._missed = self._missed, False
        if self._open is not None and self._open.key == key:
            self._open.add(z, q)
            return None
        done, self._open = self._open, _OpenObservation(key, z, q, is_whole=not missed)
        return done if done is not None and done.is_whole else None

    def state(self) -> StreamState:
        """The open run, as part of a state."""
        about: dict[str, bool] = {"missed": self._missed}
        if (run := self._open) is None:
            return StreamState({}, {"open": None, "grouping": about})
        fields = {"key": run.key, "examples": run.examples, "is_whole": run.is_whole}
        return StreamState({"open.z": run.z.clone(), "open.q": run.q.clone()}, {"open": fields, "grouping": about})

    def put(self, state: StreamState) -> None:
        """Continue from a state."""
        fields, tensors = state.about["open"], state.tensors
        self._missed = state.about.get("grouping", {}).get("missed", False)  # older files have no such entry
        self._open = None if fields is None else _OpenObservation(z=tensors["open.z"], q=tensors["open.q"], **fields)


@final
class Autocorrelation:
    """Correlation of neighbouring observations, in windows of 64 and pooled over channels.

    Let z_t be the observations of a window minus the window's mean. Its correlation is sum_t z_t z_(t+1) / sum_t z_t^2
    + 1 / 64; the second term corrects the bias from subtracting the mean. r is the average over windows, so a shift in
    the middle of a stream affects one window only. The standard error of r is at most 1 / sqrt(n) for n observations in
    whole windows. ``is_wrong`` says that the unit is too small if r is above 0.1 + 4 / sqrt(n), after at least two
    windows.
    """

    def __init__(self) -> None:
        self.count = 0  # observations in whole windows
        self._open: Tensor | None = None  # (fewer than 64, channels)
        self._sum = 0.0  # of the windows' correlations

    def add(self, z: Tensor, center: Tensor, spread: Tensor) -> None:
        """Add observations z in order, (n, channels), standardized per channel; at most 256 of the channels count."""
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
        """The correlation; 0 before the first window is full."""
        return self._sum * _WINDOW / self.count if self.count else 0.0

    @property
    def is_wrong(self) -> bool:
        """Whether neighbouring observations are correlated beyond chance."""
        return self.count >= 2 * _WINDOW and self.r > 0.1 + 4 / self.count**0.5

    def state(self) -> StreamState:
        """The windows so far, as part of a state."""
        tensors = {} if self._open is None else {"auto.open": self._open.clone()}
        return StreamState(tensors, {"auto": {"count": self.count, "sum": self._sum}})

    def put(self, state: StreamState) -> None:
        """Continue from a state."""
        self.count, self._sum = state.about["auto"]["count"], state.about["auto"]["sum"]
        self._open = state.tensors.get("auto.open")


def _correlation(z: Tensor) -> float:
    """Lag-1 correlation of one window, (64, channels)."""
    centered = z - z.mean(0)
    squares = float(centered.square().sum())
    return float((centered[1:] * centered[:-1]).sum()) / squares + 1 / len(z) if squares else 0.0
