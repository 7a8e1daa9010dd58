"""Batch norm in float64 NumPy, written from the paper's formulas, and how far rounding may lead away from it.

Forward is algorithm 1 of Ioffe and Szegedy (2015); backward is the chain rule as their section 3 prints it, which
is another route than the closed form that the product computes. Channels are axis 1; None for gamma or beta means
1 or 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Result(NamedTuple):
    """Values, or bounds on their errors, of one forward and backward pass."""

    y: np.ndarray
    d_x: np.ndarray
    d_gamma: np.ndarray
    d_beta: np.ndarray


def exact(tensor: torch.Tensor | None) -> np.ndarray | None:
    """A tensor's values, widened without rounding."""
    return None if tensor is None else tensor.detach().double().numpy()


def statistics(x):
    """Mean and biased variance of every channel."""
    axes = _others(x)
    mean = x.mean(axes)
    return mean, ((x - _along(mean, x)) ** 2).mean(axes)


def train(x, grad, gamma, beta, eps) -> Result:
    """A pass in train mode: normalized by the batch's own statistics, which depend on x."""
    axes, m = _others(x), x.size // x.shape[1]
    mean, var = (_along(v, x) for v in statistics(x))
    std = np.sqrt(var + eps)
    x_hat = (x - mean) / std
    d_x_hat = grad * _gamma(gamma, x)
    d_var = (d_x_hat * (x - mean)).sum(axes, keepdims=True) * -0.5 * std**-3
    d_mean = -(d_x_hat / std).sum(axes, keepdims=True) + d_var * (-2 * (x - mean)).mean(axes, keepdims=True)
    d_x = d_x_hat / std + d_var * 2 * (x - mean) / m + d_mean / m
    return Result(_shifted(x_hat, gamma, beta), d_x, (grad * x_hat).sum(axes), grad.sum(axes))


def evaluate(x, grad, mean, var, gamma, beta, eps) -> Result:
    """A pass in eval mode: normalized by stored statistics, which are constants."""
    std = np.sqrt(_along(var, x) + eps)
    x_hat = (x - _along(mean, x)) / std
    d_gamma, d_beta = (grad * x_hat).sum(_others(x)), grad.sum(_others(x))
    return Result(_shifted(x_hat, gamma, beta), grad * _gamma(gamma, x) / std, d_gamma, d_beta)


def updated(running_mean, running_var, x, momentum):
    """Stored statistics after a batch: they move towards its mean and its *unbiased* variance."""
    m = x.size // x.shape[1]
    mean, var = statistics(x)
    return (
        (1 - momentum) * running_mean + momentum * mean,
        (1 - momentum) * running_var + momentum * var * m / (m - 1),
    )


# --- how far rounding may lead ----------------------------------------------------------------------------


def path(count: int) -> float:
    """Longest chain of additions that a value of a sum of ``count`` takes part in.

    Sums run in vector lanes or pairwise, so it is far below count; for few values it is count - 1.
    """
    return np.sqrt(count) + 8


def train_rounding(x, grad, gamma, expected: Result, eps, wide: torch.dtype) -> Result:
    """Bound on the error of a pass that rounds each operation to ``wide``; u is its unit roundoff.

    The deviation of a value is rounded twice and is off by the error of the mean's residual, u path std at most.
    The variance is relatively off by (path + 3) u, its inverse root by half of that, and by 4 u for eps and
    the root. So z is off by e_z = u ((path + 8) |z| + path). Sums of n terms add u path times the sum of
    absolute terms, products u each.
    """
    u, axes, n = torch.finfo(wide).eps / 2, _others(x), x.size // x.shape[1]
    p = path(n)
    mean, var = (_along(v, x) for v in statistics(x))
    rstd = (var + eps) ** -0.5
    z = np.abs(x - mean) * rstd
    e_z = u * ((p + 8) * z + p)
    g, scale = np.abs(grad), np.abs(_gamma(gamma, x))
    e_y = scale * e_z + 2 * u * (scale * z + np.abs(expected.y))
    e_beta = u * p * g.sum(axes)
    e_gamma = (g * e_z).sum(axes) + u * (p + 2) * (g * z).sum(axes)
    inner = g + _along(g.sum(axes) / n, x) + z * _along((g * z).sum(axes) / n, x)
    e_inner = (
        _along(e_beta / n, x) + z * _along(e_gamma / n, x) + e_z * _along((g * z).sum(axes) / n, x) + 6 * u * inner
    )
    return Result(e_y, scale * rstd * e_inner + (p + 8) * u * np.abs(expected.d_x), e_gamma, e_beta)


def evaluate_rounding(x, grad, mean, var, gamma, expected: Result, eps, wide: torch.dtype) -> Result:
    """Bound on the error of a pass with given statistics: 8 roundings a value, and those of the two sums."""
    u, axes = torch.finfo(wide).eps / 2, _others(x)
    p = path(x.size // x.shape[1])
    z, g = np.abs(x - _along(mean, x)) * (_along(var, x) + eps) ** -0.5, np.abs(grad)
    e_y = 8 * u * (np.abs(_gamma(gamma, x)) * z + np.abs(expected.y))
    return Result(e_y, 8 * u * np.abs(expected.d_x), (p + 8) * u * (g * z).sum(axes), p * u * g.sum(axes))


def assert_within(found: torch.Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    """``found`` is ``expected`` up to ``bound`` and one rounding to the type of ``found`` (half an ulp)."""
    info = torch.finfo(found.dtype)
    allowed = bound + info.eps / 2 * (np.abs(expected) + bound) + info.smallest_normal * info.eps / 2
    error = np.abs(exact(found) - expected)
    assert (error <= allowed).all(), f"error {error.max():.3g} is {(error / allowed).max():.3g} times what is allowed"


def _others(x) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def _along(values, x):
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def _gamma(gamma, x):
    return 1.0 if gamma is None else _along(gamma, x)


def _shifted(x_hat, gamma, beta):
    return x_hat * _gamma(gamma, x_hat) + (0.0 if beta is None else _along(beta, x_hat))
