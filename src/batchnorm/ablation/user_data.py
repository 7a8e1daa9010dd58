"""The user's data: one pass of a loader in memory, split into training and held-out batches, in an order by seed.

If batches can be joined (the same tensors in every batch, with the same shape for each example), new batches are made
in each epoch, so that a loader sorted by class does not decide the outcome. If batches cannot be joined, such as
sentences of different lengths, the loader's own batches are used in a new order. A batch whose tensors all have the
same length consists of rows, one for each example. Other batches, such as a graph with its edges or an object of the
user's class, are never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import final

import torch
from torch import Tensor

from batchnorm.population import tensor_trees
from batchnorm.population.tensor_trees import (
    Batch,
    Leaf,
    copied,
    each_leaf,
    is_object,
    leaf_rows,
    leaves_of,
    tensors_in,
    why_without_rows,
)

EXAMPLES = 4096  # reading stops after this number: enough for every question, and for some hundred steps
_BYTES = 2**28  # reading stops after this amount of memory
_EVERY = 5  # one batch of this many is held out


class _ApartError(Exception):
    """Raised if batches cannot be joined into one."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Training and held-out batches.

    Args:
        train: Training batches, as the loader returned them.
        held: Held-out batches.
        pool: All training examples in one batch; None if they cannot be joined.
        size: Number of examples in the first training batch.
        dropped: Number of batches of one example, which were left out because they cannot be normalized.
        whole: Whether batches must not be cut or joined.
    """

    train: Sequence[Batch]
    held: Sequence[Batch]
    pool: Batch
    size: int
    dropped: int = 0
    whole: bool = False

    @classmethod
    def of(cls, train: Iterable[Batch], test: Iterable[Batch] | None = None, *, examples: int = EXAMPLES) -> Data:
        """Read one pass, up to ``examples`` examples or 256 MiB; without ``test`` every fifth batch is held out.

        Of fewer than five batches the last one is held out.

        Raises:
            TypeError: If the data are one tensor.
            ValueError: If there are no batches, a batch has no examples that can be counted, no batch has two examples,
                or no batch is left to train with.
        """
        usable, dropped = _usable(_read(train, examples, "--data"))
        held = usable[_EVERY - 1 :: _EVERY] or usable[-1:]
        if test is not None:
            held = _read(test, examples, "--test")
        training = [batch for batch in usable if test is not None or not any(batch is other for other in held)]
        if not training:
            raise ValueError(
                "--data needs 2 batches or more, since one batch is held out, got 1. Use a smaller batch_size, or "
                "give held-out data by --test."
            )
        whole = not all(map(is_rows, [*training, *held]))
        return cls(training, held, None if whole else joined(training), examples_in(training[0]), dropped, whole)

    def kept_whole(self) -> Data:
        """The same data for a model that accepts only whole batches."""
        return replace(self, pool=None, whole=True)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of training examples and of held-out examples."""
        return sum(map(examples_in, self.train)), sum(map(examples_in, self.held))

    def deal(self, seed: int) -> Iterator[Batch]:
        """An endless iterator over copies of training batches, which depend on the seed alone."""
        random = torch.Generator().manual_seed(seed)
        if self.pool is None:
            while True:
                for index in torch.randperm(len(self.train), generator=random).tolist():
                    yield each_leaf(self.train[index], _copied)
        total = examples_in(self.pool)
        while True:
            for drawn in torch.randperm(total, generator=random).split(min(self.size, total)):
                if len(drawn) == min(self.size, total):
                    yield take(self.pool, drawn)

    def to(self, device: torch.device) -> Data:
        """The same data on another device."""

        def moved(batch: Batch) -> Batch:
            return each_leaf(batch, lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf)

        train, held = [moved(b) for b in self.train], [moved(b) for b in self.held]
        return replace(self, train=train, held=held, pool=moved(self.pool))


def regrouped(batches: Sequence[Batch], size: int, seed: int) -> list[Batch] | None:
    """The examples of ``batches`` in random full batches of ``size``; None if ``batches`` cannot be joined."""
    pool = joined(batches)
    if pool is None:
        return None
    random = torch.Generator().manual_seed(seed)
    groups = torch.randperm(examples_in(pool), generator=random).split(size)
    return [take(pool, group) for group in groups if len(group) == size]


def inputs_of(batch: Batch) -> Tensor | None:
    """The first part of a batch, or the batch itself; None unless it is a floating-point tensor of two axes or more."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    is_one = isinstance(first, Tensor) and first.is_floating_point() and first.ndim >= 2
    return first if is_one else None


def examples_in(batch: Batch) -> int:
    """Number of examples in a batch, counted by ``tensor_trees.examples_in``.

    Raises:
        ValueError: If the batch has no examples that can be counted.
    """
    count = tensor_trees.examples_in(batch)
    if count is None:
        raise ValueError(f"a batch must hold tensors, got {type(batch).__name__} without any. Convert it to tensors.")
    return count


def is_rows(batch: Batch) -> bool:
    """Whether all tensors of a batch have one row for each example; numbers, text and None are allowed beside them."""
    is_known = all(isinstance(leaf, (Tensor, int, float, str, type(None))) for leaf in leaves_of(batch))
    return is_known and not why_without_rows(batch)


def first_examples(batch: Batch, most: int) -> Batch:
    """A copy of the first ``most`` examples of a batch; of the whole batch if it does not consist of rows."""
    return take(batch, torch.arange(min(most, examples_in(batch)))) if is_rows(batch) else each_leaf(batch, _copied)


def take(batch: Batch, chosen: Tensor) -> Batch:
    """A copy of the chosen examples of a batch that consists of rows."""
    rows, count = chosen.tolist(), examples_in(batch)
    return each_leaf(batch, lambda leaf: copied(leaf_rows(rows, count, leaf)))


def joined(batches: Sequence[Batch]) -> Batch:
    """All examples in one batch; None if the batches cannot be joined."""
    try:
        return _joined(list(batches), [examples_in(batch) for batch in batches])
    except _ApartError:
        return None


def _read(loader: Iterable[Batch], examples: int, option: str) -> list[Batch]:
    if isinstance(loader, Tensor):
        raise TypeError(f"{option} needs batches, got one tensor. Return a DataLoader or a list of batches.")
    read, count, memory = [], 0, 0
    for batch in loader:
        read.append(batch)
        count += examples_in(batch)
        memory += _bytes(batch)
        if count >= examples or memory >= _BYTES:
            break
    if not read:
        raise ValueError(f"{option} needs batches, got none. Check the data set's length and the sampler.")
    return read


def _usable(batches: list[Batch]) -> tuple[list[Batch], int]:
    """The batches of two examples or more, and the number of the other batches."""
    usable = [batch for batch in batches if examples_in(batch) > 1]
    if not usable:
        raise ValueError(
            "batch norm learns from batches of 2 examples or more, got batches of 1. Give --data a larger batch_size."
        )
    return usable, len(batches) - len(usable)


def _bytes(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_of(batch))


def _tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, also tensors in attributes of objects of the user's classes."""
    tensors = [tensors_in(leaf if isinstance(leaf, Tensor) else _attributes(leaf)) for leaf in leaves_of(batch)]
    return list(chain.from_iterable(tensors))


def _attributes(leaf: Leaf) -> list[Batch]:
    """The attributes of an object of a user's class, with mappings as dicts; [] for other values."""
    values = list(getattr(leaf, "__dict__", {}).values()) if is_object(leaf) else []
    return [dict(part) if isinstance(part, Mapping) else part for part in values]


def _joined(parts: list[Batch], counts: list[int]) -> Batch:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise _ApartError
    if isinstance(first, Tensor):
        return _concatenated(parts, counts)
    if isinstance(first, (tuple, list)):
        columns = [_joined(list(column), counts) for column in _columns(parts)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise _ApartError
        whole = copy(first) if isinstance(first, MutableMapping) else dict(first)
        for key in first:
            whole[key] = _joined([part[key] for part in parts], counts)
        return whole
    if not isinstance(first, (int, float, str, type(None))) or any(part != first for part in parts):
        raise _ApartError
    return first


def _columns(parts: list[Batch]) -> Iterator[Batch]:
    if len({len(part) for part in parts}) > 1:
        raise _ApartError
    return zip(*parts, strict=True)


def _concatenated(parts: list[Tensor], counts: list[int]) -> Tensor:
    first = parts[0]
    alike = all(part.ndim and part.shape[1:] == first.shape[1:] and part.dtype == first.dtype for part in parts)
    if not alike or [len(part) for part in parts] != counts:
        raise _ApartError
    return torch.cat(parts)


def _copied(leaf: Leaf) -> Leaf:
    return deepcopy(leaf) if is_object(leaf) else copied(leaf)
