"""Arguments of Moments: numbers as float64, the channel axes, and the weight of each value, with errors for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from batchnorm.argument_types import kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def as_float64(name: str, values: object) -> Tensor:
    """``values`` as a float64 tensor; ``name`` is their name in the message of the TypeError for other values."""
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Moments needs numbers as {name}, got {kind_of(values)}. Measure a tensor with Moments.of(x)."
        ) from error


def channel_axes(channel_axis: int | Sequence[int] | None, ndim: int) -> list[int]:
    """The channel axes, counted from 0; [] for None. A ValueError if there is no such axis, or one is named twice."""
    if channel_axis is None:
        return []
    axes = [channel_axis] if isinstance(channel_axis, int) else list(channel_axis)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"Moments.of needs channel_axis inside a tensor of {ndim} dimensions, got {channel_axis}. "
                "Use channel_axis=None for one channel."
            )
    axes = [axis % ndim for axis in axes]
    if len(set(axes)) < len(axes):
        raise ValueError(f"Moments.of needs each channel axis once, got {channel_axis}. Leave out the repeated axis.")
    return axes


def weight_of_each_value(x: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """``weight`` where ``mask`` is True and 0 elsewhere, in the shape of ``x``; None without weight and mask."""
    if weight is None and mask is None:
        return None
    weights = torch.ones((), device=x.device) if weight is None else weight.detach()
    mask = torch.ones((), device=x.device, dtype=torch.bool) if mask is None else mask
    if mask.dtype != torch.bool:
        raise TypeError(f"Moments.of needs a boolean mask, got {mask.dtype}. Use weight= for numbers.")
    try:
        counted = torch.where(mask, weights.double(), 0.0)
        expanded = counted.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"Moments.of needs weight and mask that broadcast to {tuple(x.shape)}, got {tuple(weights.shape)} and "
            f"{tuple(mask.shape)}. Give both size 1 on the axes on which they do not vary."
        ) from None
    if bool((counted < 0).any()) or not bool(torch.isfinite(counted).all()):
        raise ValueError(
            "Moments.of needs weights that are finite and 0 or more, got a negative, NaN or infinite "
            "weight. Leave values out with mask=."
        )
    return expanded
