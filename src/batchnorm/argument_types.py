"""Checks of argument types, with errors of the form "<what was expected>, got <type>. <what to do>"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from numbers import Integral, Real


def kind_of(value: object) -> str:
    """A value's type in words: the name of its class, or "the class X" if the value itself is the class X."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def require_type(value: object, kinds: type | tuple[type, ...], expected: str, remedy: str) -> None:
    """Refuse a value that is of none of the allowed types.

    Args:
        value: The argument.
        kinds: The allowed types.
        expected: The sentence before ", got", such as "recalibrate needs an nn.Module".
        remedy: A sentence that says what to pass instead.

    Raises:
        TypeError: "<expected>, got <type>. <remedy>".
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{expected}, got {kind_of(value)}. {remedy}")


def require_module(model: object, who: str) -> None:
    """Refuse a value that is not a model.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``; ``who`` is the caller.
    """
    remedy = f"Pass an instance: {model.__name__}(...)." if isinstance(model, type) else "Pass the model itself."
    require_type(model, _of_torch("Module", "torch.nn"), f"{who} needs an nn.Module", remedy)


def require_number(value: object, name: str, remedy: str) -> None:
    """Refuse a value that is not a single real number; real tensors and arrays without dimensions are allowed.

    True and False are refused: an argument in the wrong place would count as 1 or 0.

    Raises:
        TypeError: If ``value`` is not a number.
    """
    is_number = _number_kind(value) in "iuf"
    require_type(value, object if is_number else (), f"{name} must be a number", remedy)


def require_whole_number(value: object, name: str, remedy: str) -> None:
    """Refuse a value that is not an integer; torch's symbolic integers (SymInt) are allowed.

    Integer tensors and arrays without dimensions are allowed too. A float is refused even if it is whole, such as 2.0,
    and so are True and False.

    Raises:
        TypeError: If ``value`` is not a whole number.
    """
    is_whole = _number_kind(value) in "iu"
    require_type(value, object if is_whole else (), f"{name} must be a whole number", remedy)


def _number_kind(value: object) -> str:
    """The kind of a single number, by NumPy's letters: "i" or "u" is an integer, "f" a float; any other is neither."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or str(dtype) == "torch.bool":
        return "O"
    if isinstance(dtype, _of_torch("dtype")):
        return "c" if dtype.is_complex else "f" if dtype.is_floating_point else "i"
    if dtype is not None:
        return getattr(dtype, "kind", "O")
    is_integer = isinstance(value, (Integral, *_of_torch("SymInt")))
    return "i" if is_integer else "f" if isinstance(value, (Real, *_of_torch("SymFloat"))) else "O"


def require_flag(value: object, name: str) -> None:
    """Refuse a value that is not True, False, 1 or 0: a batch passed as a flag would count as True.

    Raises:
        TypeError: If ``value`` is none of them. A tensor is refused too.
    """
    is_flag = isinstance(value, (bool, *_of_torch("SymBool"))) or type(value).__name__ in {"bool", "bool_"}  # NumPy's
    is_flag = is_flag or (isinstance(value, Integral) and value in {0, 1})
    remedy = "Pass further arguments as keywords: name=value."
    require_type(value, object if is_flag else (), f"{name} must be True or False", remedy)


def require_callable(value: object, expected: str, remedy: str) -> None:
    """Refuse a value that is not a function; a module is refused too.

    A module can be called, but not with the arguments of a helper function such as ``forward(model, batch)``.

    Raises:
        TypeError: If ``value`` cannot be called, or is a module.
    """
    is_function = isinstance(value, Callable) and not isinstance(value, _of_torch("Module", "torch.nn"))  # type: ignore[arg-type]
    require_type(value, object if is_function else (), expected, remedy)


def _of_torch(name: str, home: str = "torch") -> tuple[type, ...]:
    """A class of torch, for isinstance; () while torch is not imported, because no value can be of its classes then."""
    kind = getattr(sys.modules.get(home), name, None)
    return () if kind is None else (kind,)
