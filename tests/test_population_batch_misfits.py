"""Batches that do not fit a model: every room says what the layer expected, what it got and what to do."""

import re

import pytest
import torch
from command_line import told
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.doctor import examine
from batchnorm.population import recalibrate
from batchnorm.population.batches import call
from batchnorm.shift import ShiftMonitor
from batchnorm.shift.verdict import judge

FOLDER = {
    "net.py": """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )

x = torch.rand(8, 12, 12, 3)
y = torch.arange(8) % 2
bytes_last = [((255 * x).byte(), y) for _ in range(4)]
doubles = [(x.permute(0, 3, 1, 2).double(), y) for _ in range(4)]
"""
}
IMAGES = torch.rand(8, 3, 12, 12)
ROWS = torch.rand(8, 6)


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def rows() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))


MISFITS = {
    "bytes": (images, (255 * IMAGES).byte(), "layer '0' (Conv2d) expected float32, got a batch of uint8. Convert"),
    "float64": (images, IMAGES.double(), "expected float32, got a batch of float64. Convert it as in training, for"),
    "float16": (images, IMAGES.half(), "got a batch of float16. Convert it as in training, for example"),
    "a wide model": (lambda: images().double(), IMAGES, "expected float64, got a batch of float32"),
    "whole numbers": (rows, ROWS.long(), "layer '0' (Linear) expected float32, got a batch of int64"),
    "channels last": (
        images,
        IMAGES.permute(0, 2, 3, 1).contiguous(),
        "expected 3 channels at axis 1, got a batch of shape (8, 12, 12, 3). Move its channels: x.permute(0, 3, 1, 2).",
    ),
    "channels last in one position": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), torch.rand(8, 12, 3), "x.permute(0, 2, 1)."),
    "channels last in volumes": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), torch.rand(8, 5, 5, 5, 2), "x.permute(0, 4, 1,"),
    "two channels": (images, IMAGES[:, :2], "expected 3 channels at axis 1, got a batch of shape (8, 2, 12, 12). Give"),
    "one example": (images, IMAGES[0], "layer '1' (BatchNorm2d) expected 4 axes, got 3: the batch of shape (3,"),
    "rows for images": (images, IMAGES.flatten(1), "expected (N, 3, H, W), got a batch of shape (8, 432)"),
    "few features": (rows, ROWS[:, :5], "expected 6 features at the last axis, got a batch of shape (8, 5). Give"),
    "images for rows": (rows, ROWS.view(8, 2, 3), "got a batch of shape (8, 2, 3). Flatten it: x.flatten(1)."),
    "features before batch norm": (lambda: nn.BatchNorm1d(4), ROWS, "the model (BatchNorm1d) expected 4 channels at"),
    "fractions for indices": (
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.BatchNorm1d(3)), torch.ones(8, 3), "expected indices, got"),
    "sequences": (lambda: nn.Sequential(nn.LSTM(5, 4)), torch.rand(8, 3, 6), "expected 5 features at the last axis"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "batch", "words"), MISFITS.values(), ids=MISFITS)
def test_a_batch_that_does_not_fit_is_named_with_a_remedy(make, batch, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call(make().eval(), batch)
    assert caught.value.__cause__ is not None  # torch's own error


def test_a_layer_with_channels_on_the_last_axis_gets_a_remedy_for_that_axis():
    with pytest.raises(ValueError, match="4") as caught:
        call(bn.BatchNorm1d(4, axis=-1).eval(), torch.rand(8, 4, 5))
    assert "axis 1" not in str(caught.value)


@pytest.mark.parametrize("run", [
    lambda model, data: examine(model, data),
    lambda model, data: recalibrate(model, data),
    lambda model, data: judge(ShiftMonitor(model.eval()), data),
    lambda model, data: ShiftMonitor(model.eval()).calibrate(data),
])  # fmt: skip
def test_every_room_says_it(run):
    for batch in ((255 * IMAGES).byte(), IMAGES.double(), IMAGES.permute(0, 2, 3, 1), IMAGES[0]):
        with pytest.raises(ValueError, match=r"expected (float32|3 channels|4 axes)"):
            run(images(), [batch, batch])


def test_a_batch_with_two_faults_is_told_both():
    with pytest.raises(ValueError, match=r"uint8\. .* It also expected 3 channels at axis 1.*permute\(0, 3, 1, 2\)"):
        call(images(), (255 * IMAGES).byte().permute(0, 2, 3, 1))


@pytest.mark.parametrize("command", [("doctor",), ("shift",), ("why", "--no-train"), ("why", "--steps", "20")])
@pytest.mark.parametrize(
    ("data", "words"), [("bytes_last", "got a batch of uint8"), ("doubles", "of float64. Convert")]
)
def test_the_command_line_says_it(folder, command, data, words):
    name, *options = command
    code, text = told(name, "net.py:make", "--data", f"net.py:{data}", *options)
    assert code == 2, text
    assert words in text
    assert "raised" not in text


class Converts(nn.Module):
    """A model for images as bytes with their channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = images()

    def forward(self, x: Tensor) -> Tensor:
        """Features of the images."""
        return self.net(x.permute(0, 3, 1, 2).float() / 255)


def test_a_model_that_converts_its_batches_gets_them_as_they_are():
    batch = (255 * IMAGES).byte().permute(0, 2, 3, 1)
    model = Converts().eval()
    assert torch.equal(call(model, batch), model(batch))


class Fails(nn.Module):
    """A model whose own code fails, before or behind a layer."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.conv, self.norm, self.error = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), error

    def forward(self, x: Tensor) -> Tensor:
        """Fails in its own line, or in a layer that does not fit the layer before it."""
        if self.error:
            raise self.error
        return self.norm(self.conv(x))


@pytest.mark.parametrize("error", [RuntimeError("the camera is off"), ValueError("no"), None])
def test_the_faults_of_a_model_are_not_blamed_on_the_batch(error):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call(Fails(error).eval(), IMAGES)
    assert "batch of" not in str(caught.value)
    assert error is None or caught.value is error


def test_missing_memory_is_no_misfit():
    class Full(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        call(nn.Sequential(Full(3, 4, 3)), IMAGES.double())
