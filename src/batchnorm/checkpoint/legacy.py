"""torch's format before 1.6, which ``_use_new_zipfile_serialization=False`` still writes.

Five pickles follow each other: a magic number, the protocol, facts about the system, what was saved, and the keys of
its storages. Then each storage's number of elements (8 bytes) and its bytes. All numbers are little-endian.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from batchnorm.checkpoint import pickles
from batchnorm.checkpoint.records import Record, Source, exactly
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief
from batchnorm.checkpoint.tensors import BYTES, Storage

if TYPE_CHECKING:
    from typing import BinaryIO

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read(file: BinaryIO) -> tuple[Any, Source]:
    """What was saved, and where its tensors' bytes are."""
    magic = pickles.load(file)
    if magic != _MAGIC:
        raise RefusalError("a file of torch.save", f"a plain pickle of {brief(magic)}", RESAVE)
    protocol = pickles.load(file)
    if protocol != _PROTOCOL:
        raise RefusalError(f"protocol {_PROTOCOL}", brief(protocol), RESAVE)
    pickles.load(file)
    storages: dict[str, Storage] = {}
    saved = pickles.load(file, storages)
    keys = pickles.load(file)
    return saved, Source(file, _records(file, keys, storages))


def _records(file: BinaryIO, keys: object, storages: dict[str, Storage]) -> dict[str, Record]:
    """Where each storage lies. Elements are of the type under which a storage was named first."""
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise RefusalError("a list of the storages' keys", brief(keys))
    at, end, records = file.tell(), file.seek(0, os.SEEK_END), {}
    for key in keys:
        numel = int.from_bytes(exactly(file, at, 8), "little")
        records[key] = Record(at + 8, numel * BYTES[storages[key].dtype])
        at += 8 + records[key].size
        if at > end:
            raise RefusalError(f"{numel} elements in storage {brief(key)}", "the end of the file: it was cut off")
    return records
