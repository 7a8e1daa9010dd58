"""torch's format before 1.6, which ``_use_new_zipfile_serialization=False`` still writes.

Five pickles follow each other: a magic number, the protocol, facts about the system, what was saved, and the keys of
its storages. After the pickles each storage follows: its number of elements (8 bytes), then its bytes. All numbers are
little-endian.

``read_pickle`` reads a file of pickle.dump, which is one pickle. The bytes of NumPy arrays are in the pickle. Each
torch storage in it is stored as a whole file of torch.save, in this format.
"""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from batchnorm.checkpoint.file_tensors import BYTES, Held, Span, Storage
from batchnorm.checkpoint.formats.checked_records import FileRecord, Source, exactly
from batchnorm.checkpoint.pickled import stack_machine
from batchnorm.checkpoint.pickled.unknown_classes import Saved
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LONGEST_HEAD = 1 << 16  # bytes of the pickles before a single storage


def read(file: BinaryIO) -> tuple[Saved, Source]:
    """The saved value, and the source of its tensors' bytes."""
    saved, keys, storages = _pickles(file)
    start = file.tell()
    return saved, Source(file, _records(file, keys, storages, start, file.seek(0, os.SEEK_END)))


def read_pickle(file: BinaryIO) -> tuple[Saved, Source]:
    """The value of a plain pickle, whose tensors contain their bytes, and a source without records."""
    return stack_machine.load(file, nested=_storage_in_bytes), Source(file, {})


def _pickles(file: BinaryIO) -> tuple[Saved, object, dict[str, Storage]]:
    """The saved value, the keys of its storages in the file's order, and the storages by key."""
    magic = stack_machine.load(file)
    if magic != _MAGIC:
        raise RefusalError("a file of torch.save", f"a plain pickle of {brief(magic)}", RESAVE)
    protocol = stack_machine.load(file)
    if protocol != _PROTOCOL:
        raise RefusalError(f"protocol {_PROTOCOL}", brief(protocol), RESAVE)
    stack_machine.load(file)
    storages: dict[str, Storage] = {}
    saved = stack_machine.load(file, storages)
    return saved, stack_machine.load(file), storages


def _storage_in_bytes(data: bytes | str | Span) -> Storage:
    """The one storage in ``data``: the bytes of a file of torch.save, which are themselves inside of a pickle."""
    held = Held.of(data)
    if held is None:
        raise RefusalError("the bytes of a storage", brief(data))
    head = io.BytesIO(held.read(0, min(held.size, _LONGEST_HEAD)))
    saved, keys, storages = _pickles(head)
    if not isinstance(saved, Storage):
        raise RefusalError("a storage", brief(saved))
    record = _records(head, keys, storages, head.tell(), held.size)[saved.key]
    start, stop = record.start, record.start + record.size
    part = Span(data.file, data.start + start, record.size) if isinstance(data, Span) else data[start:stop]
    return Storage(saved.key, saved.dtype, saved.numel, Held(part, "little"))


def _records(file: BinaryIO, keys: object, storages: dict[str, Storage], start: int, end: int) -> dict[str, FileRecord]:
    """The bytes of each storage, by key. The file ends at ``end``.

    The storages follow each other from ``start``; before each are 8 bytes with its number of elements. If the pickle
    names a storage several times, with different types, the first type counts.
    """
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise RefusalError("a list of the storages' keys", brief(keys))
    at, records = start, {}
    for key in keys:
        numel = int.from_bytes(exactly(file, at, 8), "little")
        records[key] = FileRecord(at + 8, numel * BYTES[storages[key].dtype])
        at += 8 + records[key].size
        if at > end:
            raise RefusalError(f"{numel} elements in storage {brief(key)}", "the end of the file: it was cut off")
    return records
