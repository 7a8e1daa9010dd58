"""Pictures made from silhouettes: black cats, coloured cats, and changed pictures of black cats.

A silhouette is 1 on the shape, 0 on the ground, and between 0 and 1 at the edge. A picture is (3, H, W): red, green and
blue from 0 to 1. All paintings of one seed have the same grounds. So the values of "contrast" and "inverted" are affine
functions of the values of "black".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIGHT = 0.8  # red, green and blue of the ground lie between this and 1
CONTRAST, BRIGHTNESS = 0.3, 0.3
NOISE = 0.6  # standard deviation


def paint(name: str, shapes: Tensor, seed: int) -> Tensor:
    """Pictures of ``shapes``, (N, H, W) -> (N, 3, H, W); ``name`` is a key of PAINTINGS."""
    return PAINTINGS[name](shapes, torch.Generator().manual_seed(seed))


def _black(shapes: Tensor, random: torch.Generator) -> Tensor:
    return _on_light_ground(shapes, random, lambda count: torch.zeros(count, 3))


def _coloured(shapes: Tensor, random: torch.Generator) -> Tensor:
    return _on_light_ground(shapes, random, lambda count: torch.rand(count, 3, generator=random))


def _on_light_ground(shapes: Tensor, random: torch.Generator, colours: Callable[[int], Tensor]) -> Tensor:
    ground = LIGHT + (1 - LIGHT) * torch.rand(len(shapes), 3, generator=random)
    ground, colour = (c[:, :, None, None] for c in (ground, colours(len(shapes))))  # (N, 3) -> (N, 3, 1, 1)
    return torch.lerp(ground, colour, shapes[:, None])


def _noisy(shapes: Tensor, random: torch.Generator) -> Tensor:
    clean = _black(shapes, random)
    return clean + NOISE * torch.randn(clean.shape, generator=random)


PAINTINGS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "black": _black,
    "coloured": _coloured,
    "contrast": lambda shapes, random: CONTRAST * _black(shapes, random) + BRIGHTNESS,
    "noise": _noisy,  # not clipped to 0..1, so that only noise is added
    "inverted": lambda shapes, random: 1 - _black(shapes, random),
}


def with_share(classes: Tensor, rare: int, share: float) -> Tensor:
    """Indices of all examples of other classes than ``rare``, and of its first examples, so that ``share`` are rare.

    Args:
        classes: Class of each example, (N,).
        rare: The class that becomes rare.
        share: Share of the class in the result, rounded to a number of examples, at least one example.
    """
    wanted, others = (classes == rare).nonzero().flatten(), (classes != rare).nonzero().flatten()
    number = max(1, round(len(others) * share / (1 - share)))
    if number > len(wanted):
        raise ValueError(
            f"a share of {share} needs {number} examples of class {rare}, got {len(wanted)}. Take a smaller share."
        )
    return torch.cat([wanted[:number], others]).sort().values


def mosaic(rows: list[Tensor], zoom: int) -> Tensor:
    """One picture, (3, H', W'), with the pictures (N, 3, H, W) of each row side by side, enlarged by ``zoom``."""
    lines = [torch.cat(list(row), 2) for row in rows]  # (N, 3, H, W) -> (3, H, N W)
    return torch.cat(lines, 1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
