"""Propagation: the signal at the entrance of a layer, and whether examples are still different there.

For H, the layer's inputs as a matrix of n examples x units (a fixed sample of the units):

    stable rank           ||H||_F^2 / ||H||_2^2
    cosine                mean over pairs of examples of <h_i, h_j> / (||h_i|| ||h_j||)
    orthogonality gap     || H H^T / ||H||_F^2 - I / n ||_F

Without batch norm all examples come to look alike in a deep net: stable rank and cosine go to 1 (Daneshmand et al.
2020, 2021). The mean square and the variance of channels are the two curves of Brock et al. 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.moments import Moments

UNITS = 256  # at most so many of a layer's units are sampled


def sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """At most 256 units of a layer's inputs, and their channels: (N, C, ...) -> (N, units), (units,).

    The same units every time: a random choice that depends on the shape alone and leaves global random states alone.
    """
    flat = x.detach().flatten(1)
    positions = flat.shape[1] // x.shape[1]
    chosen = torch.arange(flat.shape[1])
    if len(chosen) > UNITS:
        generator = torch.Generator().manual_seed(flat.shape[1])
        chosen = torch.randperm(flat.shape[1], generator=generator)[:UNITS].sort().values
    return flat[:, chosen.to(x.device)].double().cpu(), chosen // positions


def moments_of_channels(moments: Moments) -> dict[str, float]:
    """Mean square and variance of a layer's channels, each averaged over channels."""
    return {"mean_square": float(moments.mean.square().mean()), "channel_var": float(moments.var.mean())}


def resemblance(values: Tensor) -> dict[str, float]:
    """Stable rank, mean cosine and orthogonality gap of a layer's values, (N, units); None of them for N = 1.

    Values that are all 0 have no direction: NaN.
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
