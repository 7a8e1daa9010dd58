"""Held memory: the bytes that a forward pass holds at a moment, measured from the results of torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from batchnorm.population.tensor_trees import tensors_in

if TYPE_CHECKING:
    from batchnorm.call_types import Arguments, Keywords


@final
class HeldMemory(TorchFunctionMode):
    """A block that measures the memory held by the results of torch's functions.

    Attributes:
        most: The largest number of bytes at any call of ``look``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._results: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        """Call the function, and record its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._note(tensor)
        return result

    @contextmanager
    def off(self) -> Iterator[None]:
        """A block that is not measured."""
        with torch._C.DisableTorchFunction():
            yield

    def look(self) -> None:
        """Count the memory held now; call it inside ``off``."""
        self._results = {key: each for key, each in self._results.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._results.values()))

    def _note(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided and torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            self._results[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
