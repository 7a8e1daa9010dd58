"""Batches of any kind, once for each pass: cut to a number of examples, moved to a device, given to a model.

A batch is a tensor, a tuple, list, mapping or dataclass of batches, or an object of a class that is not looked into.
Its rows are the first axis that all tensors share which the model is given. Where they share none (nodes and edges of
a graph), and where the model says otherwise (``batch_rows``), it has no rows, and is used whole.

A model may write to what it is given (``x.sub_(mean)``), so every pass has memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import is_dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.data import DataLoader, default_collate

from batchnorm.argument_types import kind_of, require_whole_number
from batchnorm.population.absent_numbers import named_absences, require_batch
from batchnorm.population.forward_signatures import code_of, fields_of, names_in, ways
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.tensor_memory import AbsenceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchnorm.population.forward_signatures import Way

_DEEPEST = 4  # attributes of attributes of a batch object, in which tensors are looked for


# what a model says that was given a batch in another way than it takes it
_MISTAKEN = (AttributeError, TypeError, ValueError, LookupError)
# for each model, by its forward and the kind of a batch, which of two ways it runs with
_SETTLED: WeakKeyDictionary[nn.Module, dict[object, int]] = WeakKeyDictionary()


def call(model: nn.Module, batch: Any) -> object:
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


def _settled(model: nn.Module, batch: Any, count: int) -> int:
    return _SETTLED.get(model, {}).get(_kind_of(model, batch), 0) if count > 1 else 0


def _kind_of(model: nn.Module, batch: Any) -> object:
    while isinstance(batch, (tuple, list)) and names_in(batch) is None and len(batch):
        batch = batch[0]
    return code_of(model), type(batch), tuple(names_in(batch) or ())


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch a model is called with.

    A batch with names (mapping, named tuple, dataclass) is given by name if ``forward`` cannot do without some of them,
    or accepts all; whole if ``forward`` asks its one argument for them, is annotated with its class, or knows none of
    the names, but for a named tuple, which is a tuple then. Of a tuple or list the first element, or as many as
    ``forward`` cannot do without; all of it if it is unpacked there, or annotated as such. Anything else is given
    whole.
    """
    possible = ways(model, batch)
    return possible[_settled(model, batch, len(possible))]


def require_examples(batch: Any, who: str) -> None:
    """Refuse what is no batch.

    Raises:
        TypeError: If nothing in it may hold examples.
    """
    leaves: list[Any] = []
    if not isinstance(batch, (str, bytes)):
        _each_leaf(batch, leaves.append)
    if isinstance(batch, Iterator):
        raise TypeError(f"{who} needs a batch that can be read again, got a {kind_of(batch)}. Use list(batch).")
    if not any(map(_may_hold_examples, leaves)):
        raise TypeError(
            f"{who} needs a batch that holds tensors, got {kind_of(batch)}. Pass what the model takes: a tensor, or "
            "tuples, lists or dicts of them."
        )


def _may_hold_examples(leaf: Any) -> bool:
    if isinstance(leaf, (Tensor, PackedSequence, str, bytes)) or hasattr(leaf, "__array__"):
        return True
    if isinstance(leaf, (type, nn.Module, DataLoader, Iterator)) or callable(leaf):
        return False
    return hasattr(leaf, "to") or hasattr(leaf, "__dict__")


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    return list(chain.from_iterable(map(tensors_in, _parts(value))))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return fields_of(value).values()
    return value if isinstance(value, (tuple, list)) else ()


def _tensors_of_object(value: Any, depth: int = _DEEPEST) -> list[Tensor]:
    """The tensors in a batch object's attributes, whatever holds them."""
    if isinstance(value, (Tensor, PackedSequence)):
        return [value.data if isinstance(value, PackedSequence) else value]
    if not depth or isinstance(value, (str, bytes, type, nn.Module)):
        return []
    inside = _parts(value) or (vars(value).values() if hasattr(value, "__dict__") and not callable(value) else ())
    return list(chain.from_iterable(_tensors_of_object(part, depth - 1) for part in inside))


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's first tensor with memory is; None for a model without any.

    Parameters on the meta device are fetched when they are needed (offloading), by hooks that move inputs too.
    """
    devices = dict.fromkeys(t.device for t in chain(model.parameters(), model.buffers()))
    return next((device for device in devices if device.type != "meta"), None)


def on_device_of(model: nn.Module, batch: Any, most: int | None = None, *, who: str = "a pass of the model") -> Any:
    """The batch where the model is, cut to ``most`` examples, in memory of its own. ``who`` asks.

    Raises:
        TypeError: If it is no batch.
        ValueError: If it has more rows than ``most`` and cannot be cut, or tensors without numbers.
    """
    require_examples(batch, who)
    if most is not None and (why := why_without_rows(arguments(model, batch))) and (examples_in(batch) or 0) > most:
        raise ValueError(f"a batch to be cut needs tensors of one first axis, got one of which {why}. Use it whole.")
    return next(iter(Batches([batch], most, device_of(model), who=who)))


def rereadable(data: Any) -> Any:
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
    they would be the loader's own. ``who`` is what complaints call the one who asks.
    """

    def __init__(
        self, loader: Iterable[Any], max_examples: int | None, device: torch.device | None, *, who: str = "recalibrate"
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
        self.given: Callable[[Any], Any] = _first_part  # what of a batch the model gets
        self.loader = list(self._up_to_max(loader, cut=False)) if isinstance(loader, Iterator) else rereadable(loader)
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

    def to_be_cut(self) -> tuple[Any, int] | None:
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

    def _up_to_max(self, loader: Iterable[Any], *, cut: bool = True) -> Iterator[Any]:
        if self.max_examples is None:
            yield from loader
            return
        left = self.max_examples
        for batch in loader:
            size = self._size_of(batch)
            may_cut = cut and self.has_rows and not why_without_rows(self.given(batch))
            yield batch if size <= left or not may_cut else _each_leaf(batch, partial(_rows, range(left), size))
            left -= size
            if left <= 0:
                return

    def _size_of(self, batch: Any) -> int:
        size = examples_in(batch)
        if size is None:
            raise ValueError(
                f"{self.who} needs batches that hold tensors, got {type(batch).__name__} without any. "
                "Make the loader yield tensors, or tuples, lists or dicts of them."
            )
        return size

    def _moved(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            require_batch([leaf], self.who)
        if is_object(leaf):  # its own ``to`` may move it where it is
            leaf = leaf.clone() if hasattr(leaf, "clone") else deepcopy(leaf)
            return leaf.to(self.device) if self.device is not None else leaf
        moved = leaf.to(self.device) if self.device is not None and hasattr(leaf, "to") else leaf
        return _copied(moved) if moved is leaf and not self._are_new else moved


def _is_no_loader(loader: Any) -> bool:
    is_one_batch = isinstance(loader, (Tensor, Mapping, str, bytes)) or hasattr(loader, "_fields")
    return is_one_batch or isinstance(loader, (type, nn.Module)) or not isinstance(loader, Iterable)


def is_object(leaf: Any) -> bool:
    """Whether a part of a batch is an object of a class of its own that can be moved, such as a batch of graphs."""
    return hasattr(leaf, "to") and not isinstance(leaf, (Tensor, PackedSequence, nn.Module, type))


def examples_in(batch: Any) -> int | None:
    """Examples in a batch, by the first tensor in it that has an axis; None without any.

    A batch object has as many as its ``num_graphs`` or ``batch_size`` says, else as its first tensor.
    """
    found: list[int] = []
    _each_leaf(batch, lambda leaf: found.extend(_size(leaf) or _size_of_object(leaf)))
    return next(iter(found), None)


def why_without_rows(given: Any) -> str:
    """Why what a model is given has no rows that could be taken apart, as the end of a sentence; "" if it has."""
    leaves: list[Any] = []
    _each_leaf(given, leaves.append)
    if objects := [type(leaf).__name__ for leaf in leaves if is_object(leaf)]:
        return f"a part is a {objects[0]}, which is not looked into"
    sizes = list(dict.fromkeys(chain.from_iterable(map(_size, leaves))))
    return f"the first axes have the sizes {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""


def are_sequences(given: Any) -> bool:
    """Whether everything in what a model is given is sequences that are packed or nested, one for each example."""
    leaves: list[Any] = []
    _each_leaf(given, leaves.append)
    tensors = [leaf for leaf in leaves if isinstance(leaf, (Tensor, PackedSequence))]
    return bool(tensors) and all(isinstance(leaf, PackedSequence) or leaf.is_nested for leaf in tensors)


def _first_part(batch: Any) -> Any:
    is_row = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
    return batch[0] if is_row and len(batch) else batch


def _size(leaf: Any) -> list[int]:
    if isinstance(leaf, PackedSequence):
        return [int(leaf.batch_sizes[0])]
    if not isinstance(leaf, Tensor) or not (leaf.is_nested or leaf.ndim):
        return []
    return [leaf.size(0)]


def _size_of_object(leaf: Any) -> list[int]:
    if not is_object(leaf):
        return []
    told = next((n for name in ("num_graphs", "batch_size") if isinstance(n := getattr(leaf, name, None), int)), None)
    return [told] if told is not None else list(chain.from_iterable(map(_size, _tensors_of_object(leaf))))[:1]


def rows_of(batch: Any, rows: Sequence[int]) -> Any:
    """These rows of everything in a batch that has as many as it has examples; of other parts all."""
    return _each_leaf(batch, partial(_rows, rows, examples_in(batch) or 0))


def _rows(rows: Sequence[int], size: int, leaf: Any) -> Any:
    if _size(leaf) != [size]:
        return leaf
    if isinstance(leaf, PackedSequence):
        sequences = unpack_sequence(leaf)
        return pack_sequence([sequences[row] for row in rows], enforce_sorted=False)
    if leaf.is_nested:
        parts = leaf.unbind()
        return torch.nested.as_nested_tensor([parts[row] for row in rows], layout=leaf.layout)
    if leaf.layout in _BY_INDEX:  # which cannot be sliced
        index = torch.tensor(rows, device=leaf.device)
        return leaf.to_sparse_coo().index_select(0, index).to_sparse(layout=leaf.layout)
    return leaf[: len(rows)] if isinstance(rows, range) else leaf[torch.tensor(rows, device=leaf.device)]


_BY_INDEX = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc}


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return PackedSequence(leaf.data.clone(), *leaf[1:])
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _each_leaf(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to everything in its tuples, lists, mappings and dataclasses."""
    if isinstance(value, PackedSequence):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each_leaf(part, change) for part in value))
    if type(value) in {tuple, list}:
        return type(value)(_each_leaf(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy(value)
        for name, part in fields_of(value).items():
            object.__setattr__(changed, name, _each_leaf(part, change))  # some are frozen
        return changed
    if isinstance(value, Mapping):
        changed = copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key in value:
            changed[key] = _each_leaf(value[key], change)
        return changed
    return change(value)
