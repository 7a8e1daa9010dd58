"""Models are copied and saved while they are watched; copies and files of them watch nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "saved": saved, "deepcopy": copy.deepcopy, "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}  # fmt: skip
WATCHES: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "ShiftMonitor": lambda model: bn.ShiftMonitor(model, budget=None),
    "Adapter": lambda model: bn.Adapter(bn.ShiftMonitor(model, budget=None)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("watch", WATCHES)
def test_a_model_is_copied_while_it_is_watched(watch: str, way: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    x = torch.randn(8, 4)
    watched = WATCHES[watch](net)
    monitor = watched if isinstance(watched, bn.ShiftMonitor) else watched.monitor  # type: ignore[attr-defined]
    with watched, torch.no_grad():
        net(x)
        other = WAYS[way](net)
        assert torch.equal(other(x), net(x))
    assert monitor.stream.passed == 16  # of the model, none of the copy's
