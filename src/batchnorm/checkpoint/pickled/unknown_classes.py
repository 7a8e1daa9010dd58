"""Objects of unknown classes as data: their attributes and items by name.

A pickled ``nn.Module`` has its tensors in ``_parameters`` and ``_buffers`` and its children in ``_modules``. It is
replaced by its state dict: the same names with dots, in torch's order, each module's own tensors first. Buffers that
torch leaves out of a state dict (persistent=False) are included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from batchnorm.checkpoint.refusal import RESAVE, RefusalError

# a value in a pickle: a plain value, a tensor, an object, or a dict, list or tuple of such values
Saved: TypeAlias = Any
_MODULE = ("_parameters", "_buffers", "_modules")
_LONGEST_NAME = 1000  # characters; no module has a longer name
_MOST_NAMES = 1 << 18  # of all tensors of pickled modules


@final
@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A value of a known kind that says nothing about batch norm: a device, a path, a random state.

    If ``is_reported``, the report names it as unread. If ``makes`` is the name of a class, calling this value without
    arguments makes an object of that class, without its ``__init__``.
    """

    name: str
    is_reported: bool = False
    makes: str = ""


@final
@dataclass(frozen=True, slots=True)
class SavedSettings:
    """The settings of a pickled layer; None for a setting that it does not have as a number."""

    eps: float | None
    momentum: float | None


@final
class Object(dict[Saved, Saved]):
    """The attributes and items of an object, by their keys. ``settle`` turns those of a module into a state dict."""

    __slots__ = ("modules", "name")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # after ``settle``, for a module: the settings of each module inside, by name; None for other objects
        self.modules: dict[str, SavedSettings] | None = None

    @property
    def is_module(self) -> bool:
        """Whether the object is an ``nn.Module``: it has the dicts ``_parameters``, ``_buffers`` and ``_modules``."""
        return self.modules is not None or all(isinstance(self.get(key), dict) for key in _MODULE)


def settle(saved: Saved) -> Saved:
    """Replace each module in ``saved`` by its state dict, in place; returns ``saved``."""
    budget = _MOST_NAMES
    for container in [value for value in _containers(saved) if isinstance(value, Object) and value.is_module]:
        if container.modules is None:
            tensors, modules = _state_dict(container, budget)
            budget -= len(tensors) + len(modules)
            container.clear()
            container.update(tensors)
            container.modules = modules
    return saved


def unread(saved: Saved, paths: Sequence[Sequence[str | int]]) -> tuple[str, ...]:
    """The classes of objects that were not read, in the file's order, each once.

    Args:
        saved: The result of ``settle``.
        paths: For each layer that was read, the keys that lead to it.
    """
    read = {id(value) for path in paths for value in _along(saved, path)}
    names: dict[str, None] = {}
    for container in _containers(saved):
        objects = [container] if isinstance(container, Object) and container.modules is None else []
        values = [*objects, *(value for value in _values(container) if isinstance(value, Opaque) and value.is_reported)]
        names.update((value.name, None) for value in values if id(value) not in read)
    return tuple(names)


def has_objects(saved: Saved) -> bool:
    """Whether ``saved`` contains an object, whether it was read or not."""
    return any(isinstance(container, Object) for container in _containers(saved))


def settings(saved: Saved, path: Sequence[str | int], words: Sequence[str]) -> SavedSettings:
    """The settings of a layer; ``path`` leads to its dict, and ``words`` are the words of path and name together.

    Both settings are None if the layer was not pickled as part of a module.
    """
    container = list(_along(saved, path))[-1]
    modules = container.modules if isinstance(container, Object) else None
    return (modules or {}).get(".".join(words[len(path) :]), SavedSettings(None, None))


def is_of_module(saved: Saved, path: Sequence[str | int]) -> bool:
    """Whether the value that these keys lead to was pickled as part of a module."""
    return any(isinstance(value, Object) and value.modules is not None for value in _along(saved, path))


def _along(saved: Saved, path: Sequence[str | int]) -> Iterator[Saved]:
    """The containers that the keys lead through, ``saved`` first. Keys may be numbers."""
    yield saved
    for key in path:
        saved = saved[key]
        yield saved


def _containers(saved: Saved) -> Iterator[Saved]:
    """All dicts, lists and tuples in ``saved``, each once. Attributes of a module before ``settle`` are skipped."""
    seen: set[int] = set()
    waiting = [saved]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        inside = [item for item in _values(value) if isinstance(item, dict | list | tuple)]
        waiting += reversed(inside)


def _values(container: Saved) -> Iterable[Saved]:
    if isinstance(container, Object) and container.modules is None and container.is_module:
        return ()
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list | tuple) else ()


def _state_dict(root: Object, most: int) -> tuple[dict[str, Saved], dict[str, SavedSettings]]:
    """A module's tensors by their names with dots, and each module's settings."""
    tensors: dict[str, Saved] = {}
    modules: dict[str, SavedSettings] = {}
    waiting: list[tuple[str, Object]] = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if name in modules:
            continue
        if len(tensors) + len(modules) >= most:
            raise RefusalError(f"at most {_MOST_NAMES:,} tensors in pickled modules", "more", RESAVE)
        if module.modules is not None:  # it is already a state dict, as part of another value
            tensors.update({_joined(name, key): value for key, value in module.items()})
            modules.update({_joined(name, key).rstrip("."): value for key, value in module.modules.items()})
            continue
        modules[name] = SavedSettings(_number(module.get("eps")), _number(module.get("momentum")))
        for key in ("_parameters", "_buffers"):
            tensors.update({_joined(name, own): value for own, value in module[key].items() if value is not None})
        inner = [(_joined(name, key), child) for key, child in module["_modules"].items() if _is_child(child)]
        waiting += reversed([(path, child) for path, child in inner if len(path) <= _LONGEST_NAME])
    return tensors, modules


def _is_child(value: Saved) -> bool:
    return isinstance(value, Object) and value.is_module


def _joined(name: str, key: str | int) -> str:
    return f"{name}.{key}" if name else str(key)


def _number(value: Saved) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 else None
