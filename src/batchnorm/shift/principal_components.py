"""Components: principal components of neighbouring channels, some of which move far when no channel does.

Channels of a layer vary together from one example to the next, and what differs between them varies little. A change
that moves each of them by one standard deviation may move such a difference by several. So the channels of each layer
are taken sixteen at a time, and their means, and likewise their energies, are turned into principal components.

Directions are chosen on a random half of the calibration observations (at most 1,000), and center and variance are
measured on the rest: chosen and measured on the same ones, the least variance would come out too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

TOGETHER = 16  # channels; of 200 observations, 100 know so small a covariance well enough

MOST_CHOOSE = 1000  # observations; more of them are worth more where they are compared with


@final
@dataclass(frozen=True, eq=False)
class Components:
    """Components of channels' means z and of their relative energies q.

    Args:
        sizes: Channels of each layer.
        axes: Unit vectors, the columns of each matrix: (2, blocks, 16, 16), of z and of q, 0 where a layer has no more
            channels. In float32, as most of a reference's file is made of them.
        center: Expected component, (2 * channels,): those of z, then those of q.
        delta: Largest distance of its mean from that, likewise.
        kappa: Its largest variance, likewise.
    """

    sizes: tuple[int, ...]
    axes: Tensor
    center: Tensor
    delta: Tensor
    kappa: Tensor

    @classmethod
    def measured(
        cls, sizes: tuple[int, ...], z: Tensor, q: Tensor, bounds: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> Components:
        """Components of clean observations.

        Args:
            sizes: Channels of each layer.
            z: Channel means in stored sd, (n, channels).
            q: Relative energies of channels, (n, channels).
            bounds: Gives center, delta and kappa of observations of components.
        """
        chosen, rest = halves(len(z))
        axes = torch.stack([axes_of(x[chosen], sizes) for x in (z, q)])
        return cls(sizes, axes, *bounds(turned(axes, sizes, z[rest], q[rest])))

    def of(self, z: Tensor, q: Tensor) -> Tensor:
        """Components of observations, (n, 2 * channels)."""
        return turned(self.axes, self.sizes, z, q)


def halves(n: int) -> tuple[Tensor, Tensor]:
    """Which of n observations choose directions, and which are measured along them.

    At random, always the same way: observations may come in turns, such as a picture and its mirror image.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    half = min(n // 2, MOST_CHOOSE)
    return order[:half], order[half:]


def axes_shape(sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of ``axes`` for layers of so many channels."""
    return 2, sum(-(-size // TOGETHER) for size in sizes), TOGETHER, TOGETHER


def axes_of(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Principal directions, eigenvectors of the covariance of each block, (blocks, 16, 16), by rising variance."""
    blocks = _blocks(x - x.mean(0), sizes)
    covariance = blocks.mT @ blocks
    is_channel = _blocks(torch.ones_like(x[:1]), sizes)[:, 0]
    # slots without a channel get the largest variances: their axes come last and are dropped
    spare = (1 - is_channel) * (1 + 2 * covariance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True))
    axes = torch.linalg.eigh(covariance + spare.diag_embed()).eigenvectors
    return (axes * is_channel[:, :, None] * is_channel[:, None, :]).float()


def turned(axes: Tensor, sizes: Sequence[int], z: Tensor, q: Tensor) -> Tensor:
    """Components along ``axes``, (n, 2 * channels): those of z, then those of q, in their dtype."""
    parts = [_blocks(x, sizes) @ turn for x, turn in zip((z, q), axes.to(z.dtype), strict=True)]
    flat = torch.stack(parts).permute(2, 0, 1, 3).flatten(2)  # (n, 2, slots)
    return (flat if flat.shape[2] == z.shape[1] else flat[:, :, _slots(tuple(sizes))]).flatten(1)


def _blocks(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Observations by block, (n, channels) -> (blocks, n, 16), with 0 in slots that have no channel."""
    blocks = axes_shape(sizes)[1]
    if blocks * TOGETHER == x.shape[1]:
        return x.unflatten(1, (blocks, TOGETHER)).transpose(0, 1)
    padded = x.new_zeros(len(x), blocks * TOGETHER)
    padded[:, _slots(tuple(sizes))] = x
    return padded.unflatten(1, (blocks, TOGETHER)).transpose(0, 1)


@lru_cache(maxsize=64)
def _slots(sizes: tuple[int, ...]) -> Tensor:
    """Where each channel is among the slots of all blocks, (channels,); a block has channels of one layer only."""
    found, start = [], 0
    for size in sizes:
        found.append(torch.arange(start, start + size))
        start += -(-size // TOGETHER) * TOGETHER
    return torch.cat(found)
