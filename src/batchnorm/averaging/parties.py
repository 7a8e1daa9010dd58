"""The states that are merged: their tensors and counts, and the checks that they belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.argument_types import kind_of, require_number, require_type
from batchnorm.averaging.layers_in_state import COUNTER
from batchnorm.population.tensor_memory import require, same_bits

State = Mapping[str, Any] | nn.Module

_EXTRA = "_extra_state"  # torch's name for what a module's get_extra_state returns: anything
WHO = "merge_statistics"
_REMEDY = "Pass a list of state dicts or models: [a.state_dict(), b.state_dict()]."


@final
@dataclass(frozen=True, slots=True)
class Party:
    """One state that is merged: its name in messages, its tensors, and its count."""

    name: str
    tensors: Mapping[str, Any]
    count: float
    instance_norms: frozenset[str]  # their paths, which only a model shows


def parties_of(
    states: Sequence[State], counts: Sequence[float] | None, correction: int, names: Sequence[str] = ()
) -> list[Party]:
    """The states with a count above 0, checked one by one."""
    if isinstance(states, (str, bytes, Mapping, nn.Module)) or not isinstance(states, Iterable):
        raise TypeError(f"{WHO} needs several states, got {kind_of(states)}. {_REMEDY}")
    every = list(states)
    if not every:
        raise ValueError(f"{WHO} needs at least one state, got none. {_REMEDY}")
    for number, state in enumerate(every):
        require_type(state, (Mapping, nn.Module), f"{WHO} needs state dicts or models", f"State {number}: {_REMEDY}")
    numbers = _counts(counts, len(every), correction)
    shown = names or [f"state {number}" for number in range(len(every))]
    parties = [_party(*each) for each in zip(shown, every, numbers, strict=True) if each[-1]]
    for party in parties:
        _require_usable(party)
    return parties


def _counts(counts: Sequence[float] | None, length: int, correction: int) -> list[float]:
    if counts is None:
        return [1.0] * length
    what = "the number of values per channel behind each state, such as counts=[1000, 500]"
    if isinstance(counts, (str, bytes, Mapping, nn.Module)) or not isinstance(counts, Iterable):
        raise TypeError(f"counts must be one number for each state, got {kind_of(counts)}. Pass {what}.")
    every = [counts] if isinstance(counts, Tensor) and counts.ndim == 0 else list(counts)
    for count in every:
        require_number(count, "a count", f"Pass {what}.")
    if len(every) != length:
        raise ValueError(f"counts must be one number for each of {length} states, got {len(every)}. Pass {what}.")
    numbers = [float(count) for count in every]
    for number in numbers:
        if not 0 <= number < math.inf:
            raise ValueError(f"a count must be finite and 0 or more, got {number:g}. Pass {what}.")
    for number in numbers:
        if 0 < number <= correction:
            raise ValueError(
                f"a count must be above {correction}, got {number:g}. Pass {what}; or counts=None, if the states shall "
                "count alike."
            )
    if not any(numbers):
        raise ValueError(f"{WHO} needs a count above 0, got 0 for every state. Pass {what}.")
    return numbers


def _party(name: str, state: State, count: float) -> Party:
    if isinstance(state, nn.Module):
        modules = state.named_modules(remove_duplicate=False)
        instance = frozenset(path for path, part in modules if isinstance(part, nn.modules.instancenorm._InstanceNorm))
        return Party(name, state.state_dict(), count, instance)
    return Party(name, _with_tensors(state), count, frozenset())


def _with_tensors(state: Mapping[str, object]) -> Mapping[str, object]:
    """The state with tensors in place of NumPy arrays, which Flower sends."""
    if not any(isinstance(value, np.ndarray) for value in state.values()):
        return state
    return {name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}


def _require_usable(party: Party) -> None:
    tensors = {name: value for name, value in party.tensors.items() if isinstance(value, Tensor)}
    if not tensors and not any(map(_has_tensors, party.tensors.values())):
        raise ValueError(
            f"{WHO} needs state dicts of tensors, got {party.name} without a tensor. Pass model.state_dict()."
        )
    if nested := [name for name, value in party.tensors.items() if _has_tensors(value) and not name.endswith(_EXTRA)]:
        raise ValueError(
            f"{WHO} needs state dicts of tensors, got {party.name} with a {kind_of(party.tensors[nested[0]])} of "
            f"tensors under {nested[0]!r}. Pass the state dict itself: checkpoint[{nested[0]!r}]."
        )
    require({f"{party.name}: {name}": tensor for name, tensor in tensors.items()}, WHO)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            what = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise TypeError(
                f"{WHO} needs dense tensors, got {name!r} of {party.name}, which is {what}. Convert it with "
                f"{'dequantize' if tensor.is_quantized else 'to_dense'}(), or merge before that step."
            )


def _has_tensors(value: object) -> bool:
    """Whether a value is a container with tensors in it, as a checkpoint is."""
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(each, Tensor) or _has_tensors(each) for each in inner)


def require_same_names(parties: Sequence[Party], excluded: set[str]) -> None:
    """Refuse states with different names; a counter may be missing, as in files from before torch 0.4.1."""
    first = parties[0]
    for party in parties[1:]:
        missing = [n for n in first.tensors if n not in party.tensors and not _may_miss(n, excluded)]
        further = [n for n in party.tensors if n not in first.tensors and not _may_miss(n, excluded)]
        if missing or further:
            kinds = (("without", missing), ("with", further))
            found = " and ".join(f"{word} {_some(names)}" for word, names in kinds if names)
            raise ValueError(
                f"{WHO} needs the same names in all states, got {party.name} {found}, unlike {first.name}. Pass "
                "states of one architecture, without prefixes of wrappers; tensors that stay with their states go into "
                "local=."
            )


def _may_miss(name: str, excluded: set[str]) -> bool:
    return name in excluded or name.rpartition(".")[2] == COUNTER


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def require_same_shapes(parties: Sequence[Party], excluded: set[str]) -> None:
    """Refuse states in which a name has tensors of different shapes."""
    first = parties[0]
    for party in parties[1:]:
        for name, value in first.tensors.items():
            other = party.tensors.get(name)
            if name in excluded or other is None or _shape(value) == _shape(other):
                continue
            raise ValueError(
                f"{WHO} needs tensors of one shape under each name, got {name!r} of {_shape(value)} in {first.name} "
                f"and of {_shape(other)} in {party.name}. Pass states of one architecture, or put {name!r} into local=."
            )


def _shape(value: Any) -> object:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "another type"


def agree(values: Sequence[Any]) -> bool:
    """Whether all values are tensors of the same bits, or none is a tensor."""
    first, *rest = values
    if not isinstance(first, Tensor):
        return not any(isinstance(value, Tensor) for value in rest)
    return all(first.dtype == value.dtype and same_bits(first.cpu(), value.cpu()) for value in rest)
