"""The same functions as reference.py for tensors on CUDA and ROCm, in Triton.

A tensor is (N, C, L), with L = 1 where channels come last. It is cut into blocks, n examples by l values of each of c
channels; triton_blocks.py holds what a program does with one. Where a channel fits a block one kernel does everything,
and reads x once. Otherwise blocks leave their statistics behind, which are merged in float64, and a second pass applies
them. The backward pass does the same with sum g and sum g z. Blocks are cut by shape alone and sums have no atomics, so
results have the same bits however many programs run at once.
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
    """A function of triton_blocks.py: given a grid, what launches it."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., object]: ...


# values of a tensor in a program's registers, 16 a thread: backward, three tensors and their offsets fit the 128
# registers that a thread of 16 warps has
_WHOLE, _PART = 8192, 4096
_VALUES_PER_WARP = 512
# adjacent values that fill what memory hands out at once, 32 bytes, in half precision
_ADJACENT = 16


def supports(x: Tensor) -> bool:
    """Whether these kernels take ``x``: on a GPU, or interpreted; of a known type, contiguous or channels_last."""
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
        # without the d_residual that is rounded to the type of x
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
    y, given = torch.empty_like(x), [per_channel(x, t) for t in statistics]
    _cut(x, 0).launch(normalize_part, x, like(x, residual), *given, *_affine(x, layer), y, *_numbers(layer))
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
    known = forward if g is None else forward._replace(layer=forward.layer._replace(act=None))
    tensors, _ = _read_by_backward(grad if g is None else g, known)
    d_x = torch.empty_like(forward.x)
    options = (*_numbers(known.layer), forward.y is not None)
    _cut(forward.x, _WHOLE).launch(backward_part, *tensors, means, d_x, *options)
    return d_x


def _affine(x: Tensor, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    return per_channel(x, layer.weight), per_channel(x, layer.bias)


def _numbers(layer: Layer) -> tuple[float, str | None, float]:
    """eps, the activation and its parameter."""
    number(layer.act)  # refuses one that there is not
    return layer.eps, layer.act, float(layer.param)


def _read_by_backward(
    grad: Tensor, forward: ForwardPass
) -> tuple[tuple[Tensor, *tuple[Tensor | None, ...]], Tensor | None]:
    """Which tensors a backward pass reads, and one to write the gradient of p to where it is asked for."""
    x, statistics, layer, residual, y, _ = forward
    other = None if layer.act is None else like(x, residual if y is None else y)
    given = [per_channel(x, t) for t in statistics]
    return (like(x, grad), x, other, *given, *_affine(x, layer)), None if other is None else torch.empty_like(x)


def _empty_statistics(x: Tensor) -> ChannelStatistics:
    return ChannelStatistics(*x.new_empty(2, x.shape[1], dtype=torch.float64))


def _merged_statistics(x: Tensor, cut: _Cut) -> ChannelStatistics:
    """Mean and biased variance of every channel, in float64, measured in parts."""
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
    """How a tensor is cut into blocks: n examples, c channels and a run of values of each, all powers of two."""

    sizes: tuple[int, int, int]
    n: int
    c: int
    run: int

    @property
    def parts(self) -> int:
        """Blocks that a channel is cut into."""
        outer, _, inner = self.sizes
        return _ceil_div(outer, self.n) * _ceil_div(inner, self.run)

    @property
    def count(self) -> int:
        """Values of each channel."""
        return self.sizes[0] * self.sizes[2]

    def launch(self, kernel: Launched, x: Tensor, *arguments: Argument) -> None:
        """One program of ``kernel``, whose arguments begin with a tensor of the device, for each block."""
        programs = self.parts * _ceil_div(self.sizes[1], self.c)
        warps = max(self.n * self.c * self.run // _VALUES_PER_WARP, 1)
        with torch.cuda.device_of(x):  # a launch goes to the current device, not to that of its tensors
            kernel[(programs,)](x, *arguments, *self.sizes, self.n, self.c, self.run, num_warps=warps)


def _cut(x: Tensor, whole: int) -> _Cut:
    """Channels in one block where one of ``whole`` values holds them, else in blocks of up to _PART values."""
    outer, channels, inner = sizes(x)
    n, run = _power_of_two(outer), _power_of_two(inner)
    c = min(_power_of_two(channels), max(_ADJACENT // run, 1))
    if n * c * run > whole:
        run = min(run, max(_PART // n, _PART // 8))  # long runs of memory, but not far past its end
        n = min(n, _PART // (c * run))
    return _Cut((outer, channels, inner), n, c, run)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)
