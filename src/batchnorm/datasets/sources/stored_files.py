"""Stored files: their addresses, sizes and fingerprints; a file that changed since a job was planned is not read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, final
from urllib.parse import unquote

from batchnorm.datasets.blocks import NO_GROUP
from batchnorm.files.remote import details, is_remote, opened, path_part

# the value of a partition whose rows have null, by the convention of Hive
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@final
@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as it was when the job was planned.

    Args:
        address: A local path, or an address of fsspec.
        fingerprint: What identifies the content: size and time of change, or size and the store's own tag.
        size: Bytes.
        is_folder: Whether it is a folder, such as a store of Zarr.
    """

    address: str
    fingerprint: str
    size: int
    is_folder: bool = False

    @staticmethod
    def at(address: str) -> StoredFile:
        """The file at an address, as it is now.

        Raises:
            OSError: If there is no such file, or it cannot be reached.
            ValueError: If it has no bytes.
        """
        about = details(address)
        if about.size == 0:
            raise ValueError(
                f"expected a file with data, got {address}, which has 0 bytes. Write it again, or leave it out."
            )
        return StoredFile(address, f"{about.size}-{about.version}", about.size)

    @property
    def is_local(self) -> bool:
        """Whether the address is a path of this machine."""
        return not is_remote(self.address)

    def key(self, part: object) -> str:
        """Name of a part of the file: the same in every run while the file does not change."""
        place = str(Path(self.address).absolute()) if self.is_local else self.address
        name = sha256(f"{place}\0{self.fingerprint}".encode("utf-8", "surrogateescape")).hexdigest()
        return f"{name[:32]}:{part}"

    def check(self) -> None:
        """Raise a ValueError if the file is no longer what it was.

        Raises:
            ValueError: If its size, time of change or tag differ.
            OSError: If it is not there, or cannot be reached.
        """
        about = details(self.address)
        if f"{about.size}-{about.version}" != self.fingerprint:
            raise ValueError(
                f"expected {self.address} as it was when the job was planned, got a file that changed since then. "
                "Start again when nothing writes to it."
            )

    @contextmanager
    def open(self, *, ahead: bool = True) -> Iterator[BinaryIO]:
        """The file, open for reading bytes; it can seek.

        Args:
            ahead: Whether a store is asked for more bytes than are read, because the next bytes are read soon.

        Raises:
            ValueError: If the file changed.
            OSError: If it cannot be read.
        """
        self.check()
        with opened(self.address, ahead=ahead) as file, self._reading_parts():
            if not file.seekable():
                raise ValueError("no range requests")
            yield file

    @contextmanager
    def _reading_parts(self) -> Iterator[None]:
        """A block that reads parts of the file; some servers only send whole files."""
        try:
            yield
        except ValueError as error:
            if "range requests" not in str(error):  # the words of fsspec
                raise
            raise OSError(
                f"{self.address} cannot be read in parts, because its server does not support range requests. Read it "
                f"through a copy on this machine: simplecache::{self.address}"
            ) from error

    @property
    def partitions(self) -> dict[str, str]:
        """What folders say of a file: {"year": "2024", "folder": "year=2024"} for t/year=2024/part.parquet."""
        folders = path_part(self.address).replace("\\", "/").split("/")[:-1]
        parts = (part.partition("=") for part in folders)
        found = {unquote(name): unquote(value) for name, is_one, value in parts if is_one and name}
        found = {name: NO_GROUP if value == _NO_PARTITION else value for name, value in found.items()}
        return {"folder": folders[-1] if folders else "", **found}


@dataclass(frozen=True, slots=True)
class FilePiece(ABC):
    """A piece of a single file.

    Args:
        stored: The file.
    """

    stored: StoredFile

    @property
    def file(self) -> str:
        """Address of the file."""
        return self.stored.address

    @property
    def fingerprint(self) -> str:
        """What identifies the content of the file."""
        return self.stored.fingerprint

    @property
    def key(self) -> str:
        """Name of this piece, the same in every run while the file does not change."""
        return self.stored.key(self.part)

    @property
    @abstractmethod
    def part(self) -> str:
        """Which part of the file this is, and how its values are read."""
