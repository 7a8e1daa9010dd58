"""The safetensors format: 8 bytes with the header's length, a JSON header, then every tensor's bytes.

The header has for each tensor {"dtype": "F32", "shape": [64], "data_offsets": [begin, end]}; offsets are counted from
the header's end.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, BinaryIO, TypeAlias

from batchnorm.checkpoint.file_tensors import BYTES, Storage, Tensor, contiguous
from batchnorm.checkpoint.formats.checked_records import FileRecord, Source, exactly
from batchnorm.checkpoint.refusal import RefusalError, brief

# a value of the header, which may be of any type
Json: TypeAlias = Any
_LONGEST_HEADER = 1 << 25  # bytes, which are enough for 300,000 tensors
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def read(file: BinaryIO) -> tuple[dict[str, Tensor], Source]:
    """The tensors by name, and the source of their bytes; tensors of types that batch norm never has are left out."""
    length = int.from_bytes(exactly(file, 0, 8), "little")
    if length > _LONGEST_HEADER:
        raise RefusalError(f"a header of at most {_LONGEST_HEADER:,} bytes", f"{length:,}")
    header = json.loads(exactly(file, 8, length), object_pairs_hook=_named)
    start, end = 8 + length, file.seek(0, os.SEEK_END)
    if not isinstance(header, dict):
        raise RefusalError("a header with a name for each tensor", brief(header))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    records = {name: _record(name, tensors[name], entry, start, end) for name, entry in header.items()}
    _apart(records)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, Source(file, records)


def _named(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A JSON object as a dict; refused if a name occurs twice."""
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusalError("each name once in the header", f"{brief(twice)} twice")
    return named


def _apart(records: Mapping[str, FileRecord]) -> None:
    """Refuse records that overlap: each byte must belong to one tensor."""
    ordered = sorted(((record.start, record.start + record.size, name) for name, record in records.items()))
    for (_, stop, name), (begin, _, other) in pairwise(span for span in ordered if span[0] < span[1]):
        if begin < stop:
            raise RefusalError("bytes of its own for each tensor", f"{brief(name)} and {brief(other)} overlapping")


def _tensor(name: str, entry: Json) -> Tensor | None:
    """The tensor; None for a type that no batch norm layer has."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise RefusalError(f"dtype, shape and data_offsets of {brief(name)}", brief(entry))
    shape, dtype = entry["shape"], _TYPES.get(str(entry["dtype"]))
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise RefusalError(f"whole numbers as shape of {brief(name)}", brief(shape))
    return None if dtype is None else contiguous(Storage(name, dtype, math.prod(shape[:64])), tuple(shape))


def _record(name: str, tensor: Tensor | None, entry: Json, start: int, end: int) -> FileRecord:
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise RefusalError(f"two whole numbers as data_offsets of {brief(name)}", brief(offsets))
    begin, stop = offsets
    if not 0 <= begin <= stop <= end - start:
        raise RefusalError(
            f"{brief(name)} inside the {end - start:,} bytes of data",
            f"bytes {brief(begin)} to {brief(stop)}: the file was cut off or changed",
        )
    if tensor is not None and stop - begin != tensor.storage.numel * BYTES[tensor.dtype]:
        raise RefusalError(f"{brief(tensor.storage.numel)} elements in {brief(name)}", f"{stop - begin} bytes")
    return FileRecord(start + begin, stop - begin)
