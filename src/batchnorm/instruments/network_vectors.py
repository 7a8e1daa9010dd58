"""Inner products, lengths and cosines of vectors, such as gradients and updates, of R networks at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.kernels.reference import exact_dtype

# One vector for each of R networks, such as its gradient, split by parameter: (R, ...) each, or None for zeros
Vectors = Sequence[Tensor | None]


def inner(a: Vectors, b: Vectors) -> Tensor:
    """Inner product of two vectors of each of R networks, (R,), in float64 on the CPU; None counts as zeros."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    products = ((wide(x) * wide(y)).reshape(len(x), -1).sum(1) for x, y in pairs)
    return sum((product.double().cpu() for product in products), torch.zeros(1, dtype=torch.float64))


def norm(a: Vectors) -> Tensor:
    """Length of a vector of each of R networks, (R,)."""
    return inner(a, a).sqrt()


def cosine(a: Vectors, b: Vectors) -> Tensor:
    """Cosine between two vectors of each of R networks, (R,); NaN if a vector is 0."""
    return (inner(a, b) / (norm(a) * norm(b))).clamp(-1, 1)


def minus(a: Vectors, b: Vectors) -> list[Tensor | None]:
    """Difference of two vectors of each of R networks; None counts as zeros."""
    return [x if y is None else -y if x is None else wide(x) - wide(y) for x, y in zip(a, b, strict=True)]


def of_one(a: Vectors) -> list[Tensor | None]:
    """The vector of one network, in the form of R = 1 networks."""
    return [None if x is None else x.detach().unsqueeze(0) for x in a]


def wide(x: Tensor) -> Tensor:
    """The tensor, detached, in the widest floating-point type of its device."""
    return x.detach().to(exact_dtype(x.device))
