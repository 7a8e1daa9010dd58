"""Complex layers: E|x - m|^2, complex mean, gamma and beta, against NumPy in complex128."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from layouts import cases
from torch import nn

import batchnorm
from batchnorm.layers import BatchNorm1d
from batchnorm.lazy_layers import LazyBatchNorm1d

dtypes = pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def made(cls, dtype=torch.complex128, **options):
    """A layer whose parameters and statistics are not at their initial values."""
    layer = cls(3, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(3, dtype=dtype))
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(3, dtype=dtype))
            layer.running_var.uniform_(0.5, 2)
    return layer


def values(shape, dtype=torch.complex128):
    """Values whose real and imaginary parts have different variances and are correlated."""
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    return torch.complex(2 + 3 * a, -1 + a + 0.5 * b).to(dtype)


def along(v, x):
    return v.reshape(1, -1, *[1] * (x.ndim - 2))


def exact(t):
    return t.detach().numpy().astype(np.complex128 if t.is_complex() else np.float64)


def moments(x):
    axes = tuple(a for a in range(x.ndim) if a != 1)
    mean = x.mean(axes)
    return mean, (np.abs(x - along(mean, x)) ** 2).mean(axes)


@cases
@dtypes
@modes
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_stored_statistics(cls, shape, dtype, training, channels_last):
    layer = made(cls, dtype).train(training)
    x = values(shape, dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    stored = exact(layer.running_mean).copy(), exact(layer.running_var).copy()
    y, m = layer(x), x.numel() // 3
    mean, var = of_batch = moments(exact(x))
    by = of_batch if training else stored
    z = (exact(x) - along(by[0], x)) / np.sqrt(along(by[1], x) + layer.eps)
    right = z * along(exact(layer.weight), x) + along(exact(layer.bias), x)
    u = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert (np.abs(exact(y) - right) <= (np.sqrt(m) + 16) * u * (1 + np.abs(right) + np.abs(z))).all()
    if training:
        stored = 0.9 * stored[0] + 0.1 * mean, 0.9 * stored[1] + 0.1 * var * m / (m - 1)
    for found, value in zip((layer.running_mean, layer.running_var), stored, strict=True):
        assert (np.abs(exact(found) - value) <= (np.sqrt(m) + 16) * u * (1 + np.abs(value))).all()
    assert layer.running_mean.dtype == dtype
    assert layer.running_var.dtype == dtype.to_real()
    assert layer.num_batches_tracked == training


@cases
@modes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"own_weight": 0.3}, {"ghost_batch_size": 3}], ids=str)
def test_autograd_agrees_with_finite_differences(cls, shape, training, masked, options):
    layer = made(cls, **options).train(training)
    layer.track_running_stats = False
    x = values((min(shape[0], 4), 3, *(min(size, 2) for size in shape[2:])))
    mask = torch.rand(x.shape[0], *x.shape[2:]) > 0.2 if masked else None
    if mask is not None and mask.ndim > 1:
        mask[:, 0] = True
    elif mask is not None:
        mask[:] = True
    if layer.ghost_batch_size and x.ndim == 2:
        layer.ghost_batch_size = 2
    names = ("weight", "bias") if layer.affine else ()
    inputs = [t.detach().requires_grad_() for t in (x, torch.randn_like(x), *(getattr(layer, n) for n in names))]

    def function(x, residual, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x, residual), {"mask": mask})

    assert torch.autograd.gradcheck(function, inputs)


@cases
def test_real_values_give_the_results_of_a_real_layer(cls, shape):
    layer, real = cls(3, dtype=torch.complex128), cls(3, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x.to(torch.complex128))
    torch.testing.assert_close(y.real, real(x))
    assert not y.imag.any()
    torch.testing.assert_close(layer.running_var, real.running_var)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_both_kinds_of_momentum_and_nan(momentum):
    layer = BatchNorm1d(3, dtype=torch.complex64, momentum=momentum)
    batches = [values((8, 3), torch.complex64) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in batches:
            layer(x)
    if momentum is None:
        torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    before = layer.running_mean.clone()
    spoiled = batches[0].clone()
    spoiled[0] = complex(torch.nan, 1)
    with pytest.warns(RuntimeWarning, match="NaN or infinity in the batch statistics of 3 of 3"):
        layer(spoiled)
    assert torch.equal(layer.running_mean, before)
    assert layer.skipped_updates == 1


def test_masks_weights_axis_and_lazy_layers():
    layer, plain = made(BatchNorm1d), made(BatchNorm1d)
    plain.load_state_dict(layer.state_dict())
    x, valid = values((6, 3, 5)), torch.rand(6, 5) > 0.4
    y = layer(torch.where(valid.unsqueeze(1), x, complex(torch.nan, 0)), mask=valid)
    torch.testing.assert_close(y.movedim(1, -1)[valid], plain(x.movedim(1, -1)[valid]))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert not y.movedim(1, -1)[~valid].any()
    layer.axis = -1
    torch.testing.assert_close(layer.eval()(x.movedim(1, -1)), plain.eval()(x).movedim(1, -1), rtol=1e-6, atol=1e-6)
    lazy = LazyBatchNorm1d(dtype=torch.complex64)
    lazy(x.to(torch.complex64))
    assert lazy.running_mean.dtype == torch.complex64
    assert lazy.running_var.dtype == torch.float32


def test_casts_keep_what_is_complex_and_real():
    layer = made(BatchNorm1d, torch.complex64)
    var = layer.running_var.clone()
    x = values((8, 3), torch.complex64)
    right = copy.deepcopy(layer)(x)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        other = cast(copy.deepcopy(layer))
        assert other.weight.dtype == other.running_mean.dtype == torch.complex64
        assert other.running_var.dtype == torch.float32
        assert torch.equal(other.running_var, var)
        assert torch.equal(other(x), right)
    with pytest.warns(UserWarning, match="Complex modules are a new feature"):
        wide = copy.deepcopy(layer).to(torch.complex128)
    assert (wide.running_mean.dtype, wide.running_var.dtype) == (torch.complex128, torch.float64)
    torch.testing.assert_close(wide(x.to(torch.complex128)).to(torch.complex64), right)
    real = BatchNorm1d(3)
    with pytest.warns(UserWarning, match="Complex modules are a new feature"):
        real.to(torch.complex64)
    assert real(x).dtype == torch.complex64
    assert real.running_var.dtype == torch.float32


def test_a_state_dict_loads_and_copies_compute_the_same():
    layer, x = made(BatchNorm1d, torch.complex64), values((8, 3), torch.complex64)
    other = BatchNorm1d(3, dtype=torch.complex64)
    other.load_state_dict(layer.state_dict(), strict=True)
    third = BatchNorm1d(3, dtype=torch.complex64)
    third.load_state_dict(layer.state_dict(), assign=True)
    for each in (other, third, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(each.eval()(x), layer.eval()(x))


def test_a_layer_without_tensors_normalizes_both_kinds():
    layer = BatchNorm1d(3, affine=False, track_running_stats=False)
    x = values((8, 3))
    torch.testing.assert_close(layer(x), BatchNorm1d(3, dtype=x.dtype)(x))
    torch.testing.assert_close(layer(x.real), BatchNorm1d(3, dtype=torch.float64)(x.real))


def test_empty_and_single_values_follow_the_rules_of_real_layers():
    layer = made(BatchNorm1d)
    assert layer(values((0, 3))).shape == (0, 3)
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(values((1, 3)))
    layer.single_element = "population"
    one = values((1, 3))
    assert torch.equal(layer(one), layer.eval()(one))


@modes
def test_compile_and_vmap(training):
    layer = made(BatchNorm1d, torch.complex64).train(training)
    other, x = copy.deepcopy(layer), values((8, 3, 4), torch.complex64)
    right = layer(x)
    torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(x), right)
    torch.testing.assert_close(other.running_var, layer.running_var)
    if not training:
        torch.testing.assert_close(torch.func.vmap(layer)(torch.stack([x, x]))[1], right)


WRONG = {
    "real layer": (
        lambda: BatchNorm1d(3)(values((4, 3), torch.complex64)),
        TypeError,
        r"are torch.float32, got torch.complex64. Use BatchNorm1d\(3, dtype=torch.complex64\)",
    ),
    "real layer in eval mode": (
        lambda: BatchNorm1d(3, affine=False).eval()(values((4, 3), torch.complex64)),
        TypeError,
        "dtype=torch.complex64",
    ),
    "complex layer": (
        lambda: BatchNorm1d(3, dtype=torch.complex64)(torch.randn(4, 3)),
        TypeError,
        r"are torch.complex64, got torch.float32. Use x.to\(torch.complex64\)",
    ),
    "complex layer in eval mode": (
        lambda: BatchNorm1d(3, dtype=torch.complex64).eval()(torch.randn(4, 3)),
        TypeError,
        r"x.to\(torch.complex64\)",
    ),
    "complex residual": (
        lambda: BatchNorm1d(3)(torch.randn(4, 3), values((4, 3), torch.complex64)),
        TypeError,
        "needs a real residual for an input of torch.float32, got torch.complex64",
    ),
    "act": (lambda: BatchNorm1d(3, dtype=torch.complex64, act="relu"), ValueError, "for act, got act='relu'"),
    "act later": (lambda: with_act()(values((4, 3), torch.complex64)), ValueError, "real numbers for act"),
    "renorm": (lambda: BatchNorm1d(3, dtype=torch.complex64, renorm=True), ValueError, "real numbers for renorm"),
    "ints": (lambda: BatchNorm1d(3)(torch.ones(4, 3).long()), TypeError, "needs a floating-point input, got"),
}  # fmt: skip


def with_act():
    layer = BatchNorm1d(3, dtype=torch.complex64)
    layer.act = "relu"
    return layer


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_kinds_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_surgery_refuses_what_torch_nn_cannot_compute():
    model = nn.Sequential(made(BatchNorm1d, torch.complex64)).eval()
    with pytest.raises(ValueError, match=r"got a complex dtype at '0'\. A complex layer has no counterpart"):
        batchnorm.revert(model)


MEASURING = {
    "recalibrate": batchnorm.recalibrate,
    "in one pass": lambda model, data: batchnorm.recalibrate(model, data, exact=False),
    "adapt": lambda model, data: batchnorm.adapt(model, data),
}


@pytest.mark.parametrize("measure", MEASURING.values(), ids=MEASURING)
def test_measuring_data_names_a_complex_layer_and_a_way(measure):
    model, x = nn.Sequential(nn.Identity(), made(BatchNorm1d)), values((40, 3))
    with pytest.raises(TypeError, match=r"real statistics, got the complex BatchNorm1d at '1'.*momentum = None"):
        measure(model, [x])
    layer = model[1]
    layer.momentum = None
    layer.reset_running_stats()
    model(x)
    assert torch.allclose(layer.running_mean, x.mean(0))
    assert torch.allclose(layer.running_var, (x - x.mean(0)).abs().square().sum(0) / 39)


def test_the_doctor_says_that_it_does_not_check_complex_statistics():
    model = nn.Sequential(made(BatchNorm1d)).eval()
    with torch.no_grad():
        model[0].running_mean.imag[1] = torch.nan
    diagnosis = batchnorm.examine(model)
    assert not diagnosis.findings
    assert "BN101" not in diagnosis.checked
    assert any("complex numbers" in note and "running_mean" in note for note in diagnosis.notes)
