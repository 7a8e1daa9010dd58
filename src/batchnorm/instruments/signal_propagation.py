"""Propagation: how large the inputs of a layer are, and how much its examples still differ.

H is the matrix of a layer's inputs, n examples x units (a fixed sample of the units), with rows h_i:

    stable rank           ||H||_F^2 / ||H||_2^2
    cosine                mean over pairs of examples of <h_i, h_j> / (||h_i|| ||h_j||)
    orthogonality gap     || H H^T / ||H||_F^2 - I / n ||_F

In a deep net without batch norm all examples become similar: stable rank and cosine approach 1 (Daneshmand et al.
2020, 2021). The squared mean and the variance of channels are the two curves of Brock et al. 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.moments import Moments

UNITS = 256  # the most units that are sampled in a layer


def sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of at most 256 units of a layer's inputs, and the units' channels: (N, C, ...) -> (N, units), (units,).

    The random choice of units depends on the number of units alone, so it is the same every time. Global random states
    are not used.
    """
    flat = x.detach().flatten(1)
    positions = flat.shape[1] // x.shape[1]
    chosen = torch.arange(flat.shape[1])
    if len(chosen) > UNITS:
        generator = torch.Generator().manual_seed(flat.shape[1])
        chosen = torch.randperm(flat.shape[1], generator=generator)[:UNITS].sort().values
    return flat[:, chosen.to(x.device)].double().cpu(), chosen // positions


def moments_of_channels(moments: Moments) -> dict[str, float]:
    """Squared mean (called mean_square) and variance of a layer's channels, each averaged over channels."""
    return {"mean_square": float(moments.mean.square().mean()), "channel_var": float(moments.var.mean())}


def resemblance(values: Tensor) -> dict[str, float]:
    """Stable rank, mean cosine and orthogonality gap of a layer's values, (N, units).

    NaN for N = 1, and if all values are 0; the cosine is NaN if all values of an example are 0.
    """
    n = len(values)
    if n < 2:
        return dict.fromkeys(("stable_rank", "cosine", "orthogonality"), torch.nan)
    gram = values @ values.T  # (N, N)
    total = gram.trace()
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms)
    return {
        "stable_rank": float(total / torch.linalg.matrix_norm(gram, 2)) if total > 0 else torch.nan,
        "cosine": float((cosines.sum() - cosines.trace()) / (n * (n - 1))),
        "orthogonality": float(torch.linalg.matrix_norm(gram / total - torch.eye(n, dtype=gram.dtype) / n)),
    }
