"""What wraps a user's model: torch.compile, DataParallel and DistributedDataParallel."""

from __future__ import annotations

from torch import nn

from batchnorm.argument_types import require_type


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs as a traced program, which would trace hooks too."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model, without the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    require_type(model, nn.Module, "a model must be an nn.Module", "Pass the model itself.")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    return model
