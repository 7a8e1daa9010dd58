"""Models that gave memory of their tensors back are refused by name: a copy would hold anything, or end the process."""

import pytest
import torch
from torch import nn

import batchnorm as bn

X = torch.randn(4, 3, 8, 8)
COPIES = {
    "convert": bn.convert,
    "revert": bn.revert,
    "fold": lambda model: bn.fold(model, X, report=None),
    "unfold": bn.unfold,
    "replace": lambda model: bn.replace(model, lambda _path, _layer: nn.Identity()),
    "replace in place": lambda model: bn.replace(model, lambda _path, _layer: nn.Identity(), inplace=True),
    "for_export": bn.for_export,
    "to_group_norm": bn.to_group_norm,
}


def model_without(name: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    tensor = model.state_dict(keep_vars=True)[name]
    tensor.untyped_storage().resize_(0)
    return model


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
@pytest.mark.parametrize("caller", COPIES)
def test_a_model_without_memory_is_not_copied(caller: str, name: str) -> None:
    who = caller.removesuffix(" in place")
    message = rf"{who} needs the numbers of '{name}', got a tensor that has given its memory back"
    with pytest.raises(ValueError, match=message):
        COPIES[caller](model_without(name))


@pytest.mark.parametrize("caller", ["recalibrate", "probe", "ShiftMonitor", "adapt"])
def test_a_counter_without_memory_is_named(caller: str) -> None:
    look = {
        "recalibrate": lambda model: bn.recalibrate(model, [X]),
        "probe": lambda model: bn.probe(model, X),
        "ShiftMonitor": bn.ShiftMonitor,
        "adapt": lambda model: bn.adapt(model, [X]),
    }[caller]
    with pytest.raises(ValueError, match=rf"{caller} needs the numbers of '1.num_batches_tracked'"):
        look(model_without("1.num_batches_tracked"))
