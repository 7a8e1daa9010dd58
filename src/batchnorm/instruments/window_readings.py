"""Readings: the batch statistics of the steps and passes of a window, for layers that were updated in the same steps.

A layer may be updated in every step, in every second step, or several times in a step. Layers with the same pattern of
updates form a group. For a group, batch statistics are computed from one updating step to the next
(``optimizer_steps``), and also from pass to pass if every pass was recorded (``passes``). A pass is compared only with
the passes at the same place in other steps of the same optimizer: batches of two places, such as real and generated
batches, or originals and their augmented views, may have different distributions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from batchnorm.instruments.passes import End
from batchnorm.instruments.snapshots import Layers, Snapshot, Updates, updates

Places = list[list[int]]  # for each place in a step, the indices of the readings to compare, in the order of time


@final
@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """The readings of one group of layers.

    Args:
        indices: Indices of the group's layers, in the order of the model.
        channels: Positions of their channels in the model's long vector.
        layers: The layers of the group.
        ends: The stored statistics before the first of the W steps that updated the layers, and after each of them.
        steps: The batch statistics of whole steps, computed from ``ends``.
        moments: The stored statistics before each pass, and after the last.
        passes: The batch statistics of single passes, computed from ``moments``; None if some passes were not
            separated.
        places: For each way to align the passes of different steps, the readings of ``passes`` to compare.
    """

    indices: tuple[int, ...]
    channels: Tensor
    layers: Layers
    ends: tuple[Snapshot, ...]
    steps: Updates
    moments: tuple[Snapshot, ...]
    passes: Updates | None
    places: tuple[Places, ...]


Pattern = tuple[tuple[int, ...], ...]


def readings(window: Sequence[End], layers: Layers, least: int) -> Iterator[Readings]:
    """The groups of layers that were updated in at least ``least`` steps and not reset; ``window`` is on the CPU."""
    groups: dict[Pattern, list[int]] = {}
    for index in range(len(layers.names)):
        groups.setdefault(_pattern(window, index), []).append(index)
    for pattern, indices in groups.items():
        if sum(map(bool, pattern)) >= least and all(n > 0 for step in pattern for n in step):
            yield _of_group(window, layers, pattern, indices, least)


def _pattern(window: Sequence[End], index: int) -> Pattern:
    """For each step, the numbers of updates from one copy to the next, without zeros."""
    pairs = pairwise(window)
    return tuple(tuple(n for n in _moves(before, end, index) if n) for before, end in pairs)


def _moves(before: End, end: End, index: int) -> list[int]:
    counts = [before.snapshot.updates[index], *(state[2] for state in end.between[index]), end.snapshot.updates[index]]
    whole = [int(count) for count in counts]
    return [b - a for a, b in pairwise(whole)]


def _of_group(window: Sequence[End], layers: Layers, pattern: Pattern, indices: list[int], least: int) -> Readings:
    part, channels = layers.part(indices)
    ends = [window[0].snapshot.part(indices, channels)]
    moments = [*ends]
    for before, end, moved in zip(window, window[1:], pattern, strict=False):
        if moved:
            ends.append(end.snapshot.part(indices, channels))
            moments += [*_copies(before, end, indices), ends[-1]]
    is_separated = all(n == 1 for step in pattern for n in step)
    takers = [end.taker for end, moved in zip(window[1:], pattern, strict=True) if moved]
    return Readings(
        tuple(indices), channels, part, tuple(ends), updates(ends, part), tuple(moments),
        updates(moments, part) if is_separated else None,
        _places([len(step) for step in pattern if step], takers, least),
    )  # fmt: skip


def _copies(before: End, end: End, indices: list[int]) -> list[Snapshot]:
    """The statistics of a group after each update of a step except for the last, which is the step's end."""
    each = []
    for index in indices:
        moves = _moves(before, end, index)
        after = [state for state, n in zip(end.between[index], moves, strict=False) if n]
        each.append(after[: sum(map(bool, moves)) - 1])
    rows = zip(*each, strict=True)
    return [Snapshot(torch.cat(means), torch.cat(variances), torch.stack(counts)) for row in rows
            for means, variances, counts in [zip(*row, strict=True)]]  # fmt: skip


def _places(passes: list[int], takers: list[int], least: int) -> tuple[Places, ...]:
    """Readings by place, counted from a step's first pass; if the numbers of passes differ, also from the last pass."""
    firsts = [sum(passes[:step]) for step in range(len(passes))]
    parts: dict[int, list[int]] = {}
    for step, taker in enumerate(takers):
        parts.setdefault(taker, []).append(step)
    chosen = [steps for steps in parts.values() if len(steps) >= least] or [list(range(len(passes)))]
    shortest = [min(passes[step] for step in steps) for steps in chosen]
    forward, backward = (
        [[firsts[step] + (place if ahead else passes[step] - 1 - place) for step in steps]
         for steps, most in zip(chosen, shortest, strict=True) for place in range(most)]
        for ahead in (True, False)
    )  # fmt: skip
    return (forward,) if len(set(passes)) == 1 else (forward, backward)
