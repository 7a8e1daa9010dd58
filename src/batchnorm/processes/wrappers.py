"""Wrappers of a model that exchange buffers and gradients with other ranks, kept from it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_SETTING = "require_forward_param_sync"  # whether the next forward broadcasts the buffers


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """A block in which DistributedDataParallel in a model waits for no other rank, neither forward nor backward.

    Its buffers are not broadcast and its gradients not averaged. A forward pass in the block must have its backward
    pass in the block too. Afterwards the wrapper is as before.
    """
    found = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    wrappers = [module for module in found if hasattr(module, _SETTING)]  # without it, __init__ has not run
    before = [getattr(wrapper, _SETTING) for wrapper in wrappers]
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(wrapper.no_sync())
            setattr(wrapper, _SETTING, False)
        try:
            yield
        finally:
            for wrapper, value in zip(wrappers, before, strict=True):
                setattr(wrapper, _SETTING, value)
