"""The batch norm layers of a live model, and their stored values as ``Stored``, the form read from checkpoints."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.checkpoint import Stored
from batchnorm.layers import batch_norms
from batchnorm.population.tensor_memory import whole

_TENSORS = ("running_mean", "running_var", "weight", "bias")


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Batch norm layers by path: torch's, ours, and modules of other libraries with the same buffers."""
    layers = batch_norms(model)
    return {path: module for path, module in model.named_modules() if path in layers or _stores_the_same(module)}


def _stores_the_same(module: nn.Module) -> bool:
    # named_buffers() and not ``_buffers``: a scripted module has no such dict
    names = {name for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)}
    return {"running_mean", "running_var"} <= names and not isinstance(module, _InstanceNorm)


def stored_of(path: str, layer: Any) -> Stored:
    """Stored values of a live layer.

    A tensor is None if the layer lacks it, or if its values cannot be read in this process: it is lazy, on the meta
    device, sharded, or without memory (FSDP). All tensors of a complex layer are None; ``unread`` names them.
    """
    tensors = {key: getattr(layer, key, None) for key in _TENSORS}
    readable = {
        key: value
        for key, t in tensors.items()
        if isinstance(t, torch.Tensor) and (value := whole(t, getattr(layer, "num_features", None) or None)) is not None
    }
    is_complex = any(t.is_complex() for t in readable.values())
    values: dict[str, Any] = {} if is_complex else {key: _as_array(t) for key, t in readable.items()}
    return Stored(
        path,
        **values,
        num_batches_tracked=count_of(layer),
        dtypes={key: str(t.dtype).removeprefix("torch.") for key, t in readable.items()},
        eps=getattr(layer, "eps", None),
        momentum=momentum_of(layer),
        unread=dict.fromkeys(readable, "complex numbers, for which there are no checks") if is_complex else {},
    )


def count_of(layer: nn.Module) -> int | None:
    """A layer's num_batches_tracked; None if it is missing, not a single number, not finite, or not readable here."""
    counter = getattr(layer, "num_batches_tracked", None)
    if not isinstance(counter, torch.Tensor) or counter.numel() != 1 or (value := whole(counter)) is None:
        return None
    return int(value) if bool(torch.isfinite(value)) else None


def momentum_of(layer: object) -> float | None:
    """A layer's momentum as a number, also if the layer has a tensor; None for momentum=None or without momentum."""
    momentum = getattr(layer, "momentum", None)
    return float(momentum) if isinstance(momentum, torch.Tensor) else momentum


def _as_array(tensor: torch.Tensor) -> array[float]:
    return array("d", tensor.detach().double().cpu().reshape(-1).tolist())
