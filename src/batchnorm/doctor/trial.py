"""Trial: short runs of a model: one training step, and one example with and without others beside it.

All of it changes the model, so it belongs into ``preserve_state``.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from batchnorm.doctor.comparison import difference, floats_in, tolerance
from batchnorm.layers import batch_norms
from batchnorm.population.batches import call, examples_in, on_device_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

# enough to have statistics, few enough for the memory of a backward pass
_EXAMPLES = 8
_LONGEST_MESSAGE = 200


@final
@dataclass(frozen=True, slots=True)
class Step:
    """What one training step did: how often each layer's counter moved, and what was raised."""

    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


def train_step(model: nn.Module, batch: Any) -> Step:
    """One forward and backward pass in train mode on a few examples; frozen layers stay frozen.

    The loss is the mean square of every floating-point output. A model that needs more than the first part of a
    batch, such as labels, is given all parts. A single example is not tried: it may well be too few.
    """
    if (examples_in(batch) or 0) < 2:
        return Step()
    batch = _few(model, batch, _EXAMPLES)
    model.train()
    before = _counters(model)
    forward: dict[str, int] = {}
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs, before = _train_outputs(model, batch, before)
            forward = _counted(model, before)
            before = _counters(model)
            losses = [output.float().square().mean() for output in outputs if output.requires_grad]
            if losses:
                torch.stack(losses).sum().backward()
    except Exception as error:  # noqa: BLE001 - whatever the user's model raises is the result
        return Step(forward, error=_message(error))
    return Step(forward, _counted(model, before))


def _few(model: nn.Module, batch: Any, most: int) -> Any:
    """Some examples of a batch; all of it where its rows are no examples."""
    if (examples_in(batch) or 0) <= most:
        return on_device_of(model, batch)
    try:
        some = on_device_of(model, batch, most)
        with torch.no_grad():
            call(model, on_device_of(model, some))
    except Exception:  # noqa: BLE001 - whatever the user's model raises is the answer
        return on_device_of(model, batch)
    return some


def _train_outputs(model: nn.Module, batch: Any, before: dict[str, int]) -> tuple[list[Tensor], dict[str, int]]:
    """Outputs, and the counters from before the forward pass that gave them."""
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
    layers = batch_norms(model).items()
    return {name: int(layer.num_batches_tracked) for name, layer in layers if layer.num_batches_tracked is not None}


def _counted(model: nn.Module, before: dict[str, int]) -> dict[str, int]:
    return {name: now - before[name] for name, now in _counters(model).items() if name in before}


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    short = text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


def companions(model: nn.Module, batch: Any) -> tuple[float | None, float]:
    """How far an example's output alone is from its output beside others, relative, and what rounding explains.

    The model must be in eval mode. None if there is one example only, outputs are not one for each example, or the
    model does not take one alone.
    """
    if (examples_in(batch) or 0) < 2:
        return None, 0.0
    some, alone = (_few(model, batch, most) for most in (_EXAMPLES, 1))
    count = examples_in(some)
    if examples_in(alone) != 1:
        return None, 0.0
    with torch.no_grad():
        beside = floats_in(call(model, some))
        if not beside or any(output.ndim == 0 or len(output) != count for output in beside):
            return None, 0.0
        single = None
        with suppress(Exception):
            single = floats_in(call(model, alone))
    if single is None:
        return None, 0.0
    return difference(single, [output[:1] for output in beside]), tolerance(beside)
