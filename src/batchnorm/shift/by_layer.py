"""By layer: reduces each layer's channels, where the channels of all layers lie side by side.

Neighbouring layers of equal size are reduced together, so a network needs a few operations instead of some per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


def reduced(x: Tensor, sizes: Sequence[int], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each layer's channels: (..., channels) -> (..., layers).

    Args:
        x: Values of all channels.
        sizes: Channels of each layer.
        reduce: Takes values (..., layers, channels of one) and reduces the last dimension.
    """
    runs = _runs(tuple(sizes))
    parts = x.split([layers * size for layers, size in runs], -1)
    found = [reduce(part.unflatten(-1, run)) for part, run in zip(parts, runs, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def mean(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over each layer's channels: (..., channels) -> (..., layers)."""
    return reduced(x, sizes, lambda part: part.mean(-1))


def largest(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Largest of each layer's channels: (..., channels) -> (..., layers)."""
    return reduced(x, sizes, lambda part: part.amax(-1))


def log_mean_exp(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logarithm of the mean of exp(x) over each layer's channels: (..., channels) -> (..., layers)."""
    counts = torch.tensor(sizes, dtype=x.dtype)
    return reduced(x, sizes, lambda part: part.logsumexp(-1)) - counts.log()


@lru_cache(maxsize=64)
def _runs(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Runs of neighbouring layers of one size: their number, and the size."""
    return tuple((len(list(run)), size) for size, run in groupby(sizes))
