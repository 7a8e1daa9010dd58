"""The axis of a layer's channels: 1 as in torch.nn, or -1, the last axis.

Kernels and measurements have channels on axis 1. A layer with ``axis=-1`` has inputs (N, L, C), which a view without a
copy shows as (N, C, L): in memory, this is the layout channels_last, which the native kernels read. Everything that
reads a layer's input calls ``channels_second`` first.
"""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor


def axis_of(layer: object) -> int:
    """The axis of a layer's channels, 1 or -1; 1 for layers of torch.nn."""
    return getattr(layer, "_axis", 1)


def channels_second(layer: object, x: Any) -> Any:
    """A layer's input (N, ..., C) as a view (N, C, ...); ``x`` itself if it has that shape or is no dense tensor."""
    is_last = axis_of(layer) == -1 and isinstance(x, Tensor) and not x.is_nested and x.ndim > 2
    # not movedim: torch's older ONNX exporter writes a wrong permutation for a negative axis
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1)) if is_last else x


def shape_as_given(layer: object, x: Tensor) -> Size:
    """The shape that the user's tensor has, from its view ``x`` with channels on axis 1."""
    return x.movedim(1, axis_of(layer)).shape if x.ndim > 2 else x.shape
