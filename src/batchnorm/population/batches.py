"""Batches of any kind, once for each pass: cut to a number of examples, moved to a device, given to a model.

A batch is a tensor, a tuple, list, mapping or dataclass of batches, or an object of a class that is not looked into.
Its rows are the first axis that all tensors share which the model is given. Where they share none (nodes and edges of
a graph), and where the model says otherwise (``batch_rows``), it has no rows, and is used whole.

A model may write to what it is given (``x.sub_(mean)``), so every pass has memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, default_collate

from batchnorm.argument_types import kind_of, require_whole_number
from batchnorm.population.absent_numbers import named_absences, require_batch
from batchnorm.population.forward_signatures import code_of, names_in, ways
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.tensor_memory import AbsenceError
from batchnorm.population.tensor_trees import (
    Batch,
    Leaf,
    copied,
    each_leaf,
    examples_in,
    is_object,
    leaf_rows,
    leaves_of,
    why_without_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchnorm.call_types import Arguments, Keywords
    from batchnorm.population.forward_signatures import Way

    Forward = Callable[[nn.Module, Batch], object]  # how a model is called with a batch

# what a model says that was given a batch in another way than it takes it
_MISTAKEN = (AttributeError, TypeError, ValueError, LookupError)
# for each model, by its forward and the kind of a batch, which of two ways it runs with
_SETTLED: WeakKeyDictionary[nn.Module, dict[object, int]] = WeakKeyDictionary()


def call(model: nn.Module, batch: Batch) -> object:
    """The model's answer to a batch of any kind, as the docstring of ``recalibrate`` says.

    Where the forward's signature leaves a doubt (``forward_signatures``), the second way is tried if the first one
    fails, and kept for batches of the same kind.

    Raises:
        TypeError: If ``batch`` is none.
        AbsenceError: If numbers that the pass needs cannot be read.
    """
    require_examples(batch, "a pass of the model")
    possible = ways(model, batch)
    first = _settled(model, batch, len(possible))
    with named_absences(model):
        try:
            return _called(model, possible[first])
        except _MISTAKEN as error:
            if len(possible) < 2 or isinstance(error, AbsenceError):
                raise
            with suppress(Exception):
                output = _called(model, possible[1 - first])
                _SETTLED.setdefault(model, {})[_kind_of(model, batch)] = 1 - first
                return output
            raise


def _called(model: nn.Module, way: Way) -> object:
    args, kwargs = way
    return model(*args, **kwargs)


def _settled(model: nn.Module, batch: Batch, count: int) -> int:
    return _SETTLED.get(model, {}).get(_kind_of(model, batch), 0) if count > 1 else 0


def _kind_of(model: nn.Module, batch: Batch) -> object:
    while isinstance(batch, (tuple, list)) and names_in(batch) is None and len(batch):
        batch = batch[0]
    return code_of(model), type(batch), tuple(names_in(batch) or ())


def arguments(model: nn.Module, batch: Batch) -> tuple[Arguments, Keywords]:
    """What of a batch a model is called with.

    A batch with names (mapping, named tuple, dataclass) is given by name if ``forward`` cannot do without some of them,
    or accepts all; whole if ``forward`` asks its one argument for them, is annotated with its class, or knows none of
    the names, but for a named tuple, which is a tuple then. Of a tuple or list the first element, or as many as
    ``forward`` cannot do without; all of it if it is unpacked there, or annotated as such. Anything else is given
    whole.
    """
    possible = ways(model, batch)
    return possible[_settled(model, batch, len(possible))]


def require_examples(batch: Batch, who: str) -> None:
    """Refuse what is no batch.

    Raises:
        TypeError: If nothing in it may hold examples.
    """
    leaves = [] if isinstance(batch, (str, bytes)) else leaves_of(batch)
    if isinstance(batch, Iterator):
        raise TypeError(f"{who} needs a batch that can be read again, got a {kind_of(batch)}. Use list(batch).")
    if not any(map(_may_hold_examples, leaves)):
        raise TypeError(
            f"{who} needs a batch that holds tensors, got {kind_of(batch)}. Pass what the model takes: a tensor, or "
            "tuples, lists or dicts of them."
        )


def _may_hold_examples(leaf: Leaf) -> bool:
    if isinstance(leaf, (Tensor, PackedSequence, str, bytes)) or hasattr(leaf, "__array__"):
        return True
    if isinstance(leaf, (type, nn.Module, DataLoader, Iterator)) or callable(leaf):
        return False
    return hasattr(leaf, "to") or hasattr(leaf, "__dict__")


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's first tensor with memory is; None for a model without any.

    Parameters on the meta device are fetched when they are needed (offloading), by hooks that move inputs too.
    """
    devices = dict.fromkeys(t.device for t in chain(model.parameters(), model.buffers()))
    return next((device for device in devices if device.type != "meta"), None)


def on_device_of(model: nn.Module, batch: Batch, most: int | None = None, *, who: str = "a pass of the model") -> Batch:
    """The batch where the model is, cut to ``most`` examples, in memory of its own. ``who`` asks.

    Raises:
        TypeError: If it is no batch.
        ValueError: If it has more rows than ``most`` and cannot be cut, or tensors without numbers.
    """
    require_examples(batch, who)
    if most is not None and (why := why_without_rows(arguments(model, batch))) and (examples_in(batch) or 0) > most:
        raise ValueError(f"a batch to be cut needs tensors of one first axis, got one of which {why}. Use it whole.")
    return next(iter(Batches([batch], most, device_of(model), who=who)))


def rereadable(data: Batch) -> Any:
    """The data, in memory if they can be read only once: an iterator, or what gives the same iterator again."""
    if isinstance(data, Iterator):
        return list(data)
    if isinstance(data, (Sequence, Mapping, Tensor, DataLoader)) or not isinstance(data, Iterable):
        return data
    with preserve_random_state():  # what is asked for an iterator may draw a seed for it
        first, second = iter(data), iter(data)
    return list(first) if first is second else data


class Batches:
    """The batches of a loader, once for each pass: cut to ``max_examples`` and moved to ``device``.

    A batch without rows is not cut: with it the limit may be passed. Tensors are copies, one batch at a time, where
    they would be the loader's own. ``who`` is the name of the function that asks, for its error messages.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        max_examples: int | None,
        device: torch.device | None,
        *,
        who: str = "recalibrate",
    ) -> None:
        self.who = who
        if max_examples is not None:
            require_whole_number(max_examples, "max_examples", "Use None for all.")
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"{who} needs max_examples of 1 or more, got {max_examples}. Use None for all.")
        if _is_no_loader(loader):
            raise TypeError(
                f"{who} needs an iterable of batches, got {kind_of(loader)}. "
                "Pass a DataLoader, or a list of batches: [x]."
            )
        self.max_examples = max_examples
        self.device = device
        self.has_rows = True  # as far as a model was asked (``rows.settle``)
        self.given: Callable[[Batch], Batch] = _first_part  # what of a batch the model gets
        self.loader = list(self._up_to_max(loader, cut=False)) if isinstance(loader, Iterator) else rereadable(loader)
        # what stacks examples makes a new tensor for every batch
        self._are_new = type(loader) is DataLoader and loader.collate_fn is default_collate
        self.count: int | None = None

    @property
    def generators(self) -> list[torch.Generator]:
        """A DataLoader's own sources of randomness."""
        owners = [self.loader, getattr(self.loader, "sampler", None)]
        return [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in self._up_to_max(self.loader):
            yield each_leaf(batch, self._moved)
            count += 1
        if not count and not self.count:
            raise ValueError(
                f"{self.who} needs at least one batch, got an empty loader. Check the data set's length. "
                "Pass list(loader) if it can be read only once."
            )
        if self.count not in {None, count}:
            raise ValueError(
                f"{self.who} needs a loader that gives the same batches in every pass, got {self.count} batches, "
                f"then {count}. Pass a DataLoader or list(loader)."
            )
        self.count = count

    def to_be_cut(self) -> tuple[Batch, int] | None:
        """The batch that the limit falls into, and the number of examples to take of it; None if it falls into none."""
        if (left := self.max_examples) is None:
            return None
        for batch in self.loader:
            size = self._size_of(batch)
            if size > left:
                return batch, left
            left -= size
            if not left:
                break
        return None

    def _up_to_max(self, loader: Iterable[Batch], *, cut: bool = True) -> Iterator[Batch]:
        if self.max_examples is None:
            yield from loader
            return
        left = self.max_examples
        for batch in loader:
            size = self._size_of(batch)
            may_cut = cut and self.has_rows and not why_without_rows(self.given(batch))
            yield batch if size <= left or not may_cut else each_leaf(batch, partial(leaf_rows, range(left), size))
            left -= size
            if left <= 0:
                return

    def _size_of(self, batch: Batch) -> int:
        size = examples_in(batch)
        if size is None:
            raise ValueError(
                f"{self.who} needs batches that hold tensors, got {type(batch).__name__} without any. "
                "Make the loader yield tensors, or tuples, lists or dicts of them."
            )
        return size

    def copy_of(self, batch: Batch) -> Batch:
        """A batch that another forward may write to."""
        return each_leaf(batch, _copy)

    def _moved(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, Tensor):
            require_batch([leaf], self.who)
        if is_object(leaf):  # its own ``to`` may move it where it is
            leaf = _copy(leaf)
            return leaf.to(self.device) if self.device is not None else leaf
        moved = leaf.to(self.device) if self.device is not None and hasattr(leaf, "to") else leaf
        return copied(moved) if moved is leaf and not self._are_new else moved


def _copy(leaf: Leaf) -> Leaf:
    if is_object(leaf):
        return leaf.clone() if hasattr(leaf, "clone") else deepcopy(leaf)
    return copied(leaf)


def _is_no_loader(loader: Any) -> bool:
    is_one_batch = isinstance(loader, (Tensor, Mapping, str, bytes)) or hasattr(loader, "_fields")
    return is_one_batch or isinstance(loader, (type, nn.Module)) or not isinstance(loader, Iterable)


def _first_part(batch: Batch) -> Batch:
    is_row = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
    return batch[0] if is_row and len(batch) else batch
