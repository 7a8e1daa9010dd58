"""Whether two models do the same, without the code that is tested, and a ResNet as it is usually written."""

from __future__ import annotations

import copy

import torch
from torch import nn

from batchnorm.layers import batch_norms


def assert_same(original: nn.Module, result: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and statistics agree to within rounding of float64, in eval and in train mode."""
    for mode in (False, True):
        torch.testing.assert_close(measured(result, x, mode), measured(original, x, mode), rtol=1e-7, atol=1e-9)


def measured(model: nn.Module, x: torch.Tensor, mode: bool) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).double()
    model.train(mode)
    model.zero_grad()
    x = x.detach().double().requires_grad_()
    with torch.random.fork_rng():
        y = model(x.clone())
    if y.requires_grad:
        (y * torch.arange(y.numel()).double().sin().reshape(y.shape)).sum().backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "grad x": x.grad, **grads, **dict(model.named_buffers())}


def acts(model: nn.Module) -> dict[str, str | None]:
    return {path: getattr(layer, "act", None) for path, layer in batch_norms(model).items()}


def trained(model: nn.Module, x: torch.Tensor, steps: int = 2) -> nn.Module:
    """Parameters and statistics that are not those of construction."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if "weight" in name else 0.0, std=0.3)
    for _ in range(steps):
        model(x + torch.randn_like(x))
    return model


class Block(nn.Module):
    """torchvision's BasicBlock: one ReLU module for both activations, an addition in place."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A stem, two stages and a head, with a method that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 6), Block(6, 6))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(torch.flatten(self.features(x).mean((2, 3)), 1)))


def image() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)
