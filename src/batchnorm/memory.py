"""Memory between forward and backward: an activation that can be computed again need not be kept.

The operation after a layer keeps the layer's result y for its own gradient, and the layer keeps its input x. y is a
cheap function of x, the batch's statistics, the parameters and the residual, so ``saving`` keeps only these: in the
graph a function replaces y, and computes y when the backward pass needs it. The function, with the storage, version and
type of y, is called a recipe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@final
class _Recipe(NamedTuple):
    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    compute: Callable[[], Tensor]


@final
class _Layout(NamedTuple):
    """What autograd keeps in place of a tensor, which is a layer's result or a view of it.

    ``compute`` returns the layer's result again; size, strides and offset are those of the tensor in its storage.
    """

    compute: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recipes(threading.local):
    """Recipes of the results that layers computed in this thread, by address in memory; None outside ``saving``."""

    by_address: dict[int, _Recipe] | None = None


_recipes = _Recipes()


@contextmanager
def saving() -> Iterator[None]:
    """A block in which results of layers with ``memory="save"`` are recomputed in the backward pass, not kept.

    The forward pass must run inside the block; the backward pass may run inside or after it. Blocks may be nested.
    Gradients have the same bits as without the block. Three kinds of results are not recomputed: results that are
    changed in place before the next operation saves them, results that the layer's own backward pass needs, and
    results that are written over the layer's input.
    """
    if _recipes.by_address is not None:
        yield
        return
    _recipes.by_address = {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _recipes.by_address = None


def remember(result: Tensor, compute: Callable[[], Tensor]) -> None:
    """Inside ``saving``, keep ``compute`` in place of ``result``, which must fill its storage; outside, do nothing."""
    if _recipes.by_address is not None:
        storage = result.untyped_storage()
        _recipes.by_address[storage.data_ptr()] = _Recipe(
            StorageWeakRef(storage), result._version, result.dtype, compute
        )


def _pack(kept: Tensor) -> Tensor | _Layout:
    recipe = (_recipes.by_address or {}).get(kept.untyped_storage().data_ptr()) if _has_memory(kept) else None
    if recipe is None or recipe.version != kept._version or recipe.storage != StorageWeakRef(kept.untyped_storage()):
        return kept  # no layer's result, or changed since, or a new tensor at a freed address
    if recipe.dtype != kept.dtype or kept.is_neg() or kept.is_conj():
        return kept  # a view with another type, or a negated or conjugate view
    return _Layout(recipe.compute, kept.size(), kept.stride(), int(kept.storage_offset()))


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in {Tensor, torch.nn.Parameter} and tensor.layout == torch.strided


def _unpack(kept: Tensor | _Layout) -> Tensor:
    if not isinstance(kept, _Layout):
        return kept
    with torch.no_grad():
        return kept.compute().as_strided(kept.size, kept.stride, kept.offset)
