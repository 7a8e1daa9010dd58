"""Which tensor a function of torch writes to."""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

_AUGMENTED = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_AUGMENTED |= {"__setitem__"}


def written_by(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor that a function writes to, by its name or its argument ``inplace``; None for other functions."""
    name, place = getattr(func, "__name__", ""), _place_of_inplace(func)
    by_argument = place is not None and (
        kwargs["inplace"] if "inplace" in kwargs else args[place : place + 1] == (True,)
    )
    by_name = (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED
    return next(iter((*args, *kwargs.values())), None) if by_argument or by_name else None


@cache
def _place_of_inplace(func: Any) -> int | None:
    """The position of a function's argument ``inplace``; None if it has none."""
    try:
        return list(signature(func).parameters).index("inplace")
    except (ValueError, TypeError):  # no such argument, or a function of C without a signature
        return None
