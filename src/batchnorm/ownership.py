"""Which tensors belong to a layer that also applies an activation.

Code that knows torch.nn's batch norm takes a layer's parameters and statistics over into a layer of another class, and
does not know of the activation. It carries the tensors themselves, so a tensor that was claimed tells of the loss. A
claim is on the object and not on its values: copies, and what a state_dict loads, are nobody's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_activations: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def claim(tensors: Iterable[Tensor | None], activation: str | None) -> None:
    """Say that these tensors are of a layer that applies ``activation``, or none."""
    for tensor in tensors:
        if tensor is None:
            continue
        if activation is None:
            _activations.pop(tensor, None)
        else:
            _activations[tensor] = activation


def claimed(tensor: Tensor | None) -> str | None:
    """The activation of the layer that a tensor belongs to, or None."""
    return None if tensor is None else _activations.get(tensor)
