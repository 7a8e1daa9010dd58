"""Batch noise: the noise of normalizing by a batch's own statistics, and the dropout rate of equal noise.

For values z of a population with mean 0 and variance 1, a batch of M with mean d and standard deviation s has

    noise power = E[((z - d) / s - z)^2] = d^2 + (1 - s)^2        [ (kurtosis + 3) / (4 M) to first order in 1 / M ]

averaged over the batch. Gaussian dropout at a rate p has a noise power of p / (1 - p) (Srivastava et al. 2014, section
10). The free tier estimates the same power from running averages alone (``free_tier``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", Tensor, float)


def noise_power(mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor:
    """Noise power of batches whose standardized values have this mean and biased variance, of the shape of both.

    With ``eps`` the batch is divided by sqrt(var + eps), as a layer does. A batch without variance counts as 1 + d^2.
    """
    kept = (var / (var + eps)).sqrt() if eps else 1.0
    return mean.square() + (kept - var.sqrt()).square()


def log_slope(power: Tensor, sizes: Sequence[int]) -> Tensor:
    """Slope of log power on log batch size by least squares, (sizes, ...) -> (...); -1 where power goes as 1 / size."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    return x @ power.double().log() / x.square().sum()


def dropout_rate(power: Value) -> Value:
    """Share p of values that dropout drops for a noise power of p / (1 - p)."""
    return power / (1 + power)
