"""BN1: channels that do too much or nothing, by what is stored of them."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding
from batchnorm.rules.words import some_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.evidence import Evidence

# a variance below 10 eps is partly eps: the output varies less than gamma says. That alone is no fault: the scale of
# what a convolution makes is arbitrary
SMALL = 10.0
# below eps / 10,000 the output varies by less than 1 % of gamma: on the training data the channel was constant
CONSTANT = 1e-4
# gain |gamma| / sqrt(var + eps) of an ordinary channel is around 1, that of gamma = 1 at most 316 for eps = 1e-5 and 32
# for 1e-3
STEEP = 100.0
# a channel whose result varies by less than this moves a sum of a thousand such ones by about 0.03
FAINT = 1e-3
RARELY = 0.01  # of the positions


def constant_channel(evidence: Evidence) -> Iterator[Finding]:
    """A channel hardly varied in training, yet its gamma magnifies whatever varies in it later.

    Why:
        Dividing by sqrt(var + eps) of a constant channel multiplies by up to 316. On training data nothing comes of
        it; on new data a small change becomes the largest signal of the layer.

    How:
        running_var < eps / 10,000 and |gamma| / sqrt(var + eps) > 100. A channel with a small gamma is harmless: BN106.
        Silent for files that do not tell eps: with 1e-3 the same variance is harmless.

    Example:
        A padded corner, a one-hot feature that training data lack, a dead filter that noise wakes up.

    Fix:
        Remove the channel, or set its gamma to 0 if its beta is what is wanted.

    References:
        batchnorm explain BN106.
    """
    for name, stored in evidence.stored.items():
        if not _is_whole(stored) or (evidence.modules is None and stored.eps is None):
            continue
        channels = tuple(i for i in _constant(evidence, stored) if _gain(evidence, stored, i) > STEEP)
        if channels:
            steepest = max(_gain(evidence, stored, i) for i in channels)
            yield Finding(
                name,
                f"var < eps / 10,000 and gain up to {steepest:.0f}, {some_of(channels, stored)}",
                f"gain up to {STEEP:.0f}",
                "A small change of the input there is magnified above everything else.",
                "set gamma of these channels to 0, or prune them",
                channels=channels,
            )


def dead_channel(evidence: Evidence) -> Iterator[Finding]:
    """A channel contributes next to nothing.

    Why:
        It takes time and memory like any other. Many of them say that the learning rate or the weight decay was too
        high, or that the network is wider than it needs to be.

    How:
        |gamma| < 0.001 and, with a ReLU behind it, hardly ever active: P = Phi(beta / |gamma|) < 0.01, for inputs
        that are near normal; or var < 10 eps with |gamma| / sqrt(var + eps) sqrt(var) < 0.001: it is constant.

    Example:
        12 of 512 channels after training with strong weight decay.

    Fix:
        Nothing is wrong with the answers. Prune the channels, or leave them.

    References:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    for name, stored in evidence.stored.items():
        if not _is_whole(stored) or stored.is_initial or stored.is_silent:
            continue
        if channels := tuple(i for i in range(stored.channels) if _is_dead(evidence, stored, i)):
            yield Finding(
                name,
                f"{some_of(channels, stored)} hardly vary or are hardly ever active",
                f"|gamma| or output sd of {FAINT:g}",
                "They cost time and memory and contribute next to nothing.",
                "prune them, or leave them",
                channels=channels,
            )


def _is_whole(stored: Stored) -> bool:
    """Whether there are variances, and of all else as many or none."""
    tensors = (stored.running_mean, stored.running_var, stored.weight, stored.bias)
    sizes = {len(values) for values in tensors if values is not None}
    return stored.running_var is not None and len(sizes) == 1 and not stored.unread


def _constant(evidence: Evidence, stored: Stored) -> tuple[int, ...]:
    limit = CONSTANT * evidence.eps(stored.name)
    return tuple(i for i, var in enumerate(stored.running_var or ()) if 0 <= var < limit)


def _gain(evidence: Evidence, stored: Stored, channel: int) -> float:
    """|gamma| / sqrt(var + eps)."""
    gamma = abs(stored.weight[channel]) if stored.weight else 1.0
    spread = (stored.running_var[channel] if stored.running_var else 1.0) + evidence.eps(stored.name)
    return gamma / math.sqrt(spread) if spread > 0 else math.inf


def _is_dead(evidence: Evidence, stored: Stored, channel: int) -> bool:
    var = stored.running_var[channel] if stored.running_var else 1.0
    if not 0 <= var < math.inf:
        return False
    gain = _gain(evidence, stored, channel)
    if var < SMALL * evidence.eps(stored.name) and gain <= STEEP and gain * math.sqrt(var) < FAINT:
        return True
    gamma = abs(stored.weight[channel]) if stored.weight else 1.0
    beta = stored.bias[channel] if stored.bias else 0.0
    return gamma < FAINT and _activity(beta, gamma) < RARELY


def _activity(beta: float, gamma: float) -> float:
    """P(gamma z + beta > 0) for a standard normal z."""
    return NormalDist().cdf(beta / gamma) if gamma else float(beta > 0)
