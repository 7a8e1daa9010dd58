"""The native kernels on CPU tensors: the same functions as reference.py, for the layouts and types that they support.

``supports`` says whether they support a tensor; if not, the reference computes. Sums are split into blocks by shape
alone, so results have the same bits for any number of threads.
"""

from __future__ import annotations

from importlib import import_module
from math import nan
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.activations import number
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Gradients, Layer
from batchnorm.kernels.reference import wide_dtype
from batchnorm.kernels.running_statistics import Running
from batchnorm.kernels.shapes import TYPES, address, is_readable, like, per_channel, sizes


def _built() -> Any:
    """The native module; None if the package was built without a compiler."""
    try:
        return import_module("batchnorm._native")
    except ImportError:
        return None


_native = _built()
INSTRUCTION_SET: str | None = _native and _native.instruction_sets()[0]

# numbers of types, as in the enum Type of arithmetic.hpp
_TYPES = {dtype: number for number, dtype in enumerate(TYPES)}
_STORED = {torch.float32, torch.float64}
# addresses of the counter, running mean and running variance; whether these are float64; momentum
Stored = tuple[int, int, int, bool, float]
_NOTHING_STORED: Stored = (0, 0, 0, False, 0.0)
# number of the type, three sizes, addresses of mean, var, gamma and beta, eps, number and parameter of the activation
Described = tuple[int, int, int, int, int, int, int, int, float, int, float]


def supports(x: Tensor) -> bool:
    """Whether the native kernels are built and support ``x``: on the CPU, of a type and layout in choice.py's table."""
    return _native is not None and x.is_cpu and is_readable(x)


def train_forward(
    x: Tensor, layer: Layer, residual: Tensor | None = None, running: Running | None = None, *, inplace: bool = False
) -> tuple[Tensor, ChannelStatistics]:
    """As reference.train_forward; moves ``running`` unless it is None, and writes y over x if ``inplace``."""
    y, residual = x if inplace else torch.empty_like(x), None if residual is None else like(x, residual)
    mean, var = _pair(x, torch.float64)
    described, _kept = _described(x, mean, var, layer)
    stored = _NOTHING_STORED if running is None else _stored(x.size(1), running)
    skipped = _native.train(*described, address(x), address(residual), address(y), *stored)
    if running is not None:
        running.moved(skipped, x.size(1))
    return y, ChannelStatistics(mean, var)


def train_backward(grad: Tensor, forward: ForwardPass) -> Gradients:
    """As reference.train_backward; a gradient of another layout is copied into that of ``x`` first."""
    x, statistics, layer, _, y, constant, _ = forward
    grad, other = like(x, grad), _other(forward)
    d_x, d_residual = torch.empty_like(x), None if other is None else torch.empty_like(x)
    d_weight, d_bias = _pair(x, wide_dtype(x.dtype))
    described, _kept = _described(x, *_exact(x, statistics), layer)
    _native.backward(
        *described, address(grad), address(x), address(other), y is not None, y is x, constant,
        address(d_x), address(d_residual), address(d_weight), address(d_bias),
    )  # fmt: skip
    return d_x, d_weight, d_bias, d_residual


def measure(x: Tensor, valid: Tensor | None = None, *, exact: bool = False) -> ChannelStatistics:
    """As reference.measure, with the bits of ``train_forward``; with ``exact`` every value is added in float64."""
    mean, var = _pair(x, torch.float64)
    _native.moments(*_head(x), address(mean), address(var), address(valid), address(x), exact)
    return ChannelStatistics(mean, var)


def normalize(
    x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """As reference.normalize."""
    y, residual = torch.empty_like(x), None if residual is None else like(x, residual)
    described, _kept = _described(x, *_exact(x, statistics), layer)
    _native.normalize(*described, address(valid), address(x), address(residual), address(y))
    return y


def sum_gradients(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
    """As reference.sum_gradients, with sums in float64 and the bits of ``train_backward``."""
    x, statistics, layer, _, y, _, valid = forward
    grad, other = like(x, grad), _other(forward)
    make = torch.empty_like if valid is None else torch.zeros_like
    d_residual, sums = None if other is None else make(x), torch.empty(2, x.size(1), dtype=torch.float64)
    described, _kept = _described(x, *_exact(x, statistics), layer)
    _native.sum_gradients(
        *described, address(valid), address(grad), address(x), address(other), y is not None, y is x,
        address(d_residual), address(sums),
    )  # fmt: skip
    return sums, d_residual


def input_gradient(grad: Tensor, forward: ForwardPass, means: Tensor | None, g: Tensor | None = None) -> Tensor:
    """As reference.input_gradient, with the bits of ``train_backward``."""
    x, statistics, layer, _, y, _, valid = forward
    if g is None and forward.gradient_of_p and y is not x:
        raise ValueError("input_gradient needs g if there are an activation and a residual. Pass sum_gradients' g.")
    layer = layer if g is None else layer._replace(act=None)
    grad, d_x = like(x, grad if g is None else g), torch.empty_like(x)
    means = None if means is None else means.to(torch.float64).contiguous()
    described, _kept = _described(x, *_exact(x, statistics), layer)
    _native.input_gradient(*described, address(valid), address(grad), address(x), y is x, address(means), address(d_x))
    return d_x


def _other(forward: ForwardPass) -> Tensor | None:
    """The tensor besides x that the activation's derivative is computed from: y, the residual or None."""
    x, _, layer, residual, y, *_ = forward
    return None if layer.act is None or y is x else like(x, residual if y is None else y)


def supports_update(running: Running) -> bool:
    """Whether the kernels can move these: float32 or float64 on the CPU, contiguous, of one model."""
    mean, var, batches = running[:3]
    is_known = mean.dtype == var.dtype and mean.dtype in _STORED and batches.dtype == torch.int64
    single = mean.dim() == var.dim() == 1 and batches.dim() == 0  # of one model, not of an ensemble
    return _native is not None and is_known and single and _is_readable(mean) and _is_readable(var) and batches.is_cpu


def _is_readable(values: Tensor) -> bool:
    return values.is_cpu and values.is_contiguous() and not values.is_neg()


def update_running(running: Running, statistics: ChannelStatistics, count: int) -> None:
    """As reference.update_running."""
    mean, var = (t.to(torch.float64).contiguous().resolve_neg() for t in statistics)
    if mean.shape != var.shape:
        raise ValueError(
            f"mean and var need the same shape, got {tuple(mean.shape)} and {tuple(var.shape)}. Pass one batch's."
        )
    stored = _stored(mean.numel(), running)
    running.moved(_native.update(mean.numel(), address(mean), address(var), count, *stored), mean.numel())


def _stored(channels: int, running: Running) -> Stored:
    """Addresses of running statistics, which must have ``channels`` values: the kernels read and write so many."""
    mean, var = running.mean, running.var
    if mean.numel() != channels or var.numel() != channels:
        raise ValueError(
            f"running statistics need shape ({channels},), got {tuple(mean.shape)} and {tuple(var.shape)}. "
            "Give one value for each channel."
        )
    momentum = nan if running.momentum is None else running.momentum
    return address(running.batches), address(mean), address(var), mean.dtype == torch.float64, momentum


def _described(x: Tensor, mean: Tensor, var: Tensor, layer: Layer) -> tuple[Described, tuple[Tensor | None, ...]]:
    """The kernels' arguments for a layer, and the tensors at their addresses: the caller must keep these tensors."""
    wide = wide_dtype(x.dtype)
    weight, bias = per_channel(x, layer.weight, wide), per_channel(x, layer.bias, wide)
    at = address(mean), address(var), address(weight), address(bias)
    return (*_head(x), *at, layer.eps, number(layer.act), layer.param), (mean, var, weight, bias)


def _exact(x: Tensor, statistics: ChannelStatistics) -> tuple[Tensor, Tensor]:
    """Mean and variance in float64, which the kernels read."""
    mean, var = statistics
    return per_channel(x, mean, torch.float64), per_channel(x, var, torch.float64)


def _head(x: Tensor) -> tuple[int, int, int, int]:
    return _TYPES[x.dtype], *sizes(x)


def _pair(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors with one value for each channel, not initialized."""
    first = torch.empty(x.size(1), dtype=dtype)
    return first, torch.empty_like(first)
