"""Which tensors belong to a layer that also applies an activation.

Code that knows torch.nn's batch norm takes a layer's parameters and statistics over into a layer of another class, and
does not know of the activation. It carries the tensors themselves, so a tensor that was claimed tells of the loss. A
claim is on the object and not on its values: copies, and what a state_dict loads, are nobody's. Gamma and beta may be
shared by several layers on purpose, for which their owner lives on; stored statistics are not.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

_claims: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def claim(layer: nn.Module, tensors: Iterable[Tensor | None], activation: str | None) -> None:
    """Say that these tensors are of a layer that applies ``activation``, or none."""
    owner = weakref.ref(layer)
    for tensor in tensors:
        if tensor is None:
            continue
        if activation is None:
            _claims.pop(tensor, None)
        else:
            _claims[tensor] = (activation, owner)


def carried_from(module: nn.Module) -> str | None:
    """The activation of the layer that a module has its statistics from, or gamma and beta if that layer is gone."""
    # asked by methods: a scripted module has no dicts of them
    tables = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    claims = {name: _claims.get(tensor) for name, tensor in tables}
    for name in ("running_mean", "running_var"):
        if (found := claims.get(name)) is not None:
            return found[0]
    affine = [claims[name] for name in ("weight", "bias") if name in claims]
    gone = [found[0] for found in affine if found is not None and found[1]() is None]
    return gone[0] if affine and len(gone) == len(affine) else None
