"""axis=-1: a layer with channels last computes what a layer with channels on axis 1 computes from the moved input."""

from __future__ import annotations

import copy
import pickle

import layouts
import pytest
import torch
from layouts import LAYOUTS
from test_layers import made
from torch import nn

import batchnorm
from batchnorm.kernels import cpu
from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.moments import Moments
from batchnorm.population.hooks import seeing

# the shape of an input with channels last
CASES = {name: (cls, (n, *rest, channels)) for name, (cls, (n, channels, *rest)) in layouts.CASES.items()}
cases = pytest.mark.parametrize(("cls", "shape"), CASES.values(), ids=CASES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pair(cls, **options):
    """A layer with channels last, and one with channels on axis 1, of the same state."""
    last, second = made(cls, 3, axis=-1, **options), made(cls, 3, **options)
    second.load_state_dict(last.state_dict(), strict=True)
    return last, second


def second_axis(x):
    return x.movedim(-1, 1)


@cases
@modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_the_result_is_that_of_the_moved_input_bit_by_bit(cls, shape, training, dtype, layout):
    last, second = pair(cls, dtype=dtype)
    x, residual = layout(torch.randn(shape).to(dtype)), layout(torch.randn(shape).to(dtype))
    grad, results = torch.randn(shape).to(dtype), []
    for layer, move in ((last, lambda t: t), (second, second_axis)):
        inputs = [t.detach().requires_grad_() for t in (x, residual)]
        y = layer.train(training)(*map(move, inputs))
        y.backward(move(grad))
        results.append([y, *(t.grad for t in (*inputs, *layer.parameters())), *layer.buffers()])
    results[1][0] = results[1][0].movedim(1, -1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@cases
@modes
def test_a_contiguous_input_goes_to_the_kernel_as_it_is_and_the_result_is_contiguous(cls, shape, training, monkeypatch):
    x, read = torch.randn(shape), []
    for name in ("train_forward", "normalize"):
        function = getattr(cpu, name)

        def spy(x, *args, function=function, **kwargs):
            read.append(x.data_ptr())
            return function(x, *args, **kwargs)

        monkeypatch.setattr(cpu, name, spy)
    y = made(cls, 3, axis=-1).train(training)(x)
    assert y.is_contiguous()
    assert read == [x.data_ptr()]


FORMS = {
    "(N, L)": lambda valid: {"mask": valid},
    "(N, L, 1)": lambda valid: {"mask": valid.unsqueeze(-1)},
    "(N, L, C)": lambda valid: {"mask": valid.unsqueeze(-1).expand(*valid.shape, 3)},
    "lengths": lambda valid: {"lengths": valid.sum(1)},
    "lengths along axis 1": lambda valid: {"lengths": valid.sum(1), "length_axis": 1},
    "lengths along axis -2": lambda valid: {"lengths": valid.sum(1), "length_axis": -2},
    "weight (N, L)": lambda valid: {"weight": valid.float()},
    "weight (N, L, 1)": lambda valid: {"weight": valid.float().unsqueeze(-1)},
}


@modes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [3, 9])  # as many as channels, and more
def test_masks_lengths_and_weights_have_the_axes_of_the_input(form, length, training):
    last, second = pair(BatchNorm1d, padding="keep")
    x, valid = torch.randn(4, length, 3), torch.arange(length) < torch.tensor([length, 2, 1, 0]).unsqueeze(1)
    right = "weight" if "weight" in form else "mask"
    y = last.train(training)(x, **FORMS[form](valid))
    expected = second.train(training)(second_axis(x), **{right: valid.float() if right == "weight" else valid})
    assert torch.allclose(y, expected.movedim(1, -1), atol=1e-6)
    assert torch.allclose(last.running_var, second.running_var)


def test_lengths_of_images_count_along_the_named_axis():
    last, second = pair(BatchNorm2d)
    x, lengths = torch.randn(3, 6, 5, 3), torch.tensor([5, 3, 1])
    y = last(x, lengths=lengths, length_axis=2)
    assert torch.allclose(y, second(second_axis(x), lengths=lengths, length_axis=3).movedim(1, -1), atol=1e-6)


def test_padding_of_a_model_reaches_layers_with_channels_last():
    class Encoder(nn.Module):
        def __init__(self, axis):
            super().__init__()
            self.axis, self.conv, self.bn = axis, nn.Conv1d(2, 3, 3, padding=1, stride=2), BatchNorm1d(3, axis=axis)

        def forward(self, x):
            x = self.conv(x)
            return self.bn(x) if self.axis == 1 else self.bn(x.movedim(1, -1)).movedim(-1, 1)

    models = [Encoder(axis) for axis in (1, -1)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 2, 8)
    results = []
    for model in models:
        with batchnorm.padding(model, [8, 5]):
            results.append(model(x))
    assert torch.allclose(*results, atol=1e-6)
    assert torch.allclose(models[0].bn.running_mean, models[1].bn.running_mean)


def test_recalibrate_and_adapt_measure_the_channels():
    class Last(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.bn = layer

        def forward(self, x):
            return self.bn(x)

    batches = [2 + 3 * torch.randn(4, 6, 3) for _ in range(5)]
    exact = Moments.of(torch.cat(batches), -1)
    model = Last(BatchNorm1d(3, axis=-1))
    batchnorm.recalibrate(model, batches)
    assert torch.allclose(model.bn.running_mean, exact.mean.float())
    assert torch.allclose(model.bn.running_var, exact.unbiased_var.float())
    model = Last(BatchNorm1d(3, axis=-1))
    batchnorm.adapt(model, batches, prior=0)
    assert torch.allclose(model.bn.running_mean, exact.mean.float(), rtol=1e-5)


def test_a_shift_monitor_and_the_doctor_read_channels_last_as_channels():
    """An image with 3 channels on the last axis and 5 rows: on axis 1, statistics of 3 channels would not fit."""
    shape = (8, 5, 4, 3)
    models = [nn.Sequential(layer) for layer in pair(BatchNorm2d)]
    batches = [torch.randn(shape) for _ in range(4)]
    moved = [second_axis(x).contiguous() for x in batches]
    for model in models:
        model.eval()
    last, second = (
        [f.code for f in batchnorm.examine(m, b).findings] for m, b in zip(models, (batches, moved), strict=True)
    )
    assert last == second
    z = []
    for model, data in zip(models, (batches, moved), strict=True):
        monitor = batchnorm.ShiftMonitor(model)
        monitor.calibrate(data * 20)
        z.append(monitor.reference)
    assert torch.allclose(z[0].mean, z[1].mean)


def test_hooks_that_measure_see_channels_on_axis_1_and_nested_tensors_as_they_are():
    layer, seen = BatchNorm1d(3, axis=-1), []
    nested = torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(2, 3)], layout=torch.jagged)
    with seeing({"": layer}, lambda path, layer, x: seen.append(x)):
        layer(torch.randn(2, 5, 3))
        y = layer(nested)
    assert seen[0].shape == (2, 3, 5)
    assert seen[1].is_nested
    assert torch.allclose(y.values().mean(0), torch.zeros(3), atol=1e-6)


def test_compile_export_and_vmap_know_the_axis():
    last, second = pair(BatchNorm1d)
    last.eval(), second.eval()
    x = torch.randn(4, 5, 3)
    right = second(second_axis(x)).movedim(1, -1)
    assert torch.allclose(torch.compile(last, fullgraph=True, backend="aot_eager")(x), right, atol=1e-6)
    assert torch.allclose(torch.export.export(last, (x,)).module()(x), right, atol=1e-6)
    assert torch.allclose(torch.func.vmap(last)(torch.stack([x, x]))[1], right, atol=1e-6)
    last.train(), second.train()
    compiled = torch.compile(last, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), second(second_axis(x)).movedim(1, -1), atol=1e-6)
    assert torch.allclose(last.running_mean, second.running_mean)


@cases
def test_copies_pickles_and_replacements_keep_the_axis(cls, shape):
    layer, x = made(cls, 3, axis=-1).eval(), torch.randn(shape)
    assert "axis=-1" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    new = batchnorm.replace(nn.Sequential(layer), lambda path, old: cls(3))[0]
    assert new.axis == -1
    assert torch.equal(new(x), layer(x))
    old = pickle.loads(pickle.dumps(cls(3)))
    vars(old).pop("_axis")  # as pickles from before the setting
    assert old.axis == 1


def test_surgery_that_assumes_axis_1_refuses():
    model = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, axis=-1)).eval()
    x = torch.randn(2, 4, 3)
    for change in (batchnorm.revert, batchnorm.for_export):
        with pytest.raises(ValueError, match=r"torch.nn has too, got axis=-1 at '1'\. Set the default"):
            change(model)
    with pytest.raises(ValueError, match=r"channels on axis 1, got axis=-1 at '1'"):
        batchnorm.to_group_norm(model)
    said: list[object] = []
    folded = batchnorm.fold(model, x, report=said.append)
    assert "has axis=-1, which folding does not know" in str(said[0])
    assert isinstance(folded[1], BatchNorm1d)
    assert torch.equal(folded(x), model(x))


def test_an_activation_is_fused_into_a_layer_with_channels_last():
    model = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, axis=-1), nn.ReLU())
    fused = batchnorm.convert(model, fuse=True, example=torch.randn(4, 5, 3))
    assert fused[1].act == "relu"
    assert fused[1].axis == -1


WRONG = {
    "axis 2": (lambda: BatchNorm1d(3, axis=2), ValueError, "axis must be 1 or -1, got 2"),
    "axis 0": (lambda: BatchNorm1d(3, axis=0), ValueError, "axis must be 1 or -1, got 0"),
    "flag": (lambda: BatchNorm1d(3, axis=True), TypeError, "axis must be a whole number, got bool"),
    "text": (lambda: BatchNorm1d(3, axis="last"), TypeError, "axis must be a whole number, got str"),
    "channels": (
        lambda: BatchNorm1d(3, axis=-1)(torch.randn(4, 5, 2)),
        ValueError,
        r"3 channels on axis -1, got \(4, 5, 2\)\.$",
    ),
    "channels on axis 1": (
        lambda: BatchNorm1d(3, axis=-1)(torch.randn(4, 3, 5)),
        ValueError,
        r"channels on axis -1, got \(4, 3, 5\)\. Axis 1 has this size: construct the layer with axis=1",
    ),
    "channels on the last axis": (
        lambda: BatchNorm1d(3)(torch.randn(4, 5, 3)),
        ValueError,
        r"on axis 1, got \(4, 5, 3\)\. The last axis has this size: construct the layer with axis=-1",
    ),
    "rank": (lambda: BatchNorm2d(3, axis=-1)(torch.randn(4, 3)), ValueError, r"needs \(N, H, W, C\), got \(4, 3\)"),
    "ranks": (
        lambda: BatchNorm1d(3, axis=-1)(torch.randn(4, 3, 3, 3)),
        ValueError,
        r"needs \(N, C\) or \(N, L, C\)",
    ),
    "one value": (lambda: BatchNorm2d(3, axis=-1)(torch.randn(1, 1, 1, 3)), ValueError, r"got shape \(1, 1, 1, 3\)"),
    "mask": (
        lambda: BatchNorm1d(3, axis=-1)(torch.randn(4, 5, 3), mask=torch.ones(4, 3, 5, dtype=torch.bool)),
        ValueError,
        r"of shape \(4, 5\), \(4, 5, 1\) or \(4, 5, 3\)",
    ),
    "length": (
        lambda: BatchNorm1d(3, axis=-1)(torch.randn(2, 5, 3), lengths=[6, 1]),
        ValueError,
        "lengths from 0 to 5, the size of axis 1, got 1 to 6",
    ),
    "length axis": (
        lambda: BatchNorm2d(3, axis=-1)(torch.randn(2, 5, 4, 3), lengths=[2, 1], length_axis=3),
        ValueError,
        r"length_axis= to be 1 or 2 for an input of shape \(2, 5, 4, 3\), got 3",
    ),
    "residual": (
        lambda: BatchNorm1d(3, axis=-1)(torch.randn(2, 5, 3), torch.randn(2, 3, 5)),
        ValueError,
        r"residual of the input's shape \(2, 5, 3\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_errors_name_the_axis(call, error, words):
    with pytest.raises(error, match=words):
        call()
