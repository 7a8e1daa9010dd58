"""Settings of a layer beyond torch.nn's arguments; a subclass can use their names for attributes of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

SETTINGS = {"act", "act_param", "memory", "padding", "single_element"}
_MODULE = "batchnorm.layers"  # where our own classes are; all others with these settings are subclasses


class Setting:
    """A setting of a layer; if a subclass uses the same name for a parameter, buffer or child, it is that."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.name not in vars(layer).get("_given_up", ()):
            return getattr(layer, f"_{self.name}")
        for table in ("_parameters", "_buffers", "_modules"):
            if self.name in vars(layer)[table]:
                return vars(layer)[table][self.name]
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {self.name!r}")


def give_up(layer: nn.Module, name: str) -> None:
    """Let a subclass use a setting's name for an attribute of its own; nothing if it is no setting or no subclass."""
    if name in SETTINGS and is_subclass(layer):
        vars(layer)["_given_up"] = vars(layer).get("_given_up", frozenset()) | {name}


def is_subclass(layer: nn.Module) -> bool:
    """Whether a layer of ours is of a class that somebody else wrote."""
    return type(layer).__module__ != _MODULE
