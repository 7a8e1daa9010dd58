"""Activations in float64 NumPy, and how far rounding may lead a layer that adds a residual and applies one.

With p = gamma z + beta + r, y = a(p) and g = a'(p) d_y, the gradients are batch norm's with g in the place of d_y.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import oracle
import torch

from batchnorm.kernels.interface import ForwardPass

PARAMETERS = {"leaky_relu": 0.01, "elu": 1.0}
NAMES = ("relu", "leaky_relu", "elu", "silu", "gelu", "hardswish")

_erfc = np.vectorize(math.erfc, otypes=[float])


class Result(NamedTuple):
    """Values, or bounds on their errors."""

    y: np.ndarray
    d_x: np.ndarray
    d_gamma: np.ndarray
    d_beta: np.ndarray
    d_residual: np.ndarray


def value(p, act, param):
    """a(p)."""
    match act:
        case None:
            return p
        case "relu":
            return np.maximum(p, 0)
        case "leaky_relu":
            return np.where(p > 0, p, param * p)
        case "elu":
            return np.where(p > 0, p, param * np.expm1(np.minimum(p, 0)))
        case "silu":
            return p * _sigmoid(p)
        case "gelu":
            return p * _below(p)
        case "hardswish":
            return p * np.clip(p + 3, 0, 6) / 6
    raise ValueError(f"the oracle has no formula for {act!r}")


def slope(p, act, param):
    """a'(p)."""
    match act:
        case None:
            return np.ones_like(p)
        case "relu":
            return (p > 0) * 1.0
        case "leaky_relu":
            return np.where(p > 0, 1.0, param)
        case "elu":
            return np.where(p > 0, 1.0, param * np.exp(np.minimum(p, 0)))
        case "silu":
            return _sigmoid(p) * (1 + p * _sigmoid(-p))
        case "gelu":
            return _below(p) + p * np.exp(-p * p / 2) / math.sqrt(2 * math.pi)
        case "hardswish":
            return np.where(p <= -3, 0.0, np.where(p >= 3, 1.0, p / 3 + 0.5))
    raise ValueError(f"the oracle has no derivative for {act!r}")


def steepest(act, param):
    """The largest |a'|, and the largest |a''| where there is one: of silu 1/2, of gelu 2 phi(0) < 0.8."""
    first = {"leaky_relu": max(1, abs(param)), "elu": max(1, abs(param)), "silu": 1.1, "gelu": 1.13, "hardswish": 1.5}
    return first.get(act, 1.0), {"elu": abs(param), "silu": 0.5, "gelu": 0.8, "hardswish": 1 / 3}.get(act, 0.0)


def kinks(act, param):
    """Where a' jumps, and by how much."""
    jumps = {"relu": {0: 1}, "leaky_relu": {0: abs(1 - param)}, "elu": {0: abs(1 - param)}}
    return jumps.get(act, {-3: 0.5, 3: 0.5} if act == "hardswish" else {})


def fused(x, grad, residual, gamma, beta, eps, act, param, dtype, stored=None, narrowly=False) -> tuple[Result, Result]:
    """What a layer computes, and bounds on its errors where it computes in the wide type of ``dtype``.

    ``stored`` are the statistics of eval mode; ``narrowly`` computes in ``dtype`` itself. e_p is the error of y in
    ``oracle`` and one rounding for the residual. Evaluating a takes at most 8 roundings at the size of its terms, a' as
    many. Where p is within e_p of a kink, a' may be that of the other side. With a residual, g is rounded to ``dtype``
    before d_x is formed of it.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wide = dtype if narrowly else wide
    u, narrow = torch.finfo(wide).eps / 2, torch.finfo(dtype).eps / 2
    affine = oracle.train(x, grad, gamma, beta, eps) if stored is None else None
    affine = affine or oracle.evaluate(x, grad, *stored, gamma, beta, eps)
    e_p = _rounding(x, grad, gamma, affine, eps, wide, stored).y
    p = affine.y if residual is None else affine.y + residual
    e_p = e_p + 2 * u * np.abs(p)
    g, y = grad * slope(p, act, param), value(p, act, param)
    most, bend = steepest(act, param)
    e_y = most * e_p + (act is not None) * 8 * u * (np.abs(y) + np.abs(p) + (act == "elu") * abs(param))
    e_slope = bend * e_p + (act is not None) * 8 * u * most
    for kink, jump in kinks(act, param).items():
        e_slope = e_slope + jump * (np.abs(p - kink) <= e_p)
    e_g = np.abs(grad) * e_slope + u * np.abs(g)
    given = oracle.train(x, g, gamma, beta, eps) if stored is None else oracle.evaluate(x, g, *stored, gamma, beta, eps)
    rounding = _rounding(x, g, gamma, given, eps, wide, stored)
    e_x, e_gamma, e_beta = _carried(x, e_g, e_g + narrow * np.abs(g) * (residual is not None), gamma, eps, stored)
    bound = Result(e_y, rounding.d_x + e_x, rounding.d_gamma + e_gamma, rounding.d_beta + e_beta, e_g)
    return Result(y, given.d_x, given.d_gamma, given.d_beta, g), bound


def _rounding(x, grad, gamma, expected, eps, wide, stored):
    if stored is None:
        return oracle.train_rounding(x, grad, gamma, expected, eps, wide)
    return oracle.evaluate_rounding(x, grad, *stored, gamma, expected, eps, wide)


def _carried(x, e_sums, e_each, gamma, eps, stored):
    """What an error of g makes of d_x = gamma rstd (g - mean g - z mean g z), d_gamma = sum g z and d_beta = sum g."""
    axes, n = tuple(axis for axis in range(x.ndim) if axis != 1), x.size // x.shape[1]
    along = lambda v: v.reshape(1, -1, *[1] * (x.ndim - 2))  # noqa: E731
    mean, var = oracle.statistics(x) if stored is None else stored
    rstd = (along(var) + eps) ** -0.5
    z, scale = np.abs(x - along(mean)) * rstd, 1.0 if gamma is None else np.abs(along(gamma))
    e_beta, e_gamma = e_sums.sum(axes), (e_sums * z).sum(axes)
    shared = 0 if stored is not None else along(e_beta / n) + z * along(e_gamma / n)
    return scale * rstd * (e_each + shared), e_gamma, e_beta


def _sigmoid(p):
    return np.where(p > 0, 1 / (1 + np.exp(-np.abs(p))), np.exp(-np.abs(p)) / (1 + np.exp(-np.abs(p))))


def _below(p):
    return 0.5 * _erfc(-p / math.sqrt(2))


def calls(kernel, x, grad, layer):
    """Each function of a kernel that applies a layer's activation, as a call without arguments."""
    statistics = kernel.measure(x)
    forward = ForwardPass(x, statistics, layer)
    return [
        lambda: kernel.train_forward(x, layer),
        lambda: kernel.normalize(x, statistics, layer),
        lambda: kernel.train_backward(grad, forward),
        lambda: kernel.sum_gradients(grad, forward),
        lambda: kernel.input_gradient(grad, forward, None),
    ]
