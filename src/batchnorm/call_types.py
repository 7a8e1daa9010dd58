"""What users' models are called with and answer, which may be of any class, under names that say which it is."""

from __future__ import annotations

from typing import Any, TypeAlias

# a tensor, a tuple, list, mapping or dataclass of batches, or an object of a class that is not looked into
Batch: TypeAlias = Any
Answer: TypeAlias = Any  # of a model: a tensor, or a tree of them
Arguments: TypeAlias = tuple[Any, ...]  # of a call, by position
Keywords: TypeAlias = dict[str, Any]  # of a call, by name
