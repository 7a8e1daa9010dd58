"""Census: what gamma and beta say of a layer's channels, read and not estimated.

In train mode a channel leaves the layer with mean beta and standard deviation |gamma|, whatever comes in. For normal
values behind a ReLU that makes a share Phi(beta / |gamma|) of them active.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.instruments.snapshots import Layers, Snapshot

# below eps / 10,000 a channel's output varies by less than a hundredth of gamma: it is constant
_CONSTANT = 1e-4
_SMALL, _RARE = 0.01, 0.01


def census(layers: Layers, snapshot: Snapshot) -> dict[str, Tensor]:
    """Gamma, beta, share active behind a ReLU and share of dead channels, each (layers,).

    ``gamma`` and ``beta`` are medians over channels of |gamma| and beta; ``active`` the mean of Phi(beta / |gamma|);
    ``dead`` the share of channels with a stored variance below eps / 10,000, or with |gamma| < 0.01 and less than
    1 % of the values active. Without gamma or beta they count as 1 and 0; NaN where they cannot be read.
    Misleads where no ReLU follows.
    """
    gamma, beta = layers.affine()
    scale = gamma.abs()
    active = torch.special.ndtr(beta / scale.clamp_min(torch.finfo(scale.dtype).tiny))
    eps = layers.each(layers.numbers("eps", torch.nan))
    dead = ((snapshot.cpu().var < _CONSTANT * eps) | ((scale < _SMALL) & (active < _RARE))).double()
    dead = torch.where(scale.isnan() & (dead == 0), torch.nan, dead)
    return {
        "gamma": layers.median(scale),
        "beta": layers.median(beta),
        "active": layers.mean(active),
        "dead": layers.mean(dead),
    }
