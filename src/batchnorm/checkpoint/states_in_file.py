"""Finds the states in a dict that has several: a network and its average, a student and its teacher.

Such a dict has the same layers in several modules: ``net.1`` and ``net_ema.1``. A module is a state if a word in its
path names an average or one of two networks (``ema``, ``teacher``, ``target``), and if a neighbour has at least its
layers, with as many channels. Each such neighbour is a state too; it may also be the rest of the dict around the
module. All other layers form a further state. If the modules with such words and their neighbours have fewer than half
of the dict's layers, they are a part of one model, and the dict stays one state. Modules without such words (``left``
and ``right``) stay one state; a path or a model can choose one of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from batchnorm.checkpoint.averaged_copies import WRAPPERS, Keys, Words, says_average, snake
from batchnorm.checkpoint.stored import Checkpoint, State, below, is_below

_MOST_STATES = 64  # dicts with states, and states in one dict: a file with more was made to take time
ROOT = "."  # the name of a state that is in no dict of the file and has no prefix
_NETWORK = "(actor|backbone|critic|encoder|model|net|network|policy)"
_ONE = "(k|key|old|q|query)"
# names for one of two networks that are trained together, or for an older copy of a network
_ONE_OF_TWO_NETWORKS = re.compile(
    rf"(.*[_-])?(momentum|online|student|target|teacher)([_-].*)?|(.*[_-])?{_NETWORK}_{_ONE}|{_ONE}_{_NETWORK}",
    re.IGNORECASE,
)


def with_state(file: Checkpoint, path: str) -> tuple[Checkpoint, str]:
    """The file with the dict or module at a path as one of its states, and that state's name.

    A module inside of a state is taken out of that state. If the dict or module at the path has several states, they
    become one. The path may be written without ``file.prefix``, as the names of layers are.

    Raises:
        ValueError: If no layer is under this path. The message names all states.
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
    """The path; if it leads through a dict that has several paths in the file, the path through the first of these."""
    alias = next((alias for alias in file.aliases if is_below(alias, path)), "")
    return f"{file.aliases[alias]}{path.removeprefix(alias)}" if alias else path


def dicts(file: Checkpoint) -> dict[Keys, dict[str, str]]:
    """For each dict with states, its layers' names in the dict, mapped to those in the file; innermost dicts first."""
    names: dict[Keys, dict[str, str]] = defaultdict(dict)
    for state in file.states.values():
        prefix = state.prefix.removesuffix(".")
        names[state.keys] |= {below(prefix, layer): name for layer, name in state.layers.items()}
    return dict(sorted(names.items(), key=lambda it: -len(it[0])))


def state_name(keys: Keys, prefix: str) -> str:
    """The path of a state: the keys of its dict, then its prefix; ``ROOT`` if both are empty."""
    return below(*map(str, keys), prefix) or ROOT


def _prefix(keys: Keys, path: str) -> Iterator[str]:
    """The part of a path behind the keys of a dict; nothing if the path does not lead into the dict."""
    place = state_name(keys, "")
    if path == place:
        yield ""
    elif place == ROOT:
        yield path
    elif is_below(place, path):
        yield path.removeprefix(f"{place}.")


def apart(file: Checkpoint, keys: Keys, prefix: str) -> Checkpoint | None:
    """The file with the layers in one module of a dict as one state; None if the module has no layers.

    Other states keep the rest of their layers. Averages come last, otherwise states are in the file's order.
    """
    own = {name: in_file for name, in_file in dicts(file).get(keys, {}).items() if is_below(prefix, name)}
    if not own:
        return None
    layers = {name[len(prefix) :].removeprefix("."): in_file for name, in_file in own.items()}
    names_in_state = set(own.values())
    are_averages = [state.is_average for state in file.states.values() if names_in_state & set(state.layers.values())]
    is_average = all(are_averages) or any(map(says_average, prefix.split(".")))
    states = {name: rest for name, state in file.states.items() if (rest := _without(state, names_in_state)).layers}
    states[state_name(keys, prefix)] = State(keys, f"{prefix}." if prefix else "", layers, is_average)
    return replace(file, states=_ordered(file, states))


def _without(state: State, taken: set[str]) -> State:
    return replace(state, layers={layer: name for layer, name in state.layers.items() if name not in taken})


def _ordered(file: Checkpoint, states: Mapping[str, State]) -> dict[str, State]:
    at = {name: i for i, name in enumerate(file.every)}
    return dict(sorted(states.items(), key=lambda it: (it[1].is_average, min(at[n] for n in it[1].layers.values()))))


def parted(file: Checkpoint) -> Checkpoint:
    """The file with more states: the modules of a dict that are states because of words in their paths."""
    every, all_prefixes, by_dict = file.every, set(), dicts(file)
    if len(by_dict) > _MOST_STATES:
        return file
    for keys, names in by_dict.items():
        layers = {tuple(name.split(".")): every[it].channels for name, it in names.items()}
        prefixes = [".".join(words) for words in _told_apart(layers, dict.fromkeys(_averages(file, keys)))]
        all_prefixes.update(prefixes)
        for prefix in prefixes:
            file = apart(file, keys, prefix) or file
    for keys, names in by_dict.items():  # another dict may have only one of these modules, such as its average
        for prefix in all_prefixes:
            if all(is_below(prefix, name) for name in names):
                file = apart(file, keys, prefix) or file
    return file


def _averages(file: Checkpoint, keys: Keys) -> Iterator[Words]:
    """The modules of a dict that are averages already, such as by ``n_averaged``; without wrappers at the end."""
    for state in file.states.values():
        words = tuple(state.prefix.removesuffix(".").split("."))
        if state.keys == keys and state.prefix and state.is_average:
            yield words[: next((i for i in range(len(words), 1, -1) if words[i - 1] not in WRAPPERS), 1)]


def _told_apart(layers: Mapping[Words, int], averages: Iterable[Words]) -> list[Words]:
    """The modules of a dict that are separate states, then the module with all other layers, if there is one.

    ``layers`` has the numbers of channels of all layers of the dict, ``averages`` the modules that are averages.
    """
    labelled = dict.fromkeys([*averages, *(label for words in layers for label in _label(words))])
    parents = dict.fromkeys(label[:-1] for label in labelled)
    if len(labelled) > _MOST_STATES:
        return []
    # a single layer below such words in several modules is a part of each block, not a state
    if len(parents) > 1 and any(len(_inside(layers, label)) < 2 for label in labelled):
        return []
    parts = [part for parent in parents for part in _in_module(layers, parent, labelled)]
    chosen, bare = [part for part, _ in parts], {parent for _, parent in parts if parent is not None}
    rest = [words for words in layers if not any(words[: len(part)] == part for part in chosen)]
    beside = sum(max(len(_inside(layers, part)) for part, its in parts if its == parent) for parent in bare)
    if 2 * (len(layers) - len(rest) + beside) < len(layers):  # too few layers: they are a part of the model
        return []
    return [*chosen, *([] if bare else _alone(rest))]


def _in_module(
    layers: Mapping[Words, int], parent: Words, labelled: Iterable[Words]
) -> Iterator[tuple[Words, Words | None]]:
    """The modules in ``parent`` that are states, each with ``parent`` if the parent's other layers are a state too."""
    inside = _inside(layers, parent)
    groups: dict[Words, dict[Words, int]] = defaultdict(dict)
    for words, channels in inside.items():
        if len(words) > 1:
            groups[*parent, words[0]][words[1:]] = channels
    parts = dict(_unwrapped(group, members) for group, members in groups.items())
    matches = [part for part in parts if part[: len(parent) + 1] in labelled] if len(parts) <= _MOST_STATES else []
    bare = [part for part in matches if parts[part].items() <= inside.items()]
    pairs = [(a, b) for a in matches for b in parts if a != b and parts[a].items() <= parts[b].items()]
    chosen = {*bare, *(part for pair in pairs for part in pair)}
    yield from ((part, parent if part in bare else None) for part in parts if part in chosen)


def _inside(layers: Mapping[Words, int], module: Words) -> dict[Words, int]:
    return {words[len(module) :]: channels for words, channels in layers.items() if words[: len(module)] == module}


def _alone(layers: Sequence[Words]) -> list[Words]:
    """The module that contains all these layers, in a list; [] if no module contains all."""
    first, last = min(layers, default=()), max(layers, default=())
    shared = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))]
    return [tuple(shared)] if shared else []


def _label(words: Words) -> Iterator[Words]:
    """The path to the first word that names an average or one of two networks; nothing if no word does."""
    for i, word in enumerate(words[:-1]):
        if says_average(word) or _ONE_OF_TWO_NETWORKS.fullmatch(snake(word)):
            yield words[: i + 1]
            return


def _unwrapped(group: Words, members: dict[Words, int]) -> tuple[Words, dict[Words, int]]:
    """A module's path and layers; if everything in it is in one wrapper, those of the wrapper."""
    first = {words[0] for words in members if len(words) > 1}
    if len(first) == 1 and all(len(words) > 1 for words in members) and first <= WRAPPERS:
        return _unwrapped((*group, *first), {words[1:]: channels for words, channels in members.items()})
    return group, members
