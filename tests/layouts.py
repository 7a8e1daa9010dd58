"""Inputs of layers: a shape for each kind of layer, and the layouts in memory that users have."""

from __future__ import annotations

import pytest
from torch import Tensor

from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

# layers of 3 channels, and shapes of their inputs
CASES = {
    "rows": (BatchNorm1d, (12, 3)),
    "lines": (BatchNorm1d, (4, 3, 5)),
    "images": (BatchNorm2d, (4, 3, 5, 2)),
    "volumes": (BatchNorm3d, (2, 3, 4, 2, 3)),
}
cases = pytest.mark.parametrize(("cls", "shape"), CASES.values(), ids=CASES)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Channels next to each other; for 4 and 5 dimensions this is torch.channels_last and channels_last_3d."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def reversed_axes(x: Tensor) -> Tensor:
    """The first axis is the one with stride 1."""
    return x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])


def sliced(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, on each axis."""
    larger = x
    for axis in range(x.ndim):
        larger = larger.repeat_interleave(2, axis)
    return larger[tuple(slice(None, None, 2) for _ in range(x.ndim))]


def expanded(x: Tensor) -> Tensor:
    """The first example once in memory, with stride 0 over the batch."""
    return x[:1].expand_as(x)


LAYOUTS = [contiguous, channels_last, reversed_axes, sliced, expanded]
