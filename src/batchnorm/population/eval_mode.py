"""Eval mode for models of any kind, also those whose ``eval`` refuses."""

from __future__ import annotations

from contextlib import suppress

from torch import nn


def to_eval(model: nn.Module) -> nn.Module:
    """The model, in eval mode as far as it has one.

    A program of ``torch.export`` has the mode that it was exported in, and no other: it is left as it is. A module that
    refuses another way, or whose flag was taken away (``torch.jit.freeze``), is passed over, and its children are not.
    """
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
