"""Phrases that several rules use, and remedies that are possible for the target."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING

from batchnorm.reporting.command_line import CommandLine

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.rule_evidence import Evidence, Measured

_DATA = "--data data.py:train_loader"
# what ``batchnorm fix`` writes: states of torch.save and safetensors. A graph or a whole object is made anew
_WRITABLE = {"pt", "safetensors"}
_ANEW = {
    "onnx": "mend the model that the file was made from, and export it again",
    "": "load the model, mend it, and save it again",
}


class Fix(StrEnum):
    """What it takes to mend a finding."""

    NO = "no"  # a decision, or code that only its owner can change
    SAFE = "safe"  # needs no data, and eval outputs stay the same
    DATA = "data"  # needs examples
    UNSAFE = "unsafe"  # needs no data, and changes eval outputs


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are: "stem.1, body.1, body.4 and 2 more"."""
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(name or "the model itself" for name in every[:most]) + rest


def some_of(channels: tuple[int, ...], stored: Stored) -> str:
    """How many channels of a layer: "3 of 64 channels"."""
    return f"{len(channels)} of {stored.channels} channels"


def unsettled(measured: Measured) -> str:
    """What may explain a difference that is not proven."""
    return f"which examples too rare to be among these {measured.examples} may explain"


def is_written(evidence: Evidence) -> bool:
    """Whether a target can be mended as it is: a model, or a file whose numbers ``batchnorm fix`` writes."""
    return evidence.file is None or (evidence.file.format in _WRITABLE and not evidence.file.is_whole)


def possible(fix: Fix, remedy: str, evidence: Evidence) -> tuple[Fix, str]:
    """A remedy in the form that is possible for the target.

    A file that ``fix`` cannot write has to be made again from its source. ``fix`` loads only tensors and plain values.
    So they are saved to a file of their own first, if the file holds other objects too.
    """
    if not is_written(evidence) and fix is not Fix.NO:
        return Fix.NO, _ANEW.get(evidence.file.format if evidence.file else "", _ANEW[""])
    if evidence.file is None or evidence.file.is_plain or not isinstance(remedy, CommandLine):
        return fix, remedy
    command = CommandLine(remedy.program, "PATH", remedy.options)
    return fix, f"torch.save(model.state_dict(), PATH) of the loaded model; then {command}"


def mend(evidence: Evidence) -> str:
    """The command that mends a target without data; the Python call if the command line does not know the target."""
    if _is_known(evidence):
        return CommandLine("batchnorm fix", _target(evidence))
    return "batchnorm.treat(model)"


def measure_again(evidence: Evidence) -> str:
    """The command that measures statistics again; the Python call if the command line does not know the target."""
    if evidence.modules is None:  # a file alone says nothing of the forward
        return CommandLine("batchnorm fix model.py:make_model --weights", _target(evidence), _DATA)
    if _is_known(evidence):
        return CommandLine("batchnorm fix", _target(evidence), _DATA)
    return "batchnorm.recalibrate(model, loader)"


def _is_known(evidence: Evidence) -> bool:
    return evidence.modules is None or ":" in evidence.target


def _target(evidence: Evidence) -> str:
    """The target as a shell takes it. Names of files are quoted; an address is already the words of a command."""
    return shlex.quote(evidence.target) if evidence.modules is None else evidence.target
