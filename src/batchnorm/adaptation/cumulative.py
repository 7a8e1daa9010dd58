"""Cumulative statistics: moments of all inputs since a start, used by the layers while they grow.

All examples since the start count equally, together with ``prior`` stored ones, until 1 / ``floor`` have passed. After
that a new example has weight ``floor`` and old ones fade, so that later changes are followed. A batch's statistics
include the batch: a layer counts its input first and normalizes by the result, so later layers count inputs that are
already normalized.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.adaptation.layer_statistics import mixed
from batchnorm.moments import Moments
from batchnorm.population.observation import InputMoments
from batchnorm.population.stored_statistics import Statistics, buffers, store


@final
class Cumulative:
    """Statistics of layers that grow with every input.

    Args:
        stored: The deployed statistics.
        prior: Number of examples that they count as.
        floor: Smallest weight of a new example.
    """

    def __init__(self, stored: Statistics, prior: float, floor: float) -> None:
        self._stored, self._prior, self._floor = stored, prior, floor
        self._seen: dict[str, tuple[Moments, float]] = {}  # moments of values, and the number of examples they count as
        self.energies: dict[str, tuple[float, float]] = {}  # of each layer's last input, and of all earlier ones

    def see(self, path: str, layer: _BatchNorm, x: Tensor) -> None:
        """Count the input of a layer, and let the layer normalize by the result."""
        if layer.training or not x.numel():
            return
        new = InputMoments.of(x.detach()).moments
        if not bool(new.count.all()):
            return  # NaN or infinity: not evidence about the statistics
        moments, examples = self._seen.get(path, (Moments.empty(), 0.0))
        if examples:  # the first input has no earlier ones to compare with
            self.energies[path] = energy(layer, new), energy(layer, moments)
        kept = faded(examples, len(x), self._floor)
        moments = moments.scaled(kept) + new
        self._seen[path] = moments, examples * kept + len(x)
        stored = self._stored.mean[path], self._stored.var[path]
        mean, var = _fitting(mixed(stored, self._prior, moments, self._seen[path][1]), buffers(layer))
        store(layer, mean, var)

    def copy(self) -> Cumulative:
        """An independent copy."""
        other = Cumulative(self._stored, self._prior, self._floor)
        other._seen = dict(self._seen)  # moments are values
        return other


def faded(examples: float, new: int, floor: float) -> float:
    """Factor by which old examples fade so that ``new`` ones together weigh at least 1 - (1 - floor)^new."""
    if not examples:
        return 1.0
    weight = max(new / (examples + new), 1 - (1 - floor) ** new)
    return (1 / weight - 1) * new / examples


def energy(layer: _BatchNorm, new: Moments) -> float:
    """Mean square of an input standardized by the layer's stored statistics, over its finite channels."""
    mean, var = (buffer.double() for buffer in buffers(layer))
    each = (new.var + (new.mean - mean).square()) / (var + layer.eps)
    return float(torch.where(new.count > 0, each, 1.0).mean())


def _fitting(new: Moments, stored: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Mean and variance in the buffers' types, clipped to the types' range."""
    pairs = zip((new.mean, new.var), stored, strict=True)
    return [value.clamp(torch.finfo(b.dtype).min, torch.finfo(b.dtype).max).to(b.dtype) for value, b in pairs]
