"""The same functions as reference.py for tensors on CUDA and ROCm, in Triton.

A tensor has shape (N, C, L), with L = 1 if channels come last. It is cut into blocks of n examples, c channels and l
values of each channel; triton_blocks.py has the kernels, of which each program computes one block. If a channel fits
into a block, one kernel computes everything and reads x once. Otherwise a first kernel writes the statistics of each
block, they are merged in float64, and a second kernel applies them. The backward pass does the same with sum g and
sum g z. Blocks are cut by shape alone and sums use no atomic additions, so results have the same bits, no matter how
many programs run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchnorm.kernels.activations import number
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Gradients, Layer
from batchnorm.kernels.reference import wide_dtype
from batchnorm.kernels.shapes import is_readable, like, per_channel, sizes
from batchnorm.kernels.triton_blocks import (
    INSTALLED,
    INTERPRETED,
    backward_part,
    backward_whole,
    forward_whole,
    measure_part,
    measure_whole,
    merge,
    normalize_part,
    sum_part,
)

Argument = Tensor | float | str | None


class Launched(Protocol):
    """The type of the kernels in triton_blocks.py: ``kernel[grid](...)`` launches one."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., object]: ...


# The most values of a block whose channels are whole, and of any other block. A program of 8192 values has 16 warps and
# 16 values per thread: in the backward pass three tensors and their offsets fit the 128 registers of a thread.
_WHOLE, _PART = 8192, 4096
_VALUES_PER_WARP = 512
# adjacent half-precision values that fill 32 bytes, the smallest piece that a GPU reads from memory
_ADJACENT = 16


def supports(x: Tensor) -> bool:
    """Whether these kernels support ``x``: on a GPU, or interpreted; of a known type, contiguous or channels_last."""
    return INSTALLED and (x.is_cuda or (INTERPRETED and x.is_cpu)) and is_readable(x)


def train_forward(x: Tensor, layer: Layer, residual: Tensor | None = None) -> tuple[Tensor, ChannelStatistics]:
    """As reference.train_forward."""
    cut = _cut(x, _WHOLE)
    if cut.parts > 1:
        statistics = _merged_statistics(x, cut)
        return normalize(x, statistics, layer, residual), statistics
    y, statistics = torch.empty_like(x), _empty_statistics(x)
    cut.launch(forward_whole, x, like(x, residual), *_affine(x, layer), y, *statistics, *_numbers(layer))
    return y, statistics


def train_backward(grad: Tensor, forward: ForwardPass) -> Gradients:
    """As reference.train_backward; a gradient of another layout is copied into that of ``x`` first."""
    x, wide = forward.x, wide_dtype(forward.x.dtype)
    cut = _cut(x, _WHOLE)
    if cut.parts > 1 or forward.constant:
        sums, d_residual = sum_gradients(grad, forward)
        # g is computed again: d_residual is g rounded to the type of x
        d_x = input_gradient(grad, forward, None if forward.constant else sums / cut.count)
        d_bias, d_weight = (t.to(wide, copy=True) for t in sums)
    else:
        tensors, d_residual = _read_by_backward(grad, forward)
        d_x, (d_bias, d_weight) = torch.empty_like(x), (x.new_empty(x.shape[1], dtype=wide) for _ in range(2))
        options = (*_numbers(forward.layer), forward.y is not None)
        cut.launch(backward_whole, *tensors, d_x, d_residual, d_bias, d_weight, *options)
    return d_x, d_weight, d_bias, d_residual


def measure(x: Tensor) -> ChannelStatistics:
    """As reference.measure, with the bits of ``train_forward``."""
    cut = _cut(x, _WHOLE)
    if cut.parts > 1:
        return _merged_statistics(x, cut)
    statistics = _empty_statistics(x)
    cut.launch(measure_whole, x, *statistics)
    return statistics


def normalize(x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None) -> Tensor:
    """As reference.normalize."""
    y, mean_and_var = torch.empty_like(x), [per_channel(x, t) for t in statistics]
    _cut(x, 0).launch(normalize_part, x, like(x, residual), *mean_and_var, *_affine(x, layer), y, *_numbers(layer))
    return y


def sum_gradients(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
    """As reference.sum_gradients, with sums in float64."""
    x, cut = forward.x, _cut(forward.x, _WHOLE)
    tensors, d_residual = _read_by_backward(grad, forward)
    parts = x.new_empty(2, x.shape[1], cut.parts, dtype=torch.float64)
    cut.launch(sum_part, *tensors, d_residual, *parts, cut.parts, *_numbers(forward.layer), forward.y is not None)
    return parts.sum(-1), d_residual  # (2, C, parts) -> (2, C)


def input_gradient(grad: Tensor, forward: ForwardPass, means: Tensor | None, g: Tensor | None = None) -> Tensor:
    """As reference.input_gradient."""
    without_act = forward if g is None else forward._replace(layer=forward.layer._replace(act=None))
    tensors, _ = _read_by_backward(grad if g is None else g, without_act)
    d_x = torch.empty_like(forward.x)
    options = (*_numbers(without_act.layer), forward.y is not None)
    _cut(forward.x, _WHOLE).launch(backward_part, *tensors, means, d_x, *options)
    return d_x


def _affine(x: Tensor, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    return per_channel(x, layer.weight), per_channel(x, layer.bias)


def _numbers(layer: Layer) -> tuple[float, str | None, float]:
    """eps, the activation and its parameter."""
    number(layer.act)  # raises ValueError for an unknown activation
    return layer.eps, layer.act, float(layer.param)


def _read_by_backward(
    grad: Tensor, forward: ForwardPass
) -> tuple[tuple[Tensor, *tuple[Tensor | None, ...]], Tensor | None]:
    """The tensors that a backward pass reads, and an empty one for g; None instead unless ``forward.gradient_of_p``."""
    x, statistics, layer, residual, y, *_ = forward
    other = None if layer.act is None else like(x, residual if y is None else y)
    mean_and_var = [per_channel(x, t) for t in statistics]
    return (like(x, grad), x, other, *mean_and_var, *_affine(x, layer)), None if other is None else torch.empty_like(x)


def _empty_statistics(x: Tensor) -> ChannelStatistics:
    return ChannelStatistics(*x.new_empty(2, x.shape[1], dtype=torch.float64))


def _merged_statistics(x: Tensor, cut: _Cut) -> ChannelStatistics:
    """Mean and biased variance of every channel in float64, merged from those of its parts."""
    means, m2s = x.new_empty(2, x.shape[1], cut.parts, dtype=torch.float64)
    statistics = _empty_statistics(x)
    cut.launch(measure_part, x, means, m2s, cut.parts)
    outer, channels, inner = cut.sizes
    together = min(_power_of_two(cut.parts), 1024)
    with torch.cuda.device_of(x):
        merge[(channels,)](means, m2s, *statistics, cut.parts, cut.count, outer, inner, cut.n, cut.run, together)
    return statistics


@dataclass(frozen=True)
class _Cut:
    """How a tensor is cut into blocks of n examples, c channels and ``run`` values of each, all powers of two."""

    sizes: tuple[int, int, int]
    n: int
    c: int
    run: int

    @property
    def parts(self) -> int:
        """Number of blocks that a channel is cut into."""
        outer, _, inner = self.sizes
        return _ceil_div(outer, self.n) * _ceil_div(inner, self.run)

    @property
    def count(self) -> int:
        """Number of values of each channel."""
        return self.sizes[0] * self.sizes[2]

    def launch(self, kernel: Launched, x: Tensor, *arguments: Argument) -> None:
        """Launch one program of ``kernel`` for each block, on the device of ``x``, the kernel's first argument."""
        programs = self.parts * _ceil_div(self.sizes[1], self.c)
        warps = max(self.n * self.c * self.run // _VALUES_PER_WARP, 1)
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors' device
            kernel[(programs,)](x, *arguments, *self.sizes, self.n, self.c, self.run, num_warps=warps)


def _cut(x: Tensor, whole: int) -> _Cut:
    """Whole channels in a block if they have at most ``whole`` values, otherwise blocks of at most _PART values."""
    outer, channels, inner = sizes(x)
    n, run = _power_of_two(outer), _power_of_two(inner)
    c = min(_power_of_two(channels), max(_ADJACENT // run, 1))
    if n * c * run > whole:
        run = min(run, max(_PART // n, _PART // 8))  # long runs of memory, but few values beyond its end
        n = min(n, _PART // (c * run))
    return _Cut((outer, channels, inner), n, c, run)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)
