"""Effects of a forward that is traced: changed attributes, drawn random numbers, and the context of its operations.

A graph does not repeat such effects, so a forward that has one gets no graph.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

Container = dict[object, object] | list[object] | set[object] | deque[object]  # types of attributes that contain values


@contextmanager
def without_effects(module: nn.Module) -> Iterator[None]:
    """A block that runs a module's forward; at its end the module has its attributes back, but not values of tensors.

    Raises:
        TraceError: If the forward raises, or has an effect that a graph does not repeat.
    """
    attributes, before = Attributes(module), random_states()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}") from error
    finally:
        changed = attributes.undo()
    if changed or before != random_states():
        raise TraceError("its forward sets attributes, makes constants or draws random numbers")


def surroundings(*, stacks: bool = True) -> tuple:
    """The context of an operation, such as no_grad and autocast; with ``stacks`` also the number of active modes."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast,
        torch.get_default_dtype(),
        (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) if stacks else (),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def random_states() -> list:
    """The states of the generators that a forward may draw from."""
    states: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
    if torch.cuda.is_initialized():
        states.append([state.tolist() for state in torch.cuda.get_rng_state_all()])
    if numpy_random := sys.modules.get("numpy.random"):
        name, keys, *rest = numpy_random.get_state()
        states.append([name, keys.tolist(), *rest])
    return states


class Attributes:
    """A snapshot of the attributes of a module and its submodules, with the version numbers of their tensors."""

    def __init__(self, module: nn.Module) -> None:
        containers = [container for part in module.modules() for container in _containers(vars(part), depth=2)]
        self.before = [(container, copy(container)) for container in containers]
        tensors = (value for container in containers for value in _values(container) if isinstance(value, Tensor))
        self.versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def undo(self) -> bool:
        """Restore the attributes. Returns whether an attribute or a tensor had changed; tensors are not restored."""
        changed = [(now, before) for now, before in self.before if not _same_values(now, before)]
        for now, before in changed:
            now.clear()
            put: Any = now.update if isinstance(now, (dict, set)) else now.extend
            put(before)
        return bool(changed) or any(tensor._version != version for tensor, version in self.versions)


def _containers(value: object, depth: int) -> Iterator[Container]:
    if isinstance(value, (dict, list, set, deque)):
        yield value
        if depth:
            for item in _values(value):
                yield from _containers(item, depth - 1)


def _values(container: Container) -> list[object]:
    return list(container.values() if isinstance(container, dict) else container)


def _same_values(a: Container, b: Container) -> bool:
    same = len(a) == len(b) and all(x is y for x, y in zip(_values(a), _values(b), strict=True))
    return same and (not isinstance(a, dict) or list(a) == list(b))
