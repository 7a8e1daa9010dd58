"""Names for the arguments and results of users' models, by their role; a model may use any class for them."""

from __future__ import annotations

from typing import Any, TypeAlias

# a tensor; a tuple, list, mapping or dataclass of such batches; or an object of another class, which is not looked into
Batch: TypeAlias = Any
Answer: TypeAlias = Any  # what a model returns: a tensor, or a tree of tensors
Arguments: TypeAlias = tuple[Any, ...]  # positional arguments of a call
Keywords: TypeAlias = dict[str, Any]  # keyword arguments of a call
