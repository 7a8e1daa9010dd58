"""By layer: reduces each layer's channels, in a tensor with the channels of all layers side by side.

Neighbouring layers of equal size are reduced together, so that a network needs only a few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


def reduced(x: Tensor, sizes: Sequence[int], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each layer's channels: x (..., channels) -> (..., layers).

    Args:
        x: Values of all channels.
        sizes: Number of channels of each layer.
        reduce: Reduces the last dimension of values (..., layers, channels of a layer).
    """
    runs = _runs(tuple(sizes))
    parts = x.split([layers * size for layers, size in runs], -1)
    results = [reduce(part.unflatten(-1, run)) for part, run in zip(parts, runs, strict=True)]
    return results[0] if len(results) == 1 else torch.cat(results, -1)


def mean(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over each layer's channels: x (..., channels) -> (..., layers)."""
    return reduced(x, sizes, lambda part: part.mean(-1))


def largest(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Largest value of each layer's channels: x (..., channels) -> (..., layers)."""
    return reduced(x, sizes, lambda part: part.amax(-1))


def log_mean_exp(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logarithm of the mean of exp(x) over each layer's channels: x (..., channels) -> (..., layers)."""
    counts = torch.tensor(sizes, dtype=x.dtype)
    return reduced(x, sizes, lambda part: part.logsumexp(-1)) - counts.log()


@lru_cache(maxsize=64)
def _runs(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Runs of neighbouring layers of one size: the number of layers, and the size."""
    return tuple((len(list(run)), size) for size, run in groupby(sizes))
