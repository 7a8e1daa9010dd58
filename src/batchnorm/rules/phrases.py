"""Phrases that several rules use, and the choice of a remedy that is possible for the target."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING

from batchnorm.reporting.command_line import CommandLine, file_word

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.rule_evidence import Evidence, MeasuredLayer

_PARALLEL = "DistributedDataParallel"
_DATA = "--data data.py:train_loader"
# the formats that ``batchnorm fix`` writes, for files with states. A file with a graph or a model has to be made again
_WRITABLE = {"pt", "safetensors"}
_ANEW = {
    "onnx": "mend the model that the file was made from, and export it again",
    "": "load the model, mend it, and save it again",
}


class Fix(StrEnum):
    """What is needed to mend a finding."""

    NO = "no"  # the user has to decide, or to change the code
    SAFE = "safe"  # needs no data, and eval outputs stay the same
    DATA = "data"  # needs data
    UNSAFE = "unsafe"  # needs no data, and changes eval outputs


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are: "stem.1, body.1, body.4 and 2 more"."""
    every = list(names)
    others = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(name or "the model itself" for name in every[:most]) + others


def some_of(channels: tuple[int, ...], stored: Stored) -> str:
    """How many channels of a layer: "3 of 64 channels"."""
    return f"{len(channels)} of {stored.channels} channels"


def unsettled(measured: MeasuredLayer) -> str:
    """The end of a sentence about a difference that is not proven."""
    return f"but examples too rare to be among these {measured.examples} may explain it"


def is_written(evidence: Evidence) -> bool:
    """Whether the target is a model, or a file that ``batchnorm fix`` can write."""
    return evidence.file is None or (evidence.file.format in _WRITABLE and not evidence.file.is_whole)


def possible(fix: Fix, remedy: str, evidence: Evidence) -> tuple[Fix, str]:
    """The fix and remedy that are possible for the target.

    A file that ``fix`` cannot write has to be made again from its source. ``fix`` loads only tensors and plain values.
    So if a file has other objects too, the remedy first saves the state dict to a file of its own.
    """
    if not is_written(evidence) and fix is not Fix.NO:
        return Fix.NO, _ANEW.get(evidence.file.format if evidence.file else "", _ANEW[""])
    if evidence.file is None or evidence.file.is_plain or not isinstance(remedy, CommandLine):
        return fix, remedy
    command = CommandLine(remedy.program, "PATH", remedy.options)
    return fix, f"torch.save(model.state_dict(), PATH) of the loaded model; then {command}"


def mend(evidence: Evidence) -> str:
    """The command that mends the target without data; a Python call if the target is a model without an address."""
    if _is_known(evidence):
        return CommandLine("batchnorm fix", _target(evidence))
    return "batchnorm.treat(model)"


def measure_again(evidence: Evidence) -> str:
    """The command that measures statistics again; a Python call if the target is a model without an address."""
    if evidence.modules is None:  # a file does not contain the code of the model
        return CommandLine("batchnorm fix model.py:make_model --weights", _target(evidence), _DATA)
    if _is_known(evidence):
        return CommandLine("batchnorm fix", _target(evidence), _DATA)
    if has_several_processes(evidence):
        return 'batchnorm.recalibrate(model, loader, group="all") on all ranks'
    return "batchnorm.recalibrate(model, loader)"


def has_several_processes(evidence: Evidence) -> bool:
    """Whether the caller or a wrapper of the model says that several processes train together."""
    structure, loop = evidence.structure, evidence.loop
    return (loop is not None and loop.world_size > 1) or (structure is not None and _PARALLEL in structure.wrappers)


def count_calls(evidence: Evidence) -> str:
    """The command that runs the model of a file on data, and so counts the calls of its layers."""
    return f"batchnorm doctor model.py:make_model --weights {_target(evidence)} --data data.py:loader"


def fill_from_base(evidence: Evidence) -> str:
    """The command that copies statistics from the base model's file; advice for a file that ``fix`` cannot write."""
    if is_written(evidence):
        return CommandLine("batchnorm fix", _target(evidence), "--base BASE")
    return "save model.state_dict(), which has the buffers too"


def _is_known(evidence: Evidence) -> bool:
    return evidence.modules is None or ":" in evidence.target


def _target(evidence: Evidence) -> str:
    """The target as text for a shell. A file's name is quoted; a model's target is already part of a command line."""
    if evidence.modules is not None:
        return evidence.target
    state = f" --state {shlex.quote(evidence.state)}" if evidence.state else ""
    return f"{file_word(evidence.target)}{state}"
