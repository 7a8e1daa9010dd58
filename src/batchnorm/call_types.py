"""Types of what users' models are called with and return, which may be any class, named by their role."""

from __future__ import annotations

from typing import Any, TypeAlias

# a tensor, a tuple, list, mapping or dataclass of batches, or an object of another class, which stays opaque
Batch: TypeAlias = Any
Answer: TypeAlias = Any  # of a model: a tensor, or a tree of them
Arguments: TypeAlias = tuple[Any, ...]  # of a call, by position
Keywords: TypeAlias = dict[str, Any]  # of a call, by name
