"""Files beside a checkpoint or data: tensors and JSON data in safetensors, written as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, final

from batchnorm.files import remote_writing
from batchnorm.files.remote import is_remote, opened, reaching
from batchnorm.files.whole import replacing

_HEADER = 8  # bytes of the length of a file's header
# torch's tensors, or NumPy's arrays, with which files are written and read without torch
_Tensor = TypeVar("_Tensor")


@final
@dataclass(frozen=True, slots=True)
class Sidecar(Generic[_Tensor]):
    """A kind of file beside a checkpoint or data.

    Args:
        kind: Part of the key batchnorm.``kind`` in a file's metadata, under which the file's JSON data are stored.
        suffix: The ending of all files of this kind.
        what: The kind in words, for errors, such as "a bank".
        version: Version of the contents; ``read`` refuses files of other versions.
        remedy: The last sentence of errors: how to make such a file.
        library: "torch" for tensors, "numpy" for arrays.
    """

    kind: str
    suffix: str
    what: str
    version: int
    remedy: str
    library: Literal["torch", "numpy"] = "torch"

    def write(self, path: str | os.PathLike[str], about: Mapping[str, object], tensors: Mapping[str, _Tensor]) -> None:
        """Write tensors, and the JSON data ``about`` with the version as metadata, to a path or an address of fsspec.

        Raises:
            ValueError: If the path does not end in ``suffix``, or fsspec does not know the protocol of the address.
            TypeError: If ``about`` is not JSON data.
            ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
            OSError: If the file cannot be written.
        """
        write_whole(self.named(path), self.to_bytes(about, tensors))

    def named(self, path: str | os.PathLike[str]) -> str:
        """The path or address as text, which must end in ``suffix``.

        Raises:
            ValueError: If it does not.
        """
        name = os.fspath(path)
        if not name.endswith(self.suffix):
            raise ValueError(
                f"{self.what} needs a file that ends in {self.suffix}, got {Path(name).name!r}. "
                f"Name it model{self.suffix}."
            )
        return name

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        """The JSON data and tensors of a file from ``write``, at a path or an address of fsspec.

        Raises:
            ValueError: If the file is of another kind or version, or not a safetensors file.
            ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
            OSError: If the file cannot be read.
        """
        return self.from_bytes(_content(os.fspath(path)), str(path))

    def to_bytes(self, about: Mapping[str, object], tensors: Mapping[str, _Tensor]) -> bytes:
        """The bytes of a file.

        Raises:
            TypeError: If ``about`` is not JSON data.
        """
        metadata = {f"batchnorm.{self.kind}": json.dumps({"version": self.version, **about})}
        return self._library.save({name: _contiguous(tensor) for name, tensor in tensors.items()}, metadata)

    def from_bytes(self, data: bytes, name: str) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        """The JSON data and tensors in the bytes of a file, which errors call ``name``.

        Raises:
            ValueError: If the bytes are of another kind or version, or damaged.
        """
        from safetensors import SafetensorError

        try:
            tensors = self._library.load(data)  # checks the header
            length = int.from_bytes(data[:_HEADER], "little")
            metadata = json.loads(data[_HEADER : _HEADER + length]).get("__metadata__") or {}
            about = json.loads(metadata.get(f"batchnorm.{self.kind}", "{}"))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name} is not {self.what}: {error}. {self.remedy}") from error
        version = about.pop("version", None) if isinstance(about, dict) else None
        if version != self.version:
            raise ValueError(f"{name} is not {self.what} of version {self.version}, got {version}. {self.remedy}")
        return about, tensors

    @property
    def _library(self) -> Any:
        return import_module(f"safetensors.{self.library}")


def _contiguous(tensor: Any) -> Any:
    if hasattr(tensor, "contiguous"):
        return tensor.contiguous()
    import numpy as np

    return np.ascontiguousarray(tensor)


def write_whole(name: str, data: bytes) -> None:
    """Write a local or remote file as a whole or not at all; an old file is replaced.

    Raises:
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
        OSError: If the file cannot be written.
    """
    if is_remote(name):
        remote_writing.write(name, data)
        return
    with replacing(Path(name).absolute()) as file:
        file.write(data)


def _content(name: str) -> bytes:
    """The bytes of a local or remote file."""
    if not is_remote(name):
        return Path(name).read_bytes()
    with opened(name) as file, reaching(name):
        return file.read()
