"""A name in a pickle: what may be done with it, without importing what it names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from batchnorm.checkpoint.pickled.unknown_classes import Object, Opaque, Saved
from batchnorm.checkpoint.refusal import brief

# a class of these may do anything when it is called
_POWERFUL = sys.stdlib_module_names | {"numpy"}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A name: what calling it gives, or what type of numbers it stands for; neither for one that is not known."""

    name: str
    call: Callable[..., Saved] | None = None
    dtype: str = ""
    is_known: bool = True

    @property
    def is_class(self) -> bool:
        """Whether it is written like a class of somebody's own: one of Python's library or NumPy may do anything."""
        last = self.name.rpartition(".")[2].lstrip("_")
        return not self.is_known and self.package not in _POWERFUL and last[:1].isupper()

    @property
    def package(self) -> str:
        """The first word."""
        return self.name.partition(".")[0]


def in_words(value: object) -> str:
    """A value in a message: names and objects by their names."""
    return brief(value.name) if isinstance(value, Name | Opaque | Object) else brief(value)
