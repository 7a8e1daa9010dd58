"""Sharded models: their parameters are spread over several ranks, and are whole only during a forward pass.

FSDP2 stores a module's parameters as sharded tensors and replaces them by whole tensors during a pass. FSDP also
records internally whether a module's parameters are sharded, so parameters and record must be changed together.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def is_sharded(model: nn.Module) -> bool:
    """Whether a pass waits for other ranks' parts of the parameters (FSDP, tensor parallelism).

    True also with one rank. Such a pass must run to its end, on all ranks.
    """
    if any(_is_fsdp(module) for module in model.modules()):
        return True
    return any(hasattr(p, "full_tensor") or hasattr(p, "_is_flat_param") for p in model.parameters())


def keep_together(module: nn.Module) -> Callable[[], None] | None:
    """A function that later makes an FSDP2 module's parameters sharded or whole as now; None for other modules.

    The function gathers parameters if they are whole now, so every rank must call it.
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
            fsdp.reset_iter_state()  # an error in a pass leaves FSDP in the middle of it

    return undo


def is_flat(tensor: Tensor) -> bool:
    """Whether a tensor holds all parameters of an FSDP1 module in a row.

    FSDP1 records its memory and hooks elsewhere and changes them with every pass: no other code may restore them.
    """
    return getattr(tensor, "_is_flat_param", False)


def own_shards(flat: Tensor) -> list[Tensor]:
    """A rank's permanent part of a flat tensor: its values, and the gradients that the rank has summed."""
    names = ("_local_shard", "_saved_grad_shard", "grad")
    return [part for name in names if isinstance(part := getattr(flat, name, None), Tensor)]


def holds_shards(module: nn.Module) -> bool | None:
    """Whether an FSDP2 module's own parameters are sharded now; None if the module has no own parameters."""
    first = next(_own_parameters(module), None)
    return None if first is None else hasattr(first, "full_tensor")


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of a module and its submodules, without those that another FSDP2 module manages."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not _is_fsdp2(child):
            yield from _own_parameters(child)


def _is_fsdp(module: nn.Module) -> bool:
    return _is_fsdp2(module) or _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def _is_fsdp2(module: nn.Module) -> bool:
    return _is(module, "torch.distributed.fsdp", "FSDPModule")


def _is(module: nn.Module, home: str, name: str) -> bool:
    # importing the class takes a second, and a model of this kind has imported it
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(module, kind)
