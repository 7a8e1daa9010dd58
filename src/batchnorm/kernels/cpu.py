"""The native kernels on CPU tensors: the same functions as reference.py for the layouts and types that they know.

``supports`` says which; everything else stays with the reference. Sums are blocked by shape alone, so results have the
same bits for any number of threads.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.reference import wide_dtype


def _built() -> Any:
    """The native module; None where the package was built without a compiler."""
    try:
        return import_module("batchnorm._native")
    except ImportError:
        return None


_native = _built()
INSTRUCTION_SET: str | None = _native and _native.instruction_sets()[0]

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def supports(x: Tensor) -> bool:
    """Whether the native kernels take ``x``: built, on the CPU, of a known type, contiguous or channels_last."""
    known = _native is not None and x.device.type == "cpu" and x.dtype in _TYPES
    # a lazily negated tensor holds the other sign in memory
    return known and not x.is_neg() and x.numel() > 0 and _sizes(x) is not None


def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.train_forward."""
    wide = wide_dtype(x.dtype)
    y = torch.empty_like(x)
    mean, residual, var = (torch.empty(x.shape[1], dtype=wide) for _ in range(3))
    weight, bias = _per_channel(x, weight, bias)
    _native.train(*_head(x), _at(x), _at(y), _at(mean), _at(residual), _at(var), _at(weight), _at(bias), eps)
    return y, mean, residual, var


def train_backward(
    grad: Tensor, x: Tensor, mean: Tensor, residual: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.train_backward; a gradient of another layout is copied into that of ``x`` first."""
    wide = wide_dtype(x.dtype)
    if grad.shape != x.shape:
        raise ValueError(f"a gradient of y needs shape {tuple(x.shape)}, got {tuple(grad.shape)}. Pass that of y.")
    if grad.stride() != x.stride() or grad.dtype != x.dtype or grad.device != x.device or grad.is_neg():
        grad = torch.empty_like(x).copy_(grad)
    d_x = torch.empty_like(x)
    d_weight, d_bias = (torch.empty(x.shape[1], dtype=wide) for _ in range(2))
    channels = _per_channel(x, mean, residual, var, weight)
    inputs = (_at(t) for t in (grad, x, *channels))
    _native.backward(*_head(x), *inputs, _at(d_x), _at(d_weight), _at(d_bias), eps)
    return d_x, d_weight, d_bias


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As reference.normalize."""
    y = torch.empty_like(x)
    channels = _per_channel(x, mean, var, weight, bias)
    _native.normalize(*_head(x), _at(x), _at(y), *(_at(t) for t in channels), eps)
    return y


def supports_update(*statistics: Tensor) -> bool:
    """Whether ``update_running`` takes these statistics: one CPU type, float32 or float64, contiguous, of one model."""
    kinds = {t.dtype for t in statistics}
    plain = all(t.device.type == "cpu" and t.ndim == 1 and t.is_contiguous() and not t.is_neg() for t in statistics)
    same = len(kinds) == 1 and len({t.shape for t in statistics}) == 1
    return _native is not None and plain and same and kinds <= {torch.float32, torch.float64}


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> int:
    """As running.update; returns how many channels were not finite, and leaves counting and warning to the caller."""
    num_batches_tracked.add_(1)
    statistics = (running_mean, running_var, mean, var)
    factor = 1 / int(num_batches_tracked) if momentum is None else momentum
    head = (_TYPES[mean.dtype], mean.numel(), *(_at(t) for t in statistics))
    bad = _native.update(*head, factor, count / (count - 1), momentum is None)
    if bad and momentum is None:
        num_batches_tracked.sub_(1)
    torch.autograd.graph.increment_version((running_mean, running_var))
    return bad


def _sizes(x: Tensor) -> tuple[int, int, int] | None:
    """``x`` as outer x channels x inner: planes if contiguous, rows if channels come last; None otherwise."""
    channels = x.shape[1]
    if x.is_contiguous():
        return x.shape[0], channels, x.shape[2:].numel()
    if x.movedim(1, -1).is_contiguous():
        return x.numel() // channels, channels, 1
    return None


def _head(x: Tensor) -> tuple[int, ...]:
    return _TYPES[x.dtype], *(_sizes(x) or ())


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _per_channel(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Statistics and parameters in the type to compute with; the kernels read as many as ``x`` has channels."""
    wide, shape = wide_dtype(x.dtype), x.shape[1:2]
    for t in tensors:
        if t is not None and (t.shape != shape or t.device != x.device):
            raise ValueError(
                f"batch norm needs statistics and parameters of shape {tuple(shape)} on {x.device}, got "
                f"{tuple(t.shape)} on {t.device}. Give one value for each channel."
            )
    return [None if t is None else t.to(wide).contiguous().resolve_neg() for t in tensors]
