"""Condition number: how much longer than wide the bowl is that the loss of a linear layer makes of its inputs.

With x~ = (x, 1), the Hessian of softmax regression is bounded by E[x~ x~^T]; the ratio of its largest to its smallest
eigenvalue limits gradient descent (LeCun et al. 1998, "Efficient BackProp", section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_bias(x: Tensor) -> Tensor:
    """Inputs with a column of ones: (..., N, features) -> (..., N, features + 1)."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def condition_number(x: Tensor) -> float:
    """Largest over smallest eigenvalue of E[x~ x~^T] with a column of ones, over directions that are not empty.

    The eigenvalues are squared singular values in float64, so that 1e12 is still exact to some digits.
    A constant feature repeats the column of ones and adds an empty direction.

    Args:
        x: Inputs, (N, features).
    """
    values = torch.linalg.svdvals(with_bias(x.double()))
    empty = values[0] * max(x.shape) * torch.finfo(torch.float64).eps  # as numpy's matrix_rank
    return float((values[0] / values[values > empty][-1]).square())
