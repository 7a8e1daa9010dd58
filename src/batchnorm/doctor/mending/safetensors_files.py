"""Rewrite files of safetensors with other numbers, byte for byte, without the library and without torch.

A file begins with 8 bytes, the length of the header. The header is JSON: {"bn.weight": {"dtype": "F32", "shape": [64],
"data_offsets": [begin, end]}}. Offsets count from the end of the header. The bytes of the tensors follow each other
without gaps, wide types first.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypedDict

from batchnorm.checkpoint.averaged_copies import Keys
from batchnorm.doctor.mending.tensor_edit import Edit

# type: its name in the file, and struct's letter; bfloat16 is the upper half of a rounded float32
_TYPES = {
    "float64": ("F64", "d"),
    "float32": ("F32", "f"),
    "float16": ("F16", "e"),
    "bfloat16": ("BF16", "f"),
    "int64": ("I64", "q"),
    "int32": ("I32", "i"),
}
_ALIGNMENT = 8  # the first tensor begins at a multiple of so many bytes
_PIECE = 1 << 20  # bytes copied at once


class TensorEntry(TypedDict):
    """A tensor's entry in the header. A new tensor has sys.maxsize as offsets until its place is known."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def write(source: Path, file: BinaryIO, edits: Sequence[Edit], prefixes: Mapping[Keys, str]) -> None:
    """Write ``source`` to an open file, with edited tensors and without the prefix of names.

    Everything that is not edited keeps its bytes. Tensors keep their order if none is added and no size changes.
    """
    prefix = prefixes.get((), "")
    with source.open("rb") as old:
        length = int.from_bytes(old.read(8), "little")
        header = json.loads(old.read(length))
        metadata = header.pop("__metadata__", None)
        edited = {edit.name: _bytes(old, 8 + length, header.get(edit.name), edit) for edit in edits}
        layout = dict(_layout(header, edited, edits))
        entries = {name.removeprefix(prefix): entry for name, entry in layout.items()}
        file.write(_header(entries if metadata is None else {"__metadata__": metadata, **entries}))
        for name in sorted(layout, key=lambda name: layout[name]["data_offsets"]):
            if name in edited:
                file.write(edited[name])
            else:
                _copy(old, file, 8 + length, *header[name]["data_offsets"])


def _header(named: Mapping[str, TensorEntry | Mapping[str, str]]) -> bytes:
    text = json.dumps(named, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _layout(
    header: Mapping[str, TensorEntry], fresh: Mapping[str, bytes], edits: Sequence[Edit]
) -> Iterator[tuple[str, TensorEntry]]:
    """Entries of the new header: the old entries in their order, then the new entries."""
    dtypes = {edit.name: _TYPES[edit.dtype][0] for edit in edits}
    sizes = {name: len(data) for name, data in fresh.items()}
    entries = {
        name: TensorEntry(
            dtype=dtypes.get(name, entry["dtype"]), shape=entry["shape"], data_offsets=entry["data_offsets"]
        )
        for name, entry in header.items()
    }
    for edit in edits:
        entry = entries.get(edit.name)
        if edit.values is None and entry and math.prod(entry["shape"]) != 1:
            entry["shape"] = []  # a counter is one number
    new = [name for name in fresh if name not in header]
    shapes = {edit.name: [] if edit.values is None else [len(edit.values)] for edit in edits}
    entries |= {name: {"dtype": dtypes[name], "shape": shapes[name], "data_offsets": [sys.maxsize] * 2} for name in new}
    order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    if any(name not in header or sizes[name] != _size(header[name]) for name in fresh):
        order.sort(key=lambda name: -_item(entries[name], sizes.get(name)))
    begin, offsets = 0, {}
    for name in order:
        end = begin + sizes.get(name, _size(entries[name]))
        offsets[name], begin = [begin, end], end
    for name, entry in entries.items():
        yield name, TensorEntry(dtype=entry["dtype"], shape=entry["shape"], data_offsets=offsets[name])


def _size(entry: TensorEntry) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def _item(entry: TensorEntry, size: int | None) -> float:
    """Bytes of one element; 0 for an empty tensor, whose place does not matter."""
    count = math.prod(entry["shape"])
    return (_size(entry) if size is None else size) / count if count else 0


def _bytes(old: BinaryIO, start: int, entry: TensorEntry | None, edit: Edit) -> bytes:
    """The bytes of an edited tensor. Channels that are not edited keep their bytes."""
    if edit.values is None:
        return _packed(array("q", [edit.count]), edit.dtype)
    if entry is None or entry["dtype"] != _TYPES[edit.dtype][0]:
        return _packed(edit.values, edit.dtype)
    begin, end = entry["data_offsets"]
    old.seek(start + begin)
    data = bytearray(old.read(end - begin))
    item = len(data) // len(edit.values)
    for channel in edit.channels:
        data[channel * item : (channel + 1) * item] = _packed(edit.values[channel : channel + 1], edit.dtype)
    return bytes(data)


def _packed(values: array, dtype: str) -> bytes:
    """The bytes of numbers in the file's type; bfloat16 rounds to nearest, ties to even."""
    letter = _TYPES[dtype][1]
    if dtype != "bfloat16":
        return struct.pack(f"<{len(values)}{letter}", *values)
    words = array("I", struct.pack(f"={len(values)}f", *values))
    halves = array("H", ((word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words))
    if sys.byteorder == "big":
        halves.byteswap()
    return halves.tobytes()


def _copy(old: BinaryIO, file: BinaryIO, start: int, begin: int, end: int) -> None:
    old.seek(start + begin)
    remaining = end - begin
    while remaining and (piece := old.read(min(remaining, _PIECE))):
        file.write(piece)
        remaining -= len(piece)
