"""Model marks: whether a forward pass changes the model that runs it."""

from __future__ import annotations

from collections import deque
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class ModelMarks:
    """Records the objects in a model, to see whether a pass replaces them, writes to them, or uses its generators."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[Any] = []
        self._tensors: list[Tensor] = []
        self._generators: list[torch.Generator] = []
        self._alive: dict[int, object] = {}  # keeps objects alive, so that no id is used twice
        self._collect(model)
        self._before = self._now()

    def are_same(self) -> bool:
        """Whether the objects are as they were at the start."""
        return self._now() == self._before

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
