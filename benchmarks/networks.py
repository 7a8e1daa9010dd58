"""ResNet-20 for 32x32 images, ResNet-18 and ResNet-50 (He et al. 2016), and their training steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Block(nn.Module):
    """Two convolutions of 3x3 and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.around = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.around(x)
        return self.relu2(y)


def resnet20() -> nn.Module:
    """For (N, 3, 32, 32) and 10 classes: 0.27 million parameters, 21 batch norms."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [Block(*sizes) for sizes in _stages(16, (16, 32, 64), 3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18() -> nn.Module:
    """For (N, 3, H, W) and 1000 classes: 11.7 million parameters, 20 batch norms."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks = [Block(*sizes) for sizes in _stages(64, (64, 128, 256, 512), 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Bottleneck(nn.Module):
    """A narrow convolution of 3x3 between two of 1x1, and a way around them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(*size, size[2] // 2, bias=False) for size in sizes)
        self.bns = nn.ModuleList(nn.BatchNorm2d(size[1]) for size in sizes)
        self.around = nn.Sequential()
        if stride > 1 or inputs != 4 * width:
            around = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.around = nn.Sequential(around, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in zip(self.convs[:2], self.bns[:2], strict=True):
            y = norm(conv(y)).relu_()
        return (self.bns[2](self.convs[2](y)) + self.around(x)).relu_()


def resnet50() -> nn.Module:
    """For (N, 3, H, W) and 1000 classes: 25.6 million parameters, 53 batch norms."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, depth in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if width > 64 and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _stages(inputs: int, widths: tuple[int, ...], depth: int) -> list[tuple[int, int, int]]:
    """Inputs, outputs and stride of every block."""
    sizes = []
    for stage, width in enumerate(widths):
        for block in range(depth):
            sizes.append((inputs, width, 2 if stage and not block else 1))
            inputs = width
    return sizes


# name: model, classes, shape of a batch
NETWORKS = {
    "ResNet-20": (resnet20, 10, (128, 3, 32, 32)),
    "ResNet-18": (resnet18, 1000, (32, 3, 64, 64)),
}


def without_norm(model: nn.Module) -> nn.Module:
    """The model with its batch norms left out, in place: what is left of a step when they cost nothing."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return model


def training_step(model: nn.Module, x: Tensor, classes: int) -> Callable[[], None]:
    """One step of SGD with momentum on the same batch; the rate is too small to get anywhere."""
    target = torch.arange(len(x)) % classes
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(x), target).backward()
        optimizer.step()

    return step
