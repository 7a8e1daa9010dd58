"""Sharded models: parameters that lie on several ranks, and come together only while a forward pass needs them.

FSDP2 keeps a module's parameters as its own sharded tensors, and exchanges them for whole ones during a pass. Which of
the two a module holds is also written down inside FSDP, so one may not be changed without the other.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def is_sharded(model: nn.Module) -> bool:
    """Whether a pass would wait for other ranks to bring their part of the parameters (FSDP, tensor parallelism).

    Also with one rank. Such a pass must run to its end, on all ranks.
    """
    if any(_is_fsdp(module) for module in model.modules()):
        return True
    return any(hasattr(p, "full_tensor") or hasattr(p, "_is_flat_param") for p in model.parameters())


def keep_together(module: nn.Module) -> Callable[[], None] | None:
    """The step that takes an FSDP2 module back to the parameters that it holds now, sharded or whole; None for others.

    The step gathers parameters if they were whole, so every rank has to run it.
    """
    if not _is_fsdp2(module):
        return None
    fsdp: Any = module
    before = holds_shards(module)

    def undo() -> None:
        if before is None or holds_shards(module) is before:
            return
        (fsdp.reshard if before else fsdp.unshard)()
        if holds_shards(module) is not before and hasattr(fsdp, "reset_iter_state"):
            fsdp.reset_iter_state()  # a pass that raised on its way has left FSDP in the middle of it

    return undo


def is_flat(tensor: Tensor) -> bool:
    """Whether a tensor is all parameters of an FSDP1 module in a row.

    What memory it shows, and which hooks wait on it, FSDP1 writes down elsewhere and changes with every pass: nobody
    else may put that back.
    """
    return getattr(tensor, "_is_flat_param", False)


def own_shards(flat: Tensor) -> list[Tensor]:
    """What a rank has of such a tensor for good: its part of the values, and of gradients that it has summed."""
    names = ("_local_shard", "_saved_grad_shard", "grad")
    return [part for name in names if isinstance(part := getattr(flat, name, None), Tensor)]


def holds_shards(module: nn.Module) -> bool | None:
    """Whether the parameters that an FSDP2 module looks after are sharded now; None if there are none."""
    first = next(_own_parameters(module), None)
    return None if first is None else hasattr(first, "full_tensor")


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of a module and of the modules below it that no other FSDP2 module looks after."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not _is_fsdp2(child):
            yield from _own_parameters(child)


def _is_fsdp(module: nn.Module) -> bool:
    return _is_fsdp2(module) or _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def _is_fsdp2(module: nn.Module) -> bool:
    return _is(module, "torch.distributed.fsdp", "FSDPModule")


def _is(module: nn.Module, home: str, name: str) -> bool:
    # loading it takes a second, and no model of that kind is without it
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(module, kind)
