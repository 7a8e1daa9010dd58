"""Names of layers in messages: a layer does not know its path, but the model that calls it is on the call stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

# modules that only wrap a model, and the names under which wrappers keep what they wrap
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"}
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def path_of(layer: nn.Module) -> str:
    """The layer's dotted path in the outermost module whose forward is running; "" if no module is calling it."""
    for module in reversed(list(_calling_modules())):
        if module is layer or type(module).__name__ in _WRAPPERS:
            continue
        path = next((path for path, each in module.named_modules() if each is layer), None)
        if path is not None:
            return ".".join(part for part in path.split(".") if part not in _WRAPPED)
    return ""


def _calling_modules() -> Iterator[nn.Module]:
    """The modules of which a method is running, from the innermost to the outermost."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield module
        frame = frame.f_back
