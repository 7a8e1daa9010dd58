"""Units: what counts as one observation. Examples that depend on each other are one, not many.

A bet is fair only if an observation cannot be predicted from those before it. Frames of a video, a sorted file or the
requests of one session can be; their average can not, or far less. The mean of several examples' z has at most their
largest variance, whatever their dependence, so the reference's bounds hold for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.call_types import Batch
from batchnorm.shift.layer_observer import drawn
from batchnorm.shift.stream_state import State

_WINDOW = 64  # longer than runs of examples that are alike, as they come from a sorted file
_CHANNELS = 256

Unit = str | Callable[[Any], Sequence[Hashable]]


def name_of(unit: Unit) -> str:
    """What a reference calls the unit.

    Raises:
        ValueError: If it is none.
    """
    if callable(unit):
        return "key"
    if unit not in {"example", "batch"}:
        raise ValueError(f"unit must be 'example', 'batch' or a function of the inputs that gives keys, got {unit!r}.")
    return unit


@final
@dataclass(slots=True, eq=False)
class _Run:
    """Examples that make one observation, as far as they came.

    Args:
        key: That they share; None in batches.
        z: Sum of channel means, (channels,).
        q: Sum of energies, likewise.
        examples: How many.
        is_whole: Whether none before or between them can have been missed.
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
    """Makes observations of examples: each by itself, one of each batch, or one of each run of equal keys.

    The last run of keys stays open until another key comes. The mean of few examples varies more than that of many, so
    what is compared with other observations is made of as many.

    Args:
        unit: What one observation is.
        examples: That make one of unit "batch": so many of a batch, drawn at random, or of several small ones in a row;
            0 is all of a batch, however many.
        is_strict: Whether only whole runs of keys are observations.
    """

    def __init__(self, unit: Unit, examples: int = 0, *, is_strict: bool = False) -> None:
        self.name = name_of(unit)
        self._keys_of = unit if callable(unit) else None
        self._examples, self._is_strict = examples, is_strict
        self._open: _Run | None = None
        self._missed = False  # since the last example
        self._draws = 0

    def of(self, z: Tensor, q: Tensor, inputs: Batch, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Observations that are complete, from means and energies of examples, (n, channels) each.

        Args:
            z: Channel means.
            q: Energies.
            inputs: What the model was given.
            rows: Which of its rows the examples are; None if they are its first.

        Raises:
            ValueError: If the unit's function gives too few keys.
        """
        if self.name == "example" or not len(z):
            return z, q
        if self._keys_of is None:
            return self._of_batch(z, q)
        given, rows = list(self._keys_of(inputs)), range(len(z)) if rows is None else rows
        if len(given) <= rows[-1]:
            raise ValueError(
                f"unit's function must give a key for each example, of which there are {rows[-1] + 1} or more, got "
                f"{len(given)}."
            )
        taken = [self._take(given[row], *example) for row, *example in zip(rows, z, q, strict=True)]
        closed = [run for run in taken if run is not None]
        if not closed:
            return z[:0], q[:0]
        means = [(run.z / run.examples, run.q / run.examples) for run in closed]
        return torch.stack([mean for mean, _ in means]), torch.stack([energy for _, energy in means])

    def missed(self) -> None:
        """Examples passed that nobody looked at: a run that they may belong to is not whole."""
        self._missed = self._is_strict
        if self._open is not None:
            self._open.is_whole &= not self._is_strict

    def _of_batch(self, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self._examples or len(z)
        if len(z) >= wanted:
            self._draws += 1
            rows = drawn(len(z), wanted, self._draws) or slice(None)
            return z[rows].mean(0, keepdim=True), q[rows].mean(0, keepdim=True)
        run = self._open or _Run(None, torch.zeros_like(z[0]), torch.zeros_like(q[0]), 0)
        few = min(len(z), wanted - run.examples)
        run.add(z[:few].sum(0), q[:few].sum(0), few)
        self._open = run if run.examples < wanted else None
        return (z[:0], q[:0]) if self._open else (run.z[None] / wanted, run.q[None] / wanted)

    def _take(self, key: Hashable, z: Tensor, q: Tensor) -> _Run | None:
        """The run that this example ended, if it ended one."""
        missed, self._missed = self._missed, False
        if self._open is not None and self._open.key == key:
            self._open.add(z, q)
            return None
        done, self._open = self._open, _Run(key, z, q, is_whole=not missed)
        return done if done is not None and done.is_whole else None

    def state(self) -> State:
        """The run that is open."""
        about: dict[str, Any] = {"missed": self._missed}
        if (run := self._open) is None:
            return State({}, {"open": None, "grouping": about})
        told = {"key": run.key, "examples": run.examples, "is_whole": run.is_whole}
        return State({"open.z": run.z.clone(), "open.q": run.q.clone()}, {"open": told, "grouping": about})

    def put(self, state: State) -> None:
        """Go on from a state."""
        told, tensors = state.about["open"], state.tensors
        self._missed = state.about.get("grouping", {}).get("missed", False)  # older files do not say
        self._open = None if told is None else _Run(z=tensors["open.z"], q=tensors["open.q"], **told)


@final
class Autocorrelation:
    """Correlation of neighbouring observations, in windows of 64 and pooled over channels.

    In each window, around its own mean, r = sum_t z_t z_(t+1) / sum_t z_t^2 + 1 / 64; the addend makes up for the mean
    that was taken from the same observations. The mean over windows is what counts: a shift in the middle of a stream
    is inside one of them. Its standard error is at most 1 / sqrt(n), so ``is_wrong`` says that the unit is too small
    when r is above 0.1 + 4 / sqrt(n), from two windows on.
    """

    def __init__(self) -> None:
        self.count = 0  # observations in whole windows
        self._open: Tensor | None = None  # (fewer than 64, channels)
        self._sum = 0.0  # of the windows' correlations

    def add(self, z: Tensor, center: Tensor, spread: Tensor) -> None:
        """Take more observations in their order, (n, channels), with what is usual of each; of many channels some."""
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
        """Whether neighbours are alike beyond chance."""
        return self.count >= 2 * _WINDOW and self.r > 0.1 + 4 / self.count**0.5

    def state(self) -> State:
        """The windows so far."""
        tensors = {} if self._open is None else {"auto.open": self._open.clone()}
        return State(tensors, {"auto": {"count": self.count, "sum": self._sum}})

    def put(self, state: State) -> None:
        """Go on from a state."""
        self.count, self._sum = state.about["auto"]["count"], state.about["auto"]["sum"]
        self._open = state.tensors.get("auto.open")


def _correlation(z: Tensor) -> float:
    """Lag-1 correlation of one window, (64, channels)."""
    centered = z - z.mean(0)
    squares = float(centered.square().sum())
    return float((centered[1:] * centered[:-1]).sum()) / squares + 1 / len(z) if squares else 0.0
