"""Cumulative: statistics of everything that passed since a moment, in use while they grow.

Every example since the start counts equally, together with ``prior`` stored ones, until 1 / ``floor`` have passed; from
then on a new example has the weight ``floor``, and old ones fade, so that further changes are followed. The statistics
of a batch include that batch: a layer counts its input first and normalizes by the result, so that the layers behind it
count inputs which are normalized already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from batchnorm.adaptation.layer_statistics import mixed
from batchnorm.moments import Moments
from batchnorm.population.observation import InputMoments
from batchnorm.population.stored_statistics import Statistics, buffers, store

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm


@final
class Cumulative:
    """Statistics of layers that grow with every input.

    Args:
        stored: The statistics that were deployed.
        prior: How many examples they count as.
        floor: Least weight of a new example.
    """

    def __init__(self, stored: Statistics, prior: float, floor: float) -> None:
        self._stored, self._prior, self._floor = stored, prior, floor
        self._seen: dict[str, tuple[Moments, float]] = {}  # of values, and the examples that they count as
        self.energies: dict[str, tuple[float, float]] = {}  # of each layer's last input, and of all before it

    def see(self, path: str, layer: _BatchNorm, x: Tensor) -> None:
        """Count the input of a layer, and let the layer normalize by the result."""
        if layer.training or not x.numel():
            return
        new = InputMoments.of(x.detach()).moments
        if not bool(new.count.all()):
            return  # NaN or infinity: this input is evidence of something else
        moments, examples = self._seen.get(path, (Moments.empty(), 0.0))
        if examples:  # the first one meets statistics that know nothing of it
            self.energies[path] = energy(layer, new), energy(layer, moments)
        kept = faded(examples, len(x), self._floor)
        moments = moments.scaled(kept) + new
        self._seen[path] = moments, examples * kept + len(x)
        stored = self._stored.mean[path], self._stored.var[path]
        mean, var = _fitting(mixed(stored, self._prior, moments, self._seen[path][1]), buffers(layer))
        store(layer, mean, var)

    def copy(self) -> Cumulative:
        """One that goes on by itself."""
        other = Cumulative(self._stored, self._prior, self._floor)
        other._seen = dict(self._seen)  # moments are values
        return other


def faded(examples: float, new: int, floor: float) -> float:
    """The factor by which old examples fade so that ``new`` ones together weigh 1 - (1 - floor)^new at least."""
    if not examples:
        return 1.0
    weight = max(new / (examples + new), 1 - (1 - floor) ** new)
    return (1 / weight - 1) * new / examples


def energy(layer: _BatchNorm, new: Moments) -> float:
    """Mean square of an input that is standardized by what the layer stores, over channels that are finite."""
    mean, var = (buffer.double() for buffer in buffers(layer))
    each = (new.var + (new.mean - mean).square()) / (var + layer.eps)
    return float(torch.where(new.count > 0, each, 1.0).mean())


def _fitting(new: Moments, stored: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Mean and variance in the types of the buffers, the largest of them where they do not fit."""
    pairs = zip((new.mean, new.var), stored, strict=True)
    return [value.clamp(torch.finfo(b.dtype).min, torch.finfo(b.dtype).max).to(b.dtype) for value, b in pairs]
