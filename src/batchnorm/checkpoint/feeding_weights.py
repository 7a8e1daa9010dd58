"""Which weight makes a layer's inputs, judged by names and sizes.

Such a weight has two axes or more. Its first axis, or the second axis of a convolution that may be transposed, has as
many channels as the layer. The search begins in the module around the layer and continues in the modules around that
module. The first module with such weights decides: the nearest weight before the layer is chosen. If all of them are
behind the layer, the first of them is chosen, because in a file that is sorted by name bn1 comes before conv1.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import final

from batchnorm.checkpoint.averaged_copies import Entry, LayerTensors
from batchnorm.checkpoint.file_tensors import Tensor

_DEEPEST = 64  # levels of modules around a weight that are searched

Place = tuple[tuple[str | int, ...], tuple[str, ...], int]  # keys of a dict, words of a module, channels


@final
class Feeders:
    """The weights of a file, by the modules around them and by their channels."""

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
        """The weight that makes a layer's inputs; None if no weight in the layer's dict has as many channels."""
        at = self._starts[layer.path, layer.words]
        for depth in range(len(layer.words) - 1, len(layer.path) - 1, -1):
            indices = self._places.get((layer.path, layer.words[:depth], channels), [])
            before = bisect(indices, at)
            if indices:
                tensor = self._tensors[indices[before - 1] if before else indices[0]].tensor
                return tensor if isinstance(tensor, Tensor) else None
        return None


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating and len(tensor.size) > 1 and not tensor.why


def _channels(weight: Tensor) -> set[int]:
    return {weight.size[0], weight.size[1]} if len(weight.size) > 2 else {weight.size[0]}
