"""Batches of any kind, once for each pass: cut to a number of examples, moved to a device, given to a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def call(model: nn.Module, batch: Any) -> object:
    """The model's answer to a batch of any kind, as the docstring of ``recalibrate`` says."""
    if isinstance(batch, (tuple, list)):
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


class Batches:
    """The batches of a loader, once for each pass: cut to ``max_examples`` and moved to ``device``."""

    def __init__(self, loader: Iterable[Any], max_examples: int | None, device: torch.device | None) -> None:
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"recalibrate needs max_examples of 1 or more, got {max_examples}. Use None for all.")
        if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
            raise TypeError(
                f"recalibrate needs an iterable of batches, got {type(loader).__name__}. "
                "Pass a DataLoader, or a list of batches: [x]."
            )
        self.max_examples = max_examples
        self.device = device
        self.loader = list(self._up_to_max(loader)) if isinstance(loader, Iterator) else loader
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
            raise ValueError("recalibrate needs at least one batch, got an empty loader. Check the data set's length.")
        if self.count not in {None, count}:
            raise ValueError(
                f"recalibrate needs a loader that gives the same batches in every pass, got {self.count} batches, "
                f"then {count}. Pass a DataLoader or list(loader)."
            )
        self.count = count

    def _up_to_max(self, loader: Iterable[Any]) -> Iterator[Any]:
        if self.max_examples is None:
            yield from loader
            return
        left = self.max_examples
        for batch in loader:
            size = _examples_in(batch)
            yield batch if size <= left else _each_leaf(batch, partial(_first, left, size))
            left -= size
            if left <= 0:
                return

    def _moved(self, leaf: Any) -> Any:
        return leaf.to(self.device) if self.device is not None and hasattr(leaf, "to") else leaf


def _examples_in(batch: Any) -> int:
    sizes: list[int] = []
    _each_leaf(batch, lambda leaf: sizes.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.ndim else None)
    if not sizes:
        raise ValueError(
            f"recalibrate needs max_examples with batches that hold tensors, got {type(batch).__name__} "
            "without any. Limit the loader instead."
        )
    return sizes[0]


def _first(count: int, size: int, leaf: Any) -> Any:
    return leaf[:count] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf


def _each_leaf(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to everything in its tuples, lists and mappings."""
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
