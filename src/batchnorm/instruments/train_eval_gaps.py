"""Gaps: why a model is better or worse in eval mode than in train mode, and which layer is to blame.

Three losses of one data set, with the same weights and dropout off:

    L_batch    each batch normalized by its own statistics, as in train mode
    L_pop      all by the exact statistics of the data set (``recalibrate``)
    L_eval     all by what the layers store

    L_eval - L_batch = (L_pop - L_batch) + (L_eval - L_pop)
                        noise part          stale part

The noise part comes from normalizing by a batch; it shrinks with the batch size. The stale part comes from running
averages that are wrong: they lag, average too few batches, or describe other data. The share of a layer l is

    share_l = L_eval - L_eval with the exact statistics in layer l alone

(Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", on train-test inconsistency of statistics). The distance of
stored statistics from exact ones is given in standard errors of a running average with momentum a, for batches whose
means have the variance Var(mu_B):

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
from batchnorm.population.eager import uncompiled
from batchnorm.population.hooks import seeing
from batchnorm.population.recalibration import recalibrate
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.stored_statistics import buffers, store
from batchnorm.population.tensor_trees import examples_in

Statistics = tuple[Tensor, Tensor]  # running mean and variance


@final
@dataclass(frozen=True, slots=True)
class MeanOverBatches:
    """A mean over batches and its standard error, NaN for a single batch."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.4g} +- {self.error:.2g}"


@final
@dataclass(frozen=True, slots=True)
class LayerGap:
    """What one layer has to do with the stale part.

    Args:
        name: Dotted path.
        share: By how much the loss in eval mode falls if this layer alone gets exact statistics.
        t_mean: Distance of the stored mean from the exact one, in standard errors, rms over channels; NaN for a
            single batch.
        t_var: The same for the logarithm of the variance.
    """

    name: str
    share: MeanOverBatches
    t_mean: float
    t_var: float


@final
@dataclass(frozen=True, slots=True)
class TrainEvalGap:
    """The loss in train and eval mode and what lies between them.

    Args:
        batch: L_batch.
        population: L_pop.
        eval: L_eval.
        noise: L_pop - L_batch.
        stale: L_eval - L_pop.
        layers: In the order of execution.
        together: Of the stale part, what no layer explains alone: stale minus all shares.
        batches: How many.
        examples: How many.
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
        """The layer with the largest share, whatever its sign."""
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
    """Why the loss differs between train and eval mode, with the share of every layer; the model stays as it is.

    Losses are means over examples: the mean loss of a batch is weighted by its number of examples. Dropout is off. The
    cost is that of ``recalibrate``, 3 forward passes over the data, and one more for each layer. Frozen layers, layers
    without stored statistics, and layers in eval mode inside a model in train mode are not measured.

    Unit: of the loss; ``t_mean`` and ``t_var`` in standard errors. Noise floor: the errors, from the scatter of the
    differences over batches. The same batches are used for all losses, so that most of their scatter cancels. Where
    stored statistics are the exact ones, the stale part is 0 to the last digit.

    How to read it: a noise part below 0 means that train mode is worse, as with small batches. ``recalibrate`` repairs
    a stale part above 0. A running average scatters by a t below 2; above 4 it is stale, unless rare examples are very
    large: the variance may then exceed 4 by chance. In batches of M values the standard deviation of a channel is too
    small by sqrt((M - 1) / M), but not in eval mode: at M = 2 the output's slope falls by 29 % in eval mode, which is
    part of the noise. The numbers mislead with other data than in training, since exact statistics then adapt the
    model to new data; with other augmentation in one of the modes; and with batches of another size than in training.
    Shares do not add up if several layers are wrong (``together``). Behind another batch norm layer all batches are
    alike by construction, so a large t may matter little: read the share first.

    Args:
        model: Any model with batch norm, compiled or not.
        data: Batches as ``recalibrate`` takes them, of the size of training's. A shuffling loader may shuffle.
        loss: ``loss(output, batch)`` gives the mean over the batch's examples.
        max_examples: Stop after so many.
        device: Where batches are moved, if not to the device of the model.

    Raises:
        TypeError: If ``data`` is no iterable of batches, or the loss does not give a tensor.
        ValueError: If there is no layer with stored statistics, no batch, a batch gives a layer one value per
            channel, or the loss is not a finite scalar.

    References:
        Wu and Johnson 2021; Ioffe and Szegedy 2015, algorithm 2.
    """
    what = "train_eval_gap"
    model = unwrapped(model)
    named = with_shape(model, what)
    data = list(data) if isinstance(data, Iterator) else data
    with preserve_state(model), uncompiled(), torch.no_grad():
        layers, exact, stored = _measure(model, named, data, max_examples, device)
        at = device_of(model) if device is None else torch.device(device)
        batches = Batches(data, max_examples, at, who=what)
        losses, weights, seen = _losses(model, batches, loss, layers, _choices(stored, exact))
    away = {name: _standard_errors(layer, stored[name], exact[name], seen[name]) for name, layer in layers.items()}
    return _summary(torch.tensor(losses, dtype=torch.float64), weights, away)


def _summary(losses: Tensor, weights: list[int], away: dict[str, tuple[float, float]]) -> TrainEvalGap:
    """From the losses of every batch, (batches, 3 + layers), its examples, and how far layers' statistics are away."""
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
    """The layers that can be measured, in the order of execution, their exact and their stored statistics."""
    before = {name: _statistics(layer) for name, layer in named.items() if layer.running_mean is not None}
    if not before:
        raise ValueError(
            "train_eval_gap needs layers with stored statistics, got none. Construct them with "
            "track_running_stats=True: without, eval mode is train mode."
        )
    found = recalibrate(model, data, max_examples, device=device)
    layers = {name: named[name] for name in found}
    if not layers:
        raise ValueError(
            "train_eval_gap needs layers that train mode normalizes by batches, got only frozen ones, or none that "
            "ran. Unfreeze them, or pass a model in eval mode."
        )
    return layers, {name: _statistics(layer) for name, layer in layers.items()}, {n: before[n] for n in layers}


def _statistics(layer: _BatchNorm) -> Statistics:
    mean, var = buffers(layer)
    return mean.clone(), var.clone()


def _choices(stored: dict[str, Statistics], exact: dict[str, Statistics]) -> list[dict[str, Statistics]]:
    """Statistics for all layers: the stored ones, the exact ones, and exact ones in one layer at a time."""
    return [stored, exact, *({**stored, name: exact[name]} for name in stored)]


def _losses(
    model: nn.Module, batches: Batches, loss: Loss, layers: dict[str, _BatchNorm], choices: list[dict[str, Statistics]]
) -> tuple[list[list[float]], list[int], dict[str, list[Moments]]]:
    """Of every batch the loss in train mode and by each choice, and its examples; moments of each layer's inputs."""
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
    """A block in which the layers normalize by batches; their moments are collected."""

    with seeing(layers, lambda name, _, x: seen[name].append(Moments.of(x))):
        for layer in layers.values():
            layer.training = True
        try:
            yield
        finally:
            for layer in layers.values():
                layer.training = False


def _estimate(weight: Tensor, values: Tensor) -> MeanOverBatches:
    """Mean of (batches,) by weight, and its standard error."""
    share = weight / weight.sum()
    mean = (share * values).sum()
    count = len(values)
    spread = (share * (values - mean)).square().sum()
    return MeanOverBatches(float(mean), float((spread * count / (count - 1)).sqrt()) if count > 1 else math.nan)


def _standard_errors(
    layer: _BatchNorm, stored: Statistics, exact: Statistics, batches: list[Moments]
) -> tuple[float, float]:
    """Distance of the stored mean and log variance from the exact ones, in standard errors of a running average."""
    if len(batches) < 2:
        return math.nan, math.nan
    (mean, var), (exact_mean, exact_var) = ([x.double() for x in pair] for pair in (stored, exact))
    kept = (exact_var > 0) & (var > 0)
    scale = exact_var[kept]
    means = torch.stack([m.mean for m in batches])[:, kept]  # (batches, channels)
    logs = torch.stack([m.unbiased_var for m in batches])[:, kept].log()
    share = _noise_of_average(layer) + 1 / len(batches)  # the exact ones are an average of these batches
    off_mean = (mean - exact_mean)[kept].square() / scale
    off_log = (var / exact_var)[kept].log().square()
    pairs = [(off_mean, means.var(0) / scale), (off_log, logs.var(0))]
    mean_t, log_t = (float((off.mean() / (noise.mean() * share)).sqrt()) for off, noise in pairs)
    return mean_t, log_t


def _noise_of_average(layer: _BatchNorm) -> float:
    """Variance of a running average over that of one batch, after many batches."""
    if layer.momentum is None:
        return 1 / max(int(layer.num_batches_tracked or 1), 1)
    return layer.momentum / (2 - layer.momentum)
