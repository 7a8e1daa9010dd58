"""Measuring for adapt: what each layer receives while the layers before it normalize by what was made of theirs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.adaptation.layer_statistics import See, Statistics, buffers, mixed, seeing, write
from batchnorm.moments import Moments
from batchnorm.population.batches import Batches, call
from batchnorm.population.recalibration import execution_order
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.tensor_trees import examples_in

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

    Layers = dict[str, _BatchNorm]

_LEAST = 2  # values that have a variance


@dataclass
class _Gauge:
    """What a layer received so far, values that are not finite left out by channel and batch."""

    moments: Moments = field(default_factory=Moments.empty)
    values: int = 0  # for each channel, those left out among them
    poisoned: int = 0

    def add(self, x: Tensor) -> Moments:
        """Count an input; the part of it that counts."""
        new = finite_moments(x)
        self.poisoned += bool((new.count == 0).any()) and x.numel() > 0
        self.values += x.numel() // max(1, x.shape[1])
        self.moments += new
        return new


def finite_moments(x: Tensor) -> Moments:
    """Moments of an input, with count 0 for channels whose moments are not finite."""
    new = Moments.of(x)
    is_finite = torch.isfinite(new.mean) & torch.isfinite(new.m2)
    return Moments(torch.where(is_finite, new.count, 0.0), new.mean, new.m2)


def exact(model: nn.Module, batches: Batches, layers: Layers, prior: float) -> dict[str, Moments]:
    """Statistics layer by layer in execution order, each mixed with ``prior`` stored examples and left in the layer."""
    stored = Statistics.of(layers)
    most, examples = _calls(model, batches, layers)
    may_end = not is_sharded(model)
    gauges: dict[str, _Gauge] = {}
    # where layers are reused, first calls alone give statistics that do not depend on what was stored before
    for first_only in [True, False] if max(most.values(), default=0) > 1 else [False]:
        for path in most:
            gauges[path] = gauge = _measured(
                model, batches, {path: layers[path]}, 1 if first_only else most[path], may_end
            )
            _check(path, gauge.moments)
            # a channel that was left out of some batches has seen fewer examples
            seen = examples * gauge.moments.count / max(1, gauge.values)
            if not math.isinf(prior):
                _store(path, layers[path], mixed((stored.mean[path], stored.var[path]), prior, gauge.moments, seen))
    return _reported(layers, gauges)


def exponential(model: nn.Module, batches: Batches, layers: Layers, weight: float) -> dict[str, Moments]:
    """Exponential averages in one pass, from the layers' statistics on, and left in them."""
    gauges: dict[str, _Gauge] = {}

    def see(path: str, layer: _BatchNorm, x: Tensor) -> None:
        new = gauges.setdefault(path, _Gauge()).add(x)
        _store(path, layer, mixed(buffers(layer), 1 - weight, new, torch.where(new.count > 0, weight, 0.0)))

    _pass(model, batches, layers, see)
    return _reported(layers, gauges)


class _EndForward(BaseException):
    """Ends a forward whose remaining layers are not needed; no Exception, so that models do not catch it."""


def _pass(
    model: nn.Module, batches: Batches, layers: Layers, see: See, begin: Callable[[], object] | None = None
) -> int:
    """Examples in one pass over the data, during which ``see`` looks on; ``begin`` is called before each forward."""
    examples = 0
    with seeing(layers, see), preserve_random_state(*batches.generators):
        for batch in batches:
            if begin is not None:
                begin()
            with suppress(_EndForward):
                call(model, batch)
            examples += examples_in(batch) or 0
    return examples


def _calls(model: nn.Module, batches: Batches, layers: Layers) -> tuple[dict[str, int], int]:
    """The most calls of each layer in one forward, layers in execution order; examples in all."""
    traces: list[list[str]] = []

    def see(path: str, _: _BatchNorm, __: Tensor) -> None:
        traces[-1].append(path)

    examples = _pass(model, batches, layers, see, lambda: traces.append([]))
    distinct = list(dict.fromkeys(map(tuple, traces)))
    return {path: max(trace.count(path) for trace in distinct) for path in execution_order(distinct)}, examples


def _measured(model: nn.Module, batches: Batches, layer: Layers, calls: int, may_end: bool) -> _Gauge:
    """What one layer receives in its first ``calls`` calls of each forward."""
    gauge, seen = _Gauge(), [0]

    def see(_: str, __: _BatchNorm, x: Tensor) -> None:
        if seen[0] == calls:
            return
        gauge.add(x)
        seen[0] += 1
        if may_end and seen[0] == calls:
            raise _EndForward

    def begin() -> None:
        seen[0] = 0

    _pass(model, batches, layer, see, begin)
    return gauge


def _check(path: str, moments: Moments) -> None:
    counts = moments.count.expand(moments.shape)
    if (few := counts < _LEAST).any():
        channel = int(few.nonzero()[0])
        raise ValueError(
            f"adapt needs at least {_LEAST} finite values per channel, got {int(counts[channel])} in channel {channel} "
            f"of layer {path!r} ({int(few.sum())} of {few.numel()} channels). Give more examples."
        )


def _store(path: str, layer: _BatchNorm, new: Moments) -> None:
    """Put statistics into a layer.

    Raises:
        ValueError: If they do not fit the layer's type.
    """
    for buffer, value in zip(buffers(layer), (new.mean, new.var), strict=True):
        if not torch.isfinite(value.to(buffer.dtype)).all():
            raise ValueError(
                f"adapt needs statistics that fit the layer's buffers, got {value.abs().max():.3g} for {buffer.dtype} "
                f"in layer {path!r}. Keep batch norm layers in float32: layer.float()."
            )
    write(layer, new.mean.to(buffers(layer)[0].dtype), new.var.to(buffers(layer)[1].dtype))


def _reported(layers: Layers, gauges: dict[str, _Gauge]) -> dict[str, Moments]:
    """The moments of every layer that was reached, after a word about others."""
    if missed := [path for path in layers if path not in gauges]:
        _warn(
            f"no forward reached {', '.join(map(repr, missed))}: they keep the statistics that they had. "
            "Give batches that use them."
        )
    if poisoned := [f"{path!r} (inputs: {gauge.poisoned})" for path, gauge in gauges.items() if gauge.poisoned]:
        _warn(
            f"NaN or infinity in the input of {', '.join(poisoned)}: these batches were left out for the channels "
            "concerned. Look for the examples that cause it."
        )
    return {path: gauge.moments for path, gauge in gauges.items()}


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
