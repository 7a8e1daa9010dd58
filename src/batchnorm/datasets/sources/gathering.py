"""Gathering: small examples, such as images of 32 x 32 pixels, become one block together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

import numpy as np

from batchnorm.datasets.blocks import Block, Column
from batchnorm.datasets.sources.plans import MOST_VALUES

# a block of this many values costs little more than its values
_ENOUGH = 1 << 20


@final
class Gathering:
    """Examples that wait until they are enough for a block. All of them are of one group."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Column]] = {}
        self._rows = self._values = 0
        self._group: str | None = None

    def add(self, example: Mapping[str, Column], group: str | None) -> Iterator[Block]:
        """Add an example; the blocks that are then complete."""
        if group != self._group:
            yield from self.rest()
        self._group = group
        for name, column in example.items():
            self._parts.setdefault(name, []).append(column)
            self._values += column.values.size
        self._rows += 1
        if self._values >= _ENOUGH:
            yield from self.rest()

    def rest(self) -> Iterator[Block]:
        """The blocks of the examples that wait. An example of more than ``MOST_VALUES`` is several blocks."""
        columns = {name: _joined(parts) for name, parts in self._parts.items()}
        rows, self._parts, self._rows, self._values = self._rows, {}, 0, 0
        if rows and sum(each.values.size for each in columns.values()) <= MOST_VALUES:
            yield Block(rows, columns, self._group)
            return
        for name, column in columns.items():
            step = max(1, MOST_VALUES // max(1, column.values[:1].size))
            for start in range(0, len(column.values), step):
                yield Block(rows, {name: Column(column.values[start : start + step], unit=column.unit)}, self._group)
                rows = 0


def _joined(parts: list[Column]) -> Column:
    return parts[0] if len(parts) == 1 else Column(np.concatenate([each.values for each in parts]), unit=parts[0].unit)
