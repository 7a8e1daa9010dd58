"""Moments of a layer's batches during a step: tensors that each batch changes in place, in compiled programs too.

The operator ``batchnorm::add_moments`` adds a batch when it runs. Inside a backward pass it does nothing: there a
forward is repeated, and its batch has been added.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from batchnorm.kernels import ChannelStatistics, Measured
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.reference import exact_dtype
from batchnorm.kernels.repeated_forwards import is_repeated
from batchnorm.moments import merged

_SCHEMA = "(Tensor(a0!) count, Tensor(a1!) mean, Tensor(a2!) m2, Tensor of_count, Tensor of_mean, Tensor of_var) -> ()"


@final
class AddedMoments:
    """Count, mean and sum of squared deviations of the batches so far, all (C,) and exact.

    Args:
        like: A mean (C,), real or complex.
    """

    def __init__(self, like: Tensor) -> None:
        exact = exact_dtype(like.device)
        self._count, self._m2 = (torch.zeros(like.shape, dtype=exact, device=like.device) for _ in range(2))
        kind = exact.to_complex() if like.is_complex() else exact
        self._mean = torch.full(like.shape, torch.nan, dtype=kind, device=like.device)

    def add(self, measured: Measured) -> None:
        """Add the moments of a batch."""
        count = measured.count.expand_as(self._count)
        tensors = (self._count, self._mean, self._m2, count, *measured.statistics)
        (_add if is_plain(*tensors) else _operator)(*tensors)

    @property
    def measured(self) -> Measured:
        """The moments of all batches together; NaN if there are none."""
        return Measured(ChannelStatistics(self._mean, self._m2 / self._count), self._count)


def _add(count: Tensor, mean: Tensor, m2: Tensor, of_count: Tensor, of_mean: Tensor, of_var: Tensor) -> None:
    if is_repeated():
        return
    total = merged((count, mean, m2), (of_count, of_mean, of_var * of_count))
    for tensor, value in zip((count, mean, m2), total, strict=True):
        tensor.copy_(value)


_operator = torch.library.custom_op(
    "batchnorm::add_moments", _add, mutates_args={"count", "mean", "m2"}, schema=_SCHEMA
)


@_operator.register_fake
def _(*_: Any) -> None:
    return None


@_operator.register_vmap
def _(*_: Any) -> Any:
    raise RuntimeError(
        "step needs a model whose layers store one set of statistics, got an ensemble under torch.func.vmap. Leave out "
        "step, or run the models one after the other."
    )
