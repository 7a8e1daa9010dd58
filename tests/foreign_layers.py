"""Batch norm layers as other libraries write them, in code of our own: what they hold and compute is theirs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: torch's forward written out, a dropout and an activation behind it."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None, **settings) -> None:
        super().__init__(channels, **settings)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 axes, got {x.ndim}")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Clamped(nn.BatchNorm2d):
    """A subclass that calls torch's forward and does more behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Synced(nn.BatchNorm2d):
    """detectron2's NaiveSyncBatchNorm in one process: torch's layer; in several it measures the batches of all."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.distributed.get_world_size() == 1:
            return super().forward(x)
        raise NotImplementedError


class Four(nn.Module):
    """Four buffers with values as after training; no eps, momentum or number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(channels)
        self.register_buffer("weight", torch.randn(channels, generator=g))
        self.register_buffer("bias", torch.randn(channels, generator=g))
        self.register_buffer("running_mean", torch.randn(channels, generator=g))
        self.register_buffer("running_var", torch.rand(channels, generator=g) + 0.5)


class FrozenByHand(Four):
    """DETR's and torchvision's: eps is written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class FrozenByTorch(Four):
    """detectron2's: torch's function, or the formula where a gradient is wanted."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.reshape(1, -1, 1, 1).to(x.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class FrozenWithAct(FrozenByHand):
    """timm's FrozenBatchNormAct2d: an activation behind the frozen layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(init=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Activated(Four):
    """inplace_abn's ABN: the absolute weight counts, a leaky ReLU follows, and batches are measured in train mode."""

    momentum = 0.1

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.abs() + 1e-5
        y = F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, self.training, self.momentum, 1e-5)
        return F.leaky_relu(y, 0.01)


class Asks(FrozenByHand):
    """A frozen layer whose forward asks for values, which no tracer can answer."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            raise ValueError("expected finite values, got others. Look at the input.")
        return super().forward(x)


class NoNorm(Four):
    """Four tensors by the names of batch norm, and another use of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(1, -1, 1, 1) * x.abs() + self.running_mean.reshape(1, -1, 1, 1)


class Clipped(FrozenByHand):
    """The map of batch norm only for inputs below a bound."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=30.0))
