"""Batch norm layers that are folded into no neighbour, as operations that deployment tools know: for ``for_export``.

In eval mode a layer multiplies each channel by a number and adds a number (``folding.arithmetic``). That is a depthwise
convolution with a kernel of one position, or a multiplication and an addition.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import LAYERS
from batchnorm.other_libraries import as_sentence, response_of
from batchnorm.population.batches import call, on_device_of
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery.folding.arithmetic import Affine
from batchnorm.surgery.patterns import is_ours
from batchnorm.surgery.replacement import duplicate, find, replace

Remaining = Literal["depthwise", "mul_add"]

_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the number of axes of the input
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


class MulAdd(nn.Module):
    """``x * scale + shift`` for each channel, on axis 1 or on the last axis.

    Args:
        scale: One number for each channel, (C,).
        shift: The same.
        axis: 1 or -1, the axis of the channels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn's name
        """The result has the shape and the type of the input."""
        shape = [-1] + [1] * (input.ndim - 2) if self.axis == 1 else [-1]
        return input * self.scale.reshape(shape) + self.shift.reshape(shape)

    def extra_repr(self) -> str:
        """The number of channels, and the axis if it is not 1."""
        return f"{len(self.scale)}" + (f", axis={self.axis}" if self.axis != 1 else "")


def make_standalone(model: nn.Module, remaining: Remaining, example: Batch) -> None:
    """Replace the model's batch norm layers, in place, and set it to eval mode.

    A layer stays, with a warning, if it has no stored statistics or is no such map. With "depthwise", a layer for rows
    (N, C), with channels last, or called with inputs of several kinds becomes a multiplication and an addition.

    Raises:
        ValueError: If "depthwise" needs an example to see the shape of a layer's input.
    """
    layers: dict[str, Any] = find(model)
    ranks = _ranks_of(model, layers, example) if remaining == "depthwise" else {}
    maps = {path: _map_of(layer) for path, layer in layers.items()}
    to_eval(model)
    made = {
        path: _module(layer, known, ranks.get(path, 0))
        for path, layer in layers.items()
        if not isinstance(known := maps[path], str)
    }
    replace(model, lambda path, _: made.get(path), inplace=True)
    for path in made:
        layer, known = layers[path], maps[path]
        if hasattr(layer, "bias") and isinstance(known, Affine):  # replace carried beta, which has the name of its bias
            layer.bias = nn.Parameter(known.shift.to(layer.weight), requires_grad=False)
    if stayed := {path: why for path, why in maps.items() if isinstance(why, str)}:
        warnings.warn(f"for_export left batch norm as it is: {as_sentence(stayed)}.", UserWarning, stacklevel=3)


def _map_of(layer: _BatchNorm) -> Affine | str:
    """The map of a layer in eval mode; a text with the reason if it is no such map."""
    if isinstance(layer, _BatchNorm) and not has_stored_statistics(layer):
        return "has no stored statistics, so that eval mode uses the batch"
    if type(layer).__module__.startswith("torch.nn.") or (is_ours(layer) and _is_by_formula(layer)):
        return Affine.of(layer)
    coefficients = response_of(layer)
    if coefficients is None:
        return f"is a {type(layer).__name__} that does not multiply each channel by a number and add a number"
    return Affine(*coefficients)


def _is_by_formula(layer: _BatchNorm) -> bool:
    """Whether a layer of ours computes batch norm alone: no activation, and no weight of an example's own moments."""
    return layer.act is None and not layer.own_weight


def _module(layer: Any, known: Affine, rank: int) -> nn.Module:
    like = next((t for t in layer.parameters()), layer.running_mean)
    scale, shift = (t.to(like.device, like.dtype) for t in (known.scale, known.shift))
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        raise ValueError(
            f"for_export needs scales that fit {like.dtype}, got {float(known.scale.abs().max()):.3g}. Convert the "
            "model to float32 first, or mend its statistics: batchnorm fix."
        )
    axis = layer.axis if isinstance(layer, LAYERS) else 1
    if rank not in _CONVOLUTIONS or axis != 1:
        return MulAdd(scale, shift, axis).eval()
    channels = len(scale)
    new = _CONVOLUTIONS[rank](channels, channels, 1, groups=channels, device="meta")
    new.weight = nn.Parameter(scale.reshape(channels, 1, *[1] * (rank - 2)), requires_grad=False)
    new.bias = nn.Parameter(shift, requires_grad=False)
    return new.eval()


def _ranks_of(model: nn.Module, layers: dict[str, object], example: Batch) -> dict[str, int]:
    """The number of axes of each layer's inputs, by the layer's class or by the example; 0 if there are several."""
    known = {path: _RANKS[kind] for path, layer in layers.items() for kind in _RANKS if isinstance(layer, kind)}
    if known.keys() == layers.keys():
        return known
    if example is None:
        path = next(path for path in layers if path not in known)
        raise ValueError(
            f"for_export(remaining='depthwise') needs an example to see the shape of the input of {path!r}, got none. "
            "Pass one batch of inputs as example=, or remaining='mul_add'."
        )
    seen = _observed(model, list(layers), example)
    return {path: known.get(path) or (seen[path].pop() if len(seen[path]) == 1 else 0) for path in layers}


def _observed(model: nn.Module, paths: list[str], example: Batch) -> dict[str, set[int]]:
    """The numbers of axes of the inputs of layers, in a pass of a copy of the model in eval mode."""
    seen: dict[str, set[int]] = defaultdict(set)
    copy = to_eval(duplicate(model, "for_export"))

    def noting(path: str) -> Callable[..., None]:
        return lambda _, args: seen[path].update(value.ndim for value in args[:1] if isinstance(value, Tensor))

    for path in paths:
        copy.get_submodule(path).register_forward_pre_hook(noting(path))
    with torch.no_grad():
        call(copy, on_device_of(copy, example))
    return seen
