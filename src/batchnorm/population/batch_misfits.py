"""Misfits: why a layer of torch.nn cannot use a batch: a wrong type, a wrong number of features, or missing axes.

A model may convert its inputs (x.float() / 255), so a batch is not compared with the first layer before a pass. Only
after a pass failed, the layer that failed is compared with its input. The batch is named as the cause only if one of
its tensors has the type, the shape or the number of axes of that input.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from batchnorm.channel_axis import axis_of
from batchnorm.population.tensor_trees import tensors_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.population.tensor_trees import Batch

# torch's errors about types and shapes; subclasses, such as those about missing memory, have other causes
_ERRORS = {RuntimeError, ValueError, TypeError, IndexError}
_POSITIONS = {1: "L", 2: "H, W", 3: "D, H, W"}
_LEAST_AXES = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_INTEGERS = (torch.int32, torch.int64)


@contextmanager
def named_misfits(model: nn.Module, batch: Batch) -> Iterator[None]:
    """A block that runs a model on a batch: an error because the batch does not fit says what to change in the batch.

    Raises:
        ValueError: Instead of torch's error, if the batch does not fit the layer that failed.
    """
    try:
        yield
    except Exception as error:
        if type(error) in _ERRORS and (why := _misfit(model, list(tensors_in(batch)), error)):
            raise ValueError(why) from error
        raise


def _misfit(model: nn.Module, batch: Sequence[Tensor], error: Exception) -> str:
    """What the layer that failed expected, what it got, what to do; "" if the batch is not known to be the cause."""
    names = {id(module): name for name, module in model.named_modules()}
    layer, x = _failed(error)
    if layer is None or x is None or id(layer) not in names:
        return ""
    causes = filter(None, (_wrong_type(layer, x, batch), _wrong_shape(layer, x, batch)))
    name = f"layer {names[id(layer)]!r}" if names[id(layer)] else "the model"
    why = " It also expected ".join(causes)
    return why and f"{name} ({type(layer).__name__}) expected {why}"


def _failed(error: Exception) -> tuple[nn.Module | None, Tensor | None]:
    """The innermost module whose call failed, and the first tensor among its arguments."""
    calls = [
        frame.f_locals
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "_call_impl" and isinstance(frame.f_locals.get("self"), nn.Module)
    ]
    if not calls:
        return None, None
    values = chain(calls[-1].get("args", ()), calls[-1].get("kwargs", {}).values())
    return calls[-1]["self"], next((value for value in values if isinstance(value, Tensor)), None)


# -- types --------------------------------------------------------------------------------------------------------


def _wrong_type(layer: nn.Module, x: Tensor, batch: Sequence[Tensor]) -> str:
    if x.dtype not in {tensor.dtype for tensor in batch}:
        return ""
    if isinstance(layer, nn.Embedding):
        return (
            "" if x.dtype in _INTEGERS else f"indices, got a batch of {_kind(x.dtype)}. Give whole numbers: x.long()."
        )
    weight = next(layer.parameters(recurse=False), None)
    if weight is None or not weight.is_floating_point() or x.dtype == weight.dtype or not _is_compared(layer):
        return ""
    return f"{_kind(weight.dtype)}, got a batch of {_kind(x.dtype)}. {_conversion(x.dtype, weight.dtype)}"


def _is_compared(layer: nn.Module) -> bool:
    return isinstance(layer, (_ConvNd, nn.Linear, nn.RNNBase, _BatchNorm))


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _conversion(got: torch.dtype, wanted: torch.dtype) -> str:
    if got == torch.uint8:
        return f"Convert it as in training; for images of 0 to 255 this is often x.to({wanted}) / 255."
    return f"Convert it as in training, for example x.to({wanted})."


# -- shapes -------------------------------------------------------------------------------------------------------


def _wrong_shape(layer: nn.Module, x: Tensor, batch: Sequence[Tensor]) -> str:
    if isinstance(layer, _BatchNorm) and (why := _without_examples(layer, x, batch)):
        return why
    if x.shape not in {tensor.shape for tensor in batch}:
        return ""
    if isinstance(layer, _ConvNd):
        return _wrong_channels(layer, x)
    if isinstance(layer, _BatchNorm):
        return "" if x.dim() < 2 else _wrong_count(layer.num_features, x, axis=axis_of(layer))
    if isinstance(layer, (nn.Linear, nn.RNNBase)) and x.dim():
        return _wrong_count(layer.in_features if isinstance(layer, nn.Linear) else layer.input_size, x, axis=-1)
    return ""


def _without_examples(layer: nn.Module, x: Tensor, batch: Sequence[Tensor]) -> str:
    """The misfit of one example that is no batch: layers before batch norm accept it."""
    least = next((axes for kind, axes in _LEAST_AXES.items() if isinstance(layer, kind)), 0)
    example = next((tensor for tensor in batch if tensor.dim() == x.dim()), None)
    if x.dim() != least - 1 or example is None:
        return ""
    return (
        f"{least} axes, got {x.dim()}: the batch of shape {tuple(example.shape)} is one example. Give batches of "
        "several examples, such as torch.stack(examples)."
    )


def _wrong_channels(layer: _ConvNd, x: Tensor) -> str:
    positions = len(layer.kernel_size)
    if x.dim() != positions + 2:
        form = f"(N, {layer.in_channels}, {_POSITIONS.get(positions, '...')})"
        # a convolution accepts one example without the axis of examples
        return "" if _is_example(layer, x) else f"{form}, got {_shape(x)}. Give batches of this shape, as in training."
    if x.shape[1] != layer.in_channels == x.shape[-1]:
        order = ", ".join(map(str, (0, positions + 1, *range(1, positions + 1))))
        return f"{layer.in_channels} channels at axis 1, got {_shape(x)}. Move its channels: x.permute({order})."
    return _wrong_count(layer.in_channels, x, axis=1)


def _is_example(layer: _ConvNd, x: Tensor) -> bool:
    return x.dim() == len(layer.kernel_size) + 1 and x.shape[0] == layer.in_channels


def _wrong_count(count: int, x: Tensor, *, axis: int) -> str:
    if x.shape[axis] == count:
        return ""
    is_flat = math.prod(x.shape[1:]) == count
    remedy = "Flatten it: x.flatten(1)." if is_flat else f"Give the {count} that the model was trained on."
    what, place = ("channels", "axis 1") if axis == 1 else ("features", "the last axis")
    return f"{count} {what} at {place}, got {_shape(x)}. {remedy}"


def _shape(x: Tensor) -> str:
    return f"a batch of shape {tuple(x.shape)}"
