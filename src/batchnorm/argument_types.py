"""Checks of argument types; errors read "<what was expected>, got <what came>. <what to do>"."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn


def kind_of(value: Any) -> str:
    """A value's type for an error message; for a class, that it is a class."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def require_type(value: Any, kinds: type | tuple[type, ...], expected: str, remedy: str) -> None:
    """Refuse a value of another type.

    Args:
        value: The argument.
        kinds: The allowed types.
        expected: Beginning of the sentence, such as "recalibrate needs an nn.Module".
        remedy: A sentence.

    Raises:
        TypeError: "<expected>, got <type>. <remedy>".
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{expected}, got {kind_of(value)}. {remedy}")


def require_module(model: Any, who: str) -> None:
    """Refuse a value that is not a model.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``; ``who`` is the caller.
    """
    remedy = "Make one of it: Class(...)." if isinstance(model, type) else "Pass the model itself."
    require_type(model, nn.Module, f"{who} needs an nn.Module", remedy)


def require_number(value: Any, name: str, remedy: str) -> None:
    """Refuse a value that is not a single real number; a tensor or array with one number is allowed.

    Raises:
        TypeError: If ``value`` is not a number.
    """
    is_one = isinstance(value, Real) or (hasattr(value, "__float__") and getattr(value, "ndim", 1) == 0)
    require_type(value, object if is_one else (), f"{name} must be a number", remedy)


def require_whole_number(value: Any, name: str, remedy: str) -> None:
    """Refuse a value that is not a whole number; torch's traced integers are allowed.

    Raises:
        TypeError: If ``value`` is not a whole number.
    """
    is_one = isinstance(value, (Integral, torch.SymInt)) or (
        hasattr(value, "__index__") and getattr(value, "ndim", 1) == 0
    )
    require_type(value, object if is_one else (), f"{name} must be a whole number", remedy)


def require_flag(value: Any, name: str) -> None:
    """Refuse a value that is not True or False: a batch passed as a flag would count as True.

    Raises:
        TypeError: If ``value`` is neither.
    """
    is_one = isinstance(value, (bool, torch.SymBool)) or type(value).__name__ in {"bool", "bool_"}  # NumPy's
    is_one = is_one or (isinstance(value, Integral) and value in {0, 1})
    require_type(value, object if is_one else (), f"{name} must be True or False", "Pass other arguments by name.")


def require_callable(value: Any, expected: str, remedy: str) -> None:
    """Refuse a value that is not a function; a module is refused too, because it does not take these arguments.

    Raises:
        TypeError: If ``value`` cannot be called, or is a module.
    """
    is_one = isinstance(value, Callable) and not isinstance(value, nn.Module)  # type: ignore[arg-type]
    require_type(value, object if is_one else (), expected, remedy)
