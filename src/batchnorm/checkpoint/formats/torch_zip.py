"""torch's zip format: a pickle ``data.pkl`` and one record ``data/<key>`` of raw bytes for each storage."""

from __future__ import annotations

import io
import zipfile
from typing import BinaryIO

from batchnorm.checkpoint.formats import other_files
from batchnorm.checkpoint.formats.checked_records import FileRecord, Source
from batchnorm.checkpoint.pickled import stack_machine
from batchnorm.checkpoint.pickled.unknown_classes import Saved
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief

_ENCRYPTED = 1  # bit of an entry's flags
_PICKLE = "data.pkl"


def read(file: BinaryIO) -> tuple[Saved, Source]:
    """The saved value, and the source of its tensors' bytes."""
    entries = _entries(file)
    if entries and min(entry.header_offset for entry in entries.values()):
        raise RefusalError("a file of torch.save", *other_files.of_shards(str(getattr(file, "name", ""))))
    folder = _folder(entries)
    records = {name.removeprefix(folder): _record(entry) for name, entry in entries.items() if name.startswith(folder)}
    if records[_PICKLE].size > stack_machine.LARGEST:
        raise RefusalError(f"a pickle of at most {stack_machine.LARGEST:,} bytes", f"{records[_PICKLE].size:,}", RESAVE)
    source = Source(file, {name.removeprefix("data/"): record for name, record in records.items()})
    pickle = source.read(_PICKLE)
    return stack_machine.load(io.BytesIO(pickle)), Source(file, source.records, _byteorder(source))


def _entries(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {entry.filename: entry for entry in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise RefusalError("a whole zip file", f"one that was cut off or changed ({error})") from error


def _folder(entries: dict[str, zipfile.ZipInfo]) -> str:
    """The folder in the zip file with which every record's name starts."""
    if named := other_files.of_zip(entries):
        raise RefusalError("a state dict", *named)
    name = next((name for name in entries if name.endswith(f"/{_PICKLE}")), None)
    if name is None:
        raise RefusalError("a file of torch.save", f"a zip file without {_PICKLE}", RESAVE)
    return name.removesuffix(_PICKLE)


def _record(entry: zipfile.ZipInfo) -> FileRecord:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        raise RefusalError(
            "bytes stored as they are, as torch writes them",
            f"{brief(entry.filename)} compressed or encrypted",
            "Unpack it and save it again with torch.save.",
        )
    return FileRecord(entry.header_offset, entry.file_size, entry.CRC, zipped=True)


def _byteorder(source: Source) -> str:
    """The byte order of the machine that saved the file: torch 2.1 and later store it; "little" if it is missing."""
    if "byteorder" not in source.records:
        return "little"
    text = source.read("byteorder", 0, min(source.size("byteorder"), 80)).decode("latin-1")
    if text not in {"little", "big"}:
        raise RefusalError("byteorder little or big", brief(text))
    return text
