"""What num_batches_tracked says about stored statistics, and how that is checked: alone it proves nothing.

The counter counts forwards in train mode. But importers set it to 0, recalibrate and torch's update_bn set it to the
number of batches that they measured, copies keep it, and averages of weights round it down. A counter k is
a claim that can be tested: after k updates with momentum a, the share r = (1 - a)^k of the initial mean 0 and variance
1 is left. With averages m and v >= 0 of the batches' means and variances,

    stored mean = (1 - r) m,   stored variance = r + (1 - r) v.

- Arithmetic refutes the claim if a variance is below r in any layer with this counter.
- Arithmetic proves the claim if two channels have a variance of exactly r: they never varied. In a large model, where
  many channels vary little, it also proves the claim if at least four layers have this counter, the smallest variance
  of each is between r and 1.1 r, and some variance is above 3 r.
- Data decide: m and v are measured, and the stored statistics are nearer either to the formula or to m, v. Data of
  another scale change all variances by one factor. So the formula must also explain how the ratio of stored to measured
  variance differs between channels: r counts most where v is small.

Otherwise the claim is open, because statistics that were measured in one pass look the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.rule_evidence import Evidence, MeasuredLayer

RESIDUE = 0.01  # share of the initial statistics; a smaller share does not matter
USUAL_MOMENTUM = 0.1
# each update rounds a float32 by up to 2^-24 of its value; this is twice that
_ROUNDING = 2.0**-23
# if a layer's statistics differ by less than this (see ``_distance``), its outputs change by less than 5 %
MATTERS = 0.05
_NEARER = 0.5  # largest ratio of two distances: by chance one is smaller, but rarely half as large over all channels
_FLOOR_CHANNELS, _FLOOR_LAYERS = 2, 4
_FLOOR, _FAR = 1.1, 3.0  # times r: limits of "just above r" and of "far above r"


class StartResidue(Enum):
    """Whether a layer's statistics still contain the initial values, as its counter claims."""

    GONE = "gone"  # the share is at most RESIDUE, the claim is refuted, or all statistics are the initial ones (BN101)
    OPEN = "open"  # neither refuted nor proven
    SHOWN = "shown"


def claims(evidence: Evidence) -> dict[str, tuple[StartResidue, float]]:
    """For each layer: whether its statistics still contain the initial ones, and their share by its counter."""
    shares = {name: _share(evidence, stored) for name, stored in evidence.stored.items()}
    alike: dict[float, list[Stored]] = defaultdict(list)
    for name, share in shares.items():
        if share > RESIDUE and not evidence.stored[name].is_initial:
            alike[share].append(evidence.stored[name])
    results = {name: (StartResidue.GONE, share) for name, share in shares.items()}
    for share, layers in alike.items():
        proof = _by_arithmetic(layers, share)
        for stored in layers:
            measured = (evidence.measured or {}).get(stored.name)
            by_data = None if measured is None else _by_data(stored, measured, share, evidence.eps(stored.name))
            claim = proof if proof is StartResidue.GONE or by_data is None else by_data
            results[stored.name] = claim, share
    return results


def is_counted(stored: Stored) -> bool:
    """Whether the counter shows that a layer was trained. A counter of 0 shows nothing."""
    return (stored.num_batches_tracked or 0) > 0


def misfit(evidence: Evidence, name: str) -> float | None:
    """The distance (see ``_distance``) of a layer's stored statistics from those of the data; None if not known."""
    stored, measured = evidence.stored.get(name), (evidence.measured or {}).get(name)
    if stored is None or measured is None or stored.running_mean is None or stored.running_var is None:
        return None
    return _distance(stored, measured.mean, measured.var, evidence.eps(name))


def is_nearer(stored: Stored, mean: Sequence[float], var: Sequence[float], found: MeasuredLayer, eps: float) -> bool:
    """Whether ``mean`` and ``var`` are less than half as far from the stored statistics as those of the data.

    False if the data's distance is at most MATTERS, or if a distance cannot be computed.
    """
    own = _distance(stored, found.mean, found.var, eps)
    other = _distance(stored, mean, var, eps)
    return own is not None and other is not None and own > MATTERS and other < _NEARER * own


def _share(evidence: Evidence, stored: Stored) -> float:
    """(1 - a)^k for counter k and momentum a; 0 without a counter, a variance, or a momentum between 0 and 1."""
    count, momentum = stored.num_batches_tracked or 0, evidence.momentum(stored.name)
    if momentum is None and evidence.modules is None:
        momentum = USUAL_MOMENTUM  # a file does not store it
    if count <= 0 or momentum is None or not 0 < momentum < 1 or not stored.running_var:
        return 0.0
    return math.exp(count * math.log1p(-momentum))


def _by_arithmetic(layers: Sequence[Stored], share: float) -> StartResidue:
    """What the variances of all layers with the same counter prove."""
    variances = [value for stored in layers for value in stored.running_var or () if math.isfinite(value)]
    updates = max(stored.num_batches_tracked or 0 for stored in layers)
    slack = share * updates * _ROUNDING
    if not variances or min(variances) < share - slack:
        return StartResidue.GONE
    if sum(value <= share + slack for value in variances) >= _FLOOR_CHANNELS:
        return StartResidue.SHOWN
    begins = [min(stored.running_var or (math.inf,)) <= _FLOOR * share for stored in layers]
    if len(layers) >= _FLOOR_LAYERS and all(begins) and max(variances) > _FAR * share:
        return StartResidue.SHOWN
    return StartResidue.OPEN


def _by_data(stored: Stored, found: MeasuredLayer, share: float, eps: float) -> StartResidue | None:
    """Whether data prove that the stored statistics contain the initial ones; None if nothing can be compared."""
    if stored.running_mean is None or _distance(stored, found.mean, found.var, eps) is None:
        return None
    mean = [(1 - share) * value for value in found.mean]
    var = [share + (1 - share) * value for value in found.var]
    near = is_nearer(stored, mean, var, found, eps)
    return StartResidue.SHOWN if near and _has_pattern(stored, var, found, eps) else StartResidue.GONE


def _has_pattern(stored: Stored, var: Sequence[float], found: MeasuredLayer, eps: float) -> bool:
    """Whether ``var`` explains the stored variances better than the data's variances times one factor.

    "Better" means less than half the distance: the root mean square of log ratios. The factor is the best one.
    """
    triples = zip(stored.running_var or (), var, found.var, strict=False)
    logs = [
        (math.log((v_s + eps) / (v + eps)), math.log((v_s + eps) / (v_data + eps)))
        for v_s, v, v_data in triples
        if min(v_s, v, v_data) + eps > 0 and math.isfinite(v_s + v + v_data)
    ]
    if not logs:
        return False
    center = sum(by_data for _, by_data in logs) / len(logs)
    return sum(by_claim**2 for by_claim, _ in logs) < _NEARER**2 * sum((each - center) ** 2 for _, each in logs)


def _distance(stored: Stored, mean: Sequence[float], var: Sequence[float], eps: float) -> float | None:
    """Root mean square of (difference of means / sd) and log(ratio of sds), over channels; None without a channel."""
    squares = []
    for m, v, m_s, v_s in zip(mean, var, stored.running_mean or (), stored.running_var or (), strict=False):
        v_data, v_stored = v + eps, v_s + eps
        if v_data > 0 and v_stored > 0 and math.isfinite(m - m_s) and math.isfinite(v_data + v_stored):
            squares.append((m - m_s) ** 2 / math.sqrt(v_data * v_stored) + (0.5 * math.log(v_data / v_stored)) ** 2)
    return math.sqrt(sum(squares) / len(squares)) if squares else None
