"""The native kernels on CPU tensors: the same functions as reference.py for the layouts and types that they know.

``supports`` says which; everything else stays with the reference. Sums are blocked by shape alone, so results have the
same bits for any number of threads.
"""

from __future__ import annotations

from importlib import import_module
from math import nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.kernels.activations import NAMES
from batchnorm.kernels.reference import wide_dtype
from batchnorm.kernels.shapes import TYPES, address, is_readable, like, per_channel, sizes

if TYPE_CHECKING:
    from batchnorm.kernels.running_statistics import Running


def _built() -> Any:
    """The native module; None where the package was built without a compiler."""
    try:
        return import_module("batchnorm._native")
    except ImportError:
        return None


_native = _built()
INSTRUCTION_SET: str | None = _native and _native.instruction_sets()[0]

# as arithmetic.hpp numbers them
_TYPES = {dtype: number for number, dtype in enumerate(TYPES)}
_STORED = {torch.float32, torch.float64}
_ACTS = {act: number for number, act in enumerate((None, *NAMES))}
_NOTHING = torch.empty(0)
_NOTHING_STORED = (0, 0, 0, False, 0.0)


def supports(x: Tensor) -> bool:
    """Whether the native kernels take ``x``: built, on the CPU, of a known type, contiguous or channels_last."""
    return _native is not None and x.is_cpu and is_readable(x)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
    running: Running | None = None,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.train_forward; also moves running statistics, and writes y over x, where that is asked for."""
    y, residual, wide = x if inplace else torch.empty_like(x), like(x, residual), wide_dtype(x.dtype)
    mean, var = _empty(x, torch.float64), _empty(x, torch.float64)
    weight, bias = per_channel(x, weight, wide), per_channel(x, bias, wide)
    stored = _NOTHING_STORED if running is None else _stored(x.size(1), running)
    skipped = _native.train(
        *_head(x), _at(mean), _at(var), _at(weight), _at(bias), eps, _ACTS[act], param,
        _at(x), _at(residual), _at(y), *stored,
    )  # fmt: skip
    if running is not None:
        running.moved(skipped, mean.numel())
    return y, mean, var


def train_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    bias: Tensor | None = None,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    *,
    constant: bool = False,
    inverted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.train_backward; a gradient of another layout is copied into that of ``x`` first.

    With ``constant`` mean and variance are not functions of x: the backward pass of ``normalize``. With ``inverted``
    ``x`` is what a leaky ReLU wrote over it, from which it is recovered.
    """
    wide = wide_dtype(x.dtype)
    grad, other = like(x, grad), None if act is None else like(x, residual if y is None else y)
    d_x, d_residual = torch.empty_like(x), _NOTHING if other is None else torch.empty_like(x)
    d_weight, d_bias = _empty(x, wide), _empty(x, wide)
    mean, var = per_channel(x, mean, torch.float64), per_channel(x, var, torch.float64)
    weight, bias = per_channel(x, weight, wide), per_channel(x, bias, wide)
    _native.backward(
        *_head(x), _at(mean), _at(var), _at(weight), _at(bias), eps, _ACTS[act], param,
        _at(grad), _at(x), _at(other), y is not None, inverted, constant,
        _at(d_x), _at(d_residual), _at(d_weight), _at(d_bias),
    )  # fmt: skip
    return d_x, d_weight, d_bias, d_residual


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """As reference.normalize."""
    y, residual, wide = torch.empty_like(x), like(x, residual), wide_dtype(x.dtype)
    mean, var = per_channel(x, mean, torch.float64), per_channel(x, var, torch.float64)
    weight, bias = per_channel(x, weight, wide), per_channel(x, bias, wide)
    _native.normalize(
        *_head(x), _at(mean), _at(var), _at(weight), _at(bias), eps, _ACTS[act], param,
        _at(x), _at(residual), _at(y),
    )  # fmt: skip
    return y


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of ``x``, which ``supports`` takes, with every sum in float64."""
    mean, var = _empty(x, torch.float64), _empty(x, torch.float64)
    _native.moments(*_head(x), _at(mean), _at(var), _at(x))
    return mean, var


def supports_update(running: Running) -> bool:
    """Whether the kernels move these: float32 or float64 on the CPU, contiguous, of one model."""
    mean, var, batches = running[:3]
    known = mean.dtype == var.dtype and mean.dtype in _STORED and batches.dtype == torch.int64
    single = mean.dim() == var.dim() == 1 and batches.dim() == 0  # of one model, not of an ensemble
    return _native is not None and known and single and _is_readable(mean) and _is_readable(var) and batches.is_cpu


def _is_readable(values: Tensor) -> bool:
    return values.is_cpu and values.is_contiguous() and not values.is_neg()


def update_running(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """As running.update."""
    mean, var = (t.to(torch.float64).contiguous().resolve_neg() for t in (mean, var))
    if mean.shape != var.shape:
        raise ValueError(
            f"mean and var need one shape, got {tuple(mean.shape)} and {tuple(var.shape)}. Pass one batch's."
        )
    stored = _stored(mean.numel(), running)
    running.moved(_native.update(mean.numel(), _at(mean), _at(var), count, *stored), mean.numel())


def _stored(channels: int, running: Running) -> tuple[Any, ...]:
    """Addresses of running statistics for the kernels, which read and write as many values as there are channels."""
    mean, var = running.mean, running.var
    if mean.numel() != channels or var.numel() != channels:
        raise ValueError(
            f"running statistics need shape ({channels},), got {tuple(mean.shape)} and {tuple(var.shape)}. "
            "Give one value for each channel."
        )
    momentum = nan if running.momentum is None else running.momentum
    return _at(running.batches), _at(mean), _at(var), mean.dtype == torch.float64, momentum


def _head(x: Tensor) -> tuple[int, ...]:
    return _TYPES[x.dtype], *sizes(x)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else address(tensor)


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.size(1), dtype=dtype)
