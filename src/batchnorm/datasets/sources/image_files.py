"""Image files: the column "image", whose features are the channels. A piece is some files of a folder.

Where files are listed, a folder counts as one file: with another image in it, it is another folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import final

from batchnorm.datasets.blocks import Block, Selection
from batchnorm.datasets.sources.gathering import Gathering
from batchnorm.datasets.sources.images import channels_of, mode_of, pixels
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.packages import require_package
from batchnorm.datasets.sources.plans import FilePlan
from batchnorm.datasets.sources.schemas import Feature, FileSchema, Shape
from batchnorm.datasets.sources.stored_files import StoredFile
from batchnorm.files.remote import path_part

NAME = "image"
# Images that are fetched from a store at the same time: every request takes a while.
_FETCHED = 16


@final
@dataclass(frozen=True, slots=True)
class ImagePiece:
    """Some image files of a folder, each an example, converted to a mode of Pillow.

    Args:
        file: Address of the folder.
        fingerprint: What identifies the content of all images of the folder.
        files: The images of this piece.
        mode: The mode of Pillow.
    """

    file: str
    fingerprint: str
    files: tuple[StoredFile, ...]
    mode: str

    @property
    def key(self) -> str:
        """Name of this piece, the same in every run while none of its files changes."""
        return f"{_fingerprint(self.files)}:images {self.mode}"

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(each.size for each in self.files)

    def blocks(self, selection: Selection) -> Iterator[Block]:
        """The pixels of the images."""
        require_package("PIL", "images")
        gathering = Gathering()
        for stored, data in _contents(self.files):
            column = pixels(data, stored.address, self.mode)
            yield from gathering.add({NAME: column}, stored.partitions.get(selection.by) if selection.by else None)
        yield from gathering.rest()


def plan(files: Sequence[StoredFile], options: Options) -> list[FilePlan]:
    """The column of all images, and pieces of ``piece_images`` files.

    Raises:
        ValueError: If the mode is unknown, or the first image cannot be decoded.
        OSError: If the first image cannot be read.
    """
    require_package("PIL", "images")
    mode = options.mode or _first_mode(files[0])
    feature = Feature("number", (channels_of(mode),), "image", groups=False)

    def cut(_: Mapping[str, Shape]) -> Iterator[ImagePiece]:
        for folder, inside in _folders(files).items():
            fingerprint, many = _fingerprint(inside), max(1, options.piece_images)
            for start in range(0, len(inside), many):
                yield ImagePiece(folder, fingerprint, tuple(inside[start : start + many]), mode)

    return [FilePlan(FileSchema(files[0].address, {NAME: feature}, files[0].partitions), cut)]


def _folders(files: Sequence[StoredFile]) -> dict[str, list[StoredFile]]:
    """The files of each folder, by its address."""
    found: dict[str, list[StoredFile]] = {}
    for stored in files:
        path = path_part(stored.address)
        folder = stored.address.replace(path, path.rpartition("/")[0] or ".", 1)
        found.setdefault(folder, []).append(stored)
    return found


def _fingerprint(files: Sequence[StoredFile]) -> str:
    return sha256("\n".join(each.key("") for each in files).encode()).hexdigest()[:32]


def _first_mode(stored: StoredFile) -> str:
    return mode_of(_content(stored), stored.address)


def _content(stored: StoredFile) -> bytes:
    with stored.open() as file:
        return file.read()


def _contents(files: Sequence[StoredFile]) -> Iterator[tuple[StoredFile, bytes]]:
    """The bytes of every file; several files of a store are fetched at a time."""
    if files[0].is_local:
        yield from ((each, _content(each)) for each in files)
        return
    with ThreadPoolExecutor(_FETCHED) as threads:
        for start in range(0, len(files), _FETCHED):
            part = files[start : start + _FETCHED]
            yield from zip(part, threads.map(_content, part), strict=True)
