"""Tar shards of WebDataset: members whose names differ only after the first dot are one example. A piece is a shard.

The ending of a member's name says what it is. Images are the column "image", or columns with the names of their endings
if an example has several; the array in a member ``key.NAME.npy`` or ``key.npy`` is the column ``NAME.npy`` or ``npy``.
Other members are not measured; the text of ``key.cls`` or ``key.txt`` can be the group. Nothing is written to disk.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, final

import numpy as np

from batchnorm.datasets.blocks import NO_GROUP, Block, Column, Selection
from batchnorm.datasets.sources.array_axes import Axes, column_of, feature_of
from batchnorm.datasets.sources.gathering import Gathering
from batchnorm.datasets.sources.images import SUFFIXES, channels_of, mode_of, pixels
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.packages import require_package
from batchnorm.datasets.sources.plans import FilePlan, empty_block
from batchnorm.datasets.sources.schemas import Feature, FileSchema, Shape, names_of
from batchnorm.datasets.sources.stored_files import FilePiece, StoredFile

_TEXTS = ("cls", "txt")
# a member of more bytes is no example
_LARGEST = 1 << 30
# examples that are looked at to find the columns
_EXAMPLES = 8

Example = dict[str, tuple[str, bytes]]


@final
@dataclass(frozen=True, slots=True)
class TarPiece(FilePiece):
    """A shard.

    Args:
        features: The columns, by name.
        endings: For each ending of members the column that it is.
        mode: The mode of Pillow to which images are converted.
        axes: The channel axes of arrays, counted as if axis 0 had the examples.
    """

    features: tuple[tuple[str, Feature], ...]
    endings: tuple[tuple[str, str], ...]
    mode: str
    axes: Axes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stored.size

    @property
    def part(self) -> str:
        """Which part of the file this is, and how its values are read."""
        return f"shard, {self.mode}, axis {self.axes}"

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The examples of the shard."""
        features = dict(self.features)
        names = names_of(selection, features)
        endings = {ending: name for ending, name in self.endings if name in names}
        gathering, by = Gathering(), selection.by
        constant = self.stored.partitions.get(by) if by not in features else None
        seen = False
        for example in _examples(self.stored, {*endings, by}):
            group = constant if constant is not None or not by else _text(example, by)
            yield from gathering.add(self._columns(example, endings, features), group)
            seen = True
        yield from gathering.rest()
        if not seen:
            yield empty_block({name: features[name].shape or () for name in names})

    def _columns(self, example: Example, endings: dict[str, str], features: dict[str, Feature]) -> dict[str, Column]:
        found: dict[str, Column] = {}
        for ending, name in endings.items():
            if ending not in example:
                continue
            member, data = example[ending]
            column = _column(data, f"{self.file}: {member}", ending, self.mode, self.axes)
            if column.values.shape[1:] != features[name].shape:
                raise ValueError(
                    f"expected shape {features[name].shape} of the features of {name!r} as in the first examples, got "
                    f"{column.values.shape[1:]} in {self.file}: {member}. Leave out what differs."
                )
            found[name] = column
        missing = set(endings.values()) - set(found)
        if missing:
            member = next(iter(example.values()))[0]
            raise ValueError(
                f"expected {', '.join(sorted(missing))} in every example, got {self.file}: {member} without. Measure "
                "columns that every example has."
            )
        return found


def plan(stored: StoredFile, options: Options) -> FilePlan:
    """The columns of a shard, from its first examples.

    Raises:
        ValueError: If the file is damaged or no tar file.
        OSError: If it cannot be read.
    """
    first: Example = {}
    for example in islice(_examples(stored, None), _EXAMPLES):
        first = {**example, **first}
    images = [ending for ending in first if _is_image(ending)]
    endings = {ending: "image" if [ending] == images else ending for ending in first}
    mode = options.mode
    if images:
        require_package("PIL", "images")
        mode = mode or mode_of(first[images[0]][1], f"{stored.address}: {first[images[0]][0]}")
    features = {
        name: _feature(stored, ending, first[ending], mode, options.channel_axis) for ending, name in endings.items()
    }

    def cut(_: Mapping[str, Shape]) -> Iterator[TarPiece]:
        yield TarPiece(stored, tuple(features.items()), tuple(endings.items()), mode, options.channel_axis)

    return FilePlan(FileSchema(stored.address, features, stored.partitions), cut)


def _is_image(ending: str) -> bool:
    return f".{ending}".endswith(SUFFIXES)


def _feature(stored: StoredFile, ending: str, member: tuple[str, bytes], mode: str, axes: Axes) -> Feature:
    name, data = member
    if _is_image(ending):
        return Feature("number", (channels_of(mode),), "image", groups=False)
    if ending.endswith("npy"):
        array = _array(data, f"{stored.address}: {name}")
        return feature_of(array.dtype, (1, *array.shape), axes, name)
    return Feature("other", (), f".{ending}", ending in _TEXTS)


def _column(data: bytes, name: str, ending: str, mode: str, axes: Axes) -> Column:
    return pixels(data, name, mode) if _is_image(ending) else column_of(_array(data, name)[None], axes)


def _array(data: bytes, name: str) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"expected an array of numbers, got {name}, which is damaged or has pickled objects, which are not loaded "
            f"({error}). Write it again."
        ) from error


def _text(example: Example, ending: str) -> str:
    return example[ending][1][:1024].decode("utf-8", "backslashreplace").strip() if ending in example else NO_GROUP


def _examples(stored: StoredFile, endings: set[str] | None) -> Iterator[Example]:
    """For every example its members with these endings, each with its name and bytes; the bytes of all if None."""
    example: Example = {}
    before = None
    with stored.open() as file, _damage(stored):
        for member, archive in _members(file):
            key, _, ending = _split(member.name)
            if key != before and example:
                yield example
                example = {}
            before = key
            if member.size > _LARGEST:
                raise ValueError(f"member {member.name} has {member.size} bytes")
            example[ending] = (member.name, _bytes(archive, member) if endings is None or ending in endings else b"")
        if example:
            yield example


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                yield member, archive
            # of a long archive, tarfile would keep the names of all members
            archive.members = []  # pyrefly: ignore[missing-attribute]


def _split(name: str) -> tuple[str, str, str]:
    """Folder and name up to the first dot, and the ending after it, in lower case."""
    folder, slash, last = name.rpartition("/")
    key, dot, ending = last.partition(".")
    return f"{folder}{slash}{key}", dot, ending.lower()


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    return content.read() if content else b""


@contextmanager
def _damage(stored: StoredFile) -> Iterator[None]:
    """A block that reads a shard; errors of damaged content say which file it is, and what to do."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        if stored.address in str(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        why = " ".join(str(error).split())
        raise ValueError(
            f"expected a tar file, got {stored.address}, which is damaged or no tar file: {why}. Write it again, or "
            "leave it out."
        ) from error
