"""Trees of tensors: the tensors in a batch or output made of tuples, lists, mappings and dataclasses.

Everything else is a leaf, also a batch object, such as a batch of graphs. The rows of a leaf are the first axis of a
tensor, or the sequences of a packed or nested tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import is_dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from batchnorm.call_types import Batch
from batchnorm.population.forward_signatures import fields_of

Leaf: TypeAlias = Any  # a part of a batch that is not taken apart further

_DEEPEST = 4  # depth to which a batch object's attributes are searched for tensors
_BY_INDEX = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc}  # layouts whose rows cannot be sliced


def each_leaf(value: Batch, change: Callable[[Leaf], object]) -> Batch:
    """``value`` with ``change`` applied to every leaf of its tuples, lists, mappings and dataclasses."""
    if isinstance(value, PackedSequence):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_leaf(part, change) for part in value))
    if type(value) in {tuple, list}:
        return type(value)(each_leaf(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy(value)
        for name, part in fields_of(value).items():
            object.__setattr__(changed, name, each_leaf(part, change))  # dataclasses may be frozen
        return changed
    if isinstance(value, Mapping):
        changed = copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key in value:
            changed[key] = each_leaf(value[key], change)
        return changed
    return change(value)


def leaves_of(value: Batch) -> list[Leaf]:
    """All leaves, in the order of ``each_leaf``."""
    leaves: list[Leaf] = []
    each_leaf(value, leaves.append)
    return leaves


def tensors_in(value: Batch) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    return list(chain.from_iterable(map(tensors_in, _parts(value))))


def _parts(value: Batch) -> Iterable[Batch]:
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return fields_of(value).values()
    return value if isinstance(value, (tuple, list)) else ()


def _tensors_of_object(value: Batch, depth: int = _DEEPEST) -> list[Tensor]:
    """The tensors in a batch object's attributes, at any depth up to ``depth``."""
    if isinstance(value, (Tensor, PackedSequence)):
        return [value.data if isinstance(value, PackedSequence) else value]
    if not depth or isinstance(value, (str, bytes, type, nn.Module)):
        return []
    inside = _parts(value) or (vars(value).values() if hasattr(value, "__dict__") and not callable(value) else ())
    return list(chain.from_iterable(_tensors_of_object(part, depth - 1) for part in inside))


def is_object(leaf: Leaf) -> bool:
    """Whether a leaf is a batch object: it can be moved and is no tensor or module, such as a batch of graphs."""
    return hasattr(leaf, "to") and not isinstance(leaf, (Tensor, PackedSequence, nn.Module, type))


def examples_in(batch: Batch) -> int | None:
    """Number of examples in a batch, from its first tensor with an axis; None if it has no such tensor.

    A batch object has as many as its ``num_graphs`` or ``batch_size`` says, else as its first tensor has rows.
    """
    sizes = (_size(leaf) or _size_of_object(leaf) for leaf in leaves_of(batch))
    return next(chain.from_iterable(sizes), None)


def why_without_rows(given: Batch) -> str:
    """Why a model's inputs cannot be cut into rows, as the end of a sentence; "" if they can."""
    leaves = leaves_of(given)
    if objects := [type(leaf).__name__ for leaf in leaves if is_object(leaf)]:
        return f"a part is a {objects[0]}, which cannot be cut"
    sizes = list(dict.fromkeys(chain.from_iterable(map(_size, leaves))))
    return f"the first axes have the sizes {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""


def are_sequences(given: Batch) -> bool:
    """Whether a model's inputs are only packed or nested sequences, one sequence per example."""
    tensors = [leaf for leaf in leaves_of(given) if isinstance(leaf, (Tensor, PackedSequence))]
    return bool(tensors) and all(isinstance(leaf, PackedSequence) or leaf.is_nested for leaf in tensors)


def _size(leaf: Leaf) -> list[int]:
    if isinstance(leaf, PackedSequence):
        return [int(leaf.batch_sizes[0])]
    if not isinstance(leaf, Tensor) or not (leaf.is_nested or leaf.ndim):
        return []
    return [leaf.size(0)]


def _size_of_object(leaf: Leaf) -> list[int]:
    if not is_object(leaf):
        return []
    stated = next((n for name in ("num_graphs", "batch_size") if isinstance(n := getattr(leaf, name, None), int)), None)
    return [stated] if stated is not None else list(chain.from_iterable(map(_size, _tensors_of_object(leaf))))[:1]


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch with only these rows of every leaf that has one row per example; other leaves are unchanged."""
    return each_leaf(batch, partial(leaf_rows, rows, examples_in(batch) or 0))


def leaf_rows(rows: Sequence[int], size: int, leaf: Leaf) -> Leaf:
    """A leaf of ``size`` rows with only these rows; any other leaf is unchanged."""
    if _size(leaf) != [size]:
        return leaf
    if isinstance(leaf, PackedSequence):
        sequences = unpack_sequence(leaf)
        return pack_sequence([sequences[row] for row in rows], enforce_sorted=False)
    if leaf.is_nested:
        parts = leaf.unbind()
        return torch.nested.as_nested_tensor([parts[row] for row in rows], layout=leaf.layout)
    if leaf.layout in _BY_INDEX:
        index = torch.tensor(rows, device=leaf.device)
        return leaf.to_sparse_coo().index_select(0, index).to_sparse(layout=leaf.layout)
    return leaf[: len(rows)] if isinstance(rows, range) else leaf[torch.tensor(rows, device=leaf.device)]


def copied(leaf: Leaf) -> Leaf:
    """A copy of a tensor or packed sequence; a leaf of another class is unchanged."""
    if isinstance(leaf, PackedSequence):
        return PackedSequence(leaf.data.clone(), *leaf[1:])
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
