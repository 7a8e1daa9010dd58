"""Files beside a checkpoint: tensors and JSON data in safetensors, written as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.files.whole import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor


def named(path: str | os.PathLike[str], suffix: str, what: str, remedy: str) -> Path:
    """The path of a file that is to be written.

    Args:
        path: Must end in ``suffix``.
        suffix: The ending of all files of this kind.
        what: The kind of file in words, for the error, such as "a bank".
        remedy: The last sentence of the error: what to do.

    Raises:
        ValueError: If ``path`` does not end in ``suffix``.
    """
    path = Path(path)
    if not path.name.endswith(suffix):
        raise ValueError(f"{what} needs a file that ends in {suffix}, got {path.name!r}. {remedy}")
    return path


def write(path: Path, kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and the JSON data ``about`` as metadata named batchnorm.``kind``, to a safetensors file.

    Raises:
        TypeError: If ``about`` is not JSON data.
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save

    metadata = {f"batchnorm.{kind}": json.dumps(about)}
    with replacing(path.absolute()) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read(path: str | os.PathLike[str], kind: str, what: str, remedy: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON data and tensors of a file from ``write``; the data are {} if the file is of another kind.

    Args:
        path: The file.
        kind: The kind that was passed to ``write``.
        what: The kind of file in words, for the error, such as "a bank".
        remedy: The last sentence of the error: what to do.

    Raises:
        ValueError: If it is not a safetensors file, or its data are not JSON.
        OSError: If it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        Path(path).open("rb").close()  # raises Python's error for a missing file
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(f"batchnorm.{kind}", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not {what}: {error}. {remedy}") from error
    return about if isinstance(about, dict) else {}, tensors
