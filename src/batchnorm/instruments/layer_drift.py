"""How far the values that a layer receives move while the layers before it learn: distributional shift, measured.

For unit j with values P_t on a fixed probe set, sorted, and standard deviation s_t at the earlier time:

    drift(t, t + D) = sqrt(mean over units of W2(P_t, P_(t+D))^2 / s_t^2),  W2 = rms difference of sorted values,

so a pure shift by d standard deviations is a drift of d, and rescaling a unit changes nothing. Of its parts, the
mean part is |mean difference| / s_t and the log-sd part is |log of the ratio of standard deviations|; what is left
is a change of shape. The same examples are seen at both times, so there is no sampling noise in it. The noise
floor is the distance of two random halves of the probe: a drift below it could be chance for a sample of this size.

A ReLU that is active on almost no example has next to no standard deviation, and one more active example would
count as a shift of many of them. So a unit is idle if all its values are equal except for a twentieth of the
examples, low or high. Idle units are left out of the mean over units in both arms; their share is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IDLE = 20  # a unit is idle when it is constant but for one in this many examples


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """Distance of a layer's values at two times, in standard deviations of the earlier time, rms over units.

    Args:
        total: Of the whole distribution, (...).
        mean: Part of the mean, (...).
        log_sd: Part of the standard deviation, natural logarithm, (...); of units that are idle at neither time.
        idle: Share of units that were idle at the earlier time, (...); they are in none of the others.
    """

    total: Tensor
    mean: Tensor
    log_sd: Tensor
    idle: Tensor


def drift(before: Tensor, after: Tensor) -> Drift:
    """Drift of a layer's values from one time to a later one; 0 where every unit was idle.

    Args:
        before: Values on the probe at the earlier time, (..., N, units).
        after: Values of as many examples at the later time, (..., N, units).
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
    """Distance of two halves of the probe at one time, in the drift's units: (..., N, units) -> (...).

    The halves are the examples at even and at odd places, random where the probe is in random order.
    """
    half = values.shape[-2] // 2
    return drift(values[..., : 2 * half : 2, :], values[..., 1 : 2 * half : 2, :]).total


def _busy(values: Tensor) -> Tensor:
    """Which units vary beyond a few examples: sorted (..., N, units) -> (..., units).

    Values are compared, not a standard deviation with 0: that of equal values may be rounded above 0.
    """
    few = values.shape[-2] // IDLE
    return values[..., few, :] != values[..., -1 - few, :]


def _rms(values: Tensor, counted: Tensor) -> Tensor:
    """Root mean square over the counted units: (..., units) -> (...); 0 where none is counted."""
    squares = torch.where(counted, values, 0).square().sum(-1)
    return (squares / counted.sum(-1).clamp_min(1)).sqrt()
