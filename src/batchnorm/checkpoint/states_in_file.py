"""Which states a file holds, where one dict has several: a network and its average, a student and its teacher.

Such a dict has the same layers behind several words: ``net.1`` and ``net_ema.1``. A word tells that one of them is
an average or the like (``ema``, ``teacher``, ``target``): it is a state, and so is each neighbour that has its layers,
which may be what stands in the dict without any word. What is left over is a state too. Neighbours of which no word
tells (``left`` and ``right``) are one model for all that a file shows; a path or a model may choose one of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from batchnorm.checkpoint.averaged_copies import WRAPPERS, Keys, Words, says_average, snake
from batchnorm.checkpoint.stored import Checkpoint, State, below, is_below

_MOST = 64  # dicts with several states, and states in one: a file of more has been made to take time
ROOT = "."  # the state whose names stand in no dict and have nothing in front
_NETWORK = "(actor|backbone|critic|encoder|model|net|network|policy)"
_ONE = "(k|key|old|q|query)"
# one of two networks that are trained together, or a network as it was
_OF_TWO = re.compile(
    rf"(.*[_-])?(momentum|online|student|target|teacher)([_-].*)?|(.*[_-])?{_NETWORK}_{_ONE}|{_ONE}_{_NETWORK}",
    re.IGNORECASE,
)


def with_state(file: Checkpoint, path: str) -> tuple[Checkpoint, str]:
    """The file with what is at a path as one of its states, and that state's name.

    A module of a state is taken out of it; a dict or module that has several states is one again. The path may lack
    what all of the model's own layers have in front, as in the names of layers.

    Raises:
        ValueError: If there is nothing of this path. The message names all states.
    """
    for name in (path, below(file.prefix.rstrip("."), path)):
        known = _itself(file, name)
        if known in file.states:
            return file, known
        for keys in dicts(file):
            for prefix in _prefix(keys, known):
                if taken := apart(file, keys, prefix):
                    return taken, state_name(keys, prefix)
    has = ", ".join(map(repr, file.states)) or "none with batch norm layers"
    raise ValueError(f"{file.path} has no state {path!r}; it has {has}. Choose one of them.")


def _itself(file: Checkpoint, path: str) -> str:
    """A path by its first name in the file, if a part of it has several names."""
    alias = next((alias for alias in file.aliases if is_below(alias, path)), "")
    return f"{file.aliases[alias]}{path.removeprefix(alias)}" if alias else path


def dicts(file: Checkpoint) -> dict[Keys, dict[str, str]]:
    """The layers of each dict that has states, by their names there, with those in the file; innermost dicts first."""
    found: dict[Keys, dict[str, str]] = defaultdict(dict)
    for state in file.states.values():
        prefix = state.prefix.removesuffix(".")
        found[state.keys] |= {below(prefix, layer): name for layer, name in state.layers.items()}
    return dict(sorted(found.items(), key=lambda it: -len(it[0])))


def state_name(keys: Keys, prefix: str) -> str:
    """The path of a state: the keys of its dict, and what its names have in front."""
    return below(*map(str, keys), prefix) or ROOT


def _prefix(keys: Keys, path: str) -> Iterator[str]:
    """What a path has behind the keys of a dict, if it leads there."""
    place = state_name(keys, "")
    if path == place:
        yield ""
    elif place == ROOT:
        yield path
    elif is_below(place, path):
        yield path.removeprefix(f"{place}.")


def apart(file: Checkpoint, keys: Keys, prefix: str) -> Checkpoint | None:
    """The file with the layers of a dict whose names begin with a module's path as one state; None if there are none.

    Other states keep the rest of their layers. Averages come last, otherwise states are in the file's order.
    """
    own = {name: in_file for name, in_file in dicts(file).get(keys, {}).items() if is_below(prefix, name)}
    if not own:
        return None
    layers = {name[len(prefix) :].removeprefix("."): in_file for name, in_file in own.items()}
    taken = set(own.values())
    met = [state.is_average for state in file.states.values() if taken & set(state.layers.values())]
    is_average = all(met) or any(map(says_average, prefix.split(".")))
    states = {name: rest for name, state in file.states.items() if (rest := _without(state, taken)).layers}
    states[state_name(keys, prefix)] = State(keys, f"{prefix}." if prefix else "", layers, is_average)
    return replace(file, states=_ordered(file, states))


def _without(state: State, taken: set[str]) -> State:
    return replace(state, layers={layer: name for layer, name in state.layers.items() if name not in taken})


def _ordered(file: Checkpoint, states: Mapping[str, State]) -> dict[str, State]:
    at = {name: i for i, name in enumerate(file.every)}
    return dict(sorted(states.items(), key=lambda it: (it[1].is_average, min(at[n] for n in it[1].layers.values()))))


def parted(file: Checkpoint) -> Checkpoint:
    """The file with each state that words tell apart from another one in the same dict."""
    every, told, found = file.every, set(), dicts(file)
    if len(found) > _MOST:
        return file
    for keys, names in found.items():
        layers = {tuple(name.split(".")): every[it].channels for name, it in names.items()}
        prefixes = [".".join(words) for words in _told_apart(layers, dict.fromkeys(_averages(file, keys)))]
        told.update(prefixes)
        for prefix in prefixes:
            file = apart(file, keys, prefix) or file
    for keys, names in found.items():  # an average of one of them, in a dict of its own
        for prefix in told:
            if all(is_below(prefix, name) for name in names):
                file = apart(file, keys, prefix) or file
    return file


def _averages(file: Checkpoint, keys: Keys) -> Iterator[Words]:
    """Modules of a dict that are averages, as ``n_averaged`` beside them tells."""
    for state in file.states.values():
        words = tuple(state.prefix.removesuffix(".").split("."))
        if state.keys == keys and state.prefix and state.is_average:
            yield words[: next((i for i in range(len(words), 1, -1) if words[i - 1] not in WRAPPERS), 1)]


def _told_apart(layers: Mapping[Words, int], averages: Iterable[Words]) -> list[Words]:
    """Modules of a dict that are states of their own, by its layers with their channels; then what alone is left."""
    labelled = dict.fromkeys([*averages, *(label for words in layers for label in _label(words))])
    parents = dict.fromkeys(label[:-1] for label in labelled)
    if len(labelled) > _MOST:
        return []
    # in several places one layer is a part of each block
    if len(parents) > 1 and any(len(_inside(layers, label)) < 2 for label in labelled):
        return []
    parts = [part for parent in parents for part in _in_module(layers, parent, labelled)]
    chosen, bare = [part for part, _ in parts], {parent for _, parent in parts if parent is not None}
    rest = [words for words in layers if not any(words[: len(part)] == part for part in chosen)]
    beside = sum(max(len(_inside(layers, part)) for part, its in parts if its == parent) for parent in bare)
    if 2 * (len(layers) - len(rest) + beside) < len(layers):  # a few of many layers are a part of the model
        return []
    return [*chosen, *([] if bare else _alone(rest))]


def _in_module(
    layers: Mapping[Words, int], parent: Words, labelled: Iterable[Words]
) -> Iterator[tuple[Words, Words | None]]:
    """Modules in one that are states; with the module's own path where its other layers are another state."""
    inside = _inside(layers, parent)
    groups: dict[Words, dict[Words, int]] = defaultdict(dict)
    for words, channels in inside.items():
        if len(words) > 1:
            groups[*parent, words[0]][words[1:]] = channels
    parts = dict(_unwrapped(group, members) for group, members in groups.items())
    told = [part for part in parts if part[: len(parent) + 1] in labelled] if len(parts) <= _MOST else []
    bare = [part for part in told if parts[part].items() <= inside.items()]
    pairs = [(a, b) for a in told for b in parts if a != b and parts[a].items() <= parts[b].items()]
    chosen = {*bare, *(part for pair in pairs for part in pair)}
    yield from ((part, parent if part in bare else None) for part in parts if part in chosen)


def _inside(layers: Mapping[Words, int], module: Words) -> dict[Words, int]:
    return {words[len(module) :]: channels for words, channels in layers.items() if words[: len(module)] == module}


def _alone(layers: Sequence[Words]) -> list[Words]:
    """The module that has all of some layers, if there is one."""
    first, last = min(layers, default=()), max(layers, default=())
    shared = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))]
    return [tuple(shared)] if shared else []


def _label(words: Words) -> Iterator[Words]:
    """The path to the first word that tells of an average or of one of two networks, with layers inside."""
    for i, word in enumerate(words[:-1]):
        if says_average(word) or _OF_TWO.fullmatch(snake(word)):
            yield words[: i + 1]
            return


def _unwrapped(group: Words, members: dict[Words, int]) -> tuple[Words, dict[Words, int]]:
    """A module, or what alone is in it where that is a wrapper."""
    first = {words[0] for words in members if len(words) > 1}
    if len(first) == 1 and all(len(words) > 1 for words in members) and first <= WRAPPERS:
        return _unwrapped((*group, *first), {words[1:]: channels for words, channels in members.items()})
    return group, members
