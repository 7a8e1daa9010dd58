"""Companions: how much a prediction depends on the other examples in the batch.

In train mode a batch norm layer makes every output depend on all examples of its batch. Each example runs through the
model several times, in batches of M. For each batch M - 1 companions are drawn at random from a pool; nothing else
changes. With p_c the probability, over such batches, that the prediction is class c:

    flip rate        probability that two batches of companions lead to different predictions, 1 - sum_c p_c^2
    variance         Var(logit) over batches of companions, mean over logits
    relative         variance / variance of the logits between examples

Take an output of one batch norm layer at z standard deviations from the mean of its channel, where the channel has
skewness g3 and kurtosis kappa. By the delta method its variance is gamma^2 (1 + g3 z + (kappa - 1) z^2 / 4) / M +
O(1 / M^2). The term 1 comes from the batch's mean, (kappa - 1) z^2 / 4 from its standard deviation, and g3 z from the
covariance of both (on this noise: Ioffe and Szegedy 2015, section 3.4, and Luo et al. 2019, "Towards Understanding
Regularization in Batch Norm").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from batchnorm.call_types import Answer, Batch
from batchnorm.instruments.gradients import refuse_single_values
from batchnorm.instruments.probe_tier import unwrapped
from batchnorm.layers import batch_norms
from batchnorm.population.batches import call, on_device_of
from batchnorm.population.eager import own_run
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.tensor_trees import examples_in

Read = Callable[[Batch], Tensor]


@final
@dataclass(frozen=True, slots=True)
class Companions:
    """How predictions of examples depend on their companions.

    Args:
        flip_rate: Flip rate, mean over examples.
        flip_error: Standard error of ``flip_rate``, from the scatter over examples; NaN for a single example.
        flips: Flip rate of each example.
        from_eval: Share of predictions that differ from the prediction in eval mode, mean over examples.
        variance: Variance of a logit over companions, mean over logits and examples, in units of the logit squared.
        variances: The same for each example.
        relative: ``variance`` divided by the variance between the examples' mean logits; NaN for one example, infinite
            or NaN if all examples have the same mean logits.
        batch: M, the batch size with the example included.
        repeats: Batches of companions for each example.
    """

    flip_rate: float
    flip_error: float
    flips: tuple[float, ...]
    from_eval: float
    variance: float
    variances: tuple[float, ...]
    relative: float
    batch: int
    repeats: int

    def __str__(self) -> str:
        return (
            f"in batches of {self.batch}, two sets of companions disagree on {self.flip_rate:.2%} of predictions "
            f"(+- {self.flip_error:.2%}); {self.from_eval:.2%} differ from eval mode; logits vary by "
            f"{math.sqrt(self.variance):.3g} ({self.relative:.2%} of the variance between examples)"
        )


def companion_flips(
    model: nn.Module,
    examples: Batch,
    pool: Batch,
    batch: int = 32,
    repeats: int = 50,
    *,
    train: bool = True,
    read: Read | None = None,
    seed: int = 0,
) -> Companions:
    """How often a prediction changes with the other examples of its batch; the model is not changed.

    Every example runs with the same batches of companions. Dropout is off. Batch norm layers run in train mode; but if
    the model is in train mode, its batch norm layers in eval mode stay in eval mode. Costs (examples x (repeats + 1))
    forward passes of a batch.

    Unit: flip rates are shares, variances are in units of the logit squared. Noise floor: the smallest flip rate of
    an example above 0 is 2 / repeats. For one example and one logit, the relative error of a variance of R draws is
    sqrt(2 / (R - 1)). Without batch norm, and with ``train=False``, all numbers are exactly 0 unless another module
    mixes examples.

    How to read it: in train mode the numbers are the noise that batch norm adds to predictions in training; it falls
    as 1 / ``batch``. With ``train=False`` a number other than 0 shows a leak: a module that is not batch norm mixes
    examples of a batch. The numbers mislead in four cases: the pool is not mixed like training batches (sorted classes,
    other augmentation); ``batch`` is not the batch size of training, or training splits it over devices; the pool of n
    examples is not much larger than ``batch`` (variances are too small by the factor 1 - M / n); or the model's output
    is no set of logits, so that flips mean nothing.

    Args:
        model: Any module, with batch norm or without, compiled or not.
        examples: A batch of examples, in any form that ``recalibrate`` accepts.
        pool: A batch of the same form with at least ``batch`` - 1 examples; companions are drawn without replacement.
        batch: Size of the batches, 2 or more.
        repeats: Batches of companions, 2 or more.
        train: False keeps all layers in eval mode.
        read: Function that returns the logits, (N,) or (N, classes, ...), of a model's output. None uses the output
            itself or its ``logits``. The prediction is the class with the largest logit; for a single logit, its sign.
        seed: Seed of the choice of companions; global random states are not used.

    Raises:
        TypeError: If the output is no tensor and has no ``logits``.
        ValueError: If ``batch`` or ``repeats`` is below 2, the pool has fewer than ``batch`` - 1 examples, there is no
            example, examples and pool have different forms, an output is not finite, the number of outputs is not the
            number of examples, or a layer receives one value per channel.
    """
    what = "companion_flips"
    model = unwrapped(model)
    _check(examples, pool, batch, repeats)
    examples, pool = on_device_of(model, examples), on_device_of(model, pool)
    generator = torch.Generator().manual_seed(seed)
    count, size = examples_in(examples) or 0, examples_in(pool) or 0
    draws = [torch.randperm(size, generator=generator)[: batch - 1] for _ in range(repeats)]
    among = partial(_first_logits, model, examples, pool, (count, size), read)
    with preserve_state(model), own_run(), torch.no_grad():
        were_training = {layer for layer in batch_norms(model).values() if layer.training}
        layers = were_training if model.training else set(batch_norms(model).values())
        model.eval()
        reference = torch.stack([among(i, draws[0]) for i in range(count)])
        for layer in layers if train else ():
            layer.train()
        with refuse_single_values(model, what):
            logits = torch.stack([torch.stack([among(i, rows) for rows in draws]) for i in range(count)])
    return _summary(logits, reference, batch)


def _check(examples: Batch, pool: Batch, batch: int, repeats: int) -> None:
    for name, value in (("batch", batch), ("repeats", repeats)):
        if value < 2:
            raise ValueError(f"companion_flips needs {name} of 2 or more, got {value}. Pass {name}=2 or more.")
    if (size := examples_in(pool) or 0) < batch - 1:
        raise ValueError(
            f"companion_flips needs a pool of {batch - 1} examples or more, got {size}. Pass more, or a smaller batch=."
        )
    if not examples_in(examples):
        raise ValueError("companion_flips needs one example or more, got none. Pass a batch of examples.")


def _first_logits(
    model: nn.Module, examples: Batch, pool: Batch, sizes: tuple[int, int], read: Read | None, i: int, rows: Tensor
) -> Tensor:
    """Logits of example ``i`` in a batch with companions, (classes, ...), in float64."""
    together = _joined(examples, pool, i, rows, *sizes)
    with preserve_random_state():
        logits = (read or _logits)(call(model, together))
    if not isinstance(logits, Tensor) or logits.ndim < 1 or len(logits) != len(rows) + 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"companion_flips needs an output for each of {len(rows) + 1} examples, got {got}. Pass read=, a "
            "function that takes the logits from the model's output."
        )
    first = logits[0].double().cpu()
    if not bool(first.isfinite().all()):
        raise ValueError(
            f"companion_flips needs finite outputs, got {first.flatten()[:4].tolist()}. Check example {i}."
        )
    return first


def _joined(one: Batch, many: Batch, i: int, rows: Tensor, count: int, size: int) -> Batch:
    """Example ``i`` of ``one`` in front of ``rows`` of ``many``; other values are those of ``one``."""
    if isinstance(one, Tensor) and isinstance(many, Tensor) and one.ndim and len(one) == count and len(many) == size:
        _require_form(one, many)
        return torch.cat([one[i : i + 1], many[rows.to(many.device)]])
    if type(one) is not type(many):
        raise ValueError(
            f"companion_flips needs examples and pool of one type, got {type(one).__name__} and "
            f"{type(many).__name__}. Take both from batches of one loader."
        )
    if isinstance(one, Mapping):
        _require_form(one, {key: many[key] for key in one if key in many})
        return {key: _joined(one[key], many[key], i, rows, count, size) for key in one}
    if isinstance(one, (tuple, list)):
        _require_form(one, many)
        return [_joined(a, b, i, rows, count, size) for a, b in zip(one, many, strict=True)]
    return one


def _require_form(one: Batch, many: Batch) -> None:
    if _form(one) != _form(many):
        raise ValueError(
            f"companion_flips needs examples and pool of one form, got {_form(one)} and {_form(many)}. "
            "Take both from batches of one loader."
        )


def _form(value: Batch) -> str:
    if isinstance(value, Tensor):
        return f"examples of shape {tuple(value.shape[1:])}"
    return f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"{len(value)} parts"


def _logits(output: Answer) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"companion_flips needs a tensor of logits, got {type(output).__name__}. Pass read=, a function that "
            "takes the logits from the model's output."
        )
    return logits


def _summary(logits: Tensor, reference: Tensor, batch: int) -> Companions:
    """The result from ``logits`` (examples, repeats, classes, ...) and ``reference`` of eval mode, without repeats."""
    count, repeats = logits.shape[:2]
    predicted = _predictions(logits, axis=2)  # (examples, repeats, ...)
    flips = disagreement(predicted)
    of_eval = _predictions(reference, axis=1).unsqueeze(1)
    # the first repeat is subtracted: otherwise the variance of equal values would be a rounding error above 0
    variances = (logits - logits[:, :1]).var(1).reshape(count, -1).mean(1)
    between = logits.mean(1).var(0).mean() if count > 1 else torch.tensor(math.nan)
    return Companions(
        flip_rate=float(flips.mean()),
        flip_error=float(flips.std() / math.sqrt(count)) if count > 1 else math.nan,
        flips=tuple(flips.tolist()),
        from_eval=float((predicted != of_eval).double().mean()),
        variance=float(variances.mean()),
        variances=tuple(variances.tolist()),
        relative=float(variances.mean() / between),
        batch=batch,
        repeats=repeats,
    )


def _predictions(logits: Tensor, axis: int) -> Tensor:
    if logits.ndim <= axis:
        return (logits > 0).long()
    return (logits.select(axis, 0) > 0).long() if logits.shape[axis] == 1 else logits.argmax(axis)


def disagreement(predicted: Tensor) -> Tensor:
    """Share of pairs of repeats that differ, mean over positions: (examples, repeats, ...) -> (examples,).

    It is 1 - sum_k c_k (c_k - 1) / (R (R - 1)), where c_k of the R repeats predict class k.
    """
    flat = predicted.flatten(2) if predicted.ndim > 2 else predicted.unsqueeze(2)  # (examples, repeats, positions)
    repeats = flat.shape[1]
    counts = torch.nn.functional.one_hot(flat).double().sum(1)  # (examples, positions, classes)
    agreeing = (counts * (counts - 1)).sum(2) / (repeats * (repeats - 1))
    return 1 - agreeing.mean(1)
