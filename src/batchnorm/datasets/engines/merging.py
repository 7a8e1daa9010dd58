"""Merging: partial statistics are added in a fixed binary tree over their indices, as soon as neighbours are there.

Level 0 has the pieces 0, 1, 2, ...; node i of level l + 1 is the sum of the nodes 2 i and 2 i + 1 of level l. Additions
of floating-point numbers in another order give other bits; here each sum has the same two terms in every run, whichever
piece was measured first. If pieces arrive nearly in order, at most about log2(number of pieces) nodes are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from batchnorm.datasets.data_statistics import DataStatistics
from batchnorm.datasets.group_limit import require_few_groups


def merged(partials: Iterable[tuple[int, DataStatistics]]) -> DataStatistics:
    """The sum of all partial statistics, which are pairs of the piece's index and its statistics, in any order.

    Raises:
        ValueError: If there are no partial statistics, or all groups together are too many.
    """
    nodes: dict[tuple[int, int], DataStatistics] = {}
    for index, partial in partials:
        _insert(nodes, 0, index, partial)
    if not nodes:
        raise ValueError("merging needs the statistics of one piece or more, got none. Name data that have examples.")
    return require_few_groups(reduce(_sum, (nodes[place] for place in sorted(nodes, key=_start))))


def _insert(nodes: dict[tuple[int, int], DataStatistics], level: int, index: int, value: DataStatistics) -> None:
    """Add a node, and its sum with its neighbour if the neighbour is there."""
    while (neighbour := nodes.pop((level, index ^ 1), None)) is not None:
        value = _sum(neighbour, value) if index & 1 else _sum(value, neighbour)
        level, index = level + 1, index >> 1
    nodes[level, index] = value


def _sum(left: DataStatistics, right: DataStatistics) -> DataStatistics:
    return require_few_groups(left + right)


def _start(place: tuple[int, int]) -> int:
    """The first piece below a node."""
    level, index = place
    return index << level
