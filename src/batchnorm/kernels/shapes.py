"""Tensors for kernels that work by address: which they can read, their sizes, and other tensors in the same layout."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def values_per_channel(x: Tensor) -> int:
    """Values of each channel, on axis 1."""
    return x.shape[0] * x.shape[2:].numel()


def is_readable(x: Tensor) -> bool:
    """Whether kernels take ``x``: of a known type, contiguous or channels_last, not empty."""
    # a lazily negated tensor has the opposite sign in memory
    known = x.dtype in TYPES and x.dim() > 1 and x.numel() > 0 and not x.is_neg()
    return known and (x.is_contiguous() or _channels_come_last(x))


def check_layout(x: Tensor) -> None:
    """Refuse a tensor that is not strided.

    Raises:
        TypeError: If ``x`` is sparse, or of oneDNN's layout.
    """
    if x.layout not in {torch.strided, torch.jagged}:
        raise TypeError(
            f"batch norm needs a dense tensor, got layout {x.layout}. Call x.to_dense() first; "
            "torch.utils.mkldnn.to_mkldnn takes a model from batchnorm.for_export."
        )


def sizes(x: Tensor) -> tuple[int, int, int]:
    """``x`` as outer x channels x inner: planes if contiguous, rows if channels come last.

    Raises:
        ValueError: If ``x`` is neither.
    """
    outer, channels = x.size(0), x.size(1)
    if x.is_contiguous():
        return outer, channels, x.numel() // (outer * channels)
    if _channels_come_last(x):
        return x.numel() // channels, channels, 1
    raise ValueError(f"kernels need a contiguous or channels_last tensor, got strides {x.stride()}. Copy it first.")


def _channels_come_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


@overload
def like(x: Tensor, other: Tensor) -> Tensor: ...
@overload
def like(x: Tensor, other: Tensor | None) -> Tensor | None: ...
def like(x: Tensor, other: Tensor | None) -> Tensor | None:
    """A residual or gradient in the type and layout of ``x``: itself where it has them."""
    if other is None:
        return None
    if other.shape != x.shape:
        raise ValueError(f"a residual or gradient needs shape {tuple(x.shape)}, got {tuple(other.shape)}.")
    if other.stride() == x.stride() and other.dtype == x.dtype and other.device == x.device and not other.is_neg():
        return other
    if other.is_cpu:
        address(other)
    return torch.empty_like(x).copy_(other)


# the address of a tensor without memory is its offset: below this one, memory is asked for
_LOWEST = 1 << 36


def address(tensor: Tensor | None) -> int:
    """Where a tensor's values are; 0 for None.

    Raises:
        RuntimeError: If it has given its memory back: kernels, and torch's casts, would end the process.
    """
    if tensor is None:
        return 0
    found = tensor.data_ptr()
    if found < _LOWEST and tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(
            f"batch norm needs tensors with memory, got one of shape {tuple(tensor.shape)} that has given its memory "
            "back. Bring it back first, as FSDP and offloading do before a pass."
        )
    return found


@overload
def per_channel(x: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def per_channel(x: Tensor, values: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...
def per_channel(x: Tensor, values: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Statistics or parameters of ``x``, in a type if one is given; kernels read as many as ``x`` has channels."""
    if values is None:
        return None
    here = values.device == x.device if not x.is_cpu else values.is_cpu
    if values.dim() != 1 or values.numel() != x.size(1) or not here:
        raise ValueError(
            f"batch norm needs statistics and parameters of shape {tuple(x.shape[1:2])} on {x.device}, got "
            f"{tuple(values.shape)} on {values.device}. Give one value for each channel."
        )
    plain = values.is_contiguous() and not values.is_neg()
    if plain and (dtype is None or values.dtype == dtype):
        return values
    if values.is_cpu:
        address(values)
    wide = values.to(dtype or values.dtype)
    return wide if plain else wide.contiguous().resolve_neg()
