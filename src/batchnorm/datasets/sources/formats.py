"""Formats: which files have which format, by their suffixes and first bytes, and what reads them. One table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import final

from batchnorm.datasets.sources import (
    arrow_files,
    csv_files,
    image_files,
    images,
    numpy_files,
    parquet,
    tar_shards,
    zarr_stores,
)
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.plans import FilePlan, together
from batchnorm.datasets.sources.stored_files import StoredFile
from batchnorm.files.remote import path_part

Plan = Callable[[Sequence[StoredFile], Options], list[FilePlan]]


def _each(plan: Callable[[StoredFile, Options], FilePlan]) -> Plan:
    """Plans the reading of every file for itself."""
    return lambda files, options: together(lambda stored: plan(stored, options), files)


@final
@dataclass(frozen=True, slots=True)
class Format:
    """A format of files.

    Args:
        name: Its name, for ``Options.format``.
        suffixes: Endings of file names, in lower case.
        plan: Plans the reading of files.
        magics: Bytes at the beginning of its files, each with their place.
        is_certain: Whether all its files have one of ``magics``.
        is_opened: Whether the beginning of its files is looked at; not of images, of which there are many.
    """

    name: str
    suffixes: tuple[str, ...]
    plan: Plan
    magics: tuple[tuple[int, bytes], ...] = ()
    is_certain: bool = False
    is_opened: bool = True


ZARR = Format("zarr", (zarr_stores.SUFFIX,), _each(zarr_stores.plan), is_opened=False)
_COMPRESSED = ("", ".gz", ".bz2", ".zst")
FORMATS: tuple[Format, ...] = (
    Format("parquet", (".parquet", ".pq", ".parq"), _each(parquet.plan), ((0, b"PAR1"),), is_certain=True),
    Format("csv", tuple(f".{a}{b}" for a in ("csv", "tsv", "tab") for b in _COMPRESSED), _each(csv_files.plan)),
    Format("arrow", (".arrow", ".feather", ".ipc", ".arrows"), _each(arrow_files.plan), ((0, arrow_files.MAGIC),)),
    Format("npy", (".npy",), _each(numpy_files.plan_array), ((0, b"\x93NUMPY"),), is_certain=True),
    Format("npz", (".npz",), _each(numpy_files.plan_archive), ((0, b"PK\3\4"), (0, b"PK\5\6")), is_certain=True),
    Format("images", images.SUFFIXES, image_files.plan, is_opened=False),
    Format("tar", (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), _each(tar_shards.plan), ((257, b"ustar"),)),
    ZARR,
)
# bytes that are read to recognize a format
_BEGINNING = 512


def format_named(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: If there is none.
    """
    for each in FORMATS:
        if each.name == name:
            return each
    raise ValueError(
        f"expected a format of {', '.join(each.name for each in FORMATS)}, got {name!r}. Name one of them."
    )


def by_suffix(address: str) -> Format | None:
    """The format of a file by its name; None if no format has its suffix."""
    path = path_part(address)
    if path.lower().startswith(("http://", "https://")):
        path = path.partition("?")[0].partition("#")[0]
    name = PurePosixPath(path.rstrip("/").replace("\\", "/")).name.lower()
    return next((each for each in FORMATS if name.endswith(each.suffixes)), None)


def by_content(beginning: bytes) -> Format | None:
    """The format whose magic bytes a file begins with; None if there is none."""
    for each in FORMATS:
        if any(beginning[place:].startswith(magic) for place, magic in each.magics):
            return each
    return None


def format_of(stored: StoredFile) -> Format:
    """The format of a file: by its suffix, unless its first bytes are those of another format.

    Raises:
        ValueError: If neither suffix nor first bytes are those of a format, or they contradict the suffix.
        OSError: If the file cannot be read.
    """
    named = ZARR if stored.is_folder else by_suffix(stored.address)
    if named is not None and not named.is_opened:
        return named
    with stored.open(ahead=False) as file:
        beginning = file.read(_BEGINNING)
    found = by_content(beginning)
    if found is None and named is not None and named.is_certain:
        raise ValueError(
            f"expected a file of format {named.name}, as its name says, got {stored.address}, which begins with "
            f"{beginning[:8]!r}. Write it again, or say its format (format, --format)."
        )
    found = found or named
    if found is None:
        raise ValueError(f"expected a file of a known format, got {stored.address}. {supported()}")
    return found


def supported() -> str:
    """Which formats there are, in a sentence."""
    return "Formats: " + "; ".join(f"{each.name} ({' '.join(each.suffixes)})" for each in FORMATS) + "."
