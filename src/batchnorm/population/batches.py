"""Batches of any kind, repeated for each pass: cut to a number of examples, moved to a device, given to a model.

A batch is a tensor, a tuple, list, mapping or dataclass of batches, or an object of another class, which stays opaque.
A batch has rows if the first axes of all tensors that the model receives have the same size. If the sizes differ (nodes
and edges of a graph), or if the model's outputs show that the first axis does not count examples (``batch_rows``), the
batch has no rows and is used whole.

A model may overwrite its inputs (``x.sub_(mean)``), so every pass gets its own copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, default_collate

from batchnorm.argument_types import kind_of, require_whole_number
from batchnorm.population.absent_numbers import named_absences, require_batch
from batchnorm.population.batch_misfits import named_misfits
from batchnorm.population.forward_signatures import call_forms, code_of, names_in
from batchnorm.population.loader_state import generators_of, passes_of
from batchnorm.population.repeated_examples import own_examples
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

    Forward = Callable[[nn.Module, Batch], object]  # calls a model with a batch

# errors that a model raises if it gets a batch in the wrong form
_WRONG_FORM_ERRORS = (AttributeError, TypeError, ValueError, LookupError)
# for each model, by its forward and the kind of batch: which of two call forms works
_WORKING_FORMS: WeakKeyDictionary[nn.Module, dict[object, int]] = WeakKeyDictionary()


def call(model: nn.Module, batch: Batch) -> object:
    """The model's output for a batch of any kind, by the rules in the docstring of ``recalibrate``.

    If the forward's signature is ambiguous (``forward_signatures``) and the first call form raises an AttributeError,
    TypeError, ValueError or LookupError, the second call form is tried. If it works, it is used for all batches of the
    same kind; else the first error is raised.

    Raises:
        TypeError: If ``batch`` is not a batch.
        AbsenceError: If values that the pass needs cannot be read.
        ValueError: If a layer of torch.nn cannot use the type or the shape of the batch.
    """
    require_examples(batch, "a pass of the model")
    possible = call_forms(model, batch)
    first = _settled(model, batch, len(possible))
    with named_absences(model), named_misfits(model, batch):
        try:
            return _called(model, possible[first])
        except _WRONG_FORM_ERRORS as error:
            if len(possible) < 2 or isinstance(error, AbsenceError):
                raise
            with suppress(Exception):
                output = _called(model, possible[1 - first])
                _WORKING_FORMS.setdefault(model, {})[_kind_of(model, batch)] = 1 - first
                return output
            raise


def _called(model: nn.Module, way: Way) -> object:
    args, kwargs = way
    return model(*args, **kwargs)


def _settled(model: nn.Module, batch: Batch, count: int) -> int:
    return _WORKING_FORMS.get(model, {}).get(_kind_of(model, batch), 0) if count > 1 else 0


def _kind_of(model: nn.Module, batch: Batch) -> object:
    while isinstance(batch, (tuple, list)) and names_in(batch) is None and len(batch):
        batch = batch[0]
    return code_of(model), type(batch), tuple(names_in(batch) or ())


def arguments(model: nn.Module, batch: Batch) -> tuple[Arguments, Keywords]:
    """The positional and keyword arguments with which a model is called for a batch.

    A batch with names (mapping, named tuple, dataclass) is passed whole if ``forward`` has one required argument and
    indexes it by these names or annotates it with the batch's class. Otherwise it is passed by name if it has all names
    that ``forward`` requires, or, for a mapping, if ``forward`` accepts all its names. Otherwise a named tuple is
    treated as a tuple, and other batches are passed whole. From a tuple or list, ``forward`` gets the first element, or
    as many as it requires, or the whole tuple as one argument if ``forward`` unpacks this argument or annotates it as a
    tuple or list. Anything else is passed whole.
    """
    possible = call_forms(model, batch)
    return possible[_settled(model, batch, len(possible))]


def require_examples(batch: Batch, who: str) -> None:
    """Refuse anything that is not a batch.

    Raises:
        TypeError: If ``batch`` is an iterator, or no part of it can contain examples.
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
    """Device of a model's first parameter or buffer that is not on the meta device; None if there is none.

    Parameters on the meta device are fetched when needed (offloading), by hooks that also move inputs.
    """
    devices = dict.fromkeys(t.device for t in chain(model.parameters(), model.buffers()))
    return next((device for device in devices if device.type != "meta"), None)


def on_device_of(model: nn.Module, batch: Batch, most: int | None = None, *, who: str = "a pass of the model") -> Batch:
    """A copy of the batch on the model's device, cut to ``most`` examples. Errors name ``who`` as the caller.

    Raises:
        TypeError: If ``batch`` is not a batch.
        ValueError: If the batch has more rows than ``most`` and cannot be cut, or contains tensors without values.
    """
    require_examples(batch, who)
    if most is not None and (why := why_without_rows(arguments(model, batch))) and (examples_in(batch) or 0) > most:
        raise ValueError(f"a batch can be cut if its first axes have one size, got a batch where {why}. Use it whole.")
    return next(iter(Batches([batch], most, device_of(model), who=who)))


def rereadable(data: Batch) -> Batch:
    """The data, or a list of them if they can be read only once: an iterator, or a loader that is its own iterator."""
    if isinstance(data, Iterator):
        return list(data)
    if isinstance(data, (Sequence, Mapping, Tensor, DataLoader)) or not isinstance(data, Iterable):
        return data
    with preserve_random_state():  # creating an iterator may draw a seed
        first, second = iter(data), iter(data)
    return list(first) if first is second else data


class Batches:
    """The batches of a loader, for any number of passes: cut to ``max_examples`` and moved to ``device``.

    A batch without rows is not cut, so the limit may be exceeded. Tensors that belong to the loader are copied, one
    batch at a time. Error messages name ``who`` as the caller.

    If ``part`` is (i, n), n processes have a part of the data each, and this is part i. ``max_examples`` is then the
    number of all of them, of which each has an equal share, and a part may have no batch. Examples that a sampler
    repeats to fill up the parts (``repeated_examples``) are left out.

    Raises:
        TypeError: If ``loader`` is not an iterable of batches, or ``max_examples`` is not a whole number.
        ValueError: If ``max_examples`` is below 1. A pass raises it if there is no batch, if the number of batches
            differs from that of an earlier pass, or if examples must be counted in a batch without tensors.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        max_examples: int | None,
        device: torch.device | None,
        *,
        who: str = "recalibrate",
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.who = who
        index, self._parts = part
        if max_examples is not None:
            require_whole_number(max_examples, "max_examples", "Use None for all.")
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"{who} needs max_examples of 1 or more, got {max_examples}. Use None for all.")
        if _is_no_loader(loader):
            raise TypeError(
                f"{who} needs an iterable of batches, got {kind_of(loader)}. "
                "Pass a DataLoader, or a list of batches: [x]."
            )
        self.max_examples = None if max_examples is None else len(range(index, max_examples, self._parts))
        self.device = device
        self.has_rows = True  # until ``batch_rows.settle`` finds otherwise
        self.given: Callable[[Batch], Batch] = _first_part  # the part of a batch that the model receives
        self.loader = list(self._up_to_max(loader, cut=False)) if isinstance(loader, Iterator) else rereadable(loader)
        self._begin_again = passes_of(self.loader)
        # the default collate function makes a new tensor for every batch
        self._are_new = type(loader) is DataLoader and loader.collate_fn is default_collate
        self._own = own_examples(loader, self._parts) if self._parts > 1 else None
        self.count: int | None = None

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators of the loader and its samplers."""
        return generators_of(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        self._begin_again()
        try:
            for batch in self._without_repeated(self._up_to_max(self.loader)):
                yield each_leaf(batch, self._moved)
                count += 1
        finally:
            self._begin_again()
        if not count and not self.count and self._parts == 1:
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
        """The batch in which the limit falls, and how many of its examples are used; None if no batch is cut."""
        if not (left := self.max_examples):
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
        if not (left := self.max_examples):
            return
        for batch in loader:
            size = self._size_of(batch)
            may_cut = cut and self.has_rows and not why_without_rows(self.given(batch))
            yield batch if size <= left or not may_cut else each_leaf(batch, partial(leaf_rows, range(left), size))
            left -= size
            if left <= 0:
                return

    def _without_repeated(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Without the examples at the end that a sampler repeats so that all ranks have equally many."""
        left = self._own
        for batch in batches:
            if left is None:
                yield batch
                continue
            if left <= 0:
                return
            size = examples_in(batch) or 0
            yield batch if size <= left else each_leaf(batch, partial(leaf_rows, range(left), size))
            left -= size

    def _size_of(self, batch: Batch) -> int:
        size = examples_in(batch)
        if size is None:
            raise ValueError(
                f"{self.who} needs batches that hold tensors, got {type(batch).__name__} without any. "
                "Make the loader yield tensors, or tuples, lists or dicts of them."
            )
        return size

    def copy_of(self, batch: Batch) -> Batch:
        """A copy that another forward may overwrite."""
        return each_leaf(batch, _copy)

    def _moved(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, Tensor):
            require_batch([leaf], self.who)
        if is_object(leaf):  # its ``to`` may work in place
            leaf = _copy(leaf)
            return leaf.to(self.device) if self.device is not None else leaf
        moved = leaf.to(self.device) if self.device is not None and hasattr(leaf, "to") else leaf
        return copied(moved) if moved is leaf and not self._are_new else moved


def _copy(leaf: Leaf) -> Leaf:
    if is_object(leaf):
        return leaf.clone() if hasattr(leaf, "clone") else deepcopy(leaf)
    return copied(leaf)


def _is_no_loader(loader: Batch) -> bool:
    is_one_batch = isinstance(loader, (Tensor, Mapping, str, bytes)) or hasattr(loader, "_fields")
    return is_one_batch or isinstance(loader, (type, nn.Module)) or not isinstance(loader, Iterable)


def _first_part(batch: Batch) -> Batch:
    is_row = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
    return batch[0] if is_row and len(batch) else batch
