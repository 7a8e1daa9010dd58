"""Twins: two parts of a file whose layers have the same statistics, bit for bit, although their weights differ.

Statistics are averages of activations, and different weights make different activations. Equal bits by chance are rarer
than one in 2^24, so the statistics of one part were copied from the other. Layers with initial statistics are no proof.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import final

from batchnorm.checkpoint.stored import Checkpoint, Stored, below, is_below

Pair = tuple[str, str]
_MOST_PAIRS = 256  # pairs of parts that are compared: a file with more was made to take time


@final
@dataclass(frozen=True, slots=True)
class Twins:
    """Paths of both parts, in the file's order, and the pairs of layers whose inputs come from different weights."""

    first: str
    second: str
    layers: tuple[Pair, ...]


def find_twins(file: Checkpoint) -> Iterator[Twins]:
    """The parts of a file that have the statistics of an earlier part; each later part is listed once.

    At least one layer must come after a weight that differs between the parts. Frozen layers, and modules that both
    parts share, are not listed. At most 256 pairs of parts are compared.
    """
    layers = {below(copy, name): stored for copy, named in file.copies.items() for name, stored in named.items()}
    copied_parts: set[str] = set()
    for first, second in islice(_candidates(layers), _MOST_PAIRS):
        names = [name.removeprefix(second).removeprefix(".") for name in layers if is_below(second, name)]
        inside = len(names) if is_below(first, second) else 0
        size = sum(is_below(first, name) for name in layers) - inside
        if size != len(names) or second in copied_parts or _have_one_module(file, first, second):
            continue
        pairs = [(below(first, name), below(second, name)) for name in names]
        if all(a in layers and _agree(layers[a], layers[b]) for a, b in pairs):
            behind = tuple((a, b) for a, b in pairs if _are_fed_otherwise(layers[a], layers[b]))
            if behind and not _are_frozen([(layers[a], layers[b]) for a, b in pairs]):
                copied_parts.add(second)
                yield Twins(first, second, behind)


def statistics_of(stored: Stored) -> bytes:
    """Bits of a layer's mean and variance; b"" if they are initial, or if one is missing."""
    mean, var = stored.running_mean, stored.running_var
    return b"" if not mean or not var or stored.is_initial else mean.tobytes() + var.tobytes()


def _have_one_module(file: Checkpoint, *parts: str) -> bool:
    """Whether both parts contain a module that the file stores once: then its layers are shared, not copied."""
    return any(all(any(is_below(part, name) for name in each.names) for part in parts) for each in file.shared)


def _candidates(layers: dict[str, Stored]) -> dict[Pair, None]:
    """Pairs of modules in which layers of the same name have the same statistics, in the file's order."""
    alike: dict[bytes, list[str]] = defaultdict(list)
    for name, stored in layers.items():
        if bits := statistics_of(stored):
            alike[bits].append(name)
    return dict.fromkeys(_without_end(first, other) for first, *others in alike.values() for other in others)


def _agree(a: Stored, b: Stored) -> bool:
    """Whether two layers have the same statistics, or both have initial statistics."""
    return statistics_of(a) == statistics_of(b) and a.is_initial == b.is_initial


def _without_end(a: str, b: str) -> Pair:
    """Two paths without the words that both end with."""
    first, second = a.split("."), b.split(".")
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return ".".join(first), ".".join(second)


def _are_fed_otherwise(a: Stored, b: Stored) -> bool:
    """Whether the weights before two layers have the same type and shape and different values."""
    kinds = {stored.fed_by.rpartition(":")[0] for stored in (a, b)}
    return len(kinds) == 1 and kinds != {""} and a.fed_by != b.fed_by


def _are_frozen(pairs: list[tuple[Stored, Stored]]) -> bool:
    """Whether all pairs look like frozen layers: gamma and beta are equal too, and no batches are counted."""
    return all(
        a.weight is not None and a.weight == b.weight and a.bias == b.bias
        and a.num_batches_tracked is None and b.num_batches_tracked is None
        for a, b in pairs
    )  # fmt: skip
