"""Cumulative statistics: moments of all inputs since a start, used by the layers while they grow.

All examples since the start count equally, and the stored statistics count as ``prior`` examples, until 1 / ``floor``
examples have passed. After that a new example has weight ``floor`` and old examples lose weight, so that the statistics
follow later changes. A batch's statistics include the batch: a layer counts its input first and normalizes by the
result, so later layers count inputs that are already normalized.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.adaptation.layer_statistics import mixed
from batchnorm.moments import Moments
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.stored_statistics import Statistics, buffers, store


@final
class Cumulative:
    """Statistics of layers that grow with every input.

    Args:
        stored: The deployed statistics.
        prior: Number of examples that the deployed statistics count as.
        floor: Smallest weight of a new example.
    """

    def __init__(self, stored: Statistics, prior: float, floor: float) -> None:
        self._stored, self._prior, self._floor = stored, prior, floor
        self._moments: dict[str, tuple[Moments, float]] = {}  # of a layer's inputs; weight of its examples
        self.energies: dict[str, tuple[float, float]] = {}  # of a layer's last input, and of its earlier inputs

    def see(self, path: str, layer: _BatchNorm, x: Tensor) -> None:
        """Count the input of a layer, and let the layer normalize by the result."""
        if layer.training or not x.numel():
            return
        new = InputMoments.of(x.detach()).moments
        if not bool(new.count.all()):
            return  # a channel has NaN or infinity: this input does not count
        moments, examples = self._moments.get(path, (Moments.empty(), 0.0))
        if examples:  # the first input has no earlier inputs to compare with
            self.energies[path] = energy(layer, new), energy(layer, moments)
        factor = faded(examples, len(x), self._floor)
        moments = moments.scaled(factor) + new
        self._moments[path] = moments, examples * factor + len(x)
        stored = self._stored.mean[path], self._stored.var[path]
        mean, var = _fitting(mixed(stored, self._prior, moments, self._moments[path][1]), buffers(layer))
        store(layer, mean, var)

    def copy(self) -> Cumulative:
        """An independent copy."""
        other = Cumulative(self._stored, self._prior, self._floor)
        other._moments = dict(self._moments)  # a Moments object never changes
        return other


def faded(examples: float, new: int, floor: float) -> float:
    """Factor for the weight of old examples, so that the share of ``new`` ones is at least 1 - (1 - floor)^new."""
    if not examples:
        return 1.0
    weight = max(new / (examples + new), 1 - (1 - floor) ** new)
    return (1 / weight - 1) * new / examples


def energy(layer: _BatchNorm, new: Moments) -> float:
    """Mean square of an input standardized by the layer's stored statistics; a channel without a value counts as 1."""
    mean, var = (buffer.double() for buffer in buffers(layer))
    squares = (new.var + (new.mean - mean).square()) / (var + layer.eps)
    return float(torch.where(new.count > 0, squares, 1.0).mean())


def _fitting(new: Moments, stored: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Mean and variance in the buffers' types, clipped to the types' range."""
    pairs = zip((new.mean, new.var), stored, strict=True)
    return [value.clamp(torch.finfo(b.dtype).min, torch.finfo(b.dtype).max).to(b.dtype) for value, b in pairs]
