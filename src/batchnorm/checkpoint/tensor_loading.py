"""Loads the tensors of a file with torch or safetensors, with errors that say what to do."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def by_torch(path: str | os.PathLike[str]) -> Any:
    """The contents of a file of torch.save, with tensors on the CPU.

    Raises:
        ValueError: If torch cannot load the file as tensors and plain values alone.
    """
    try:
        with _plain_numpy(), Path(path).open("rb") as file:  # with a path, torch would choose the format by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: torch.load(weights_only=True) raises {type(error).__name__}. "
            "Save the state dict alone: torch.save(model.state_dict(), path)."
        ) from error


def _plain_numpy() -> AbstractContextManager:
    """A block in which torch also loads NumPy numbers: training loops save them as losses and metrics."""
    try:
        import numpy as np
    except ModuleNotFoundError:
        return nullcontext()
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    return torch.serialization.safe_globals(
        [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]  # its names since NumPy 2 and before
    )


def by_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If safetensors cannot read the file.
    """
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--weights with a .safetensors file needs safetensors. Run: pip install 'batchnorm[torch]'"
        ) from error
    try:
        return load_file(path)
    except Exception as error:
        message = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path}: safetensors cannot read it: {message}. Copy or save it again.") from error
