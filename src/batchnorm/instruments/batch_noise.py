"""Batch noise: the noise of normalizing by a batch's own statistics, and the dropout rate of equal noise.

For values z of a population with mean 0 and variance 1, a batch of M values with mean d and standard deviation s has

    noise power = mean over the batch of ((z - d) / s - z)^2 = d^2 + (1 - s)^2

Its expectation is (kurtosis + 3) / (4 M) to first order in 1 / M. Gaussian dropout with rate p has the noise power
p / (1 - p) (Srivastava et al. 2014, section 10). ``free_tier`` estimates the noise power from running averages alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", Tensor, float)


def noise_power(mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor:
    """Noise power of batches, in the shape of ``mean`` and ``var``.

    The batch is divided by sqrt(var + eps), as in a layer. A batch with ``var`` 0 has the noise power mean^2 if ``eps``
    is above 0, and 1 + mean^2 if ``eps`` is 0.

    Args:
        mean: Mean of the batch's standardized values.
        var: Biased variance of the batch's standardized values.
        eps: The layer's eps, in units of the population's variance.
    """
    kept = (var / (var + eps)).sqrt() if eps else 1.0
    return mean.square() + (kept - var.sqrt()).square()


def log_slope(power: Tensor, sizes: Sequence[int]) -> Tensor:
    """Least-squares slope of log power over log batch size, (sizes, ...) -> (...); -1 if power falls as 1 / size."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    return x @ power.double().log() / x.square().sum()


def dropout_rate(power: Value) -> Value:
    """The dropout rate p whose noise power p / (1 - p) is ``power``."""
    return power / (1 + power)
