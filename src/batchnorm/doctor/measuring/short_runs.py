"""Short runs of a model: one training step, and one example alone and among others.

They change the model, so run them inside ``preserve_state``. A run that was not possible has a reason.
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

# enough for batch statistics, few enough for the memory of a backward pass
_EXAMPLES = 8
_LONGEST_MESSAGE = 200


@final
@dataclass(frozen=True, slots=True)
class ExampleSubset:
    """A few examples of a batch; the whole batch if it cannot be cut, with the reason."""

    batch: Batch
    size: int  # examples in all of the batch
    uncut: str = ""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """Results of one training step: how often each layer's counter moved, the error, and why parts were not tried."""

    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    unknown: str = ""  # why no step was tried, or why its error is not about batch norm
    no_backward: str = ""


@final
@dataclass(frozen=True, slots=True)
class BatchDependence:
    """Relative difference between an example's outputs alone and among others, and what rounding explains."""

    change: float | None = None
    tolerance: float = 0.0
    error: str = ""  # the error of one example alone, although several ran
    unknown: str = ""


def example_subset(model: nn.Module, batch: Batch, most: int = _EXAMPLES) -> ExampleSubset:
    """Up to ``most`` examples on which the model runs in eval mode; it must run on the whole batch.

    Nodes of a graph and packed points are not examples: the model fails if they are cut off. A part may get outputs
    that differ from those within the whole: that is what ``batch_dependence`` measures.
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

    The loss is the mean square of all floating-point outputs. A model that needs more than the first part of a batch,
    such as labels, gets all parts. A single example is not tried, because it may be too few.
    """
    batch = some.batch
    if (examples_in(batch) or 0) < 2:
        return Step(unknown="a training step takes a batch of 2 examples or more")
    try:
        model.train()
    except NotImplementedError as error:  # of torch.export
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
    """The step of a failed run: a fault, unless the model needs arguments that the batch lacks."""
    if isinstance(error, AbsenceError):
        return Step(forward, unknown=str(error).rstrip("."))
    missing = _missing_arguments(model, batch)
    if missing and not _is_of_batch_norm(error):
        told = f"a training step fails outside of batch norm layers, perhaps because it lacks {missing}"
        return Step(forward, unknown=f"{told}: {_message(error)}")
    return Step(forward, error=_message(error))


def _missing_arguments(model: nn.Module, batch: Batch) -> str:
    """Names of forward's arguments that the batch does not provide: "targets"."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ""
    takes = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    if isinstance(batch, Mapping) and set(batch) & set(takes):
        return ", ".join(name for name in takes if name not in batch)
    parts = len(batch) if isinstance(batch, (tuple, list)) else 1
    return ", ".join(takes[parts:])


def _is_of_batch_norm(error: BaseException) -> bool:
    """Whether the error was raised in a batch norm layer."""
    return any(isinstance(module, _BatchNorm) for module in modules_behind(error))


def _train_outputs(model: nn.Module, batch: Batch, before: dict[str, int]) -> tuple[list[Tensor], dict[str, int]]:
    """Outputs, and the counters before the forward pass that gave them."""
    try:
        return floats_in(call(model, batch)), before
    except Exception:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise
        before = _counters(model)
        with suppress(Exception):  # the first error says more
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
    """One example's eval output alone and among a few others, or why they were not compared.

    The model must be in eval mode and run on ``some``. An error of one example alone is a fault if the row is certainly
    an example: batch norm raises it, or the model's outputs for a part of ``some`` equal those within the whole.
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
        return BatchDependence(unknown="outputs have other shapes for one example alone")
    return BatchDependence(change, tolerance(beside))


def _are_rows(outputs: list[Tensor], count: int) -> bool:
    return bool(outputs) and all(output.ndim > 0 and len(output) == count for output in outputs)
