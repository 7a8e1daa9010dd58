"""Ownership: which tensors belong to a layer that also applies an activation.

Code that knows only torch.nn's batch norm may move a layer's parameters and statistics into a layer of another class,
and so lose the activation. The tensor objects move along, so a claimed tensor reveals the loss. A claim belongs to the
object, not to its values: copies, and tensors that load a state_dict, have no owner. Several layers may share gamma and
beta on purpose, while their owner is alive; they do not share stored statistics.
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
    """The activation of the layer that the module's statistics come from, or gamma and beta if that layer is gone."""
    # by methods: a scripted module has no dicts of them
    tables = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    claims = {name: _claims.get(tensor) for name, tensor in tables}
    for name in ("running_mean", "running_var"):
        if (found := claims.get(name)) is not None:
            return found[0]
    affine = [claims[name] for name in ("weight", "bias") if name in claims]
    gone = [found[0] for found in affine if found is not None and found[1]() is None]
    return gone[0] if affine and len(gone) == len(affine) else None
