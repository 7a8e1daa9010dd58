"""Batches of any kind, once for each pass: cut to a number of examples, moved to a device, given to a model.

A model may write to what it is given (``x.sub_(mean)``), so every pass has memory of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.data import DataLoader, default_collate

if TYPE_CHECKING:
    from collections.abc import Callable


def call(model: nn.Module, batch: Any) -> object:
    """The model's answer to a batch of any kind, as the docstring of ``recalibrate`` says."""
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return model(batch[0])
    if isinstance(batch, Mapping) and _accepts(model, batch):
        return model(**batch)
    return model(batch)


def _accepts(model: nn.Module, batch: Mapping) -> bool:
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return list(chain.from_iterable(map(tensors_in, parts)))


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's first tensor is; None for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def on_device_of(model: nn.Module, batch: Any, most: int | None = None) -> Any:
    """The batch where the model is, cut to ``most`` examples, in memory of its own."""
    return next(iter(Batches([batch], most, device_of(model))))


class Batches:
    """The batches of a loader, once for each pass: cut to ``max_examples`` and moved to ``device``.

    Tensors are copies, one batch at a time, where they would be the loader's own. ``who`` is what complaints call the
    one who asks.
    """

    def __init__(
        self, loader: Iterable[Any], max_examples: int | None, device: torch.device | None, *, who: str = "recalibrate"
    ) -> None:
        self.who = who
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"{who} needs max_examples of 1 or more, got {max_examples}. Use None for all.")
        if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
            raise TypeError(
                f"{who} needs an iterable of batches, got {type(loader).__name__}. "
                "Pass a DataLoader, or a list of batches: [x]."
            )
        self.max_examples = max_examples
        self.device = device
        self.loader = list(self._up_to_max(loader)) if isinstance(loader, Iterator) else loader
        # what stacks examples makes a new tensor for every batch
        self._are_new = type(loader) is DataLoader and loader.collate_fn is default_collate
        self.count: int | None = None

    @property
    def generators(self) -> list[torch.Generator]:
        """A DataLoader's own sources of randomness."""
        owners = [self.loader, getattr(self.loader, "sampler", None)]
        return [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batch in self._up_to_max(self.loader):
            yield _each_leaf(batch, self._moved)
            count += 1
        if not count and not self.count:
            raise ValueError(f"{self.who} needs at least one batch, got an empty loader. Check the data set's length.")
        if self.count not in {None, count}:
            raise ValueError(
                f"{self.who} needs a loader that gives the same batches in every pass, got {self.count} batches, "
                f"then {count}. Pass a DataLoader or list(loader)."
            )
        self.count = count

    def _up_to_max(self, loader: Iterable[Any]) -> Iterator[Any]:
        if self.max_examples is None:
            yield from loader
            return
        left = self.max_examples
        for batch in loader:
            size = examples_in(batch)
            if size is None:
                raise ValueError(
                    f"{self.who} needs batches that hold tensors, got {type(batch).__name__} without any. "
                    "Make the loader yield tensors, or tuples, lists or dicts of them."
                )
            yield batch if size <= left else _each_leaf(batch, partial(_first, left, size))
            left -= size
            if left <= 0:
                return

    def _moved(self, leaf: Any) -> Any:
        moved = leaf.to(self.device) if self.device is not None and hasattr(leaf, "to") else leaf
        return _copied(moved) if moved is leaf and not self._are_new else moved


def examples_in(batch: Any) -> int | None:
    """Examples in a batch, by the first tensor in it that has an axis; None without any."""
    sizes: list[int] = []
    _each_leaf(batch, lambda leaf: sizes.extend(_size(leaf)))
    return next(iter(sizes), None)


def _size(leaf: Any) -> list[int]:
    if isinstance(leaf, PackedSequence):
        return [int(leaf.batch_sizes[0])]
    return [len(leaf)] if isinstance(leaf, Tensor) and leaf.ndim else []


def _first(count: int, size: int, leaf: Any) -> Any:
    if _size(leaf) != [size]:
        return leaf
    if isinstance(leaf, PackedSequence):
        return pack_sequence(unpack_sequence(leaf)[:count], enforce_sorted=False)
    if leaf.is_sparse:  # which cannot be sliced
        return leaf.index_select(0, torch.arange(count, device=leaf.device))
    return leaf[:count]


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return PackedSequence(leaf.data.clone(), *leaf[1:])
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _each_leaf(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to everything in its tuples, lists and mappings."""
    if isinstance(value, PackedSequence):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each_leaf(part, change) for part in value))
    if type(value) in {tuple, list}:
        return type(value)(_each_leaf(part, change) for part in value)
    if isinstance(value, Mapping):
        changed = copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key in value:
            changed[key] = _each_leaf(value[key], change)
        return changed
    return change(value)
