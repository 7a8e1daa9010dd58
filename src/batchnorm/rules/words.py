"""Phrases that several rules use."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.evidence import Evidence


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are: "stem.1, body.1, body.4 and 2 more"."""
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(name or "the model itself" for name in every[:most]) + rest


def some_of(channels: tuple[int, ...], stored: Stored) -> str:
    """How many channels of a layer: "3 of 64 channels"."""
    return f"{len(channels)} of {stored.channels} channels"


def target_of(evidence: Evidence) -> str:
    """The target as a shell takes it: a file's name may hold spaces and signs; an address is a command's words."""
    return shlex.quote(evidence.target) if evidence.modules is None else evidence.target


def measure_again(evidence: Evidence) -> str:
    """The command for a target that the command line knows, else the call."""
    if evidence.modules is None or ":" in evidence.target:
        return f"batchnorm fix {target_of(evidence)} --data data.py:train_loader"
    return "batchnorm.recalibrate(model, loader)"
