"""Units: what counts as one observation. Examples that depend on each other are one, not many.

A bet is fair only if an observation cannot be predicted from those before it. Frames of a video, a sorted file or the
requests of one session can be; their average can not, or far less. The mean of several examples' z has at most their
largest variance, whatever their dependence, so the reference's bounds hold for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.shift.state import State

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
class Grouping:
    """Makes observations of examples: each by itself, one of each batch, or one of each run of equal keys.

    The last run of keys stays open until another key comes.
    """

    def __init__(self, unit: Unit) -> None:
        self.name = name_of(unit)
        self._keys_of = unit if callable(unit) else None
        self._open: tuple[Hashable, Tensor, Tensor, int] | None = None  # key, sums of z and q, examples

    def of(self, z: Tensor, q: Tensor, inputs: Any, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Observations that are complete, from means and energies of examples, (n, channels) each.

        Args:
            z: Channel means.
            q: Energies.
            inputs: What the model was given.
            rows: Which of its rows the examples are; None if they are its first.

        Raises:
            ValueError: If the unit's function gives too few keys.
        """
        if self.name == "example":
            return z, q
        if self._keys_of is None:
            return z.mean(0, keepdim=True), q.mean(0, keepdim=True)
        if not len(z):
            return z, q
        given, rows = list(self._keys_of(inputs)), range(len(z)) if rows is None else rows
        if len(given) <= rows[-1]:
            raise ValueError(
                f"unit's function must give a key for each example, of which there are {rows[-1] + 1} or more, got "
                f"{len(given)}."
            )
        keys = [given[row] for row in rows]
        closed = [done for key, row, energy in zip(keys, z, q, strict=True) if (done := self._take(key, row, energy))]
        if not closed:
            return z[:0], q[:0]
        return torch.stack([row for row, _ in closed]), torch.stack([energy for _, energy in closed])

    def _take(self, key: Hashable, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """The means of the run that this example ended, if it ended one."""
        if self._open is not None and self._open[0] == key:
            _, zs, qs, n = self._open
            self._open = key, zs + z, qs + q, n + 1
            return None
        done, self._open = self._open, (key, z, q, 1)
        return None if done is None else (done[1] / done[3], done[2] / done[3])

    def state(self) -> State:
        """The run that is open."""
        if self._open is None:
            return State({}, {"open": None})
        key, z, q, examples = self._open
        return State({"open.z": z.clone(), "open.q": q.clone()}, {"open": {"key": key, "examples": examples}})

    def put(self, state: State) -> None:
        """Go on from a state."""
        told = state.about["open"]
        tensors = state.tensors
        self._open = None if told is None else (told["key"], tensors["open.z"], tensors["open.q"], told["examples"])


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
