"""The free tier: how noisy batches are and how well stored statistics follow them, from running averages alone.

A window of W consecutive steps gives W batch means m_i and unbiased variances v_i of each channel (``snapshots``).
Second differences leave out a drift that is even within the window:

    Var(mu_B)        = mean (m_(i+1) - 2 m_i + m_(i-1))^2 / 6 / share,      Var(log s_B^2) likewise from log v_i
    noise power      = Var(mu_B) / s^2 + Var(log s_B^2) / 4     [ (kappa + 3) / (4 M) for M independent values ]
    M_eff            = s^2 / Var(mu_B)                          [ M ]
    dropout          = noise / (1 + noise)                      [ Gaussian dropout of as much noise ]
    staleness^2      = (stored - mean of m_i)^2 / (Var(mu_B) (a / (2 - a) + share / W))          [ 1 ]

all pooled over a layer's channels in units of s^2, the mean of v_i: with a few steps each channel alone would be an
unsteady estimate. In brackets what each comes to for independent batches: a normal channel (kappa = 3) in batches of
32 has noise power 0.0469 and a dropout rate of 4.5 %. With C channels the relative error of a window of eight steps
is about 0.8 / sqrt(C).

Behind another batch norm layer batches are alike by construction: each was given the same means and variances, so
M_eff can be many times the number of values, and the noise small. That is what the layer adds, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from batchnorm.instruments.snapshots import Layers, Snapshot, updates

LEAST = 4  # snapshots: three steps have one second difference
# a channel is left out when more than this share of its measured variance may be rounding of the stored mean
_ROUNDED = 0.1


@final
@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What W consecutive training steps say of every layer; all (layers,), NaN where nothing could be measured.

    A layer is measured if every step updated its statistics, by a momentum above 0. Channels without variance are
    left out. Several forward passes in a step are counted for what they are, a mean of several batches.

    Args:
        noise: Noise power of normalization by a batch's own statistics, as a share of the output's variance.
        m_eff: Independent values that a batch's mean is worth.
        dropout: Rate of Gaussian dropout with as much noise.
        staleness: Distance of the stored mean from the batches', in standard errors, rms over channels.
        staleness_var: The same for the log of the variance.
        gap: Difference of outputs between batch and stored statistics, rms, in sd of the eval output.
    """

    noise: Tensor
    m_eff: Tensor
    dropout: Tensor
    staleness: Tensor
    staleness_var: Tensor
    gap: Tensor

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot], layers: Layers) -> Window:
        """Read a window of W + 1 snapshots that were taken after consecutive steps; W is at least 3."""
        if len(snapshots) < LEAST:
            raise ValueError(f"a window needs {LEAST} snapshots or more, got {len(snapshots)}. Take more steps.")
        snapshots = [snapshot.cpu() for snapshot in snapshots]
        seen = updates(snapshots, layers)
        var = seen.var.mean(0)  # (channels,)
        of_mean = _variance_of_neighbours(seen.mean, layers.each(seen.share))
        of_log = _variance_of_neighbours(seen.var.log(), layers.each(seen.share))
        counted = layers.each(seen.measurable) & (var > 0) & of_log.isfinite() & of_mean.isfinite()
        counted &= seen.rounding.square().mean(0) <= _ROUNDED * of_mean
        mean_noise = layers.mean(of_mean / var, counted)
        log_noise = layers.mean(of_log, counted)
        noise = mean_noise + log_noise / 4
        first = snapshots[0]
        lag = layers.mean((first.mean - seen.mean.mean(0)).square() / var, counted)
        log_lag = layers.mean((first.var.log() - var.log()).square(), counted)
        ema = _ema_noise(first, layers) + seen.share.mean(0) / len(seen.mean)
        return cls(
            noise=noise,
            m_eff=1 / mean_noise,
            dropout=noise / (1 + noise),
            staleness=(lag / (mean_noise * ema)).sqrt(),
            staleness_var=(log_lag / (log_noise * ema)).sqrt(),
            gap=_gap(snapshots, seen.mean, seen.var, counted, layers),
        )


def shift(before: Snapshot, after: Snapshot, layers: Layers) -> Tensor:
    """How far stored statistics moved, (layers,): rms over channels of the 2-Wasserstein distance of normal laws in sd.

    sqrt(mean over channels of ((mean' - mean)^2 + (sd' - sd)^2) / var), with the earlier variance. Channels whose
    earlier variance is 0 are left out.
    """
    before, after = before.cpu(), after.cpu()
    distance = (after.mean - before.mean).square() + (after.var.sqrt() - before.var.sqrt()).square()
    return layers.mean(distance / before.var, (before.var > 0) & distance.isfinite()).sqrt()


def shift_floor(before: Snapshot, after: Snapshot, layers: Layers, noise: Tensor) -> Tensor:
    """What ``shift`` comes to for batches of one distribution, (layers,).

    Two values of an exponential average, n updates apart, differ with variance 2 a / (2 - a) (1 - (1 - a)^n) of one
    batch's; NaN for ``momentum=None``, whose averages settle.
    """
    momentum = layers.numbers("momentum", torch.nan)
    passes = (after.updates.cpu() - before.updates.cpu()).double()
    return (2 * momentum / (2 - momentum) * (1 - (1 - momentum) ** passes) * noise).sqrt()


def _variance_of_neighbours(values: Tensor, share: Tensor) -> Tensor:
    """Variance of independent values around an even drift: (W, channels) -> (channels,)."""
    curve = values[2:] - 2 * values[1:-1] + values[:-2]
    return (curve.square() / (share[2:] + 4 * share[1:-1] + share[:-2])).mean(0)


def _ema_noise(snapshot: Snapshot, layers: Layers) -> Tensor:
    """Variance of a stored mean over that of one batch's mean, (layers,), as after many updates."""
    momentum = layers.numbers("momentum", torch.nan)
    return torch.where(momentum.isnan(), 1 / snapshot.updates.double(), momentum / (2 - momentum))


def _gap(snapshots: Sequence[Snapshot], mean: Tensor, var: Tensor, counted: Tensor, layers: Layers) -> Tensor:
    """Rms difference of outputs by a batch's statistics and by those stored before it, in sd of the latter."""
    stored_mean, stored_var = (torch.stack([getattr(s, name) for s in snapshots[:-1]]) for name in ("mean", "var"))
    eps = layers.each(layers.numbers("eps", torch.nan))
    by_batch, by_stored = (var + eps).rsqrt(), (stored_var + eps).rsqrt()  # (W, channels)
    gain = layers.affine()[0].square()
    difference = var * (by_batch - by_stored).square() + ((mean - stored_mean) * by_stored).square()
    output = var * by_stored.square()
    counted = counted.expand_as(var)
    return (layers.mean(gain * difference, counted).mean(0) / layers.mean(gain * output, counted).mean(0)).sqrt()
