"""Silhouettes painted: black cats, coloured cats, and pictures of black cats that were changed as a whole.

A silhouette is 1 on the shape, 0 on the ground and between them at its edge; a picture is (3, H, W), red, green and
blue from 0 to 1. The paintings of one seed share their grounds, so "contrast" and "inverted" are affine maps of
"black", value by value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The ground is light: each of its colours lies between this and 1.
LIGHT = 0.8
CONTRAST, BRIGHTNESS = 0.3, 0.3
NOISE = 0.6  # standard deviation


def paint(name: str, shapes: Tensor, seed: int) -> Tensor:
    """Pictures of ``shapes``, (N, H, W) -> (N, 3, H, W), in the painting called ``name``, a key of PAINTINGS."""
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
    "noise": _noisy,  # not cut to 0..1: added noise and nothing else
    "inverted": lambda shapes, random: 1 - _black(shapes, random),
}


def with_share(classes: Tensor, rare: int, share: float) -> Tensor:
    """Indices of examples of which ``share`` are of class ``rare``: all others, and the first few of it.

    Args:
        classes: Class of each example, (N,).
        rare: The class to thin out.
        share: Its share of the result, to the nearest example; at least one is kept.
    """
    wanted, others = (classes == rare).nonzero().flatten(), (classes != rare).nonzero().flatten()
    kept = max(1, round(len(others) * share / (1 - share)))
    if kept > len(wanted):
        raise ValueError(
            f"a share of {share} needs {kept} examples of class {rare}, got {len(wanted)}. Take a smaller share."
        )
    return torch.cat([wanted[:kept], others]).sort().values


def mosaic(rows: list[Tensor], zoom: int) -> Tensor:
    """One picture (3, H', W') of all: each row's pictures (N, 3, H, W) side by side, a pixel ``zoom`` wide and high."""
    lines = [torch.cat(list(row), 2) for row in rows]  # (N, 3, H, W) -> (3, H, N W)
    return torch.cat(lines, 1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
