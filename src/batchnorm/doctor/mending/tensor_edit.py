"""Edits of tensors in a file, in a form that every kind of file can be written by."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import final

from batchnorm.checkpoint.averaged_copies import Keys


@final
@dataclass(frozen=True, slots=True)
class Edit:
    """One tensor of the file: its keys, the last one its name; its type; numbers of some channels, or a counter."""

    key: Keys
    dtype: str
    values: array[float] | None  # None for a counter
    channels: tuple[int, ...] = ()
    count: int = 0

    @property
    def name(self) -> str:
        """The last key, which names the tensor."""
        return str(self.key[-1])
