"""Edits of tensors in a file, in one form for all file formats."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import final

from batchnorm.checkpoint.averaged_copies import Keys


@final
@dataclass(frozen=True, slots=True)
class Edit:
    """The edit of one tensor: its keys, of which the last is its name; its type; its values, or a counter."""

    key: Keys
    dtype: str
    values: array[float] | None  # None for a counter
    channels: tuple[int, ...] = ()  # the channels whose values change
    count: int = 0

    @property
    def name(self) -> str:
        """The last key, which names the tensor."""
        return str(self.key[-1])
