"""Alarm: which layers moved, which moved first, and what kind of change that suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.shift.layer_evidence import LayerEvidence

# share of the layers, from the input on, that a shift of the inputs is expected to move
_EARLY = 2 / 3
# largest W2 of a layer that did not move, in sd: stored statistics are exact to about 0.05, shifts are several tenths
_STILL = 0.15
# sd of the weights that turn old examples into the new mix, if the new mix lacks half of them
MIX = 1.0
# observations that measure a distance well: its error, sqrt(2 log(2 m) / 128), is 0.4 for m = 10,000 components
SETTLED = 128
_MOST_CHANNELS = 20


@final
@dataclass(frozen=True, slots=True)
class LayerShift:
    """Evidence for a shift at one layer.

    Args:
        name: Dotted path of the layer.
        log_evidence: Natural logarithm of the layer's e-value.
        kind: The kind of bet that gained most: "mean", "energy up" or "energy down"; if calibrated also
            "channel energy", "components" or "component means".
        channels: Channels whose mean moved, at most 20, strongest evidence first; false discovery rate at most alpha
            (e-BH).
        w2: 2-Wasserstein distance between the observed and the stored distribution, in sd, rms over channels; both are
            assumed to be normal. For display: it has no null distribution.
        kl: Symmetric Kullback-Leibler divergence of the two distributions, nats; median over channels, the lower middle
            value for an even number of channels. For display.
    """

    name: str
    log_evidence: float
    kind: str
    channels: tuple[int, ...]
    w2: float
    kl: float

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> LayerShift:
        """The layer from its dict, also from a dict read from JSON."""
        fields: dict[str, Any] = {**values, "channels": tuple(values["channels"])}
        return cls(**fields)


@final
@dataclass(frozen=True, slots=True)
class Alarm:
    """Evidence against "the data are as they were" that has reached the limit for the promised rate of false alarms.

    Args:
        observations: Number of observations.
        examples: Number of examples that passed, observed or not.
        log_evidence: Natural logarithm of the evidence, at least log(1 / alpha), or log(arl).
        first: The first layer in forward order whose own evidence reached the limit; None if only the evidence of all
            layers together did.
        hint: What the change looks like: "inputs", "late layers only", "another mix", or "" if it looks like none of
            these. If it is "" and the reference is calibrated with unit "example", the monitor sets the hint later: to
            "inputs" when a principal component has moved far enough, or to "another mix" 128 observations after the
            alarm.
        layers: The evidence for every layer.
        seconds: Unix time of the alarm.
    """

    observations: int
    examples: int
    log_evidence: float
    first: str | None
    hint: str
    layers: Sequence[LayerShift]
    seconds: float

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Alarm:
        """The alarm from its dict, also from a dict read from JSON."""
        fields: dict[str, Any] = dict(values)
        fields["layers"] = [LayerShift.of_dict(layer) for layer in values["layers"]]
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        """The alarm in one sentence."""
        where = f"first at {self.first}" if self.first else "in no single layer"
        hint = f" ({self.hint})" if self.hint else ""
        evidence = f"evidence e^{self.log_evidence:.1f} after {self.observations} observations"
        return f"the inputs' distribution moved, {where}{hint}: {evidence}"


def layer_shifts(evidence: LayerEvidence, mean: Tensor, energy: Tensor, *, alpha: float) -> list[LayerShift]:
    """Evidence for every layer.

    Args:
        evidence: The evidence from all bets.
        mean: Mean over observations of the channels' standardized means z, (channels,).
        energy: Mean over observations of the channels' energies q, (channels,).
        alpha: False discovery rate of the reported channels.
    """
    kinds, of_layers, sizes = evidence.log_kinds, evidence.log_layers, list(evidence.sizes)
    channels = evidence.log_channels.split(sizes)
    moments = zip(mean.split(sizes), energy.split(sizes), strict=True)
    return [
        LayerShift(
            name,
            float(of_layers[i]),
            evidence.kinds[int(kinds[:, i].argmax())],
            e_bh(channels[i], alpha)[:_MOST_CHANNELS],
            *_distances(*part),
        )
        for i, (name, part) in enumerate(zip(evidence.layers, moments, strict=True))
    ]


def first_moved(layers: Sequence[LayerShift], limit: float) -> str | None:
    """The first layer whose own evidence reaches the limit; None if there is none."""
    return next((layer.name for layer in layers if layer.log_evidence >= limit), None)


def hint(layers: Sequence[LayerShift], limit: float, furthest: float | None = None) -> str:
    """What the change looks like; a hint, not a proof.

    - "inputs": a principal component of neighbouring channels moved further than any mix that keeps half of the
      examples can move it; or ``furthest`` is None, and a layer among the first third moved.
    - "another mix": no component moved that far. If only the shares of the classes change, the new examples are old
      examples with weights w, and no mean moves by more than sd(w) of its standard deviations (Cauchy-Schwarz). sd(w)
      is 1 if half of the examples no longer come, and 3 if one of ten equal classes is left. Few observations measure
      the distance badly, so only the stream gives this hint, ``SETTLED`` observations after the alarm.
    - "late layers only": ``furthest`` is None, and early layers are near their stored distribution. Fine noise or
      another mix can be the cause.
    - "": none of these, or ``furthest`` is None and there are fewer than 3 layers.

    Args:
        layers: The evidence for each layer.
        limit: Log evidence at which a layer counts as moved.
        furthest: Largest movement of a principal component, in sd; None if unknown, as from a checkpoint alone.
    """
    if furthest is not None:
        return "inputs" if furthest > MIX else ""
    moved = [layer.log_evidence >= limit for layer in layers]
    early = max(1, math.floor(_EARLY * len(layers)))
    if not any(moved) or len(layers) < 3:
        return ""
    if any(moved[: max(1, early // 2)]):
        return "inputs"
    still = not any(moved[:early]) and all(layer.w2 < _STILL for layer in layers[:early])
    return "late layers only" if still else ""


def e_bh(log_e: Tensor, alpha: float) -> tuple[int, ...]:
    """The k channels with the largest e-values, by e-BH (Wang and Ramdas 2022).

    k is the largest number for which the k-th largest of the n e-values is at least n / (k alpha); 0 if there is none.
    """
    order = log_e.argsort(descending=True)
    n = len(log_e)
    needed = math.log(n / alpha) - torch.arange(1, n + 1, dtype=torch.float64, device=log_e.device).log()
    reached = (log_e[order] >= needed).nonzero()
    k = int(reached.max()) + 1 if len(reached) else 0
    return tuple(order[:k].tolist())


def _distances(mean: Tensor, energy: Tensor) -> tuple[float, float]:
    """2-Wasserstein distance (rms) and symmetric KL (median) between N(mean, energy - mean^2) and N(0, 1)."""
    var = (energy - mean.square()).clamp_min(torch.finfo(torch.float32).tiny)
    w2 = (mean.square() + (var.sqrt() - 1).square()).mean().sqrt()
    kl = ((var - 1).square() + mean.square() * (1 + var)) / (2 * var)
    return float(w2), float(kl.median())
