"""Zarr: a store is a folder with an array, the column "values", or with a group of arrays, each a column.

A piece is a range of rows that begins at a chunk, or at a shard where chunks are in shards. By Zarr's definition a
chunk that is not in the store has the fill value of its array, so that a chunk which was lost is not noticed. The
fingerprint of a store is that of all its files when the job is planned; it is not compared again for every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, final

import numpy as np

from batchnorm.datasets.sources.array_axes import NAME
from batchnorm.datasets.sources.array_pieces import plan_arrays
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.packages import require_package
from batchnorm.datasets.sources.plans import FilePlan
from batchnorm.datasets.sources.schemas import Shape
from batchnorm.datasets.sources.stored_files import StoredFile
from batchnorm.files.remote import details, tree

if TYPE_CHECKING:
    import zarr

SUFFIX = ".zarr"
# the files that make a folder a store, of version 3 and 2
_MARKS = ("zarr.json", ".zgroup", ".zarray")


@final
@dataclass(frozen=True, slots=True)
class ZarrArray:
    """An array of a store, with its place in the store: "" if the store is the array."""

    name: str
    path: str
    shape: Shape
    dtype: np.dtype
    step: int

    @contextmanager
    def reader(self, stored: StoredFile) -> Iterator[Callable[[int, int], np.ndarray]]:
        """A function that reads the rows ``first`` to ``last - 1``.

        Raises:
            ValueError: If the store is damaged.
            OSError: If it cannot be read.
        """
        with _damage(stored):
            array = {path: each for _, path, each in _arrays(_opened(stored))}[self.path]
            yield lambda first, last: np.asarray(array[first:last])


def store_of(file: str) -> str | None:
    """The store in which a file is, by the ending .zarr of a folder; None if there is none."""
    parts = file.split("/")
    place = next((i for i, part in enumerate(parts) if part.lower().endswith(SUFFIX)), None)
    return None if place is None else "/".join(parts[: place + 1])


def is_store(address: str) -> bool:
    """Whether a folder is a store."""
    return any(_exists(f"{address.rstrip('/')}/{mark}") for mark in _MARKS)


def _exists(address: str) -> bool:
    try:
        details(address)
    except (OSError, ValueError):
        return False
    return True


def stored_at(address: str) -> StoredFile:
    """The store at an address; its fingerprint is that of all files in it.

    Raises:
        OSError: If it cannot be listed.
    """
    files = tree(address)
    text = "\n".join(f"{name} {about.size} {about.version}" for name, about in files)
    fingerprint = sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return StoredFile(address, fingerprint, sum(about.size for _, about in files), is_folder=True)


def plan(stored: StoredFile, options: Options) -> FilePlan:
    """The columns of a store, from its metadata, and its pieces.

    Raises:
        ValueError: If it is no store of Zarr, or damaged, or has no arrays.
        OSError: If it cannot be read.
    """
    require_package("zarr", "Zarr stores", "zarr")
    with _damage(stored):
        arrays = [_array(name, path, each) for name, path, each in _arrays(_opened(stored))]
    if not arrays:
        raise ValueError(f"expected a Zarr store with arrays, got {stored.address} without. Name a store with arrays.")
    return plan_arrays(stored, arrays, options)


def _opened(stored: StoredFile) -> zarr.Array | zarr.Group:
    import zarr

    return zarr.open(stored.address, mode="r")


def _arrays(root: zarr.Array | zarr.Group) -> Iterable[tuple[str, str, zarr.Array]]:
    import zarr

    if isinstance(root, zarr.Array):
        return [(NAME, "", root)]
    members = ((path, each) for path, each in root.members(max_depth=None) if isinstance(each, zarr.Array))
    return sorted((path, path, each) for path, each in members)


def _array(name: str, path: str, array: zarr.Array) -> ZarrArray:
    stored_together = array.shards or array.chunks
    return ZarrArray(name, path, array.shape, np.dtype(array.dtype), stored_together[0] if stored_together else 1)


@contextmanager
def _damage(stored: StoredFile) -> Iterator[None]:
    """A block that reads a store; errors of damaged content say which store it is, and what to do."""
    try:
        yield
    except GeneratorExit:
        raise
    except Exception as error:  # codecs and stores raise errors of many types
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"expected a Zarr store, got {stored.address}, which is damaged or no store: {error}. Write it again, or "
            "leave it out."
        ) from error
