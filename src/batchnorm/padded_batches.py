"""Padded batches: which values of a batch count, from a mask, from lengths or from weights.

Sequences of different lengths are padded to one length to make a batch. If padding counts, it pulls the statistics
towards 0, by an amount that depends on the lengths in the batch; and a layer turns its zeros into other values, such as
beta, which the next convolution adds to valid positions. So padding is not counted, and its results are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.call_types import Keywords
from batchnorm.channel_axis import axis_of
from batchnorm.kernels import Sample
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.shapes import values_per_channel

# a mask as the layers' arguments have it, or None
Mask = Tensor | None
Lengths = Tensor | Sequence[int] | None


def sample_of(
    layer: nn.Module, x: Tensor, mask: Mask, lengths: Lengths, length_axis: int | None, weight: Mask, *, keep: bool
) -> Sample:
    """The values of a batch that count, from the arguments of a layer's call.

    Args:
        layer: The layer. With ``axis=-1``, arguments and errors have channels on the last axis.
        x: The input as (N, C) or (N, C, ...).
        mask: Bool, True = valid: (N, ...) without the channels, (N, 1, ...), or the shape of the input.
        lengths: Number of valid positions of each example, (N,), from the first on.
        length_axis: The axis of the input that ``lengths`` count along; by default the only one besides N and C.
        weight: How many values each value counts as, 0 or more: (N,), or of a mask's shapes.
        keep: Whether padding is normalized too.

    Raises:
        TypeError: If a mask is not bool, lengths are not whole numbers, or a weight is not a real number.
        ValueError: If a shape or device does not fit, a length is not in 0..L, a weight is negative, NaN or infinite,
            or both a mask and lengths are given.
    """
    name, axis = type(layer).__name__, axis_of(layer)
    if mask is not None and lengths is not None:
        raise ValueError(f"{name} needs mask= or lengths=, got both. Leave one out: they say the same.")
    if length_axis is not None and lengths is None:
        raise ValueError(f"{name} needs lengths= with length_axis=, got no lengths. Give them, or leave both out.")
    if lengths is None:
        valid = _valid(name, x, mask, axis)
    else:
        valid = valid_by_lengths(name, x, lengths, length_axis, channel_axis=axis)
    return Sample(valid, None if weight is None else _weight(name, x, weight, axis), keep=keep)


def valid_mask(layer: nn.Module, x: object, options: Keywords) -> Mask:
    """Which values of a layer's input, as (N, C, ...), are valid by the arguments of its call; None: all.

    The mask broadcasts to ``x``.
    """
    names = ("mask", "lengths", "length_axis")
    if not isinstance(x, Tensor) or all(options.get(name) is None for name in names):
        return None
    arguments = (options.get(name) for name in names)
    return sample_of(layer, x, *arguments, weight=None, keep=False).valid


def valid_positions(layer: nn.Module, x: Any, options: Keywords) -> Any:
    """The valid positions (M, C) of a layer's input, as (N, C, ...), by its call; ``x`` itself if it has no padding.

    Raises:
        ValueError: If the mask differs between channels: no batch (M, C) has the valid values alone.
    """
    valid = valid_mask(layer, x, options)
    if valid is None:
        return x
    positions = Sample(valid).positions(x)
    if positions is None:
        raise ValueError(
            f"exact statistics need a mask (N, ...) or (N, 1, ...) for all channels, got "
            f"{tuple(valid.shape)} in a call of {type(layer).__name__}. Give one mask of positions."
        )
    return x.movedim(1, -1)[positions]


def least_count(x: Tensor, sample: Sample) -> float | None:
    """The smallest sum of counts of a channel; None where asking an accelerator or a compiler would make it wait."""
    if sample.is_whole:
        return values_per_channel(x)
    counts = sample.counts(x)
    if not (counts.is_cpu and is_plain(x, counts)):
        return None
    axes = [axis for axis in range(x.ndim) if axis != 1]
    repeated = x.numel() / x.shape[1] / (counts.numel() / counts.shape[1])
    return float(counts.sum(axes, dtype=torch.float64).min()) * repeated


def _valid(name: str, x: Tensor, mask: Mask, axis: int) -> Mask:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} needs a mask of bool in which True means valid, got {got}. Many attention masks mean the "
            "opposite: for those pass ~mask."
        )
    return _broadcast(name, x, mask, "a mask, in which True means valid,", axis)


def _weight(name: str, x: Tensor, weight: object, axis: int) -> Tensor:
    if not isinstance(weight, Tensor) or weight.dtype == torch.bool or weight.is_complex():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} needs a weight of numbers, got {got}. For valid positions use mask=.")
    if weight.shape == x.shape[:1]:
        weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    weight = _broadcast(name, x, weight, "a weight (N,) or", axis)
    if is_plain(weight) and weight.is_cpu and not bool((weight >= 0).all() and torch.isfinite(weight).all()):
        raise ValueError(
            f"{name} needs weights of 0 or more, got {weight.min():g} to {weight.max():g}. A weight of 2 counts as two "
            "equal values."
        )
    return weight


def _broadcast(name: str, x: Tensor, values: Tensor, what: str, axis: int) -> Tensor:
    """A mask or weight in a shape that broadcasts to ``x``: (N, 1, ...), or that of ``x``.

    ``axis`` is that of the channels in the user's tensors, the values among them.
    """
    if torch.jit.is_tracing():  # sizes are tensors
        return values.unsqueeze(1) if values.ndim < x.ndim else values
    without_channels = (x.shape[0], *x.shape[2:])
    shapes = [without_channels, *(tuple(t.movedim(1, axis).shape) for t in (x[:, :1], x))]
    if values.shape not in {*shapes, (x.shape[0], *[1] * (x.ndim - 1))} or values.device != x.device:
        raise ValueError(
            f"{name} needs {what} of shape {', '.join(map(str, shapes[:-1]))} or {shapes[-1]} on {x.device}, for an "
            f"input of shape {shapes[-1]}, got {tuple(values.shape)} on {values.device}. Reshape or move it."
        )
    return values.movedim(axis, 1) if values.ndim == x.ndim else values.unsqueeze(1)


def valid_by_lengths(
    name: str, x: Tensor, lengths: Lengths, length_axis: int | None, *, channel_axis: int = 1
) -> Tensor:
    """The positions of an input before each example's length: bool, broadcastable to ``x``, (N, C, ...).

    The two axes are those of the user's input.
    """
    length_axis, axis = _axes(name, x, length_axis, channel_axis)
    lengths = _whole_numbers(name, x, lengths)
    size = x.shape[axis]
    if is_plain(lengths) and lengths.is_cpu and not bool(((lengths >= 0) & (lengths <= size)).all()):
        raise ValueError(
            f"{name} needs lengths from 0 to {size}, the size of axis {length_axis}, got {int(lengths.min())} to "
            f"{int(lengths.max())}. Lengths shrink with strides: give those of this layer's input."
        )
    lengths = lengths.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    positions = torch.arange(size, device=x.device).reshape(size, *[1] * (x.ndim - axis - 1))
    return positions < lengths


def _axes(name: str, x: Tensor, axis: int | None, channel_axis: int) -> tuple[int, int]:
    """The axis that lengths count along, in the user's input and in ``x``."""
    shift = int(channel_axis == -1)
    axis = 2 - shift if axis is None and x.ndim == 3 else axis
    is_whole = isinstance(axis, int) and not isinstance(axis, bool)
    if not is_whole or not 2 <= (axis % x.ndim if axis < 0 else axis) + shift < x.ndim:
        axes = " or ".join(map(str, range(2 - shift, x.ndim - shift))) or "an input (N, C, L)"
        raise ValueError(
            f"{name} needs length_axis= to be {axes} for an input of shape {tuple(x.movedim(1, channel_axis).shape)}, "
            f"got {axis}. It is the axis along which an example ends early."
        )
    return axis % x.ndim, axis % x.ndim + shift


def _whole_numbers(name: str, x: Tensor, lengths: Lengths) -> Tensor:
    try:
        values = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} needs lengths as whole numbers, got {type(lengths).__name__}. Give a tensor."
        ) from error
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(
            f"{name} needs lengths as whole numbers, got {values.dtype}. For relative lengths multiply by L."
        )
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"{name} needs one length for each example, shape ({x.shape[0]},), got {tuple(values.shape)}. Flatten them."
        )
    return values
