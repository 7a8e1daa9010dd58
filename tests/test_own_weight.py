"""An example's own weight in eval mode: against the formula of the paper in float64, one example at a time."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import onnx
import oracle
import pytest
import torch
from layouts import LAYOUTS, cases
from onnx.reference import ReferenceEvaluator
from test_layers import made
from torch import nn

import batchnorm
from batchnorm.kernels import cpu
from batchnorm.kernels.reference import wide_dtype
from batchnorm.layers import BatchNorm1d
from batchnorm.population import freeze

weights = pytest.mark.parametrize("weight", [0.1, 0.5, 1])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def mixed(values, mean, var, weight):
    """E[x] and E[x^2] of one example (C, positions) and of the stored statistics, mixed as the paper writes it."""
    m = weight * values.mean(1) + (1 - weight) * mean
    square = weight * (values**2).mean(1) + (1 - weight) * (var + mean**2)
    return m, square - m**2


@cases
@weights
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_each_example_is_normalized_by_the_mixture(cls, shape, weight, dtype, layout):
    layer = made(cls, 3, dtype=dtype, own_weight=weight).eval()
    x = layout((2 + 3 * torch.randn(shape)).to(dtype))
    y = layer(x)
    assert y.stride() == layout(torch.empty(shape)).stride() or layout.__name__ not in {"contiguous", "channels_last"}
    mean, var = oracle.exact(layer.running_mean), oracle.exact(layer.running_var)
    gamma, beta, wide = oracle.exact(layer.weight), oracle.exact(layer.bias), wide_dtype(dtype)
    for i, example in enumerate(oracle.exact(x)):
        values, grad = example[None], np.zeros_like(example)[None]
        of_mixture = mixed(example.reshape(3, -1), mean, var, weight)
        right = oracle.evaluate(values, grad, *of_mixture, gamma, beta, layer.eps)
        bound = oracle.evaluate_rounding(values, grad, *of_mixture, gamma, right, layer.eps, wide)
        # where an example's own variance is 0 and its weight 1, z is the rounding of the mean times 1 / sqrt(eps)
        u, p = torch.finfo(wide).eps, oracle.path(values[0, 0].size)
        of_mean = np.abs(gamma) * p * u * (np.abs(of_mixture[0]) * 2**-20 + np.sqrt(of_mixture[1].clip(0)))
        of_mean = of_mean / np.sqrt(of_mixture[1].clip(0) + layer.eps)
        size = np.abs(gamma) * np.abs(example.reshape(3, -1).T - of_mixture[0]).max(0) * p * u
        extra = of_mean + size / np.sqrt(of_mixture[1].clip(0) + layer.eps)
        oracle.assert_within(y[i : i + 1], right.y, bound.y + extra.reshape(1, 3, *[1] * (values.ndim - 2)))
    assert layer.num_batches_tracked == 0


@cases
@weights
@dtypes
@pytest.mark.parametrize("masked", [False, True])
def test_an_example_has_the_same_bits_alone_and_in_any_batch(cls, shape, weight, dtype, masked):
    layer, x = made(cls, 3, dtype=dtype, own_weight=weight).eval(), torch.randn(37, *shape[1:]).to(dtype)
    mask = torch.rand(37, *shape[2:]) > 0.4 if masked else None
    one_by_one = [layer(x[i : i + 1], mask=None if mask is None else mask[i : i + 1]) for i in range(37)]
    y = layer(x, mask=mask)
    assert torch.equal(y, torch.cat(one_by_one))
    assert torch.equal(y[5:9], layer(x[5:9], mask=None if mask is None else mask[5:9]))


@cases
@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_weight_of_0_is_the_plain_layer_bit_by_bit(cls, shape, zero):
    layer, plain = made(cls, 3, own_weight=zero).eval(), made(cls, 3).eval()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain(x))
    assert repr(layer) == repr(plain)


@cases
def test_train_mode_and_stored_statistics_are_those_of_the_plain_layer(cls, shape):
    layer, plain = made(cls, 3, own_weight=0.5), made(cls, 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("options", [{"affine": False}, {"weight": False}, {"bias": False}], ids=str)
def test_layers_without_gamma_or_beta(options):
    layer, full = (made(BatchNorm1d, 3, own_weight=0.3, **o).eval() for o in (options, {}))
    full.load_state_dict({**full.state_dict(), **layer.state_dict()})
    with torch.no_grad():
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if getattr(layer, name) is None:
                getattr(full, name).fill_(value)
    x = torch.randn(8, 3, 5)
    torch.testing.assert_close(layer(x), full(x))


def test_the_kernels_get_a_contiguous_batch_without_a_copy(monkeypatch):
    x, read = torch.randn(8, 3, 5), []
    for name in ("measure", "normalize"):
        function = getattr(cpu, name)

        def spy(x, *args, function=function, **kwargs):
            read.append((x.data_ptr(), x.shape[1]))
            return function(x, *args, **kwargs)

        monkeypatch.setattr(cpu, name, spy)
    with torch.no_grad():
        made(BatchNorm1d, 3, own_weight=0.2).eval()(x)
    assert read == [(x.data_ptr(), 24)] * 2


@pytest.mark.parametrize("form", ["(N, L)", "(N, C, L)", "weight (N, L)"])
@weights
def test_own_statistics_are_those_of_the_valid_positions(form, weight):
    layer = made(BatchNorm1d, 3, dtype=torch.float64, own_weight=weight, act="relu").eval()
    x, valid = torch.randn(5, 3, 7, dtype=torch.float64), torch.rand(5, 7) > 0.4
    valid[:, 0], valid[3] = True, False
    options = {
        "(N, L)": {"mask": valid},
        "(N, C, L)": {"mask": valid.unsqueeze(1).expand(5, 3, 7)},
        "weight (N, L)": {"weight": valid.double()},
    }[form]
    spoiled = x if "weight" in form else torch.where(valid.unsqueeze(1), x, torch.nan)
    y = layer(spoiled, **options)
    for i in (0, 1, 2, 4):
        right = layer(x[i : i + 1, :, valid[i]])
        torch.testing.assert_close(y[i : i + 1, :, valid[i]], right)
        if "weight" not in form:
            assert not y[i][:, ~valid[i]].any()
    layer.own_weight, layer.padding = 0, "keep"  # an example that is all padding has the stored statistics
    if "weight" in form:
        torch.testing.assert_close(y[3], layer(x)[3])
    else:
        assert not y[3].any()
        kept = layer(x, **options)
        layer.own_weight = weight
        torch.testing.assert_close(layer(x, **options)[3], kept[3])


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_are_those_of_finite_differences(cls, shape, masked):
    layer = made(cls, 3, dtype=torch.float64, own_weight=0.4, act="silu").eval()
    x = torch.randn(2, *shape[1:], dtype=torch.float64)
    mask = torch.rand(2, *shape[2:]) > 0.3 if masked else None
    inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias, torch.randn_like(x))]

    def function(x, weight, bias, residual):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual), {"mask": mask})

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    with torch.no_grad():
        right = layer(*inputs[::3], mask=mask)
    torch.testing.assert_close(layer(*inputs[::3], mask=mask), right)


def test_far_from_zero_no_digits_are_lost():
    """The paper's E[x^2] - E[x]^2 in float32 has a variance of the size of its rounding here: 1e10 * 6e-8 = 600."""
    layer = BatchNorm1d(1, own_weight=0.5).eval()
    layer.running_mean.fill_(1e5)
    x = (1e5 + torch.randn(4, 1, 50)).float()
    values = x.double() - 1e5
    mean = 0.5 * values.mean(2, keepdim=True)
    var = 0.5 * values.var(2, correction=0, keepdim=True) + 0.5 + 0.25 * values.mean(2, keepdim=True) ** 2
    right = (values - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(layer(x).double(), right, rtol=1e-5, atol=1e-5)


def test_axis_frozen_layers_compile_export_and_vmap():
    layer = made(BatchNorm1d, 3, own_weight=0.3).eval()
    last, x = copy.deepcopy(layer), torch.randn(4, 3, 5)
    last.axis = -1
    right = layer(x)
    torch.testing.assert_close(last(x.movedim(1, -1)), right.movedim(1, -1))
    torch.testing.assert_close(freeze(copy.deepcopy(layer)).train()(x), right)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), right)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), right)
    torch.testing.assert_close(torch.func.vmap(layer)(torch.stack([x, x]))[1], right)


@cases
def test_an_empty_batch(cls, shape):
    layer = made(cls, 3, own_weight=0.3).eval()
    x = torch.empty(0, *shape[1:], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    if len(shape) > 2:
        assert layer(torch.empty(*shape[:-1], 0)).shape == (*shape[:-1], 0)


def test_copies_and_surgery():
    layer, x = made(BatchNorm1d, 3, own_weight=0.25).eval(), torch.randn(4, 3, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "own_weight=0.25" in repr(other)
        assert torch.equal(other(x), layer(x))
    model = nn.Sequential(nn.Conv1d(3, 3, 1), layer).eval()
    assert batchnorm.replace(model, lambda *_: BatchNorm1d(3))[1].own_weight == 0.25
    for change in (batchnorm.revert, batchnorm.for_export):
        with pytest.raises(ValueError, match=r"got own_weight=0\.25 at '1'"):
            change(model)
    folded = batchnorm.fold(model, x, report=None)
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (1.5, ValueError, "own_weight must be from 0 to 1, got 1.5"),
        (-0.1, ValueError, "own_weight must be from 0 to 1, got -0.1"),
        (float("nan"), ValueError, "own_weight must be from 0 to 1, got nan"),
        ("half", TypeError, "own_weight must be a number, got str"),
        (True, TypeError, "own_weight must be a number, got bool"),
        (None, TypeError, "own_weight must be a number, got NoneType"),
    ],
)
def test_wrong_weights_say_what_was_expected(weight, error, words):
    with pytest.raises(error, match=words):
        BatchNorm1d(3, own_weight=weight)
    layer = BatchNorm1d(3)
    with pytest.raises(error, match=words):
        layer.own_weight = weight
    assert layer.own_weight == 0


@cases
@pytest.mark.parametrize("options", [{}, {"own_weight": 0.3}], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_an_onnx_program_computes_the_same(cls, shape, options, axis):
    layer = made(cls, 3, axis=axis, **options).eval()
    x = torch.randn(shape).movedim(1, axis).contiguous()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(nn.Sequential(layer).eval(), (x,), file, dynamo=False, input_names=["x"])
    program = ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    torch.testing.assert_close(torch.from_numpy(program.run(None, {"x": x.numpy()})[0]), layer(x), rtol=1e-5, atol=1e-5)
