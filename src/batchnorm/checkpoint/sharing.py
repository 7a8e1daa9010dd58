"""Modules that a file of torch.save has under several names: their tensors are the same bytes of it.

Only within one copy of a model and one dict: two dicts whose tensors are the same bytes may be one model saved twice,
or averaged weights beside statistics that were not copied, and neither is a shared layer.

Two names of a layer, such as encoder.backbone.bn1 and backbone.bn1, are two names of the largest module around it all
of whose tensors are shared.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from batchnorm.checkpoint.stored import Shared
from batchnorm.checkpoint.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from batchnorm.checkpoint.copies import Entry, Found, Words
    from batchnorm.checkpoint.feeding import Feeders

Module = tuple[tuple[str | int, ...], "Words"]  # a dict, and the words of a module in it
_STATISTICS = ("running_mean", "running_var")


def find_shared(named: Mapping[str, Found], tensors: Sequence[Entry], feeders: Feeders) -> tuple[Shared, ...]:
    """Every such module of one copy with its names, in the file's order; a layer of two names counts once in it."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, layer in named.items():
        if statistics := _statistics(layer):
            groups[layer.path, statistics].append(name)
    several = [names for names in groups.values() if len(names) > 1]
    contents = _contents(tensors) if several else {}
    modules: dict[tuple[str, ...], list[list[Found]]] = defaultdict(list)
    for names in several:
        layers = [named[name] for name in names]
        height = _height(layers, contents)
        modules[tuple(".".join(name.split(".")[: len(name.split(".")) - height]) for name in names)].append(layers)
    return tuple(
        Shared(names, len(layers), is_alias=all(_is_alias(each, contents, feeders) for each in layers))
        for names, layers in modules.items()
    )


def _statistics(layer: Found) -> tuple[Tensor, ...] | None:
    """Mean and variance, where both are there and have values: equal ones are the same bytes."""
    found = [layer.tensors.get(key) for key in _STATISTICS]
    there = tuple(tensor for tensor in found if isinstance(tensor, Tensor) and tensor.numel and not tensor.why)
    return there if len(there) == len(_STATISTICS) else None


def _contents(tensors: Iterable[Entry]) -> dict[Module, dict[str, Tensor]]:
    """Tensors of every module, by their names in it."""
    contents: dict[Module, dict[str, Tensor]] = defaultdict(dict)
    for entry in tensors:
        if isinstance(entry.tensor, Tensor):
            words = (*entry.words, entry.leaf)
            for depth in range(len(entry.path), len(words)):
                contents[entry.path, words[:depth]][".".join(words[depth:])] = entry.tensor
    return contents


def _height(layers: Sequence[Found], contents: Mapping[Module, Mapping[str, Tensor]]) -> int:
    """How many modules around the layers are shared as a whole."""
    height = 0
    while all(len(layer.words) - height - 1 > len(layer.path) for layer in layers):
        cut = [layer.words[: len(layer.words) - height] for layer in layers]
        around = [(layer.path, words[:-1]) for layer, words in zip(layers, cut, strict=True)]
        same_name = len({words[-1] for words in cut}) == 1 and len(set(around)) == len(around)
        if not same_name or any(contents[module] != contents[around[0]] for module in around):
            break
        height += 1
    return height


def _is_alias(layers: Sequence[Found], contents: Mapping[Module, Mapping[str, Tensor]], feeders: Feeders) -> bool:
    """Whether what is before the layer is stored once as well, so that its names may be of one call."""
    first = layers[0]
    module = first.words[: len(first.words) - _height(layers, contents)]
    if any(len(tensor.size) > 1 for tensor in contents[first.path, module].values()):
        return True
    fed = [feeders.of(layer, layer.tensors["running_mean"].numel) for layer in layers]  # type: ignore[union-attr]
    return fed[0] is not None and all(weight == fed[0] for weight in fed)
