"""The probe tier: the inputs of every batch norm layer for a fixed batch of examples.

The examples pass through the model twice: in eval mode, and with the batch norm layers in train mode (if some of them
were in train mode before, only these layers). Then the model's state is restored bit for bit (``preserve_state``).
Dropout is off in both passes, so that only batch norm differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.call_types import Answer, Batch
from batchnorm.instruments.gamma_and_beta import census
from batchnorm.instruments.layer_drift import drift, noise_floor
from batchnorm.instruments.output_differences import difference
from batchnorm.instruments.signal_propagation import moments_of_channels, resemblance, sample
from batchnorm.instruments.snapshots import Layers, Snapshot
from batchnorm.layers import batch_norms
from batchnorm.model_wrappers import unwrapped
from batchnorm.moments import Moments
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.batches import Batches, call, on_device_of
from batchnorm.population.eager import uncompiled
from batchnorm.population.freezing import has_stored_statistics, statistics_of
from batchnorm.population.hooks import seeing
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.tensor_memory import require, whole
from batchnorm.population.tensor_trees import tensors_in
from batchnorm.processes import is_synchronized
from batchnorm.record import Record

Loss = Callable[[Answer, Batch], Tensor]  # called with a model's output and its batch

PERCENTILES = (2, 16, 50, 84, 98)  # in a normal distribution: 2, 1 and 0 standard deviations from the mean
_MOST_VALUES = 4096  # percentiles are computed from at most this number of values


def probe(model: nn.Module, batch: Batch, loss: Loss | None = None) -> Record:
    """Measure every batch norm layer of a model once, on one batch; the model is not changed, bit for bit.

    For each layer: the gap between train and eval mode on these examples; the squared mean and the variance of its
    input channels; stable rank, cosine and orthogonality gap of the examples; the noise floor of drift; and the
    census of gamma and beta. For the model: the difference between outputs in train mode and in eval mode, and the loss
    in both modes. ``batchnorm.record.QUANTITIES`` explains each quantity, its unit and when it misleads.

    Inputs are measured in eval mode. If a layer did not run, or its inputs are NaN or infinite, the numbers that are
    computed from its inputs are None. If a layer is called several times, its first call is measured. Under
    torch.distributed a model with synchronized layers runs in eval mode only: the loss in train mode and the difference
    between outputs are then left out.

    Args:
        model: Any model with batch norm layers of torch.nn or of this package, compiled or not.
        batch: A batch of two examples or more, in any form that ``recalibrate`` accepts.
        loss: ``loss(output, batch)`` returns a scalar. None chooses the cross-entropy if the batch is (inputs,
            classes) and the output has one logit for each class, the mean square error if the batch is (inputs,
            targets) and targets have the output's shape, and no loss otherwise.

    Raises:
        ValueError: If the model has no batch norm layer with a shape, the batch has fewer than two examples, or the
            pass needs a tensor without readable numbers.
        TypeError: If ``model`` is no module, or ``batch`` no batch.

    Example:
        >>> import torch, batchnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> record = batchnorm.probe(model, torch.randn(32, 4))
        >>> record["gamma"]
        {'1': 1.0}
    """
    model = unwrapped(model)
    require_real(model, "probe")
    modules = with_shape(model, "probe")
    require(statistics_of(modules), "probe")
    layers = Layers(modules)
    batch = on_device_of(model, batch, who="probe")
    view = Probe.of_batch(batch, loss).look(model, layers)
    values = {**view.values(), **_row(census(layers, Snapshot.of(layers)))}
    return Record(0, layers.names, values, view.of_model, "probe", time.time(), view.arrays())


def with_shape(model: nn.Module, what: str) -> dict[str, _BatchNorm]:
    """The batch norm layers that have a shape; a lazy layer has no shape before its first pass."""
    layers = {name: layer for name, layer in batch_norms(model).items() if layer.num_features}
    if not layers:
        raise ValueError(
            f"{what} needs a model with batch norm layers that have a shape, got {type(model).__name__} without any. "
            "If its layers are lazy, run a batch through the model first."
        )
    return layers


@final
@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed batch, with the forward pass and the loss for it.

    Args:
        forward: Returns a model's output for the batch.
        batch: The second argument of ``loss``.
        loss: As in ``probe``.
    """

    forward: Callable[[nn.Module], Batch]
    batch: Batch = None
    loss: Loss | None = None

    @classmethod
    def of_batch(cls, batch: Batch, loss: Loss | None) -> Probe:
        """A probe of a loader's batch, which is on the model's device."""
        return cls(lambda model: call(model, batch), batch, loss)

    @classmethod
    def of_call(cls, args: tuple[Batch, ...], kwargs: dict[str, Batch], most: int) -> Probe:
        """A probe of a call's arguments: the first ``most`` examples, copied so that no later step overwrites them."""
        with torch.no_grad():
            ((copied_args, copied_kwargs),) = Batches([(args, kwargs)], most, None)
        return cls(lambda model: model(*copied_args, **copied_kwargs))

    def look(self, model: nn.Module, layers: Layers) -> View:
        """Run the batch through the model and measure the layers; the state is restored, also after an error."""
        view = View(layers)
        with preserve_state(model), preserve_random_state(), uncompiled(), torch.no_grad():
            were_training = [layer for layer in layers.layers if layer.training]
            model.eval()
            with view.hooks():
                evaluated = self.forward(model)
            view.of_model["loss_eval"] = self._loss(evaluated)
            view.check()
            if _communicates(layers):
                return view  # a pass in train mode would wait for the other ranks, which do not look now
            for layer in were_training or layers.layers:
                layer.train()
            trained = self.forward(model)
            view.of_model["loss_train"] = self._loss(trained)
            view.of_model["output_gap"] = _output_gap(trained, evaluated)
        return view

    def _loss(self, output: Answer) -> float | None:
        loss = self.loss or _usual_loss(output, self.batch)
        return None if loss is None else float(loss(output, self.batch))


@final
@dataclass
class View:
    """The inputs of the layers in one pass in eval mode, and the numbers of the model."""

    layers: Layers
    units: dict[str, Tensor] = field(default_factory=dict)  # sampled inputs, (N, units)
    channels: dict[str, Tensor] = field(default_factory=dict)  # the channel of each unit, (units,)
    moments: dict[str, Moments] = field(default_factory=dict)
    of_model: dict[str, float | None] = field(default_factory=dict)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """A block in which the inputs of the layers are recorded."""
        with seeing(dict(zip(self.layers.names, self.layers.layers, strict=True)), self._see):
            yield

    def _see(self, name: str, _: nn.Module, received: Tensor) -> None:
        x = None if received is None else whole(received)
        if name in self.units or x is None or x.ndim < 2:
            return
        self.units[name], self.channels[name] = sample(x)
        moments = Moments.of(x)
        self.moments[name] = moments.to("cpu")

    def check(self) -> None:
        """Raise if the batch has fewer than two examples."""
        if self.units and max(len(x) for x in self.units.values()) < 2:
            raise ValueError("a probe needs a batch of 2 examples or more, got 1. Pass more examples.")

    def values(self) -> dict[str, list[float | None]]:
        """One number per layer for every quantity that a single look measures."""
        rows = [self._of(i, name) for i, name in enumerate(self.layers.names)]
        names = ("gap", "mean_square", "channel_var", "stable_rank", "cosine", "orthogonality", "drift_floor")
        return {name: [row.get(name) for row in rows] for name in names}

    def _of(self, i: int, name: str) -> dict[str, float]:
        if name not in self.units or not bool(self.units[name].isfinite().all()):
            return {}
        units, moments = self.units[name], self.moments[name]
        return {
            "gap": gap(self.layers.layers[i], moments),
            **moments_of_channels(moments),
            **resemblance(units),
            "drift_floor": float(noise_floor(units)),
        }

    def drift_from(self, earlier: View) -> list[float | None]:
        """Drift of every layer since an earlier look, in standard deviations; None if the layer did not run in both."""
        both = [name if name in self.units and name in earlier.units else None for name in self.layers.names]
        return [None if name is None else float(drift(earlier.units[name], self.units[name]).total) for name in both]

    def arrays(self) -> dict[str, np.ndarray]:
        """Percentiles, (layers, 5); NaN for a layer that did not run.

        Percentiles of inputs and outputs are over values, those of stored and batch statistics over channels.
        """
        rows = [self._percentiles(i, name) for i, name in enumerate(self.layers.names)]
        names = ("quantiles_input", "quantiles_output", "running_mean", "running_var", "batch_mean", "batch_var")
        unknown = torch.full((len(PERCENTILES),), torch.nan)
        return {name: torch.stack([row.get(name, unknown) for row in rows]).numpy() for name in names}

    def _percentiles(self, i: int, name: str) -> dict[str, Tensor]:
        if name not in self.units:
            return {}
        layer, moments = self.layers.layers[i], self.moments[name]
        mean, var = stored(layer, moments)
        gamma, beta = Layers({name: layer}).affine()
        at = self.channels[name]
        outputs = (self.units[name] - mean[at]) * (gamma * (var + layer.eps).rsqrt())[at] + beta[at]
        return {
            "quantiles_input": _quantiles(self.units[name]),
            "quantiles_output": _quantiles(outputs),
            "running_mean": _quantiles(mean),
            "running_var": _quantiles(var),
            "batch_mean": _quantiles(moments.mean),
            "batch_var": _quantiles(moments.unbiased_var),
        }


def stored(layer: _BatchNorm, moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and variance that the layer uses in eval mode, (channels,); NaN if they cannot be read.

    A layer without stored statistics uses those of the batch.
    """
    if not has_stored_statistics(layer) or layer.running_mean is None or layer.running_var is None:
        return moments.mean, moments.var
    numbers = [whole(layer.running_mean), whole(layer.running_var)]
    mean, var = (torch.full_like(moments.mean, torch.nan) if x is None else x.double().cpu() for x in numbers)
    return mean, var


def gap(layer: _BatchNorm, moments: Moments) -> float:
    """Rms difference between a layer's outputs by batch statistics and its outputs by stored statistics.

    In standard deviations of the outputs by stored statistics; 0 for a layer that stores no statistics, and infinite or
    NaN if the outputs do not vary.
    """
    mean, var = stored(layer, moments)
    gain = Layers({"": layer}).affine()[0].square()
    by_stored = mean, (var + layer.eps).rsqrt()
    by_batch = moments.mean, (moments.var + layer.eps).rsqrt()
    between = gain * difference(moments.mean, moments.var, by_batch, by_stored)
    return float((between.sum() / (gain * moments.var * by_stored[1].square()).sum()).sqrt())


def _quantiles(values: Tensor) -> Tensor:
    values = values.double().flatten()
    values = values[:: -(-len(values) // _MOST_VALUES)]
    return values.quantile(torch.tensor(PERCENTILES, dtype=torch.float64) / 100)


def _usual_loss(output: Answer, batch: Batch) -> Loss | None:
    """Cross-entropy or mean square error, by the kinds of output and target; None if neither fits."""
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return None
    if target.dtype == torch.long and output.ndim > 1 and target.shape == output.shape[:1] + output.shape[2:]:
        return lambda output, batch: F.cross_entropy(output.float(), batch[1])
    if target.is_floating_point() and target.shape == output.shape:
        return lambda output, batch: F.mse_loss(output.float(), batch[1].float())
    return None


def _output_gap(trained: Answer, evaluated: Answer) -> float | None:
    """Rms difference of outputs, in standard deviations over examples.

    None if no output is a floating-point tensor of two axes or more, if the shapes differ between the modes, or if the
    outputs in eval mode do not vary.
    """
    a, b = (
        torch.cat([x.double().flatten(1) for x in _floats(y)], 1).cpu() if _floats(y) else None
        for y in (trained, evaluated)
    )
    if a is None or b is None or a.shape != b.shape:
        return None
    spread = (b - b.mean(0)).square().mean()
    return float(((a - b).square().mean() / spread).sqrt()) if spread > 0 else None


def _floats(value: Batch) -> list[Tensor]:
    """Every floating-point tensor of two axes or more in an output."""
    tensors = [whole(x) for x in tensors_in(value)]
    return [x for x in tensors if x is not None and x.is_floating_point() and x.ndim > 1]


def _communicates(layers: Layers) -> bool:
    return has_ranks() and any(map(is_synchronized, layers.layers))


def has_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _row(values: dict[str, Tensor]) -> dict[str, list[float | None]]:
    return {name: value.tolist() for name, value in values.items()}
