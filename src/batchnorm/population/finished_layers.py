"""Finished layers: the moments that a recalibration has measured so far, in a file from which it can be resumed.

The file is written anew after each layer and replaces the old file, so it is whole at any moment. It contains what a
measurement depends on: model, settings, the first batch and the number of batches of each rank. A measurement of
anything else refuses it. Only the first rank reads and writes it, and sends its contents to the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from batchnorm.files.sidecar import Sidecar
from batchnorm.moments import Moments
from batchnorm.population.input_moments import InputMoments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_REMEDY = "Delete it to measure all layers, or give another resume=."
_FILE = Sidecar("recalibration", ".safetensors", "a file of finished layers", 1, _REMEDY)
_LISTED = 5  # differences that an error lists


@final
@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A finished layer.

    Args:
        path: Its dotted path.
        first_only: Whether the inputs are those of the layer's first call in each forward.
        found: The moments of its inputs on all ranks, on the CPU.
        spoiled_on: The ranks that excluded an input.
    """

    path: str
    first_only: bool
    found: InputMoments
    spoiled_on: list[int]


@final
class FinishedLayers:
    """The finished layers of a recalibration, which ``add`` writes to its file.

    Args:
        path: The file; None: the layers are not kept.
        writes: Whether this process reads and writes the file.
        origin: Digests of what the measurement depends on, by name.

    Raises:
        ValueError: If the file belongs to another measurement, or is no such file.
        OSError: If the file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        origin: Mapping[str, str] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.path, self._origin, self._writes = path, dict(origin or {}), writes
        self.restarted = ""  # why forwards were restarted
        self.steps: list[Step] = []
        self._counts: list[int | None] | None = None  # of the batches of each rank
        if path is not None and writes and Path(path).exists():
            self._read(path)

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self.path is not None

    @property
    def contents(self) -> tuple[str, list[Step], list[int | None] | None]:
        """What the ranks that do not read the file need."""
        return self.restarted, self.steps, self._counts

    @contents.setter
    def contents(self, value: tuple[str, list[Step], list[int | None] | None]) -> None:
        self.restarted, self.steps, self._counts = value

    def found(self, path: str, *, first_only: bool = False) -> Step | None:
        """A finished layer; None if the layer is not finished."""
        return next((each for each in self.steps if (each.path, each.first_only) == (path, first_only)), None)

    def add(self, step: Step, counts: list[int | None]) -> None:
        """Add a layer, and write the file; ``counts`` has the number of batches of each rank.

        Raises:
            ValueError: If the file was written for other numbers of batches.
            OSError: If the file cannot be written.
        """
        if not self.is_kept:
            return
        self.require(counts)
        self._counts = counts
        self.steps.append(step)
        if self._writes:
            self._write()

    def require(self, counts: list[int | None]) -> None:
        """Refuse a file that was written for other numbers of batches.

        Raises:
            ValueError: If they differ.
        """
        if self._counts is not None and self._counts != counts:
            raise ValueError(
                f"recalibrate needs the batches for which {self.path} was written, {_in_words(self._counts)}, got "
                f"{_in_words(counts)}. {_REMEDY}"
            )

    def begin_again(self, reason: str) -> None:
        """Forget all layers, which are measured again with restarted forwards for this reason."""
        self.steps, self.restarted = [], reason

    def _read(self, path: str | os.PathLike[str]) -> None:
        about, tensors = _FILE.read(path)
        origin = about["origin"]
        names = dict.fromkeys([*origin, *self._origin])
        if unequal := [name for name in names if origin.get(name) != self._origin.get(name)]:
            more = f" and {len(unequal) - _LISTED} more" if len(unequal) > _LISTED else ""
            raise ValueError(
                f"recalibrate needs a file of finished layers of this measurement, got {path}, which was "
                f"written for another {', '.join(unequal[:_LISTED])}{more}. {_REMEDY}"
            )
        self.restarted, self._counts = about["restarted"], about["counts"]
        self.steps = [_step(each, f"{index}.", tensors) for index, each in enumerate(about["steps"])]

    def _write(self) -> None:
        tensors: dict[str, Tensor] = {}
        for index, step in enumerate(self.steps):
            moments = step.found.moments
            parts = {"count": moments.count, "mean": moments.mean, "m2": moments.m2, "left_out": step.found.left_out}
            tensors |= {f"{index}.{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
        about = {
            "origin": self._origin,
            "restarted": self.restarted,
            "counts": self._counts,
            "steps": [_about(each) for each in self.steps],
        }
        _FILE.write(os.fspath(self.path or ""), about, tensors)


def _about(step: Step) -> dict[str, object]:
    numbers = {name: getattr(step.found, name) for name in ("inputs", "spoiled", "values")}
    return {"path": step.path, "first_only": step.first_only, "spoiled_on": step.spoiled_on, **numbers}


def _step(about: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Step:
    moments = Moments(*(tensors[f"{prefix}{name}"] for name in ("count", "mean", "m2")))
    left_out = tensors.get(f"{prefix}left_out", False)
    found = InputMoments(moments, about["inputs"], about["spoiled"], left_out, about["values"])
    return Step(about["path"], about["first_only"], found, about["spoiled_on"])


def _in_words(counts: Sequence[int | None]) -> str:
    return f"{', '.join(map(str, counts))} on its ranks" if len(counts) > 1 else f"{counts[0]}"
