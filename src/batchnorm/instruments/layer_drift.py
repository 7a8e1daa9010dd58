"""How far the values that a layer receives move while the layers before it learn: distributional shift, measured.

For unit j with values P_t on a fixed probe set, sorted, and standard deviation s_t at the earlier time:

    drift(t, t + D) = sqrt(mean over units of W2(P_t, P_(t+D))^2 / s_t^2),  W2 = rms difference of sorted values,

so a pure shift by d standard deviations is a drift of d, and the scale of a unit has no influence. Two parts of the
drift are also reported: the mean part |difference of means| / s_t, and the log-sd part |log of the ratio of standard
deviations|; the rest is a change of shape. Both times have the same examples, so the drift has no sampling noise. The
noise floor is the distance of two random halves of the probe set: a smaller drift could be chance if the probe set is
taken as a sample.

A ReLU that is active on almost no example has a standard deviation near 0, and one more active example would be a
shift by many standard deviations. So a unit is called idle if all its values are equal once the lowest twentieth and
the highest twentieth are left out. Units that are idle at the earlier time are left out of the mean over units; their
share is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IDLE = 20  # a unit is idle if its values are equal without the lowest and highest 1 / IDLE of them


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """Distance of a layer's values at two times, in standard deviations of the earlier time, rms over units.

    Args:
        total: Distance of the distributions, (...).
        mean: Mean part: difference of the means, (...).
        log_sd: Log-sd part: natural logarithm of the ratio of standard deviations, (...), over the units that are idle
            at neither time.
        idle: Share of units that were idle at the earlier time, (...); the other numbers leave these units out.
    """

    total: Tensor
    mean: Tensor
    log_sd: Tensor
    idle: Tensor


def drift(before: Tensor, after: Tensor) -> Drift:
    """Drift of a layer's values from one time to a later one; 0 if every unit was idle.

    Args:
        before: Values on the probe set at the earlier time, (..., N, units).
        after: Values of the same number of examples at the later time, (..., N, units).
    """
    before, after = before.sort(-2).values, after.sort(-2).values
    busy = _busy(before)
    both = busy & _busy(after)
    sd = torch.where(busy, before.std(-2, correction=0), 1)
    ratio = torch.where(both, after.std(-2, correction=0) / sd, 1)
    return Drift(
        _rms((after - before).square().mean(-2).sqrt() / sd, busy),
        _rms((after.mean(-2) - before.mean(-2)) / sd, busy),
        _rms(ratio.log(), both),
        1 - busy.float().mean(-1),
    )


def noise_floor(values: Tensor) -> Tensor:
    """Distance of two halves of the probe set at one time, in units of the drift: (..., N, units) -> (...).

    The halves are the examples at even and at odd places; they are random if the examples are in random order.
    """
    half = values.shape[-2] // 2
    return drift(values[..., : 2 * half : 2, :], values[..., 1 : 2 * half : 2, :]).total


def _busy(values: Tensor) -> Tensor:
    """Which units are not idle: sorted values (..., N, units) -> (..., units).

    Values are compared, because rounding can make the standard deviation of equal values larger than 0.
    """
    few = values.shape[-2] // IDLE
    return values[..., few, :] != values[..., -1 - few, :]


def _rms(values: Tensor, counted: Tensor) -> Tensor:
    """Root mean square over the counted units: (..., units) -> (...); 0 if no unit is counted."""
    squares = torch.where(counted, values, 0).square().sum(-1)
    return (squares / counted.sum(-1).clamp_min(1)).sqrt()
