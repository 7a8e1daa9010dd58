"""The free tier: how noisy batches are and how well stored statistics follow them, from running averages alone.

A window of W consecutive steps gives W batch means m_i and unbiased variances v_i of each channel (``snapshots``). If
a step has several forward passes, each pass gives such a mean and variance (``window_readings``). Noise, M_eff, dropout
and gap are computed from single passes, staleness from whole steps. The variance of batch means is computed from
second differences, so that a constant drift within the window does not count. With momentum a, ``share`` as
in ``snapshots``, and s^2 the mean of v_i:

    Var(mu_B)        = mean (m_(i+1) - 2 m_i + m_(i-1))^2 / 6 / share,      Var(log s_B^2) likewise from log v_i
    noise power      = Var(mu_B) / s^2 + Var(log s_B^2) / 4     [ (kappa + 3) / (4 M) ]
    M_eff            = s^2 / Var(mu_B)                          [ M ]
    dropout          = noise / (1 + noise)                      [ the rate of Gaussian dropout with equal noise ]
    staleness^2      = (stored - mean of m_i)^2 / (Var(mu_B) (a / (2 - a) + share / W))          [ 1 ]

The brackets show the expected values for batches of M independent values with kurtosis kappa. All quantities are means
over a layer's channels, in units of s^2, because few steps of one channel give an inaccurate estimate. Example: a
normal channel (kappa = 3) in batches of 32 has noise power 0.0469 and a dropout rate of 4.5 %. With C channels the
relative error of a window of eight steps is about 0.8 / sqrt(C).

Behind another batch norm layer all batches have nearly the same mean and variance, because that layer has normalized
them. So M_eff can be many times the number of values, and the noise is small. This is no error of measurement: the
layer really adds little noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor

from batchnorm.instruments.batch_noise import dropout_rate
from batchnorm.instruments.passes import End
from batchnorm.instruments.snapshots import Layers, Snapshot, Updates
from batchnorm.instruments.window_readings import Places, Readings, readings

LEAST = 4  # snapshots of three steps, which have one second difference
# a channel is left out when more than this share of its measured variance may be rounding of the stored mean
_ROUNDED = 0.1


@final
@dataclass(frozen=True, slots=True, eq=False)
class StepWindow:
    """Every layer over W consecutive training steps; all (layers,), NaN for a layer that could not be measured.

    A layer is measured if three steps or more updated its statistics, with a momentum above 0 or None, and if nothing
    reset them. Channels without variance, or with differences that may be rounding, are left out. If a step has several
    passes, each pass is compared with the same pass of other steps. So a batch that passes twice counts once, and four
    micro-batches count as four.

    Args:
        noise: Noise power of normalization by a batch's own statistics, as a share of the output's variance.
        m_eff: The number of independent values whose mean varies as much as a batch's mean.
        dropout: Rate of Gaussian dropout with equal noise.
        staleness: Distance of the mean stored before the window from the mean of the batches, in standard errors, rms
            over channels.
        staleness_var: The same for the log of the variance.
        short_var: As ``staleness_var``, but a channel counts as 0 unless its stored variance is below the variance of
            every step in the window. Rare large examples cannot cause this: they make the stored variance larger.
        gap: Difference of outputs between batch and stored statistics, rms, in standard deviations of the eval output.
        wander: Noise power computed from whole steps, as if the passes of a step were independent.
    """

    noise: Tensor
    m_eff: Tensor
    dropout: Tensor
    staleness: Tensor
    staleness_var: Tensor
    short_var: Tensor
    gap: Tensor
    wander: Tensor

    @classmethod
    def of(cls, window: Sequence[Snapshot] | Sequence[End], layers: Layers) -> StepWindow:
        """Compute the numbers from W + 1 copies that were taken after consecutive steps; W is at least 3.

        With ``Snapshot``, the passes of a step count as independent. With ``End``, each pass is compared with the same
        pass of other steps; noise, M_eff, dropout and gap are NaN for layers whose passes were not separated.
        """
        if len(window) < LEAST:
            raise ValueError(f"a window needs {LEAST} snapshots or more, got {len(window)}. Take more steps.")
        ends = [(end if isinstance(end, End) else End.alone(end)).cpu() for end in window]
        independent = isinstance(window[0], Snapshot)
        result = cls(*(torch.full((len(layers.names),), torch.nan, dtype=torch.float64) for _ in fields(cls)))
        for group in readings(ends, layers, LEAST - 1):
            part = _of_group(group, independent)
            for field in fields(cls):
                getattr(result, field.name)[list(group.indices)] = getattr(part, field.name)
        return result


def _of_group(group: Readings, independent: bool) -> StepWindow:
    """The numbers of the layers that were updated in the same steps."""
    layers, steps, first = group.layers, group.steps, group.ends[0]
    whole = _spread(steps, [list(range(len(steps.mean)))], layers)
    passes = _spread_of_passes(group) or (whole if independent else None)
    var, counted = whole.var, whole.counted
    lag = layers.mean((first.mean - steps.mean.mean(0)).square() / var, counted)
    log_lags = (first.var.log() - var.log()).square()
    log_lag, short = (
        layers.mean(lags, counted) for lags in (log_lags, log_lags.where(first.var < steps.var.amin(0), 0))
    )
    ema = _ema_noise(first, layers) + steps.share.mean(0) / len(steps.mean)
    unknown = torch.full_like(whole.of_mean, torch.nan)
    noise = unknown if passes is None else passes.noise
    return StepWindow(
        noise=noise,
        m_eff=unknown if passes is None else 1 / passes.of_mean,
        dropout=dropout_rate(noise),
        staleness=(lag / (whole.of_mean * ema)).sqrt(),
        staleness_var=(log_lag / (whole.of_log * ema)).sqrt(),
        short_var=(short / (whole.of_log * ema)).sqrt(),
        gap=unknown if passes is None else _gap(group, counted),
        wander=whole.noise,
    )


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Spread:
    """How far the readings of the layers differ.

    Args:
        of_mean: Variance of batch means divided by ``var``, mean over the counted channels, (layers,).
        of_log: Variance of the logarithm of batch variances, mean over the counted channels, (layers,).
        var: Mean of the batch variances, (channels,).
        counted: Whether a channel was measured, (channels,).
    """

    of_mean: Tensor
    of_log: Tensor
    var: Tensor
    counted: Tensor

    @property
    def noise(self) -> Tensor:
        return self.of_mean + self.of_log / 4


def _spread_of_passes(group: Readings) -> _Spread | None:
    """Spread of single passes; None if some passes were not separated.

    If there are two ways to align the passes of different steps, the way with the smaller spread is used.
    """
    if group.passes is None:
        return None
    first, *others = (_spread(group.passes, places, group.layers) for places in group.places)
    for other in others:
        nearer = other.of_mean < first.of_mean
        first = _Spread(*(
            torch.where(group.layers.each(nearer) if name in {"var", "counted"} else nearer, b, a)
            for name, a, b in ((f.name, getattr(first, f.name), getattr(other, f.name)) for f in fields(_Spread))
        ))  # fmt: skip
    return first


def _spread(seen: Updates, places: Places, layers: Layers) -> _Spread:
    """Spread of readings: at each place of ``places``, each reading is compared with the one before and after it."""
    var = torch.cat([seen.var[place] for place in places]).mean(0)  # (channels,)
    share = layers.each(seen.share)
    of_mean, of_log = (
        torch.cat([_curves(values[place], share[place]) for place in places]).mean(0)
        for values in (seen.mean, seen.var.log())
    )
    counted = layers.each(seen.measurable) & (var > 0) & of_log.isfinite() & of_mean.isfinite()
    counted &= seen.rounding.square().mean(0) <= _ROUNDED * of_mean
    return _Spread(layers.mean(of_mean / var, counted), layers.mean(of_log, counted), var, counted)


def shift(before: Snapshot, after: Snapshot, layers: Layers) -> Tensor:
    """How far stored statistics moved between two snapshots, in standard deviations, (layers,).

    The rms over channels of the 2-Wasserstein distance of normal distributions: sqrt(mean over channels of
    ((mean' - mean)^2 + (sd' - sd)^2) / var), with var the earlier variance. Channels with an earlier variance of 0, and
    channels with NaN or infinity, are left out; NaN if no channel is left.
    """
    before, after = before.cpu(), after.cpu()
    distance = (after.mean - before.mean).square() + (after.var.sqrt() - before.var.sqrt()).square()
    return layers.mean(distance / before.var, (before.var > 0) & distance.isfinite()).sqrt()


def shift_floor(before: Snapshot, after: Snapshot, layers: Layers, noise: Tensor) -> Tensor:
    """The ``shift`` that batch noise alone causes if all batches have the same distribution, (layers,).

    The difference between two values of an exponential average with momentum a, n updates apart, has the variance of
    one batch times 2 a / (2 - a) (1 - (1 - a)^n). NaN for ``momentum=None``.
    """
    momentum = layers.numbers("momentum", torch.nan)
    passes = (after.updates.cpu() - before.updates.cpu()).double()
    return (2 * momentum / (2 - momentum) * (1 - (1 - momentum) ** passes) * noise).sqrt()


def _curves(values: Tensor, share: Tensor) -> Tensor:
    """Variance of independent values around a constant drift, from second differences: (T, C) -> (T - 2, C)."""
    curve = values[2:] - 2 * values[1:-1] + values[:-2]
    return curve.square() / (share[2:] + 4 * share[1:-1] + share[:-2])


def _ema_noise(snapshot: Snapshot, layers: Layers) -> Tensor:
    """Variance of a stored mean after many updates, divided by the variance of one batch's mean, (layers,)."""
    momentum = layers.numbers("momentum", torch.nan)
    return torch.where(momentum.isnan(), 1 / snapshot.updates.double(), momentum / (2 - momentum))


def _gap(group: Readings, counted: Tensor) -> Tensor:
    """Rms difference between outputs by batch statistics and outputs by the statistics stored before the batch.

    In standard deviations of the outputs by stored statistics.
    """
    layers, read, moments = group.layers, group.passes or group.steps, group.moments if group.passes else group.ends
    mean, var = read.mean, read.var
    stored_mean, stored_var = (torch.stack([getattr(s, name) for s in moments[:-1]]) for name in ("mean", "var"))
    eps = layers.each(layers.numbers("eps", torch.nan))
    by_batch, by_stored = (var + eps).rsqrt(), (stored_var + eps).rsqrt()  # (W, channels)
    gain = layers.affine()[0].square()
    difference = var * (by_batch - by_stored).square() + ((mean - stored_mean) * by_stored).square()
    output = var * by_stored.square()
    counted = counted.expand_as(var)
    return (layers.mean(gain * difference, counted).mean(0) / layers.mean(gain * output, counted).mean(0)).sqrt()
