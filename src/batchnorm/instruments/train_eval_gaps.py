"""Gaps: why a model is better or worse in eval mode than in train mode, and which layers cause it.

Three losses of one data set, with the same weights and dropout off:

    L_batch    each batch is normalized by its own statistics, as in train mode
    L_pop      all batches are normalized by the exact statistics of the data set (``recalibrate``)
    L_eval     all batches are normalized by the statistics that the layers store

    L_eval - L_batch = (L_pop - L_batch) + (L_eval - L_pop)
                        noise part          stale part

The noise part comes from normalizing by batch statistics; it is smaller for larger batches. The stale part comes from
wrong running averages: they lag, average too few batches, or are of other data. The share of a layer l is

    share_l = L_eval - (L_eval with the exact statistics in layer l only)

(Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", on train-test inconsistency of statistics). The distance
between stored and exact statistics is given in standard errors of a running average with momentum a. With Var(mu_B) the
variance of batch means, and s^2 the exact variance of a channel:

    t_mean^2 = mean (mu_stored - mu_pop)^2 / s^2 / (mean Var(mu_B) / s^2) / (a / (2 - a) + 1 / batches)

and t_var likewise from the logarithms of unbiased variances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.call_types import Batch
from batchnorm.instruments.gradients import Loss, finite, refuse_single_values, scalar
from batchnorm.instruments.probe_tier import unwrapped, with_shape
from batchnorm.moments import Moments
from batchnorm.population.batches import Batches, call, device_of
from batchnorm.population.eager import own_run
from batchnorm.population.hooks import seeing
from batchnorm.population.recalibration import recalibrate
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.stored_statistics import buffers, store
from batchnorm.population.tensor_trees import examples_in

Statistics = tuple[Tensor, Tensor]  # running mean and variance


@final
@dataclass(frozen=True, slots=True)
class MeanOverBatches:
    """A mean over batches and its standard error, which is NaN for a single batch."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.4g} +- {self.error:.2g}"


@final
@dataclass(frozen=True, slots=True)
class LayerGap:
    """One layer's part in the stale part.

    Args:
        name: Dotted path of the layer.
        share: By how much the loss in eval mode falls if this layer alone gets exact statistics.
        t_mean: Distance between the stored and the exact mean, in standard errors, rms over channels that vary; NaN for
            a single batch, or if no channel varies.
        t_var: The same for the logarithm of the variance.
    """

    name: str
    share: MeanOverBatches
    t_mean: float
    t_var: float


@final
@dataclass(frozen=True, slots=True)
class TrainEvalGap:
    """The losses in train and eval mode, and the parts of their difference.

    Args:
        batch: L_batch.
        population: L_pop.
        eval: L_eval.
        noise: L_pop - L_batch.
        stale: L_eval - L_pop.
        layers: The measured layers, in the order of execution.
        together: The stale part minus the sum of all shares: the part of it that no single layer explains.
        batches: Number of batches.
        examples: Number of examples.
    """

    batch: MeanOverBatches
    population: MeanOverBatches
    eval: MeanOverBatches
    noise: MeanOverBatches
    stale: MeanOverBatches
    layers: tuple[LayerGap, ...]
    together: float
    batches: int
    examples: int

    @property
    def worst(self) -> LayerGap:
        """The layer whose share has the largest absolute value."""
        return max(self.layers, key=lambda layer: abs(layer.share.value))

    def __str__(self) -> str:
        worst = self.worst
        return (
            f"loss {self.batch.value:.4g} in train mode, {self.population.value:.4g} by exact statistics, "
            f"{self.eval.value:.4g} in eval mode: noise part {self.noise}, stale part {self.stale}, most of it "
            f"{worst.share} in {worst.name} (stored mean {worst.t_mean:.1f}, variance {worst.t_var:.1f} standard "
            f"errors away)"
        )


def train_eval_gap(
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    max_examples: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> TrainEvalGap:
    """Why the loss differs between train and eval mode, with the share of every layer; the model is not changed.

    Losses are means over examples: the mean loss of a batch is weighted by its number of examples. Dropout is off. The
    cost is one run of ``recalibrate``, 3 forward passes over the data, and one more pass for each layer. Frozen layers,
    layers without stored statistics, and layers in eval mode inside a model in train mode are not measured.

    Unit: the unit of the loss; ``t_mean`` and ``t_var`` are in standard errors. Noise floor: the ``error`` of each
    mean, from the scatter over batches. All losses use the same batches, so most of the scatter cancels in their
    differences. If the stored statistics are exact, the stale part is exactly 0.

    How to read it: a noise part below 0 means that train mode is worse, as with small batches. ``recalibrate`` repairs
    a stale part above 0. For a correct running average t is below 2; a t above 4 shows that it is stale. If rare
    examples are very large, ``t_var`` may exceed 4 by chance. In train mode a batch of M values makes the standard
    deviation of a channel too small by the factor sqrt((M - 1) / M), in eval mode this factor is missing: at M = 2
    outputs are 29 % smaller in eval mode, which counts as noise part. The numbers mislead with other data than in
    training, since exact statistics then adapt the model to the new data; with other augmentation than in training; and
    with batches of another size than in training. Shares do not add up if several layers are wrong (``together``).
    Behind another batch norm layer all batches have nearly the same statistics, so even a large t may change the loss
    little: read the share first.

    Args:
        model: Any model with batch norm, compiled or not.
        data: Batches in any form that ``recalibrate`` accepts, of the batch size of training. A loader may shuffle.
        loss: ``loss(output, batch)`` returns the mean over the batch's examples.
        max_examples: Stop after this number of examples; None uses all data.
        device: The device to which batches are moved; None means the model's device.

    Raises:
        TypeError: If ``data`` is no iterable of batches, or the loss returns no tensor.
        ValueError: If there is no layer with stored statistics, no measurable layer runs, there is no batch, a layer
            receives one value per channel, or the loss is not a finite scalar.

    References:
        Wu and Johnson 2021; Ioffe and Szegedy 2015, algorithm 2.
    """
    what = "train_eval_gap"
    model = unwrapped(model)
    named = with_shape(model, what)
    data = list(data) if isinstance(data, Iterator) else data
    with preserve_state(model), own_run(), torch.no_grad():
        layers, exact, stored = _measure(model, named, data, max_examples, device)
        at = device_of(model) if device is None else torch.device(device)
        batches = Batches(data, max_examples, at, who=what)
        losses, weights, seen = _losses(model, batches, loss, layers, _choices(stored, exact))
    away = {name: _standard_errors(layer, stored[name], exact[name], seen[name]) for name, layer in layers.items()}
    return _summary(torch.tensor(losses, dtype=torch.float64), weights, away)


def _summary(losses: Tensor, weights: list[int], away: dict[str, tuple[float, float]]) -> TrainEvalGap:
    """The result.

    Args:
        losses: (batches, 3 + layers): in train mode, by stored statistics, by exact statistics, and for each layer by
            exact statistics in this layer alone.
        weights: Number of examples in each batch.
        away: Layer -> (t_mean, t_var).
    """
    trained, stored, exact, *alone = losses.T  # (batches,) each
    mean = partial(_estimate, torch.tensor(weights, dtype=torch.float64))
    gaps = [LayerGap(name, mean(stored - loss), *away[name]) for name, loss in zip(away, alone, strict=True)]
    stale = mean(stored - exact)
    return TrainEvalGap(
        batch=mean(trained),
        population=mean(exact),
        eval=mean(stored),
        noise=mean(exact - trained),
        stale=stale,
        layers=tuple(gaps),
        together=stale.value - sum(gap.share.value for gap in gaps),
        batches=len(weights),
        examples=sum(weights),
    )


def _measure(
    model: nn.Module,
    named: dict[str, _BatchNorm],
    data: Iterable[Batch],
    max_examples: int | None,
    device: torch.device | str | None,
) -> tuple[dict[str, _BatchNorm], dict[str, Statistics], dict[str, Statistics]]:
    """The measured layers in the order of execution, their exact statistics, and their stored statistics."""
    before = {name: _statistics(layer) for name, layer in named.items() if layer.running_mean is not None}
    if not before:
        raise ValueError(
            "train_eval_gap needs layers with stored statistics, got none. Construct the layers with "
            "track_running_stats=True: without it, both modes use batch statistics."
        )
    recalibrated = recalibrate(model, data, max_examples, device=device)
    layers = {name: named[name] for name in recalibrated}
    if not layers:
        raise ValueError(
            "train_eval_gap needs layers that use batch statistics in train mode, but all layers are frozen, or none "
            "ran. Unfreeze the layers, or pass a model in eval mode."
        )
    return layers, {name: _statistics(layer) for name, layer in layers.items()}, {n: before[n] for n in layers}


def _statistics(layer: _BatchNorm) -> Statistics:
    mean, var = buffers(layer)
    return mean.clone(), var.clone()


def _choices(stored: dict[str, Statistics], exact: dict[str, Statistics]) -> list[dict[str, Statistics]]:
    """Statistics for all layers: stored, exact, and stored with the exact statistics in one layer at a time."""
    return [stored, exact, *({**stored, name: exact[name]} for name in stored)]


def _losses(
    model: nn.Module, batches: Batches, loss: Loss, layers: dict[str, _BatchNorm], choices: list[dict[str, Statistics]]
) -> tuple[list[list[float]], list[int], dict[str, list[Moments]]]:
    """For every batch: losses in train mode and by each choice, number of examples, and moments of layers' inputs."""
    losses: list[list[float]] = []
    weights: list[int] = []
    seen: dict[str, list[Moments]] = {name: [] for name in layers}
    model.eval()
    with preserve_random_state(*batches.generators):
        for batch in batches:
            evaluate = partial(_loss, model, batch, loss)
            with _train_mode(layers, seen), refuse_single_values(model, "train_eval_gap"):
                row = [evaluate()]
            for statistics in choices:
                for name, layer in layers.items():
                    store(layer, *statistics[name])
                row.append(evaluate())
            losses.append(row)
            weights.append(examples_in(batch) or 1)
    return losses, weights, seen


def _loss(model: nn.Module, batch: Batch, loss: Loss) -> float:
    with preserve_random_state():
        return float(finite(scalar(loss(call(model, batch), batch), "train_eval_gap"), "train_eval_gap"))


@contextmanager
def _train_mode(layers: dict[str, _BatchNorm], seen: dict[str, list[Moments]]) -> Iterator[None]:
    """A block in which the layers use batch statistics, and the moments of their inputs are collected in ``seen``."""

    with seeing(layers, lambda name, _, x: seen[name].append(Moments.of(x))):
        for layer in layers.values():
            layer.training = True
        try:
            yield
        finally:
            for layer in layers.values():
                layer.training = False


def _estimate(weight: Tensor, values: Tensor) -> MeanOverBatches:
    """Weighted mean of ``values``, (batches,), and its standard error."""
    share = weight / weight.sum()
    mean = (share * values).sum()
    count = len(values)
    spread = (share * (values - mean)).square().sum()
    return MeanOverBatches(float(mean), float((spread * count / (count - 1)).sqrt()) if count > 1 else math.nan)


def _standard_errors(
    layer: _BatchNorm, stored: Statistics, exact: Statistics, batches: list[Moments]
) -> tuple[float, float]:
    """Distance between stored and exact mean, and between the logs of the variances, in standard errors."""
    if len(batches) < 2:
        return math.nan, math.nan
    (mean, var), (exact_mean, exact_var) = ([x.double() for x in pair] for pair in (stored, exact))
    varying = (exact_var > 0) & (var > 0)
    scale = exact_var[varying]
    means = torch.stack([m.mean for m in batches])[:, varying]  # (batches, channels)
    logs = torch.stack([m.unbiased_var for m in batches])[:, varying].log()
    share = _noise_of_average(layer) + 1 / len(batches)  # exact statistics are an average over these batches
    off_mean = (mean - exact_mean)[varying].square() / scale
    off_log = (var / exact_var)[varying].log().square()
    pairs = [(off_mean, means.var(0) / scale), (off_log, logs.var(0))]
    mean_t, log_t = (float((off.mean() / (noise.mean() * share)).sqrt()) for off, noise in pairs)
    return mean_t, log_t


def _noise_of_average(layer: _BatchNorm) -> float:
    """Variance of a running average after many batches, divided by the variance of one batch's mean."""
    if layer.momentum is None:
        return 1 / max(int(layer.num_batches_tracked or 1), 1)
    return layer.momentum / (2 - layer.momentum)
