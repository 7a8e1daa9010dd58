"""Modules that a file of torch.save has under several names: their tensors are the same bytes of the file.

Only names in one copy of a model and in one dict are compared. Two dicts whose tensors are the same bytes may be one
model that was saved twice, or averaged weights with statistics that were not copied; neither is a shared layer.

If a layer has two names, such as encoder.backbone.bn1 and backbone.bn1, the shared module is the largest module around
the layer all of whose tensors are shared, such as backbone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import final

from batchnorm.checkpoint.averaged_copies import Entry, LayerTensors, Words
from batchnorm.checkpoint.feeding_weights import Feeders
from batchnorm.checkpoint.file_tensors import Tensor
from batchnorm.checkpoint.stored import Shared

Module = tuple[tuple[str | int, ...], "Words"]  # keys of a dict, words of a module in it
_STATISTICS = ("running_mean", "running_var")
_HIGHEST = 64  # levels of modules around a tensor that are compared


def find_shared(named: Mapping[str, LayerTensors], tensors: Sequence[Entry], feeders: Feeders) -> tuple[Shared, ...]:
    """The shared modules of one copy with their names, in the file's order; a layer with two names counts once."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, layer in named.items():
        if statistics := _statistics(layer):
            groups[layer.path, statistics].append(name)
    several = [names for names in groups.values() if len(names) > 1]
    modules = _Modules(tensors if several else ())
    are_aliases: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for names in several:
        layers = [named[name] for name in names]
        height = modules.height(layers)
        whole = tuple(".".join(name.split(".")[: len(name.split(".")) - height]) for name in names)
        are_aliases[whole].append(modules.has_weight(layers[0], height) or _are_fed_alike(layers, feeders))
    return tuple(Shared(names, len(each), is_alias=all(each)) for names, each in are_aliases.items())


def _statistics(layer: LayerTensors) -> tuple[Tensor, ...] | None:
    """Mean and variance of a layer; None unless both have values. Equal Tensors are the same bytes of the file."""
    tensors = [layer.tensors.get(key) for key in _STATISTICS]
    readable = tuple(tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.numel and not tensor.why)
    return readable if len(readable) == len(_STATISTICS) else None


@final
class _Modules:
    """The tensors in each module of a file."""

    def __init__(self, tensors: Iterable[Entry]) -> None:
        self._contents: dict[Module, dict[str, Tensor]] = defaultdict(dict)  # by names in the module
        self._known: dict[tuple[Module, ...], bool] = {}
        for entry in tensors:
            if isinstance(entry.tensor, Tensor):
                words = (*entry.words, entry.leaf)
                for depth in range(max(len(entry.path), len(words) - _HIGHEST), len(words)):
                    self._contents[entry.path, words[:depth]][".".join(words[depth:])] = entry.tensor

    def height(self, layers: Sequence[LayerTensors]) -> int:
        """The number of levels of modules around the layers that are shared as a whole."""
        height = 0
        while height < _HIGHEST and all(len(layer.words) - height - 1 > len(layer.path) for layer in layers):
            cut = [layer.words[: len(layer.words) - height] for layer in layers]
            around = tuple((layer.path, words[:-1]) for layer, words in zip(layers, cut, strict=True))
            if len({words[-1] for words in cut}) > 1 or len(set(around)) < len(around) or not self._are_same(around):
                break
            height += 1
        return height

    def has_weight(self, layer: LayerTensors, height: int) -> bool:
        """Whether the module ``height`` levels around a layer has a weight of two axes or more: not only batch norm."""
        module = layer.path, layer.words[: len(layer.words) - height]
        return any(len(tensor.size) > 1 for tensor in self._contents[module].values())

    def _are_same(self, modules: tuple[Module, ...]) -> bool:
        if modules not in self._known:
            first, *others = (self._contents[module] for module in modules)
            self._known[modules] = all(other == first for other in others)
        return self._known[modules]


def _are_fed_alike(layers: Sequence[LayerTensors], feeders: Feeders) -> bool:
    """Whether the weight before the layer is stored once too, so that all names may mean one call."""
    means = [layer.tensors["running_mean"] for layer in layers]
    first, *others = (
        feeders.of(layer, mean.numel) if isinstance(mean, Tensor) else None
        for layer, mean in zip(layers, means, strict=True)
    )
    return first is not None and all(other == first for other in others)
