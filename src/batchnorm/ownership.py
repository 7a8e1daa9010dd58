"""Ownership: which tensors belong to a layer that also applies an activation.

Code that knows only torch.nn's batch norm may move a layer's parameters and statistics into a layer of another class,
and so lose the activation. The new layer has the same tensor objects, so a record of their owner, the claim, shows the
loss. A claim belongs to a tensor object, not to its values: a copy of the tensor has no owner, nor has a tensor into
which its values are loaded. Layers may share gamma and beta on purpose while the owner is alive; they do not share
stored statistics.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_claims: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def claim(layer: nn.Module, tensors: Iterable[Tensor | None], activation: str | None) -> None:
    """Record that these tensors belong to a layer that applies ``activation``; None removes the record."""
    owner = weakref.ref(layer)
    for tensor in tensors:
        if tensor is None:
            continue
        if activation is None:
            _claims.pop(tensor, None)
        else:
            _claims[tensor] = (activation, owner)


def carried_from(module: nn.Module) -> str | None:
    """The activation of the layer that owns the module's tensors; None if they have no owner.

    The owner of the statistics counts. The owner of gamma and beta counts only if it is deleted, and owned all of them.
    """
    # not _parameters and _buffers: a scripted module has no such dicts
    tables = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    claims = {name: _claims.get(tensor) for name, tensor in tables}
    for name in ("running_mean", "running_var"):
        if (record := claims.get(name)) is not None:
            return record[0]
    affine = [claims[name] for name in ("weight", "bias") if name in claims]
    activations = [record[0] for record in affine if record is not None and record[1]() is None]
    return activations[0] if affine and len(activations) == len(affine) else None
