"""Comparison of a model with another version of it: their outputs and their statistics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from batchnorm import checkpoint
from batchnorm.call_types import Answer, Batch
from batchnorm.checkpoint import Checkpoint, Stored
from batchnorm.doctor.measuring.live_layers import layers_of, stored_of
from batchnorm.population import preserve_state
from batchnorm.population.batches import call, on_device_of
from batchnorm.population.tensor_trees import tensors_in
from batchnorm.rules.rule_evidence import OtherVersion

# Two float32 sums of the same terms in different orders differ by about eps sqrt(terms). For 4096 terms in each of 256
# layers that is 2^10 eps, as 2^10 = sqrt(4096 * 256).
_WIDE_ROUNDINGS = 1024
# Half precision, and float32 on a GPU (TF32), round the terms and the result of each layer, but sum in float32: 16 eps
# for 256 layers, as 16 = sqrt(256).
_NARROW_ROUNDINGS = 16
_TF32_EPS = 2**-10


def reference_of(model: nn.Module, reference: nn.Module | str | os.PathLike[str], example: Batch) -> OtherVersion:
    """The reference's stored values, and how far the model's eval outputs for ``example`` are from the reference's.

    Neither model is changed, also if one of them raises.

    Args:
        model: The model that was made from the reference.
        reference: A model; or the path of a checkpoint, of which only stored values are compared.
        example: One batch of any kind. None: outputs are not compared.

    Raises:
        TypeError: If ``reference`` is neither a model nor a path.
        FileNotFoundError, ValueError: As ``checkpoint.read``, if ``reference`` is a path.
        Exception: An error of one of the two models on the example.
    """
    if isinstance(reference, (str, os.PathLike)):
        file = checkpoint.read(reference)
        why = "the reference is a file, so it has no outputs"
        state, layers = _state_of(file, model)
        return OtherVersion(f"{file.path}{state and f', {state}'}", _eps_of(layers), layers, unknown=why)
    if not isinstance(reference, nn.Module):
        raise TypeError(
            f"a reference must be a model or the path of a checkpoint, got {type(reference).__name__}. "
            "Pass the version that the model was made from."
        )
    stored = {name: stored_of(name, layer) for name, layer in layers_of(reference).items()}
    version = OtherVersion(type(reference).__name__, _eps_of(stored), stored)
    if example is None:
        return replace(version, unknown="comparing outputs with the reference needs an example")
    theirs, ours = (_eval_outputs(each, example) for each in (reference, model))
    if (distance := difference(ours, theirs)) is None:
        return replace(version, unknown="the model's and the reference's outputs differ in shape")
    return replace(version, difference=distance, tolerance=tolerance(theirs))


def _eps_of(layers: Mapping[str, checkpoint.Stored]) -> dict[str, float]:
    return {name: stored.eps for name, stored in layers.items() if stored.eps is not None}


def floats_in(value: Answer) -> list[Tensor]:
    """All floating-point tensors in a model's output of any kind, in order."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _state_of(file: Checkpoint, model: nn.Module) -> tuple[str, Mapping[str, Stored]]:
    """Name ("" for a single state) and layers of the first state with the model's layers; else of the first state."""
    if len(file.states) < 2:
        return "", file.layers
    mine, stored = layers_of(model).keys(), file.every
    fitting = (name for name, state in file.states.items() if mine <= state.layers.keys())
    name = next(fitting, next(iter(file.states)))
    return name, {layer: stored[place] for layer, place in file.states[name].layers.items()}


def difference(outputs: list[Tensor], references: list[Tensor]) -> float | None:
    """Largest max |output - reference| / max |reference| of the pairs; None if shapes differ or there are no values.

    Values that are NaN in both count as equal. If the reference is 0, the difference is absolute.
    """
    if not references or [tuple(t.shape) for t in outputs] != [tuple(t.shape) for t in references]:
        return None
    pairs = zip(outputs, references, strict=True)
    return max((_difference(a.double(), b.double().to(a.device)) for a, b in pairs if a.numel()), default=None)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = torch.where(a.isnan() & b.isnan(), 0.0, a), torch.where(a.isnan() & b.isnan(), 0.0, b)
    largest, scale = float((a - b).abs().max()), float(b.abs().max())
    return largest / scale if scale else largest


def tolerance(outputs: list[Tensor]) -> float:
    """Largest relative difference that rounding alone can cause."""
    return max((_rounding(output) for output in outputs), default=0.0)


def _rounding(x: Tensor) -> float:
    eps = torch.finfo(x.dtype).eps
    if x.dtype == torch.float32 and not x.is_cpu:
        return _NARROW_ROUNDINGS * _TF32_EPS
    return (_WIDE_ROUNDINGS if eps <= torch.finfo(torch.float32).eps else _NARROW_ROUNDINGS) * eps


def _eval_outputs(model: nn.Module, example: Batch) -> list[Tensor]:
    with preserve_state(model), torch.no_grad():
        model.eval()
        return [output.clone() for output in floats_in(call(model, on_device_of(model, example)))]
