"""Model marks: whether a forward pass changes the model that runs it, or its hooks."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class HookMarks:
    """Records the hooks of a model's modules and those of all modules, to see whether a pass attaches or removes some.

    A comparison takes microseconds, so it can be made wherever a forward waits.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [vars(module) for module in model.modules()]
        everywhere = vars(nn.modules.module)
        self._holders = [
            value
            for holder in (*own, everywhere)
            for name, value in holder.items()
            if "_hooks" in name and isinstance(value, dict)
        ]
        self._before = self._now()

    def are_same(self) -> bool:
        """Whether the hooks are those of the start."""
        return self._now() == self._before

    def _now(self) -> tuple[object, ...]:
        return tuple(chain.from_iterable(self._holders))  # of handles: no number is used twice


@final
class ModelMarks:
    """Records a model, to see whether a pass replaces or writes to its objects, draws numbers, or changes its hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[Any] = []
        self._tensors: list[Tensor] = []
        self._generators: list[torch.Generator] = []
        self._alive: dict[int, object] = {}  # keeps objects alive, so that no id is used twice
        self._collect(model)
        self._hooks = HookMarks(model)
        self._before = self._now()

    def are_same(self) -> bool:
        """Whether the objects are as they were at the start."""
        return self._hooks.are_same() and self._now() == self._before

    def _collect(self, model: nn.Module) -> None:
        visited = self._alive
        waiting: list[object] = [model]
        while waiting:
            item = waiting.pop()
            if id(item) in visited:
                continue
            visited[id(item)] = item
            if isinstance(item, Tensor):
                self._tensors.append(item)
            elif isinstance(item, torch.Generator):
                self._generators.append(item)
            elif isinstance(item, (dict, list, deque, set)):
                self._holders.append(item)
                waiting.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, tuple):
                waiting.extend(item)
            elif isinstance(item, nn.Module):
                self._holders.append(vars(item))
                waiting.extend(value for name, value in vars(item).items() if "hooks" not in name)
                waiting.extend(item.children())

    def _now(self) -> tuple[list[list[int]], list[tuple[int, int]], list[bytes]]:
        ids = [list(map(id, holder.values() if isinstance(holder, dict) else holder)) for holder in self._holders]
        states = [generator.get_state().numpy().tobytes() for generator in self._generators]
        return ids, list(map(_address_and_version, self._tensors)), states


def _address_and_version(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor's memory (0 if it has none), and the number of writes to it (0 for an inference tensor)."""
    address = tensor.data_ptr() if tensor.layout == torch.strided and torch._C._has_storage(tensor) else 0
    return address, 0 if tensor.is_inference() else tensor._version
