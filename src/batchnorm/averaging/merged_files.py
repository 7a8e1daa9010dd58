"""Merged checkpoints: a state of each file is loaded, all are merged, and the result is written as one state dict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from batchnorm import checkpoint
from batchnorm.averaging.merged_states import merged, weights_agree
from batchnorm.checkpoint.model_loading import state_dict_of
from batchnorm.checkpoint.states_in_file import with_state
from batchnorm.files.whole import replacing

# formats that ``checkpoint.read`` knows and that are not merged: what they are, and what to do
_OTHERS = {
    "onnx": ("ONNX model", "Merge the checkpoints that the models were made from."),
    "pickle": ("plain pickle", "Load it, and save its tensors with torch.save(state, path)."),
}


@final
@dataclass(frozen=True, slots=True)
class FileState:
    """The state that was read from a file, the file's other states, and the number of batch norm layers."""

    path: str
    name: str
    unused: tuple[str, ...]
    layers: int
    tensors: dict[str, Any]


def read(path: str, state: str = "") -> FileState:
    """The state at a path in a checkpoint; by default the first state, which is the model's own.

    Raises:
        ValueError: If the file is no checkpoint of torch.save or safetensors, or lacks the state.
        FileNotFoundError: If there is no such file.
    """
    file = checkpoint.read(path)
    if file.format in _OTHERS:
        kind, remedy = _OTHERS[file.format]
        raise ValueError(f"merge needs files of torch.save or safetensors, got the {kind} {path}. {remedy}")
    file, name = with_state(file, state) if state else (file, next(iter(file.states), ""))
    layers = len(file.states[name].layers) if name else 0
    unused = tuple(other for other in file.states if other != name)
    return FileState(path, name, unused, layers, state_dict_of(file, name))


def merge(
    states: Sequence[FileState], counts: Sequence[float] | None, *, local: str | Iterable[str], others: str,
    correction: int,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """The merged state dict, and whether all files with a count above 0 have the same weights.

    Arguments and errors are those of ``merge_statistics``; messages name the files.
    """
    tensors = [state.tensors for state in states]
    result = merged(
        tensors, counts, local=local, others=others, correction=correction, names=[state.path for state in states]
    )
    used = [each for each, count in zip(tensors, counts or [1.0] * len(tensors), strict=True) if count]
    shared = [{name: state[name] for name in result if name in state} for state in used]
    return result, weights_agree(shared)


def write(state: dict[str, Any], output: Path) -> None:
    """Write a state dict as a whole, in the format of the suffix: .safetensors, or torch.save for any other.

    Raises:
        ValueError: If a value is not a tensor, for .safetensors.
        OSError: If the file cannot be written.
    """
    with replacing(output) as file:
        if output.suffix.lower() == ".safetensors":
            file.write(_packed(state, output))
        else:
            torch.save(state, file)


def _packed(state: dict[str, Any], output: Path) -> bytes:
    from safetensors.torch import save

    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"a .safetensors file needs tensors alone, got {other[0]!r}, a {type(state[other[0]]).__name__}. Write "
            f"{output.stem}.pt instead."
        )
    return save({name: value.contiguous().clone() for name, value in state.items()}, {"format": "pt"})
