"""Census: what gamma and beta show about a layer's channels.

In train mode each output channel has mean beta and standard deviation |gamma|, whatever the inputs are. If its values
are normally distributed, a ReLU behind the layer passes the share Phi(beta / |gamma|) of them.
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

    ``gamma`` and ``beta`` are medians over channels of |gamma| and beta, and ``active`` is the mean of
    Phi(beta / |gamma|). ``dead`` is the share of channels with a stored variance below eps / 10,000, or with
    |gamma| < 0.01 and less than 1 % of the values active. A layer without gamma or beta counts as gamma 1 and beta 0.
    Gamma and beta that cannot be read give NaN; a stored variance that is missing or cannot be read makes no channel
    dead. ``active`` and ``dead`` mislead if no ReLU follows the layer.
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
