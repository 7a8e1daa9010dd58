"""Formats: which files have which format, by their suffixes and first bytes, and what reads them. One table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import final

from batchnorm.datasets.sources import csv_files, numpy_files, parquet
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.plans import FilePlan
from batchnorm.datasets.sources.stored_files import StoredFile


@final
@dataclass(frozen=True, slots=True)
class Format:
    """A format of files.

    Args:
        name: Its name, for ``Options.format``.
        suffixes: Endings of file names, in lower case.
        plan: Plans the reading of a file.
        magics: First bytes of its files, each with their place; () if files of this format can begin with any bytes.
    """

    name: str
    suffixes: tuple[str, ...]
    plan: Callable[[StoredFile, Options], FilePlan]
    magics: tuple[tuple[int, bytes], ...] = ()


FORMATS: tuple[Format, ...] = (
    Format("parquet", (".parquet", ".pq", ".parq"), parquet.plan, ((0, b"PAR1"),)),
    Format(
        "csv", tuple(f".{a}{b}" for a in ("csv", "tsv", "tab") for b in ("", ".gz", ".bz2", ".zst")), csv_files.plan
    ),
    Format("npy", (".npy",), numpy_files.plan_array, ((0, b"\x93NUMPY"),)),
    Format("npz", (".npz",), numpy_files.plan_archive, ((0, b"PK\x03\x04"), (0, b"PK\x05\x06"))),
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
    name = address.partition("::")[0].rstrip("/").lower()
    name = PurePosixPath(name.replace("\\", "/")).name
    if address.lower().startswith(("http://", "https://")):
        name = name.partition("?")[0].partition("#")[0]
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
    named = by_suffix(stored.address)
    with stored.open() as file:
        beginning = file.read(_BEGINNING)
    found = by_content(beginning)
    if found is None and named is not None and named.magics:
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


def mixed(formats: Iterable[tuple[str, Format]]) -> dict[str, list[str]]:
    """Addresses by the name of their format."""
    found: dict[str, list[str]] = {}
    for address, each in formats:
        found.setdefault(each.name, []).append(address)
    return found


def names(formats: Sequence[Format]) -> str:
    """Names of formats, as a list in words."""
    return ", ".join(each.name for each in formats)
