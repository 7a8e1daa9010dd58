"""Eval mode for models of any kind, also those whose ``eval`` raises an error."""

from __future__ import annotations

from contextlib import suppress

from torch import nn


def to_eval(model: nn.Module) -> nn.Module:
    """Set a model to eval mode as far as possible, and return it.

    DistributedDataParallel no longer broadcasts buffers before a forward: this process may run others than the rest.

    A program of ``torch.export`` has only the mode of its export, and keeps that mode. A module that raises an error
    for another reason, or has no training flag (``torch.jit.freeze``), is skipped; its children are set all the same.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.require_forward_param_sync = False
    try:
        return model.eval()
    except (NotImplementedError, AttributeError, RuntimeError):
        for module in model.modules():
            _set_eval(module)
    return model


def _set_eval(module: nn.Module) -> None:
    with suppress(AttributeError, RuntimeError):
        if module.training:
            module.training = False
