"""Tensors for kernels that read memory by address: their types, layouts, sizes and addresses."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def values_per_channel(x: Tensor) -> int:
    """Number of values of each channel; channels are on axis 1."""
    return x.shape[0] * x.shape[2:].numel()


def is_readable(x: Tensor) -> bool:
    """Whether kernels can read ``x``: of a known type, contiguous or channels_last, not empty."""
    # a lazily negated tensor has the opposite sign in memory
    is_known = x.dtype in TYPES and x.dim() > 1 and x.numel() > 0 and not x.is_neg()
    return is_known and (x.is_contiguous() or _channels_come_last(x))


def check_layout(x: Tensor) -> None:
    """Refuse a tensor that is not strided.

    Raises:
        TypeError: If ``x`` is sparse or has oneDNN's layout. A nested tensor (jagged) passes.
    """
    if x.layout not in {torch.strided, torch.jagged}:
        raise TypeError(
            f"batch norm needs a dense tensor, got layout {x.layout}. Call x.to_dense() first, or, for "
            "torch.utils.mkldnn.to_mkldnn, batchnorm.for_export(model)."
        )


def sizes(x: Tensor) -> tuple[int, int, int]:
    """The sizes of ``x`` in memory, (outer, channels, inner): inner is 1 if channels come last.

    Raises:
        ValueError: If ``x`` is neither contiguous nor channels_last.
    """
    outer, channels = x.size(0), x.size(1)
    if x.is_contiguous():
        return outer, channels, x.numel() // (outer * channels)
    if _channels_come_last(x):
        return x.numel() // channels, channels, 1
    raise ValueError(f"kernels need a contiguous or channels_last x, got strides {x.stride()}. Call x.contiguous().")


def _channels_come_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


@overload
def like(x: Tensor, other: Tensor) -> Tensor: ...
@overload
def like(x: Tensor, other: Tensor | None) -> Tensor | None: ...
def like(x: Tensor, other: Tensor | None) -> Tensor | None:
    """A residual or gradient in the type and layout of ``x``: unchanged if it has them, otherwise a copy."""
    if other is None:
        return None
    if other.shape != x.shape:
        raise ValueError(f"a residual or gradient needs shape {tuple(x.shape)}, got {tuple(other.shape)}.")
    if other.stride() == x.stride() and other.dtype == x.dtype and other.device == x.device and not other.is_neg():
        return other
    if other.is_cpu:
        address(other)
    return torch.empty_like(x).copy_(other)


# the address of a tensor without memory is its offset; below this address the tensor's memory is checked
_LOWEST = 1 << 36


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's values; 0 for None.

    Raises:
        RuntimeError: If the tensor's memory was freed: kernels, and torch's casts, would crash the process.
    """
    if tensor is None:
        return 0
    pointer = tensor.data_ptr()
    if pointer < _LOWEST and tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(
            f"batch norm needs tensors with memory, got a tensor of shape {tuple(tensor.shape)} that has given its "
            "memory back. Restore the memory first, as FSDP and offloading do before a pass."
        )
    return pointer


@overload
def per_channel(x: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def per_channel(x: Tensor, values: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...
def per_channel(x: Tensor, values: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Statistics or parameters of ``x``, contiguous and, unless ``dtype`` is None, in this type; None for None.

    Raises:
        ValueError: If there is not one value for each channel of ``x``, which kernels read, or the device differs.
    """
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
