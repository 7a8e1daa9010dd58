"""Short runs of a model: one training step, and one example alone and among others.

These runs change the model, so call them inside ``preserve_state``. If a run is not possible, its result has the
reason.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.call_types import Batch
from batchnorm.doctor.measuring.live_layers import count_of
from batchnorm.doctor.measuring.other_version import difference, floats_in, tolerance
from batchnorm.layers import batch_norms
from batchnorm.population.absent_numbers import modules_behind
from batchnorm.population.batch_rows import why_whole
from batchnorm.population.batches import arguments, call, on_device_of
from batchnorm.population.tensor_memory import AbsenceError
from batchnorm.population.tensor_trees import examples_in, why_without_rows

# enough for batch statistics, and few enough for the memory of a backward pass
_EXAMPLES = 8
_LONGEST_MESSAGE = 200


@final
@dataclass(frozen=True, slots=True)
class ExampleSubset:
    """A few examples of a batch; or the whole batch and the reason why it cannot be cut."""

    batch: Batch
    size: int  # examples in the whole batch
    uncut: str = ""  # why the batch cannot be cut; "" if it can


@final
@dataclass(frozen=True, slots=True)
class Step:
    """Results of one training step: updates of each layer's counter, the error, and reasons for missing parts."""

    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    unknown: str = ""  # why no step was tried, or why its error is not about batch norm
    no_backward: str = ""  # why there was no backward pass


@final
@dataclass(frozen=True, slots=True)
class BatchDependence:
    """Relative difference between an example's outputs alone and among others; and the largest by rounding alone."""

    change: float | None = None
    tolerance: float = 0.0
    error: str = ""  # the error for one example alone, if the model ran on several
    unknown: str = ""


def example_subset(model: nn.Module, batch: Batch, most: int = _EXAMPLES) -> ExampleSubset:
    """Up to ``most`` examples of a batch on which the model runs in eval mode; or the whole batch if it cannot be cut.

    The model must run on the whole batch. Rows that are nodes of a graph or packed points are not examples: the model
    fails if some of them are missing. Examples may get other outputs than in the whole batch: ``batch_dependence``
    measures that.
    """
    size = examples_in(batch) or 0
    if size <= 2:
        return ExampleSubset(on_device_of(model, batch), size)
    count = min(most, size - 1)
    if not (why := why_without_rows(arguments(model, batch))):
        try:
            with torch.no_grad():
                call(model, on_device_of(model, batch, count))
        except Exception as error:  # noqa: BLE001 - whatever the user's model raises is the result
            why = _message(error)
    if why:
        return ExampleSubset(
            on_device_of(model, batch), size, f"a batch cannot be cut to {count} of its {size} rows: {why}"
        )
    return ExampleSubset(on_device_of(model, batch, most), size)


def train_step(model: nn.Module, some: ExampleSubset) -> Step:
    """One forward and backward pass in train mode on a few examples; frozen layers stay frozen.

    The loss is the sum of the mean squares of the floating-point outputs that have a gradient. If the model fails on
    the first element of a batch, it is called with all elements, such as inputs and labels. A step with a single
    example is not tried, because batch norm may need two.
    """
    batch = some.batch
    if (examples_in(batch) or 0) < 2:
        return Step(unknown="a training step needs a batch of 2 examples or more")
    try:
        model.train()
    except NotImplementedError as error:  # raised by models of torch.export
        return Step(unknown=f"the model has no train mode: {_message(error)}")
    before = _counters(model)
    forward: dict[str, int] = {}
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs, before = _train_outputs(model, on_device_of(model, batch), before)
            forward = _counted(model, before)
            before = _counters(model)
            losses = [output.float().square().mean() for output in outputs if output.requires_grad]
            if not losses:
                return Step(forward, no_backward="no output has a gradient, so there was no backward pass")
            torch.stack(losses).sum().backward()
    except Exception as error:  # noqa: BLE001 - whatever the user's model raises is the result
        return _failed(model, batch, forward, error)
    return Step(forward, _counted(model, before))


def _failed(model: nn.Module, batch: Batch, forward: dict[str, int], error: Exception) -> Step:
    """The result of a failed step: its error, or a reason if values or arguments that the model needs are missing."""
    if isinstance(error, AbsenceError):
        return Step(forward, unknown=str(error).rstrip("."))
    missing = _missing_arguments(model, batch)
    if missing and not _is_of_batch_norm(error):
        reason = f"a training step fails outside of batch norm layers, perhaps because it lacks {missing}"
        return Step(forward, unknown=f"{reason}: {_message(error)}")
    return Step(forward, error=_message(error))


def _missing_arguments(model: nn.Module, batch: Batch) -> str:
    """Names of forward's arguments that the batch lacks, such as "targets"; "" if there are none."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ""
    names = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    if isinstance(batch, Mapping) and set(batch) & set(names):
        return ", ".join(name for name in names if name not in batch)
    parts = len(batch) if isinstance(batch, (tuple, list)) else 1
    return ", ".join(names[parts:])


def _is_of_batch_norm(error: BaseException) -> bool:
    """Whether the error was raised in a batch norm layer."""
    return any(isinstance(module, _BatchNorm) for module in modules_behind(error))


def _train_outputs(model: nn.Module, batch: Batch, before: dict[str, int]) -> tuple[list[Tensor], dict[str, int]]:
    """Floating-point outputs of a forward pass, and the counters before it."""
    try:
        return floats_in(call(model, batch)), before
    except Exception:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise
        before = _counters(model)
        with suppress(Exception):  # the first error is the more useful one
            return floats_in(model(*batch)), before
        raise


def _counters(model: nn.Module) -> dict[str, int]:
    counted = {name: count_of(layer) for name, layer in batch_norms(model).items()}
    return {name: count for name, count in counted.items() if count is not None}


def _counted(model: nn.Module, before: dict[str, int]) -> dict[str, int]:
    return {name: now - before[name] for name, now in _counters(model).items() if name in before}


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    short = text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


@torch.no_grad()
def batch_dependence(model: nn.Module, some: ExampleSubset) -> BatchDependence:
    """The comparison of one example's eval output alone and among a few others, or why they were not compared.

    The model must be in eval mode and run on ``some``. An error for one row alone counts only if the row is certainly
    an example: batch norm raises the error, or outputs for half of ``some`` equal those in the whole of it.
    """
    count = examples_in(some.batch) or 0
    if some.uncut or count < 2:
        return BatchDependence(unknown=some.uncut or "the comparison needs a batch of 2 examples or more")
    beside = floats_in(call(model, on_device_of(model, some.batch)))
    if not beside:
        return BatchDependence(unknown="outputs are not floating-point numbers")
    if not _are_rows(beside, count):
        return BatchDependence(unknown="outputs do not have one row per example")
    try:
        single = floats_in(call(model, on_device_of(model, some.batch, 1)))
    except Exception as error:  # noqa: BLE001 - whatever the user's model raises is the result
        if _is_of_batch_norm(error):
            return BatchDependence(error=_message(error))
        if count == 2:
            return BatchDependence(
                unknown=f"one row of a batch of 2 raises, perhaps because it was cut: {_message(error)}"
            )
        # rows that depend on other rows, such as points, are not examples
        why = why_whole(model, some.batch, max(2, count // 2))
        return (
            BatchDependence(unknown=f"one row raises {_message(error)}; {why}")
            if why
            else BatchDependence(error=_message(error))
        )
    change = difference(single, [output[:1] for output in beside])
    if change is None:
        return BatchDependence(unknown="the outputs of one example alone have other shapes")
    return BatchDependence(change, tolerance(beside))


def _are_rows(outputs: list[Tensor], count: int) -> bool:
    return bool(outputs) and all(output.ndim > 0 and len(output) == count for output in outputs)
