"""Which weight makes a layer's inputs, judged by names and sizes.

It has two axes or more, and one of them has as many channels as the layer: the first axis, or the second one of a
transposed convolution. The search begins in the module around the layer and goes on in the modules around that one. The
nearest weight before the layer is taken. If there is none, the nearest one behind it is, since in a file that is sorted
by name bn1 stands before conv1.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import final

from batchnorm.checkpoint.averaged_copies import Entry, LayerTensors
from batchnorm.checkpoint.file_tensors import Tensor

_DEEPEST = 64  # modules around a weight that are looked at

Place = tuple[tuple[str | int, ...], tuple[str, ...], int]  # a dict, a module in it, a number of channels


@final
class Feeders:
    """Weights of a file by the modules around them."""

    def __init__(self, tensors: Sequence[Entry]) -> None:
        self._tensors = tensors
        self._starts: dict[tuple, int] = {}
        self._places: dict[Place, list[int]] = defaultdict(list)
        for i, entry in enumerate(tensors):
            words = entry.words
            self._starts.setdefault((entry.path, words), i)
            if isinstance(entry.tensor, Tensor) and _is_weight(entry.tensor):
                for channels in _channels(entry.tensor):
                    for depth in range(len(entry.path), min(len(words), len(entry.path) + _DEEPEST) + 1):
                        self._places[entry.path, words[:depth], channels].append(i)

    def of(self, layer: LayerTensors, channels: int) -> Tensor | None:
        """The weight that makes a layer's inputs; None if there is none of its size."""
        at = self._starts[layer.path, layer.words]
        for depth in range(len(layer.words) - 1, len(layer.path) - 1, -1):
            found = self._places.get((layer.path, layer.words[:depth], channels), [])
            before = bisect(found, at)
            if found:
                tensor = self._tensors[found[before - 1] if before else found[0]].tensor
                return tensor if isinstance(tensor, Tensor) else None
        return None


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating and len(tensor.size) > 1 and not tensor.why


def _channels(weight: Tensor) -> set[int]:
    return {weight.size[0], weight.size[1]} if len(weight.size) > 2 else {weight.size[0]}
