"""Loader state: what decides which examples a loader gives next, so that every pass can start from the same state.

A loader has samplers, which may contain others: a batch sampler has a sampler, and those of accelerate a batch sampler.
Any of them may have a generator of its own, or count the passes and shuffle each pass in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

_INNER = ("sampler", "batch_sampler", "base_dataloader")
_DEPTH = 6  # accelerate's loader has a loader, its batch sampler, that of the user, and its sampler
_PASSES = ("epoch", "iteration")  # of samplers; of accelerate's loaders, which give it to their samplers


def generators_of(loader: object) -> list[torch.Generator]:
    """The random generators of a loader and its samplers, each once."""
    found = (getattr(each, "generator", None) for each in _parts(loader))
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def passes_of(loader: object) -> Callable[[], None]:
    """A function that puts back the present numbers of passes that a loader and its samplers have counted."""
    known = [(vars(each), name) for each in _parts(loader) if hasattr(each, "__dict__") for name in _PASSES]
    numbers = [(values, {name: values[name]}) for values, name in known if isinstance(values.get(name), int)]
    return partial(_put, numbers)


def _put(numbers: list[tuple[dict[str, object], dict[str, int]]]) -> None:
    for values, before in numbers:
        values.update(before)


def _parts(loader: object) -> list[object]:
    """A loader and its samplers, each once."""
    found: dict[int, object] = {}
    level = [loader]
    for _ in range(_DEPTH):
        level = [part for part in level if part is not None and id(part) not in found]
        found |= {id(part): part for part in level}
        level = [getattr(part, name, None) for part in level for name in _INNER]
    return list(found.values())
