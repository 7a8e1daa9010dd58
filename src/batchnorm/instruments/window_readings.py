"""Readings: the steps and passes of a window that may be compared, for layers that moved in the same steps.

Layers may be updated in every step, in every second one, or several times in one. Those with the same pattern are read
together: from one updated step to the next (``optimizer_steps``), and, where every pass was seen, from pass to pass
(``passes``). A pass is compared with the passes at the same place of other steps of the same optimizer, because real
and generated batches, or an original and its augmented view, may differ for good.
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

Places = list[list[int]]  # of readings that are compared, each in the order of time


@final
@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """What one group of layers shows.

    Args:
        indices: Of the layers, in the order of the model.
        channels: Where their channels are in the model's long vector.
        layers: They themselves.
        ends: The stored statistics at the ends of the W steps that updated the layers, and before the first.
        steps: Read back from one of these to the next.
        moments: What was stored before each pass, and at the end.
        passes: Read back pass by pass; None if some passes were not separated.
        places: For each way to align steps the readings of ``passes`` that are compared.
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
    """Groups of layers that were updated in ``least`` steps or more, and not reset meanwhile; ends are on the CPU."""
    groups: dict[Pattern, list[int]] = {}
    for index in range(len(layers.names)):
        groups.setdefault(_pattern(window, index), []).append(index)
    for pattern, indices in groups.items():
        if sum(map(bool, pattern)) >= least and all(n > 0 for step in pattern for n in step):
            yield _of_group(window, layers, pattern, indices, least)


def _pattern(window: Sequence[End], index: int) -> Pattern:
    """For each step the updates from one copy to the next, where there were any."""
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
    told_apart = all(n == 1 for step in pattern for n in step)
    takers = [end.taker for end, moved in zip(window[1:], pattern, strict=True) if moved]
    return Readings(
        tuple(indices), channels, part, tuple(ends), updates(ends, part), tuple(moments),
        updates(moments, part) if told_apart else None,
        _places([len(step) for step in pattern if step], takers, least),
    )  # fmt: skip


def _copies(before: End, end: End, indices: list[int]) -> list[Snapshot]:
    """What the layers of a group stored after each move of a step but the last, which the step's end has."""
    each = []
    for index in indices:
        moves = _moves(before, end, index)
        after = [state for state, n in zip(end.between[index], moves, strict=False) if n]
        each.append(after[: sum(map(bool, moves)) - 1])
    rows = zip(*each, strict=True)
    return [Snapshot(torch.cat(means), torch.cat(variances), torch.stack(counts)) for row in rows
            for means, variances, counts in [zip(*row, strict=True)]]  # fmt: skip


def _places(passes: list[int], takers: list[int], least: int) -> tuple[Places, ...]:
    """Readings by their place in a step, from its first pass on, and from its last where steps differ in length."""
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
