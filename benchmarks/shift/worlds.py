"""Three worlds without end, each with a task, a network and shifts: pictures of shapes, tones, and rows of a table.

A clean stream of ten thousand examples, two thousand times over, needs data that never run out. The shapes are painted
as the lecture's cats are: black on a light ground, and coloured where the world has moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import recalibrate

Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
SIZE, LENGTH, FEATURES = 24, 256, 16
LABELS = "two of four classes"


@dataclass(frozen=True)
class World:
    """What clean examples look like, what happens to them, and the network that learns them."""

    clean: Sampler
    shifts: Mapping[str, Sampler]
    net: Callable[[], nn.Module]
    is_trained: bool = True  # or its statistics are measured, exactly, with random weights


# -- shapes -------------------------------------------------------------------------------------------------------


def silhouettes(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Discs, squares, triangles and crosses of any size, place and angle: (N, 24, 24) from 0 to 1, classes."""
    y = torch.randint(4, (n,), generator=random)
    u = torch.rand(n, 4, generator=random)
    at = torch.linspace(-1, 1, SIZE)
    center = 0.6 * (u[:, :2] - 0.5)
    angle = 2 * math.pi * u[:, 2]
    x0, y0 = (at[None, :, None] - center[:, 0, None, None]), (at[None, None, :] - center[:, 1, None, None])
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    a, b = cos * x0 + sin * y0, cos * y0 - sin * x0
    radius = (0.35 + 0.25 * u[:, 3])[:, None, None]
    square = torch.maximum(a.abs(), b.abs()) - 0.85 * radius
    triangle = torch.stack(
        [b - 0.5 * radius, 0.866 * a - 0.5 * b - 0.5 * radius, -0.866 * a - 0.5 * b - 0.5 * radius]
    ).amax(0)
    bar = torch.minimum(
        torch.maximum(a.abs() - radius, b.abs() - 0.3 * radius), torch.maximum(b.abs() - radius, a.abs() - 0.3 * radius)
    )
    distance = torch.stack([(a.square() + b.square()).sqrt() - radius, square, triangle, bar])
    chosen = distance.gather(0, y[None, :, None, None].expand(1, -1, SIZE, SIZE))[0]
    return (0.5 - chosen * SIZE / 2).clamp(0, 1), y


def _painted(shapes: Tensor, random: torch.Generator, *, coloured: bool = False) -> Tensor:
    n = len(shapes)
    ground = 0.8 + 0.2 * torch.rand(n, 3, 1, 1, generator=random)
    colour = torch.rand(n, 3, 1, 1, generator=random) if coloured else torch.zeros(n, 3, 1, 1)
    return torch.lerp(ground, colour, shapes[:, None]) + 0.02 * torch.randn(n, 3, SIZE, SIZE, generator=random)


def _shapes(change: Callable[[Tensor, torch.Generator], Tensor] = lambda x, _: x, *, coloured: bool = False) -> Sampler:
    def sample(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        shapes, y = silhouettes(n, random)
        return change(_painted(shapes, random, coloured=coloured), random), y

    return sample


def _blur(x: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, [width // 2] * 4, mode="replicate"), width, 1)


def _noise(x: Tensor, random: torch.Generator, sd: float) -> Tensor:
    return x + sd * torch.randn(x.shape, generator=random)


def _fewer_classes(clean: Sampler) -> Sampler:
    """The first two of four classes: label shift."""

    def sample(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = clean(3 * n, random)
        kept = torch.cat([(y < 2).nonzero().flatten(), (y >= 2).nonzero().flatten()])[:n]
        order = kept[torch.randperm(len(kept), generator=random)]
        return x[order], y[order]

    return sample


def _conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def shapes_net() -> nn.Module:
    """Four convolutions and a hidden layer, all with batch norm."""
    layers = [*_conv(3, 12, 1), *_conv(12, 16, 2), *_conv(16, 24, 2), *_conv(24, 24, 2)]
    head = [nn.Flatten(), nn.Linear(24 * 9, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers, *head)


SHAPES = World(
    _shapes(),
    {
        "coloured": _shapes(coloured=True),
        "brightness -0.3": _shapes(lambda x, _: x - 0.3),
        "blur 5": _shapes(lambda x, _: _blur(x, 5)),
        "noise 0.15": _shapes(lambda x, random: _noise(x, random, 0.15)),
        "contrast 0.4": _shapes(lambda x, _: 0.4 * x + 0.3),
        "brightness -0.1": _shapes(lambda x, _: x - 0.1),
        LABELS: _fewer_classes(_shapes()),
    },
    shapes_net,
)

# -- tones --------------------------------------------------------------------------------------------------------


def _tones(change: Callable[[Tensor, torch.Generator], Tensor] = lambda x, _: x) -> Sampler:
    def sample(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (n,), generator=random)
        u = torch.rand(n, 3, generator=random)
        at = torch.arange(LENGTH)[None] / LENGTH
        pitch = (8 + 8 * u[:, :1]) * (1 + (y[:, None] % 2) * at * 0.5)  # steady or rising
        phase = 2 * math.pi * (pitch * at + u[:, 1:2])
        overtone = (y[:, None] >= 2) * torch.sin(3 * phase) * 0.6
        x = (0.5 + u[:, 2:3]) * (torch.sin(phase) + overtone) + 0.1 * torch.randn(n, LENGTH, generator=random)
        return change(x[:, None], random), y

    return sample


def tones_net() -> nn.Module:
    """Four convolutions along time."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 12), (12, 16), (16, 24), (24, 24)):
        layers += [nn.Conv1d(inputs, outputs, 7, 2, 3, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(96, 4))


TONES = World(
    _tones(),
    {
        "gain 0.4": _tones(lambda x, _: 0.4 * x),
        "noise 0.5": _tones(lambda x, random: _noise(x, random, 0.5)),
        "clipped at 0.4": _tones(lambda x, _: x.clamp(-0.4, 0.4)),
        "offset 0.3": _tones(lambda x, _: x + 0.3),
        LABELS: _fewer_classes(_tones()),
    },
    tones_net,
)

# -- a table ------------------------------------------------------------------------------------------------------

_MIX = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(1)) / FEATURES**0.5


def _rows(change: Callable[[Tensor, torch.Generator], Tensor] = lambda x, _: x) -> Sampler:
    def sample(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(n, FEATURES, generator=random)
        y = (hidden[:, 0] * hidden[:, 1] > 0).long() + 2 * (hidden[:, 2] + hidden[:, 3] > 0).long()
        x = hidden @ _MIX
        x[:, 4:8] = x[:, 4:8].exp()  # skewed columns, as incomes are
        return change(x, random), y

    return sample


def _moved(x: Tensor, columns: int, by: float) -> Tensor:
    return torch.cat([x[:, :columns] + by, x[:, columns:]], 1)


def table_net() -> nn.Module:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((FEATURES, 48), (48, 48), (48, 24)):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(24, 4))


TABLE = World(
    _rows(),
    {
        "two columns + 1": _rows(lambda x, _: _moved(x, 2, 1.0)),
        "all columns x 2": _rows(lambda x, _: 2 * x),
        "columns missing": _rows(lambda x, _: torch.cat([torch.zeros_like(x[:, :4]), x[:, 4:]], 1)),
        "noise 1": _rows(lambda x, random: _noise(x, random, 1.0)),
        LABELS: _fewer_classes(_rows()),
    },
    table_net,
)

WORLDS = {"shapes": SHAPES, "tones": TONES, "table": TABLE}


def trained(world: World, seed: int = 0, steps: int = 600) -> nn.Module:
    """The network after training with an annealed learning rate, in eval mode; the same seed, the same network."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    net = world.net()
    if not world.is_trained:
        recalibrate(net, [world.clean(2000, random)[0] for _ in range(100)])
        return net.eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = world.clean(64, random)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, sampler: Sampler, n: int = 2000, seed: int = 99) -> float:
    """Share of right answers on fresh examples."""
    x, y = sampler(n, torch.Generator().manual_seed(seed))
    return float((net(x).argmax(1) == y).float().mean())
