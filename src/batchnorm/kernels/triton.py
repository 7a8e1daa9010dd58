"""The same functions as reference.py for tensors on CUDA and ROCm, in Triton.

A tensor is (N, C, L), with L = 1 where channels come last. It is cut into blocks, n examples by l values of each of c
channels; triton_blocks.py holds what a program does with one. Where a channel fits a block one kernel does everything,
and reads x once. Otherwise blocks leave their statistics behind, which are merged in float64, and a second pass applies
them. The backward pass does the same with sum g and sum g z. Blocks are cut by shape alone and sums have no atomics, so
results have the same bits however many programs run at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.reference import wide_dtype
from batchnorm.kernels.shapes import is_readable, like, per_channel, sizes
from batchnorm.kernels.triton_blocks import (
    INSTALLED,
    INTERPRETED,
    backward_part,
    backward_whole,
    forward_whole,
    measure_part,
    merge,
    normalize_part,
    sum_part,
)

# values of a tensor in a program's registers, 16 a thread: backward, three tensors and their offsets fit the 128
# registers that a thread of 16 warps has
_WHOLE, _PART = 8192, 4096
_VALUES_PER_WARP = 512
# adjacent values that fill what memory hands out at once, 32 bytes, in half precision
_ADJACENT = 16


def supports(x: Tensor) -> bool:
    """Whether these kernels take ``x``: on a GPU, or interpreted; of a known type, contiguous or channels_last."""
    return INSTALLED and (x.is_cuda or (INTERPRETED and x.is_cpu)) and is_readable(x)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    param: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.train_forward."""
    cut = _cut(x, _WHOLE)
    if cut.parts > 1:
        mean, var = _statistics(x, cut)
        return normalize(x, mean, var, weight, bias, eps, act, param, residual), mean, var
    y, residual = torch.empty_like(x), like(x, residual)
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    weight, bias = per_channel(x, weight), per_channel(x, bias)
    cut.launch(forward_whole, x, residual, weight, bias, y, mean, var, eps, act, float(param))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.train_backward; a gradient of another layout is copied into that of ``x`` first."""
    other = None if act is None else like(x, residual if y is None else y)
    d_x, d_residual = torch.empty_like(x), None if other is None else torch.empty_like(x)
    mean, var, weight, bias = (per_channel(x, t) for t in (mean, var, weight, bias))
    given = (like(x, grad), x, other, mean, var, weight, bias)
    options = (eps, act, float(param), y is not None)
    cut = _cut(x, _WHOLE)
    if cut.parts == 1:
        sums = x.new_empty(2, x.shape[1], dtype=wide_dtype(x.dtype))
        cut.launch(backward_whole, *given, d_x, d_residual, sums, *options)
    else:
        parts = x.new_empty(2, x.shape[1], cut.parts, dtype=torch.float64)
        cut.launch(sum_part, *given, *parts, cut.parts, *options)
        exact = parts.sum(-1)  # (2, C, parts) -> (2, C)
        cut.launch(backward_part, *given, exact, d_x, d_residual, cut.count, *options)
        sums = exact.to(wide_dtype(x.dtype))
    return d_x, sums[1], sums[0], x.new_empty(0) if d_residual is None else d_residual


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
    y, residual = torch.empty_like(x), like(x, residual)
    mean, var, weight, bias = (per_channel(x, t) for t in (mean, var, weight, bias))
    _cut(x, 0).launch(normalize_part, x, residual, mean, var, weight, bias, y, eps, act, float(param))
    return y


def _statistics(x: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float64, measured in parts."""
    means, m2s = x.new_empty(2, x.shape[1], cut.parts, dtype=torch.float64)
    mean, var = x.new_empty(2, x.shape[1], dtype=torch.float64)
    cut.launch(measure_part, x, means, m2s, cut.parts)
    outer, channels, inner = cut.sizes
    together = min(_power_of_two(cut.parts), 1024)
    with torch.cuda.device_of(x):
        merge[(channels,)](means, m2s, mean, var, cut.parts, cut.count, outer, inner, cut.n, cut.run, together)
    return mean, var


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

    def launch(self, kernel: Any, *arguments: Any) -> None:
        """One program of ``kernel`` for each block."""
        programs = self.parts * _ceil_div(self.sizes[1], self.c)
        warps = max(self.n * self.c * self.run // _VALUES_PER_WARP, 1)
        with torch.cuda.device_of(arguments[0]):  # a launch goes to the current device, not to that of its tensors
            kernel[(programs,)](*arguments, *self.sizes, self.n, self.c, self.run, num_warps=warps)


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
