"""A name in a pickle, such as "torch.Size": what a call of it returns. Nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from batchnorm.checkpoint.pickled.unknown_classes import Object, Opaque, Saved
from batchnorm.checkpoint.refusal import brief

# packages whose classes may run any code when they are called
_PACKAGES_THAT_RUN_CODE = sys.stdlib_module_names | {"numpy"}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A name in a pickle.

    ``call`` is the function that is called in place of it, None if it cannot be called. ``dtype`` is the type of
    numbers that it names, such as "float32" for torch.FloatStorage, else "".
    """

    name: str
    call: Callable[..., Saved] | None = None
    dtype: str = ""
    is_known: bool = True

    @property
    def is_class(self) -> bool:
        """Whether an unknown name is written like a class, and is neither in Python's library nor in NumPy."""
        last = self.name.rpartition(".")[2].lstrip("_")
        return not self.is_known and self.package not in _PACKAGES_THAT_RUN_CODE and last[:1].isupper()

    @property
    def package(self) -> str:
        """The name's first word."""
        return self.name.partition(".")[0]


def in_words(value: object) -> str:
    """A value in words for a message: names and objects by their names."""
    return brief(value.name) if isinstance(value, Name | Opaque | Object) else brief(value)
