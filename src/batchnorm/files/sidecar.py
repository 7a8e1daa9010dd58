"""Files beside a checkpoint: tensors and JSON data in safetensors, written as a whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from batchnorm.files.whole import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Sidecar:
    """A kind of file beside a checkpoint.

    Args:
        kind: Part of the key batchnorm.``kind`` in a file's metadata, under which the file's JSON data are stored.
        suffix: The ending of all files of this kind.
        what: The kind in words, for errors, such as "a bank".
        version: Version of the contents; ``read`` refuses files of other versions.
        remedy: The last sentence of errors: how to make such a file.
    """

    kind: str
    suffix: str
    what: str
    version: int
    remedy: str

    def write(self, path: str | os.PathLike[str], about: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, and the JSON data ``about`` with the version as metadata.

        Raises:
            ValueError: If the path does not end in ``suffix``.
            TypeError: If ``about`` is not JSON data.
            OSError: If the file cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        if not path.name.endswith(self.suffix):
            raise ValueError(
                f"{self.what} needs a file that ends in {self.suffix}, got {path.name!r}. Name it model{self.suffix}."
            )
        metadata = {f"batchnorm.{self.kind}": json.dumps({"version": self.version, **about})}
        with replacing(path.absolute()) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The JSON data and tensors of a file from ``write``.

        Raises:
            ValueError: If the file is of another kind or version, or not a safetensors file.
            OSError: If the file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            Path(path).open("rb").close()  # raises Python's error for a missing file
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(f"batchnorm.{self.kind}", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is not {self.what}: {error}. {self.remedy}") from error
        version = about.pop("version", None) if isinstance(about, dict) else None
        if version != self.version:
            raise ValueError(f"{path} is not {self.what} of version {self.version}, got {version}. {self.remedy}")
        return about, tensors
