"""Where a file's batch norm layers are, and which of them are an averaged copy of others.

A tensor's words are the keys that lead to its module: data["state_dict"]["module.bn1.running_mean"] has the words
state_dict, module, bn1. A layer is recognized by the names of its statistics. A copy is averaged if one of its first
words names an average (``ema``, ``model_ema``, ``state_dict_ema``, ``shadow``, ``swa``), if torch's AveragedModel saved
``n_averaged`` beside it, or if Lightning saved ``current_model_state`` beside it. If only the name of a module inside
of a dict says so, the module counts as an average only if the model has all of its layers too. All other layers are the
model's own. They form one copy, even if they come from several dicts. If a file has only averages, the first averaged
copy takes the place of the model's own. A state is what a model loads: a copy, or the part of a copy in one dict
(``q_net`` and ``q_net_target``, ``generator`` and ``discriminator``, list members).

The names of a copy's layers leave out the words that all of them begin with, if these words are dicts of the file or
wrappers (``module``, ``_orig_mod``, ``model``). So the names in different copies agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.checkpoint.file_tensors import Tensor
from batchnorm.checkpoint.pickled.unknown_classes import Saved

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OF_A_LAYER = (*STATISTICS, "weight", "bias")

_DEEPEST = 32  # dicts and lists inside each other
_LONGEST_KEY = 1000
WRAPPERS = frozenset(
    {"_forward_module", "_orig_mod", "model", "model_state", "model_state_dict", "module", "online_model", "state_dict"}
)
_AVERAGE = re.compile(r"(.*[_-])?(averaged?|avg_model|ema|shadow|swa)([_-].*)?", re.IGNORECASE)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

Words = tuple[str, ...]
Keys = tuple[str | int, ...]  # keys of dicts and lists that lead to a value in a file


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor with the keys of its dict (``path``) and its dotted name there (``key``); a counter may be an int."""

    path: Keys
    key: str
    tensor: Tensor | int

    @property
    def words(self) -> Words:
        """The words of the module that has the tensor."""
        module = self.key.rpartition(".")[0]
        return (*map(str, self.path), *(module.split(".") if module else ()))

    @property
    def leaf(self) -> str:
        """The tensor's name in its module."""
        return self.key.rpartition(".")[2]


@final
@dataclass(frozen=True, slots=True, eq=False)
class LayerTensors:
    """A layer's tensors by name, the keys of its dict (``path``), and all words that lead to it."""

    path: Keys
    words: Words
    tensors: dict[str, Tensor | int]

    @property
    def place(self) -> Keys:
        """The layer's place in the file: the keys of its dict, then its dotted name in that dict."""
        return (*self.path, ".".join(self.words[len(self.path) :]))


@final
@dataclass(frozen=True, slots=True)
class Copy:
    """The layers of one copy of a model, by their names without ``prefix``."""

    prefix: Words
    layers: dict[str, LayerTensors]


def entries(saved: Saved) -> Iterator[Entry]:
    """In the file's order, all tensors and counters in dicts, lists and tuples; a repeated container is read once.

    Containers more than 32 levels deep and keys of more than 1,000 characters are skipped.
    """
    for path, first, value in _containers(saved):
        if path == first:
            yield from (Entry(path, str(key), item) for key, item in _named(value) if _is_entry(key, item))


def same_objects(saved: Saved) -> Iterator[tuple[Keys, Keys]]:
    """For each repeated dict, the place of the repetition and its first place; in the order of ``entries``."""
    yield from ((path, first) for path, first, value in _containers(saved) if path != first and isinstance(value, dict))


def _containers(saved: Saved) -> Iterator[tuple[Keys, Keys, Saved]]:
    """Every dict, list and tuple in the file's order: its place, the place where it came first, and itself."""
    places: dict[int, Keys] = {}
    waiting: list[tuple[Keys, Saved]] = [((), saved)]
    while waiting:
        path, value = waiting.pop()
        is_new = id(value) not in places and len(path) <= _DEEPEST
        if is_new:
            places[id(value)] = path
            inner = [((*path, key), item) for key, item in _named(value) if isinstance(item, dict | list | tuple)]
            waiting += reversed(inner)
        if id(value) in places:
            yield path, places[id(value)], value


def _named(value: Saved) -> list[tuple[str | int, Saved]]:
    """The items of a container whose key is a number or a text that is not too long."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, item) for key, item in items if _is_name(key)]


def _is_name(key: object) -> bool:
    return (isinstance(key, str) and len(key) <= _LONGEST_KEY) or isinstance(key, int)


def _is_entry(key: object, item: object) -> bool:
    is_counter = type(item) is int and str(key).rpartition(".")[2] == "num_batches_tracked"
    return isinstance(item, Tensor) or is_counter


def find_layers(tensors: Iterable[Entry]) -> list[LayerTensors]:
    """All modules with at least one tensor of ``STATISTICS``, with their tensors."""
    modules: dict[tuple[Keys, Words], LayerTensors] = {}
    for entry in tensors:
        if entry.leaf in OF_A_LAYER:
            words = entry.words
            module = modules.setdefault((entry.path, words), LayerTensors(entry.path, words, {}))
            module.tensors[entry.leaf] = entry.tensor
    return [module for module in modules.values() if any(isinstance(module.tensors.get(k), Tensor) for k in STATISTICS)]


def find_copies(layers: Sequence[LayerTensors], tensors: Sequence[Entry]) -> list[Copy]:
    """The model's own layers, then those of each averaged copy, in the file's order."""
    roots = averaged_roots(tensors)
    groups: dict[Words | None, list[LayerTensors]] = {None: []}
    for layer in layers:
        groups.setdefault(_average(layer, roots), []).append(layer)
    own = groups.pop(None)
    names = set(_copy(own).layers)
    for group, members in list(groups.items()):
        # a module may be called ema for other reasons: the layers of an average are also in the model
        prefix_length = len(group or ())
        inside = group not in roots and prefix_length > len(members[0].path)
        if names and inside and not names.issuperset(_copy(members, prefix_length).layers):
            own += groups.pop(group)
    copies = [_copy(members, len(group or ())) for group, members in groups.items()]
    return [_copy(own), *copies] if own else copies


def find_states(copies: Sequence[Copy], roots: set[Words]) -> list[tuple[Copy, Copy, bool]]:
    """States in the file's order: the part of a copy that is in one dict, the whole copy, and whether it is averaged.

    All copies except the first are averages. The first is an average if it is recognized as one.
    """
    states = []
    for i, copy in enumerate(copies):
        dicts: dict[Keys, list[LayerTensors]] = {}
        for layer in copy.layers.values():
            dicts.setdefault(layer.path, []).append(layer)
        prefix_length = len(copy.prefix)
        parts = [copy] if len(dicts) == 1 else [_copy(members, prefix_length) for members in dicts.values()]
        states += [
            (part, copy, i > 0 or _average(next(iter(part.layers.values())), roots) is not None) for part in parts
        ]
    return states


def averaged_roots(tensors: Sequence[Entry]) -> set[Words]:
    """The words at which averages begin, as ``n_averaged`` beside them or Lightning's ``current_model_state`` shows."""
    roots = {entry.words for entry in tensors if entry.leaf == "n_averaged"}
    # Lightning's WeightAveraging swaps: the averages are where the model usually is
    swapped = any(entry.path[:1] == ("current_model_state",) for entry in tensors)
    return roots | {("state_dict",)} if swapped else roots


def _average(layer: LayerTensors, roots: set[Words]) -> Words | None:
    """The words of a layer up to the last word that names an average; () if the whole file is an average.

    None if the layer is not part of an average.
    """
    group = () if () in roots else None
    for i, word in enumerate(layer.words):
        head = layer.words[: i + 1]
        if head in roots or says_average(word):
            group = head
        elif i >= len(layer.path) and word not in WRAPPERS:
            break
    return group


def says_average(word: str) -> bool:
    """Whether a key or a module's name names an average, such as "ema"."""
    return _AVERAGE.fullmatch(snake(word)) is not None


def snake(word: str) -> str:
    """A word with underscores before capitals: ``net_EMA`` for ``netEMA``."""
    return _HUMP.sub("_", word)


def _copy(layers: Sequence[LayerTensors], prefix_length: int = 0) -> Copy:
    """The layers by name, without the first ``prefix_length`` words.

    Further words that all names begin with are left out too, if they are dicts of the file or wrappers.
    """
    length = prefix_length
    while layers and all(_drops(layer, layers[0], length) for layer in layers):
        length += 1
    named = {".".join(layer.words[length:]): layer for layer in layers}
    return Copy(layers[0].words[:length] if layers else (), named)


def _drops(layer: LayerTensors, first: LayerTensors, i: int) -> bool:
    """Whether word ``i`` of a layer equals word ``i`` of the first layer, and is a wrapper or a dict of the file."""
    if i >= min(len(layer.words), len(first.words)) or layer.words[i] != first.words[i]:
        return False
    return layer.words[i] in WRAPPERS or i < min(len(layer.path), len(layer.words) - 1)
