"""A user's file: small models, healthy and with several faults at once, their data, and files that hold their states.

The command line is called on a copy of it, and pickles of ``files/`` name its classes. All numbers are from seeds.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two convolutions with batch norm, activations as functions, a sum, and a linear layer."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(y)) + y).mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """A layer of another library: torch's own, and an activation that is a child of it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.act(super().forward(input))


class Faulty(nn.Module):
    """One fault in nearly every line."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=0.99), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Dropout(0.3), nn.BatchNorm2d(6, eps=1e-3), nn.BatchNorm2d(6))
        self.late = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6, momentum=None), nn.ReLU())
        self.twice = nn.BatchNorm2d(6, momentum=0.0)
        self.spare = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.late(self.body(self.stem(x))))
        return self.head(self.twice(y * 2).mean((2, 3)))


def images(count: int, seed: int, mean: float = 0.0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + mean


def trained(model: nn.Module, batches: list[Tensor] | None = None) -> nn.Module:
    """In eval mode, after passes of 60 batches."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.train()
    with torch.no_grad():
        for step in range(60):
            model(images(16, 100 + step) if batches is None else batches[step % len(batches)])
    return model.eval()


def net() -> nn.Module:
    return trained(Net())


def faulty() -> nn.Module:
    model = trained(Faulty())
    assert isinstance(model, Faulty)
    model.late[1].running_var /= 9
    model.late[1].weight.requires_grad_(False)
    model.train()
    model.stem[1].eval()
    return model


def rows() -> nn.Module:
    """In float64, for what is trained: its numbers are the same wherever it runs, but for the last digits."""
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(6, 2)).double()


def classes() -> list[tuple[Tensor, Tensor]]:
    random, y = torch.Generator().manual_seed(0), torch.arange(16) % 2
    draws = [torch.randn(16, 4, generator=random, dtype=torch.float64) for _ in range(10)]
    return [(3 * draw + 2 * y[:, None], y) for draw in draws]


def clean() -> list[Tensor]:
    return [images(32, 200 + i) for i in range(8)]


def reference() -> list[Tensor]:
    return [images(32, 300 + i) for i in range(8)]


def bright() -> list[Tensor]:
    return [images(32, 400 + i, mean=1.0) for i in range(8)]


def uneven() -> DataLoader:
    """Other data than those of the training, in batches of 4 with one example in the last."""
    return DataLoader(TensorDataset(images(33, 500, mean=3.0)), 4, shuffle=True)


# -- files ------------------------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """The files that the commands of the harness are given."""
    torch.save(net().state_dict(), folder / "net.pt")
    torch.save({"model": broken(), "ema": averaged(), "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "broken.pt")
    _write_half(folder / "half.safetensors")
    torch.save(trained(Net()), folder / "object.pt")
    torch.save(net().state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)


def broken() -> dict[str, Tensor]:
    """A state with something in nearly every channel."""
    state = copy.deepcopy(net().state_dict())
    state["bn1.running_var"][:4] = torch.tensor([-0.5, 1e-40, 0.0, float("nan")])
    state["bn1.running_mean"][:3] = torch.tensor([0.0, 1e6, 0.0])
    state["bn2.weight"][:2] = torch.tensor([1e-6, float("inf")])
    state["bn2.bias"][0] = -1.0
    del state["bn2.num_batches_tracked"]
    return state


def averaged() -> dict[str, Tensor]:
    """Weights that moved, and statistics that did not move with them."""
    state = copy.deepcopy(net().state_dict())
    state["conv1.weight"] *= 1.2
    state["head.bias"] += 0.1
    return state


def _write_half(path: Path) -> None:
    from safetensors.torch import save_file

    state = net().state_dict()
    del state["bn1.running_var"]
    halved = {f"module.{key}": value.half() if "running" in key else value for key, value in state.items()}
    save_file(halved, path)
