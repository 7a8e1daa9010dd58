"""What a repeated forward takes from the first: values computed from stored statistics, which may have moved since.

Activation checkpointing drops the tensors between two layers and computes them again in the backward pass. The result
has to be that of the first forward. Usually it depends on the batch alone; a value that depends on stored statistics as
well is kept from the first forward, and is found by the moments of its batch, which are the same bits both times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, final
from warnings import warn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.repeated_forwards import is_repeated

# Forwards of one layer that may wait for their backward passes: micro-batches in a pipeline, or calls in one forward
_MOST_FORWARDS = 64


@final
class _First(NamedTuple):
    """One forward: the moments of its batch, and the values that it computed."""

    moments: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@final
class _Forwards:
    """The latest first forwards of one layer."""

    def __init__(self) -> None:
        self.waiting: deque[_First] = deque(maxlen=_MOST_FORWARDS)
        self.repeated: deque[_First] = deque(maxlen=_MOST_FORWARDS)

    def take(self, moments: Sequence[Tensor]) -> _First | None:
        """The latest forward with these moments; one that was not repeated yet comes first."""
        for forwards in (self.waiting, self.repeated):
            found = next((each for each in reversed(forwards) if _are_same(each.moments, moments)), None)
            if found is not None:
                if forwards is self.waiting:
                    _drop(self.waiting, found)
                    self.repeated.append(found)
                return found
        return None


_forwards: WeakKeyDictionary[object, _Forwards] = WeakKeyDictionary()


def first_values(
    layer: object, moments: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``compute()`` in a first forward; in its repetition inside a backward pass, the values of the first forward.

    The values of the latest 64 forwards of a layer are kept, as copies. A compiler or a transform computes them anew.

    Args:
        layer: The layer, which is not changed; copies of it start without values.
        moments: Tensors by which a batch is recognized, bit for bit; NaN is equal to NaN.
        compute: Returns the values, from stored statistics.

    Warns:
        RuntimeWarning: If the first forward of a repetition is not among those that are kept: the values are new.
    """
    if not is_plain(*moments):
        return compute()
    if is_repeated():
        return _repeated(layer, moments, compute)
    values = compute()
    kept = _First(_copies(moments), _copies(values))
    _forwards.setdefault(layer, _Forwards()).waiting.append(kept)
    return values


def _repeated(
    layer: object, moments: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    forwards = _forwards.get(layer)
    first = None if forwards is None else forwards.take(moments)
    if first is not None:
        return first.values
    warn(
        f"{type(layer).__name__} is computed again in a backward pass, and none of its latest "
        f"{_MOST_FORWARDS} forwards had this batch: the result depends on stored statistics that may have moved since, "
        "so gradients may be wrong. "
        "Call backward() after fewer forwards, and keep preserve_rng_state=True.",
        RuntimeWarning,
        stacklevel=3,
    )
    return compute()


def _copies(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone() for t in tensors)


def _are_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _drop(forwards: deque[_First], first: _First) -> None:
    """Remove one forward; deque.remove would compare tensors."""
    kept = [each for each in forwards if each is not first]
    forwards.clear()
    forwards.extend(kept)
