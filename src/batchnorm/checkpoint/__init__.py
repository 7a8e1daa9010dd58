"""checkpoint: the batch norm layers in a file, read without torch and without running any code of the file.

``read`` knows torch.save's two formats, plain pickles, safetensors and ONNX. It recognizes them by their content, not
by the suffix. Little else than batch norm's tensors is read, so even a file of gigabytes is read quickly.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from batchnorm.checkpoint import layers_in_file
from batchnorm.checkpoint.formats import detection, other_files, safetensors_file, torch_legacy, torch_zip
from batchnorm.checkpoint.refusal import DAMAGED, RefusalError
from batchnorm.checkpoint.stored import Checkpoint, Shared, State, Stored

__all__ = ["Checkpoint", "Shared", "State", "Stored", "format_of", "read"]

# the type of the result of ``look``
Seen = TypeVar("Seen")
_READERS = {
    "pt": torch_zip.read,
    "legacy": torch_legacy.read,
    "pickle": torch_legacy.read_pickle,
    "safetensors": safetensors_file.read,
}
# errors that readers raise on bytes of no known format
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The batch norm layers in a file, and what concerns them; ``layers`` is empty if the file has none.

    Nothing in the file is executed. Of a pickle only tensors and plain values are read, and of a whole module its
    tensors; the classes of other objects are named in ``unread``. Bytes that are used are compared with their CRC, if
    the format has a CRC.

    Args:
        path: A file of torch.save (.pt, .pth, .ckpt, .bin), a pickle of tensors or NumPy arrays (.pkl), .safetensors
            or .onnx.

    Raises:
        ValueError: If the path is not a file of these formats, or the file is damaged or would run code when loaded.
        FileNotFoundError: If there is no such file.
        PermissionError: If the file may not be read.
        ModuleNotFoundError: If it is an ONNX file and ``onnx`` is not installed.
    """
    return _opened(path, _contents)


def format_of(path: str | os.PathLike[str]) -> str:
    """The format of a file: "pt" (torch.save), "pickle", "safetensors" or "onnx", by its bytes; errors as ``read``."""
    return _opened(path, lambda _, file: "pt" if (kind := detection.of(file)) == "legacy" else kind)


def _opened(path: str | os.PathLike[str], look: Callable[[str, BinaryIO], Seen]) -> Seen:
    """The result of ``look`` for an open file; a ``ValueError`` if the file is refused or damaged."""
    place = Path(path)
    try:
        return _looked_at(place, look)
    except (FileNotFoundError, ModuleNotFoundError):
        raise
    except PermissionError as error:
        raise PermissionError(f"{place} cannot be read: {error.strerror}. Make it readable.") from None
    except RefusalError as refusal:
        raise ValueError(f"{place}: {refusal}") from None
    except _DAMAGE as error:
        raise ValueError(f"{place}: expected a whole file, got {type(error).__name__}: {error}. {DAMAGED}") from error


def _looked_at(place: Path, look: Callable[[str, BinaryIO], Seen]) -> Seen:
    if not place.exists():
        raise FileNotFoundError(f"{place}: expected a file, got no such path. Check its spelling.")
    if place.is_dir():
        raise RefusalError("a file", *other_files.of_folder(place))
    if not place.is_file():
        raise RefusalError("a file", "a device or pipe", "Give the file that holds the weights.")
    with place.open("rb") as file:
        return look(str(place), file)


def _contents(path: str, file: BinaryIO) -> Checkpoint:
    kind = detection.of(file)
    file.seek(0)
    if kind == "onnx":
        return _contents_of_onnx(path, file)
    saved, source = _READERS[kind](file)
    return layers_in_file.checkpoint(path, "pt" if kind == "legacy" else kind, saved, source)


def _contents_of_onnx(path: str, file: BinaryIO) -> Checkpoint:
    try:
        import onnx  # noqa: F401 - the reader needs it

        from batchnorm.checkpoint.formats import onnx_layers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading an ONNX file needs {error.name}, which is not installed. Run: pip install 'batchnorm[onnx]'",
            name=error.name,
        ) from None
    return onnx_layers.read(path, file)
