"""Put numbers into tensors, and rewrite files of torch.save with them.

Dicts, lists and tensors stay the objects that torch.load made. So everything that is not edited is saved as it was,
with the same sharing of memory. Only devices are lost, because tensors are loaded to the CPU.
"""

from __future__ import annotations

import zipfile
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from batchnorm.checkpoint.averaged_copies import OF_A_LAYER, Keys
from batchnorm.checkpoint.tensor_loading import by_torch
from batchnorm.doctor.mending.tensor_edit import Edit

Place = tuple[Any, Any]  # a dict or list, and the key in it


@torch.no_grad()
def put(tensor: Tensor, values: array[float], channels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Put values into channels of a tensor, in place; a new tensor if the type changes or elements share memory."""
    flat = tensor.detach().to(dtype, copy=True).reshape(-1)
    index = torch.tensor(channels, dtype=torch.long, device=flat.device)
    flat[index] = torch.tensor([values[i] for i in channels], dtype=torch.float64).to(flat.device, dtype)
    repeats = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    if tensor.dtype != dtype or repeats:
        return flat.view(tensor.shape)
    tensor.data.copy_(flat.view(tensor.shape))
    return tensor


def write(source: Path, file: BinaryIO, edits: Sequence[Edit], prefixes: Mapping[Keys, str]) -> None:
    """Write ``source`` to an open file, with edited tensors and without the prefix of names.

    Args:
        source: A file of torch.save.
        file: Open for writing.
        edits: The new values.
        prefixes: Keys that lead to a dict: the prefix to remove from its names.

    Raises:
        ValueError: If torch does not load the file as tensors and plain values.
    """
    saved = by_torch(source)
    places = dict(_places(saved))
    new_tensors: dict[int, Tensor] = {}
    separate = set(_sharing_memory(edits, places))
    for key in separate:
        container, name = places[key]
        container[name] = container[name].clone()
    for edit in edits:
        _apply(edit, saved, places, new_tensors)
    for path, prefix in prefixes.items():
        _take_off(_at(saved, path), prefix)
    torch.save(saved, file, _use_new_zipfile_serialization=zipfile.is_zipfile(source))


def _places(saved: object) -> Iterator[tuple[Keys, Place]]:
    """The place of each tensor, with the keys that lead to it. An object that occurs twice is visited once."""
    # in the order of the checkpoint's reader, so that a dict that occurs twice gets the same keys as there
    waiting: list[tuple[Keys, Any]] = [((), saved)]
    visited: set[int] = set()
    while waiting:
        path, container = waiting.pop()
        if id(container) in visited:
            continue
        visited.add(id(container))
        items = list(container.items() if isinstance(container, dict) else enumerate(container))
        yield from (((*path, key), (container, key)) for key, value in items if isinstance(value, Tensor))
        waiting += [((*path, key), value) for key, value in reversed(items) if isinstance(value, dict | list | tuple)]


def _sharing_memory(edits: Sequence[Edit], places: Mapping[Keys, Place]) -> Iterator[Keys]:
    """Keys of edited tensors that share memory with a tensor that is not edited, or is edited in another way.

    For example, averaged weights may have been saved with the same statistics tensors as the model.
    """
    edited = {edit.key: edit for edit in edits if edit.key in places}
    views: dict[Keys, list[Keys]] = defaultdict(list)
    for key, (container, name) in places.items():
        if str(key[-1]).rpartition(".")[2] in OF_A_LAYER:
            tensor = container[name]
            memory = tensor.untyped_storage().data_ptr()
            views[memory, tensor.storage_offset(), tensor.shape, tensor.stride()].append(key)
    for keys in views.values():
        if any(not _is_same(edited.get(keys[0]), edited.get(key)) for key in keys):
            yield from (key for key in keys if key in edited)


def _is_same(a: Edit | None, b: Edit | None) -> bool:
    """Whether two tensors get the same values. None stands for a tensor that is not edited."""
    if a is None or b is None or (a.dtype, a.channels, a.count) != (b.dtype, b.channels, b.count):
        return a is b
    return a.values is b.values or repr(a.values) == repr(b.values)


def _apply(edit: Edit, saved: object, places: dict[Keys, Place], new_tensors: dict[int, Tensor]) -> None:
    if edit.values is None:
        _count(edit, saved, places)
        return
    if edit.key not in places:
        new = torch.tensor(edit.values, dtype=torch.float64).to(getattr(torch, edit.dtype))
        _insert(_at(saved, edit.key[:-1]), edit.key[-1], new)
        return
    container, key = places[edit.key]
    old = container[key]
    if id(old) not in new_tensors:
        new_tensors[id(old)] = put(old, edit.values, edit.channels, getattr(torch, edit.dtype))
    if new_tensors[id(old)] is not old:
        container[key] = new_tensors[id(old)]


def _count(edit: Edit, saved: object, places: dict[Keys, Place]) -> None:
    """Set a counter; in place if it is a tensor of one number, so that tensors that share its memory change too."""
    kind = getattr(torch, edit.dtype)
    if edit.key in places:
        container, key = places[edit.key]
        if container[key].numel() == 1 and container[key].dtype == kind:
            container[key].fill_(edit.count)
        else:
            container[key] = torch.tensor(edit.count, dtype=kind)
    else:
        _insert(_at(saved, edit.key[:-1]), edit.key[-1], torch.tensor(edit.count, dtype=kind))


def _module(name: object) -> str:
    return str(name).rpartition(".")[0]


def _insert(container: dict, name: object, tensor: Tensor) -> None:
    """Put a tensor under its name: in its old place, or after the last tensor of the layer as torch does; else last."""
    if name in container:
        container[name] = tensor
        return
    items = list(container.items())
    last = max((i for i, (key, _) in enumerate(items) if _module(key) == _module(name)), default=len(items) - 1)
    container.clear()
    container.update([*items[: last + 1], (name, tensor), *items[last + 1 :]])


def _at(saved: Any, path: Keys) -> Any:
    for key in path:
        saved = saved[key]
    return saved


def _take_off(state: dict, prefix: str) -> None:
    """Remove a prefix from all names, also in ``_metadata``, where torch stores the versions of modules."""
    metadata = getattr(state, "_metadata", None)
    for mapping in (state, metadata) if isinstance(metadata, dict) else (state,):
        items = list(mapping.items())
        mapping.clear()
        mapping.update((_without(key, prefix), value) for key, value in items)


def _without(key: object, prefix: str) -> object:
    if not isinstance(key, str):
        return key
    return "" if f"{key}." == prefix else key.removeprefix(prefix)
