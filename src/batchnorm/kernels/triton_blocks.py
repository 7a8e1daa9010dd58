"""The kernels of triton.py: each program computes one block of a tensor.

Value (n, c, l) of a tensor (N, C, L) is at (n C + c) L + l. A program has its block of n examples, c channels and l
values of each channel in registers. It measures each channel of its block in two steps: near is the rounded mean, low
the rest of the mean.

    mean = near + low, low = sum (x - near) / count     m2 = sum (x - mean)^2

In a kernel whose name ends in whole, a block has all values of its channels; if the name ends in part, it may have only
some. For each part k of a channel a program writes mean_k and m2_k; ``merge`` combines them in float64, where n is the
sum of all count_k (Chan, Golub and LeVeque 1983):

    mean = sum count_k mean_k / n     m2 = sum m2_k + sum count_k (mean_k - mean)^2

Formulas and names are those of reference.py. Of the arguments, ``outer`` is N, ``channels`` C and ``inner`` L, and
``block_n`` is n, ``block_c`` c and ``block_run`` l.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def _installed(name: str) -> Any:
    """A module of the package triton; None if triton is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


_triton, tl = _installed("triton"), _installed("triton.language")
INSTALLED = _triton is not None
_jit = _triton.jit if _triton else lambda kernel: kernel
# whether Triton's interpreter, which needs no GPU, replaces its compiler: TRITON_INTERPRET=1 before Triton is imported
INTERPRETED = bool(_triton and _triton.knobs.runtime.interpret)


@_jit
def forward_whole(
    x, residual, weight, bias, y, means, variances, eps: tl.float64, act: tl.constexpr, param: tl.constexpr,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """y, mean and var of whole channels."""
    block, _, count = _place(outer, channels, inner, block_n, block_c, block_run)
    values = _load(x, block)
    near, low, m2 = _measure(values, count, block)
    mean, var = near.to(tl.float64) + low, m2 / count
    _store_channels(means, mean, block)
    _store_channels(variances, var, block)
    z = (values - near[None, :] - low[None, :]) * _rstd(var, eps, values.dtype)[None, :]
    _store(y, _activate(_scale_and_shift(z, weight, bias, residual, block), act, param), block)


@_jit
def normalize_part(
    x, residual, means, variances, weight, bias, y, eps: tl.float64, act: tl.constexpr, param: tl.constexpr,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """y from the given statistics."""
    block, _, _ = _place(outer, channels, inner, block_n, block_c, block_run)
    z, _ = _standardize(x, means, variances, eps, block)
    _store(y, _activate(_scale_and_shift(z, weight, bias, residual, block), act, param), block)


@_jit
def measure_whole(
    x, means, variances,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """Mean and var of whole channels."""
    block, _, count = _place(outer, channels, inner, block_n, block_c, block_run)
    near, low, m2 = _measure(_load(x, block), count, block)
    _store_channels(means, near.to(tl.float64) + low, block)
    _store_channels(variances, m2 / count, block)


@_jit
def measure_part(
    x, means, m2s, parts,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """Mean and m2 of a part of each channel."""
    block, part, count = _place(outer, channels, inner, block_n, block_c, block_run)
    near, low, m2 = _measure(_load(x, block), count, block)
    _store_part(means, near.to(tl.float64) + low, part, parts, block)
    _store_part(m2s, m2, part, parts, block)


@_jit
def merge(
    means, m2s, mean, var, parts, count,
    outer, inner, block_n: tl.constexpr, block_run: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """Mean and var of a channel from those of its parts."""
    channel = tl.program_id(0).to(tl.int64)
    total, m2 = tl.zeros([together], tl.float64), tl.zeros([together], tl.float64)
    for start in range(0, parts, together):
        k = start + tl.arange(0, together).to(tl.int64)
        total += _count(k, outer, inner, block_n, block_run) * tl.load(means + channel * parts + k, k < parts, 0.0)
    middle = tl.sum(total, 0) / count
    for start in range(0, parts, together):
        k = start + tl.arange(0, together).to(tl.int64)
        away = tl.load(means + channel * parts + k, k < parts, 0.0) - middle
        between = _count(k, outer, inner, block_n, block_run) * away * away
        m2 += tl.where(k < parts, between + tl.load(m2s + channel * parts + k, k < parts, 0.0), 0.0)
    tl.store(mean + channel, middle)
    tl.store(var + channel, tl.sum(m2, 0) / count)


@_jit
def backward_whole(
    grad, x, other, means, variances, weight, bias, d_x, d_residual, d_bias, d_weight,
    eps: tl.float64, act: tl.constexpr, param: tl.constexpr, other_is_y: tl.constexpr,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """d_x, d_residual, d_bias and d_weight of whole channels; d_bias is sum g, d_weight is sum g z."""
    block, _, count = _place(outer, channels, inner, block_n, block_c, block_run)
    g, z, rstd = _gradient(grad, x, other, means, variances, weight, bias, eps, act, param, other_is_y, block)
    sum_g, sum_gz = tl.sum(g, 0), tl.sum(g * z, 0)
    _store_channels(d_bias, sum_g, block)
    _store_channels(d_weight, sum_gz, block)
    _store(d_residual, g, block)
    g = g - (sum_g / count)[None, :] - z * (sum_gz / count)[None, :]
    _store(d_x, _slope(rstd, weight, block)[None, :] * g, block)


@_jit
def sum_part(
    grad, x, other, means, variances, weight, bias, d_residual, sums, sums_z, parts,
    eps: tl.float64, act: tl.constexpr, param: tl.constexpr, other_is_y: tl.constexpr,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """The sums of g and g z over a part of each channel, and d_residual, which is g."""
    block, part, _ = _place(outer, channels, inner, block_n, block_c, block_run)
    g, z, _ = _gradient(grad, x, other, means, variances, weight, bias, eps, act, param, other_is_y, block)
    _store(d_residual, g, block)
    _store_part(sums, tl.sum(g, 0), part, parts, block)
    _store_part(sums_z, tl.sum(g * z, 0), part, parts, block)


@_jit
def backward_part(
    grad, x, other, means, variances, weight, bias, means_of_gradients, d_x,
    eps: tl.float64, act: tl.constexpr, param: tl.constexpr, other_is_y: tl.constexpr,
    outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr,
):  # fmt: skip
    """d_x, from the means of g and g z over all of a channel, or None for constant statistics."""
    block, _, _ = _place(outer, channels, inner, block_n, block_c, block_run)
    g, z, rstd = _gradient(grad, x, other, means, variances, weight, bias, eps, act, param, other_is_y, block)
    if means_of_gradients is not None:
        mean_g = _load_channels(means_of_gradients, block).to(z.dtype)
        mean_gz = _load_channels(means_of_gradients + channels, block).to(z.dtype)
        g = g - mean_g[None, :] - z * mean_gz[None, :]
    _store(d_x, _slope(rstd, weight, block)[None, :] * g, block)


@_jit
def _place(outer, channels, inner, block_n: tl.constexpr, block_c: tl.constexpr, block_run: tl.constexpr):
    """This program's block, the number of the part, and the count of values per channel in it.

    A block is a tuple: the offsets of its values, a mask of those that exist, its channels, a mask of those that exist.
    Offsets and masks have shape (values, channels); offsets and channels are int64. Programs with consecutive numbers
    have adjacent channels, as in memory.
    """
    groups, runs = tl.cdiv(channels, block_c), tl.cdiv(inner, block_run)
    program = tl.program_id(0).to(tl.int64)
    part, i = program // groups, tl.arange(0, block_n * block_run)
    n, position = part // runs * block_n + i // block_run, part % runs * block_run + i % block_run
    c = program % groups * block_c + tl.arange(0, block_c)
    at = (n * channels * inner + position)[:, None] + (c * inner)[None, :]
    exists = ((n < outer) & (position < inner))[:, None] & (c < channels)[None, :]
    return (at, exists, c, c < channels), part, _count(part, outer, inner, block_n, block_run)


@_jit
def _count(part, outer, inner, block_n: tl.constexpr, block_run: tl.constexpr):
    """Number of values of a channel in its block number ``part``."""
    runs = tl.cdiv(inner, block_run)
    n, run = outer - part // runs * block_n, inner - part % runs * block_run
    return (tl.minimum(n, block_n) * tl.minimum(run, block_run)).to(tl.int32)


@_jit
def _load(values, block):
    """A block's values in the type of the arithmetic, float64 or float32; 0 where the mask is False."""
    loaded = tl.load(values + block[0], block[1], 0.0)
    return loaded if loaded.dtype == tl.float64 else loaded.to(tl.float32)


@_jit
def _store(target, values, block):
    """Write a block to its place; to none where ``target`` is None."""
    if target is not None:
        tl.store(target + block[0], values, block[1])


@_jit
def _load_channels(values, block):
    return tl.load(values + block[2], block[3], 0.0)


@_jit
def _store_channels(target, values, block):
    tl.store(target + block[2], values, block[3])


@_jit
def _store_part(target, values, part, parts, block):
    tl.store(target + block[2] * parts + part, values, block[3])


@_jit
def _measure(values, count, block):
    """near, low and m2 of each channel of a block; m2 is float64."""
    exists = block[1]
    # divided before the sum, because a sum of large values overflows; low contains the rounding error
    near = tl.sum(values * (1.0 / count), 0)
    low = tl.sum(tl.where(exists, values - near[None, :], 0.0), 0) / count
    away = tl.where(exists, values - near[None, :] - low[None, :], 0.0)
    # the squares of 1e20 and 1e-30 do not fit float32, so deviations are divided by the largest one
    largest = tl.minimum(tl.maximum(tl.max(tl.abs(away), 0), 1e-30), 1e30)
    away = away / largest[None, :]
    largest = largest.to(tl.float64)
    return near, low, tl.sum(away * away, 0) * largest * largest


@_jit
def _standardize(x, means, variances, eps, block):
    """z and rstd; the mean is subtracted in two parts, near and low."""
    values, mean = _load(x, block), _load_channels(means, block).to(tl.float64)
    rstd = _rstd(_load_channels(variances, block).to(tl.float64), eps, values.dtype)
    near = mean.to(values.dtype)
    low = (mean - near).to(values.dtype)
    return (values - near[None, :] - low[None, :]) * rstd[None, :], rstd


@_jit
def _rstd(var, eps, dtype: tl.constexpr):
    """1 / sqrt(var + eps), scaled so that the root can be in float32: most GPUs are slow in float64."""
    var += eps
    if dtype == tl.float64:
        return 1.0 / tl.sqrt(var)
    else:  # noqa: RET505 - without else the compiler needs one type for both returns
        scale = tl.where(var > 1e30, 2.0**-80, tl.where(var < 1e-30, 2.0**50, 1.0))
        return scale / tl.sqrt((var * scale * scale).to(tl.float32))


@_jit
def _scale_and_shift(z, weight, bias, residual, block):
    """p = gamma z + beta + residual; weight (gamma), bias (beta) and residual may be None."""
    if weight is not None:
        z = z * _load_channels(weight, block).to(z.dtype)[None, :]
    if bias is not None:
        z = z + _load_channels(bias, block).to(z.dtype)[None, :]
    if residual is not None:
        z = z + _load(residual, block)
    return z


@_jit
def _gradient(
    grad, x, other, means, variances, weight, bias,
    eps, act: tl.constexpr, param: tl.constexpr, other_is_y: tl.constexpr, block,
):  # fmt: skip
    """g = a'(p) d_y, z and rstd.

    ``other`` is y if ``other_is_y`` (a'(p) follows from its sign), otherwise the residual or None.
    """
    z, rstd = _standardize(x, means, variances, eps, block)
    g = _load(grad, block)
    if act is not None:
        p = _load(other, block) if other_is_y else _scale_and_shift(z, weight, bias, other, block)
        g = g * _derivative(p, act, param)
    return g, z, rstd


@_jit
def _slope(rstd, weight, block):
    """gamma rstd."""
    return rstd if weight is None else rstd * _load_channels(weight, block).to(rstd.dtype)


@_jit
def _activate(p, act: tl.constexpr, param: tl.constexpr):
    """a(p), as activations.activate; NaN stays NaN."""
    if act == "relu":
        p = tl.where(p < 0, 0.0, p)
    elif act == "leaky_relu":
        p = tl.where(p > 0, p, p * param)
    elif act == "elu":
        p = tl.where(p > 0, p, param * (tl.exp(p) - 1.0))
    elif act == "silu":
        p = p / (1.0 + tl.exp(-p))
    elif act == "gelu":
        p = p * 0.5 * (1.0 + tl.erf(p * 0.7071067811865476))  # 1 / sqrt(2)
    elif act == "hardswish":
        p = p * tl.minimum(tl.maximum(p + 3.0, 0.0), 6.0) / 6.0
    else:
        tl.static_assert(act is None, "an activation without a formula")
    return p


@_jit
def _derivative(p, act: tl.constexpr, param: tl.constexpr):
    """a'(p), as activations.derivative."""
    if act == "relu":
        p = tl.where(p > 0, 1.0, 0.0)
    elif act == "leaky_relu":
        p = tl.where(p > 0, 1.0, param)
    elif act == "elu":
        p = tl.where(p > 0, 1.0, param * tl.exp(p))
    elif act == "silu":
        s = 1.0 / (1.0 + tl.exp(-p))
        p = s * (1.0 + p * (1.0 - s))
    elif act == "gelu":
        density = tl.exp(-0.5 * p * p) * 0.3989422804014327  # 1 / sqrt(2 pi)
        p = 0.5 * (1.0 + tl.erf(p * 0.7071067811865476)) + p * density
    elif act == "hardswish":
        p = tl.where(p > 3, 1.0, tl.where(p < -3, 0.0, p / 3.0 + 0.5))
    else:
        tl.static_assert(False, "an activation without a derivative")
    return p
