"""Condition number of the inputs of a linear layer, which limits the speed of gradient descent.

With x~ = (x, 1), the Hessian of softmax regression is bounded by E[x~ x~^T]. The condition number of this matrix is
the ratio of its largest to its smallest eigenvalue (LeCun et al. 1998, "Efficient BackProp", section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_bias(x: Tensor) -> Tensor:
    """Append a column of ones to the inputs: (..., N, features) -> (..., N, features + 1)."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def condition_number(x: Tensor) -> float:
    """Largest over smallest eigenvalue of E[x~ x~^T], without the eigenvalues that are 0 up to rounding.

    The eigenvalues are squared singular values in float64, so a condition number of 1e12 still has correct digits.
    A constant feature repeats the column of ones, which gives an eigenvalue of 0.

    Args:
        x: Inputs, (N, features).
    """
    values = torch.linalg.svdvals(with_bias(x.double()))
    tolerance = values[0] * max(x.shape) * torch.finfo(torch.float64).eps  # the tolerance of numpy's matrix_rank
    return float((values[0] / values[values > tolerance][-1]).square())
