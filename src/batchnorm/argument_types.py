"""Arguments of a wrong type, refused at the door: "<what was expected>, got <what came>. <what to do>"."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn


def kind_of(value: Any) -> str:
    """What a value is called in an error: its type, or that it is a class itself."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def require_type(value: Any, kinds: type | tuple[type, ...], expected: str, remedy: str) -> None:
    """Refuse what is of none of these types.

    Args:
        value: What came.
        kinds: What may come.
        expected: As the beginning of a sentence, such as "recalibrate needs an nn.Module".
        remedy: A sentence.

    Raises:
        TypeError: With all that.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{expected}, got {kind_of(value)}. {remedy}")


def require_module(model: Any, who: str) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: If ``model`` is no ``nn.Module``; ``who`` needs one.
    """
    remedy = "Make one of it: Class(...)." if isinstance(model, type) else "Pass the model itself."
    require_type(model, nn.Module, f"{who} needs an nn.Module", remedy)


def require_number(value: Any, name: str, remedy: str) -> None:
    """Refuse what is no single real number; a tensor or array of one number is one.

    Raises:
        TypeError: If ``value`` is none.
    """
    is_one = isinstance(value, Real) or (hasattr(value, "__float__") and getattr(value, "ndim", 1) == 0)
    require_type(value, object if is_one else (), f"{name} must be a number", remedy)


def require_whole_number(value: Any, name: str, remedy: str) -> None:
    """Refuse what is no whole number; what torch traces as one is one.

    Raises:
        TypeError: If ``value`` is none.
    """
    is_one = isinstance(value, (Integral, torch.SymInt)) or (
        hasattr(value, "__index__") and getattr(value, "ndim", 1) == 0
    )
    require_type(value, object if is_one else (), f"{name} must be a whole number", remedy)


def require_flag(value: Any, name: str) -> None:
    """Refuse what is neither true nor false: a batch in the place of a flag would count as true.

    Raises:
        TypeError: If ``value`` is neither.
    """
    is_one = isinstance(value, (bool, torch.SymBool)) or type(value).__name__ in {"bool", "bool_"}  # NumPy's
    is_one = is_one or (isinstance(value, Integral) and value in {0, 1})
    require_type(value, object if is_one else (), f"{name} must be True or False", "Pass other arguments by name.")


def require_callable(value: Any, expected: str, remedy: str) -> None:
    """Refuse what cannot be called, a module among it, which is no function of these arguments.

    Raises:
        TypeError: If ``value`` is none.
    """
    is_one = isinstance(value, Callable) and not isinstance(value, nn.Module)  # type: ignore[arg-type]
    require_type(value, object if is_one else (), expected, remedy)
