"""Objects of unknown classes as data: their attributes and items by name.

A pickled ``nn.Module`` keeps its tensors in ``_parameters`` and ``_buffers`` and its children in ``_modules``. It is
read as its own state dict: the same names with dots, in torch's order, each module's own tensors first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from batchnorm.checkpoint.refusal import RefusalError

# what a pickle holds: a plain value, a tensor, an object, or a dict, list or tuple of such
Saved: TypeAlias = Any
_MODULE = ("_parameters", "_buffers", "_modules")
_LONGEST_NAME = 1000  # characters; longer ones are no module's
_MOST_NAMES = 1 << 18  # of all tensors of pickled modules


@final
@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A value of a known kind that says nothing about batch norm: a device, a path, a random state.

    ``is_reported`` says that the report names it as unread. ``makes`` is a class: calling this value without arguments
    makes an object of it, without its ``__init__``.
    """

    name: str
    is_reported: bool = False
    makes: str = ""


@final
@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What a pickled layer says beside its tensors; None where it says nothing."""

    eps: float | None
    momentum: float | None


@final
class Object(dict[Saved, Saved]):
    """An object's attributes and items by their keys. ``state_dict`` makes a module's tensors of them."""

    __slots__ = ("modules", "name")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # of a module that was made its state dict: the settings of each module in it
        self.modules: dict[str, LayerSettings] | None = None

    @property
    def is_module(self) -> bool:
        """Whether it is an ``nn.Module`` as torch pickles one."""
        return self.modules is not None or all(isinstance(self.get(key), dict) for key in _MODULE)


def settle(saved: Saved) -> Saved:
    """``saved`` with the state dict of each module in the module's place."""
    left = _MOST_NAMES
    for container in [found for found in _containers(saved) if isinstance(found, Object) and found.is_module]:
        if container.modules is None:
            tensors, modules = _state_dict(container, left)
            left -= len(tensors) + len(modules)
            container.clear()
            container.update(tensors)
            container.modules = modules
    return saved


def unread(saved: Saved, paths: Sequence[Sequence[str | int]]) -> tuple[str, ...]:
    """Classes of objects of which nothing was read, in the file's order, each once.

    Args:
        saved: As ``settle`` gives it.
        paths: The keys that lead to what was read.
    """
    read = {id(found) for path in paths for found in _along(saved, path)}
    names: dict[str, None] = {}
    for container in _containers(saved):
        found = [container] if isinstance(container, Object) and container.modules is None else []
        values = [*found, *(value for value in _values(container) if isinstance(value, Opaque) and value.is_reported)]
        names.update((value.name, None) for value in values if id(value) not in read)
    return tuple(names)


def has_objects(saved: Saved) -> bool:
    """Whether any object is in it, read or not."""
    return any(isinstance(container, Object) for container in _containers(saved))


def settings(saved: Saved, path: Sequence[str | int], words: Sequence[str]) -> LayerSettings:
    """The settings of a layer that was pickled as a module; ``words`` are the keys of ``path`` and of its name."""
    container = list(_along(saved, path))[-1]
    modules = container.modules if isinstance(container, Object) else None
    return (modules or {}).get(".".join(words[len(path) :]), LayerSettings(None, None))


def is_of_module(saved: Saved, path: Sequence[str | int]) -> bool:
    """Whether what keys lead to was pickled as part of a module."""
    return any(isinstance(found, Object) and found.modules is not None for found in _along(saved, path))


def _along(saved: Saved, path: Sequence[str | int]) -> Iterator[Saved]:
    """The containers that keys lead through. A key of a dict may have been a number."""
    yield saved
    for key in path:
        saved = saved[key]
        yield saved


def _containers(saved: Saved) -> Iterator[Saved]:
    """Every dict, list and tuple, each once. A module's own attributes are not looked into."""
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


def _state_dict(root: Object, most: int) -> tuple[dict[str, Saved], dict[str, LayerSettings]]:
    """A module's tensors by their names with dots, and each module's settings."""
    tensors: dict[str, Saved] = {}
    modules: dict[str, LayerSettings] = {}
    waiting: list[tuple[str, Object]] = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if name in modules:
            continue
        if len(tensors) + len(modules) >= most:
            raise RefusalError(f"at most {_MOST_NAMES:,} tensors in pickled modules", "more")
        if module.modules is not None:  # it was settled before, as part of another value
            tensors.update({_joined(name, key): value for key, value in module.items()})
            modules.update({_joined(name, key).rstrip("."): value for key, value in module.modules.items()})
            continue
        modules[name] = LayerSettings(_number(module.get("eps")), _number(module.get("momentum")))
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
