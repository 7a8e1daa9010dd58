"""The conformance suite: every layer, type, layout and option against the float64 oracle and torch.nn."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from layouts import LAYOUTS
from torch import nn

import batchnorm
from batchnorm import bench, layers
from batchnorm.kernels.reference import wide_dtype
from batchnorm.layer_checks import SHAPES
from batchnorm.layers import LAYERS, OURS, BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norms
from batchnorm.surgery import adoption

CASES = {
    "1d": (BatchNorm1d, (6, 3)),
    "1d with length": (BatchNorm1d, (4, 3, 5)),
    "2d": (BatchNorm2d, (4, 3, 5, 2)),
    "3d": (BatchNorm3d, (2, 3, 4, 2, 3)),
}
THEIRS = {BatchNorm1d: nn.BatchNorm1d, BatchNorm2d: nn.BatchNorm2d, BatchNorm3d: nn.BatchNorm3d}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

cases = pytest.mark.parametrize(("cls", "shape"), CASES.values(), ids=CASES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
affine = pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"weight": False}, {"affine": False}],
    ids=["gamma and beta", "gamma alone", "beta alone", "neither"],
)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def made(cls, *args, dtype=torch.float32, **kwargs):
    """A layer whose parameters and stored statistics are not at their initial values."""
    layer = cls(*args, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer


def check_against_the_oracle(layer, x):
    """Forward, backward and the update of stored statistics of ``layer`` on ``x`` stay within rounding."""
    gamma, beta = oracle.exact(layer.weight), oracle.exact(layer.bias)
    stored = [oracle.exact(s).copy() for s in (layer.running_mean, layer.running_var) if s is not None]
    x.requires_grad_()
    grad = torch.randn(x.shape).to(x.dtype)
    y = layer(x)
    y.backward(grad)
    values, wide = (oracle.exact(x), oracle.exact(grad)), wide_dtype(x.dtype)
    if layer.training or not stored:
        expected = oracle.train(*values, gamma, beta, layer.eps)
        bound = oracle.train_rounding(*values, gamma, expected, layer.eps, wide)
    else:
        expected = oracle.evaluate(*values, *stored, gamma, beta, layer.eps)
        bound = oracle.evaluate_rounding(*values, *stored, gamma, expected, layer.eps, wide)
    assert y.dtype == x.dtype
    oracle.assert_within(y, expected.y, bound.y)
    oracle.assert_within(x.grad, expected.d_x, bound.d_x)
    for parameter, value, allowed in zip((layer.weight, layer.bias), expected[2:], bound[2:], strict=True):
        if parameter is not None:
            oracle.assert_within(parameter.grad, value, allowed)
    if stored:
        check_stored_statistics(layer, values[0], stored, wide)


def check_stored_statistics(layer, x, before, wide):
    after = before
    if layer.training and layer.track_running_stats:
        after = oracle.updated(*before, x, layer.momentum)
    # the mean of the batch is off by u path std; both averages are rounded some 8 times, in the narrower type
    u = max(torch.finfo(dtype).eps / 2 for dtype in (wide, layer.running_mean.dtype))
    p, (_, var) = oracle.path(x.size // x.shape[1]), oracle.statistics(x)
    moved = layer.training
    for found, value, old, off in zip(
        (layer.running_mean, layer.running_var), after, before, (np.sqrt(var), var), strict=True
    ):
        oracle.assert_within(found, value, moved * u * (8 * (np.abs(value) + np.abs(old)) + (p + 8) * off))


# --- values and gradients ---------------------------------------------------------------------------------


@cases
@dtypes
@layouts
@modes
def test_every_layer_type_and_layout_agrees_with_the_oracle(cls, shape, dtype, layout, training):
    layer = made(cls, 3, dtype=dtype).train(training)
    check_against_the_oracle(layer, layout((2 + 3 * torch.randn(shape)).to(dtype)))


@cases
@affine
@modes
def test_gamma_and_beta_are_optional_each_alone_too(cls, shape, options, training):
    layer = made(cls, 3, **options).train(training)
    assert (layer.weight is None) == ("weight" in options or "affine" in options)
    assert (layer.bias is None) == ("bias" in options or "affine" in options)
    check_against_the_oracle(layer, 1 + torch.randn(shape))


@cases
@modes
@pytest.mark.parametrize("momentum", [0, 0.1, 1])
def test_momentum_is_the_weight_of_the_new_batch(cls, shape, training, momentum):
    check_against_the_oracle(made(cls, 3, momentum=momentum).train(training), 1 + torch.randn(shape))


@cases
@modes
def test_without_stored_statistics_both_modes_use_the_batch(cls, shape, training):
    layer = made(cls, 3, track_running_stats=False).train(training)
    assert not list(layer.buffers())
    check_against_the_oracle(layer, 1 + torch.randn(shape))


@cases
@modes
def test_tracking_turned_off_later_keeps_the_statistics_and_eval_uses_them(cls, shape, training):
    layer = made(cls, 3).train(training)
    layer.track_running_stats = False
    check_against_the_oracle(layer, 1 + torch.randn(shape))
    assert layer.num_batches_tracked == 0


@cases
@modes
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_half_precision_activations_meet_float32_parameters(cls, shape, training, narrow):
    check_against_the_oracle(made(cls, 3).train(training), (2 + 3 * torch.randn(shape)).to(narrow))


@modes
def test_autocast_keeps_the_type_of_the_convolution_before(training):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), made(BatchNorm2d, 3), nn.Conv2d(3, 2, 1)).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net[0](torch.randn(4, 2, 6, 6))
        y = net[1](inside)
        loss = net[2](y).float().sum()
    loss.backward()
    assert inside.dtype == y.dtype == torch.bfloat16
    assert net[1].running_mean.dtype == net[1].weight.grad.dtype == torch.float32


@cases
@modes
def test_float64_activations_meet_float32_parameters(cls, shape, training):
    check_against_the_oracle(made(cls, 3).train(training), (2 + 3 * torch.randn(shape)).double())


@modes
@pytest.mark.parametrize(
    ("cls", "shape", "memory_format"),
    [(BatchNorm2d, (4, 3, 5, 2), torch.channels_last), (BatchNorm3d, (2, 3, 4, 2, 3), torch.channels_last_3d)],
)
def test_the_memory_format_is_kept_in_value_and_gradient(cls, shape, memory_format, training):
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    y = made(cls, 3).train(training)(x)
    assert y.is_contiguous(memory_format=memory_format)
    (d_x,) = torch.autograd.grad(y.square().sum(), x)
    assert d_x.is_contiguous(memory_format=memory_format)


@cases
@dtypes
def test_one_example_gets_the_same_bits_in_eval_mode_alone_and_in_any_batch(cls, shape, dtype):
    layer = made(cls, 3, dtype=dtype).eval()
    x = torch.randn(37, *shape[1:]).to(dtype)
    assert torch.equal(layer(x), torch.cat([layer(one) for one in x.split(1)]))
    assert torch.equal(layer(x)[5:9], layer(x[5:9]))


# --- empty batches and single values ----------------------------------------------------------------------


@cases
@modes
def test_an_empty_batch_passes_through_counts_for_nothing_and_has_gradients_of_zero(cls, shape, training):
    layer = made(cls, 3).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.empty(0, *shape[1:], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.skipped_updates == 0


@cases
@modes
@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act": "relu", "memory": "save"},
        {"renorm": True},
        {"ghost_batch_size": 2},
        {"own_weight": 0.5},
        {"axis": -1},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_a_tensor_without_values_has_a_result_and_gradients_and_moves_nothing(cls, shape, training, dtype, options):
    """No examples, or axes of size 0 behind the channels, each in turn and all together."""
    layer = made(cls, 3, dtype=dtype, **options).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    axes = [0, *range(2, len(shape))]
    for empty in [*([axis] for axis in axes), axes]:
        sizes = [0 if axis in empty else size for axis, size in enumerate(shape)]
        x, residual = (torch.empty(sizes, dtype=dtype) for _ in range(2))
        if "axis" in options and len(shape) > 2:
            x, residual = (t.movedim(1, -1) for t in (x, residual))
        for mask in (None, torch.ones(sizes[0], *sizes[2:], dtype=torch.bool)):
            given = [t.clone().requires_grad_() for t in (x, residual)]
            y = layer(*given, mask=mask)
            y.sum().backward()
            assert y.shape == given[0].grad.shape == given[1].grad.shape == x.shape
            assert y.dtype == dtype
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.skipped_updates == 0


@modes
@pytest.mark.parametrize("shape", [(65_535, 2), (65_536, 2), (131_072, 2), (65_537, 2, 1), (70_000, 2, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"ghost_batch_size": 1000}, {"own_weight": 0.5}], ids=str)
def test_more_rows_than_cudnn_accepts(shape, training, options):
    """torch.nn fails here in eval mode on CUDA: cuDNN has 65,535 rows at most."""
    layer, x = made(BatchNorm1d, 2, **options).train(training), torch.randn(shape)
    if options:
        assert layer(x).isfinite().all()
    else:
        check_against_the_oracle(layer, x)


@cases
def test_a_single_value_is_refused_before_anything_is_counted(cls, shape):
    layer = cls(3)
    one = torch.randn(1, 3, *[1] * (len(shape) - 2))
    with pytest.raises(ValueError, match=r"needs more than 1 value per channel, got shape \(1, 3.*: one value has no"):
        layer(one)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()
    assert layer.eval()(one).isfinite().all()


def test_the_advice_for_a_single_value_fits_the_layer():
    one = torch.randn(1, 3)
    with pytest.raises(ValueError, match=r"drop_last=True in the loader, call eval\(\), or .*single_element='pop"):
        BatchNorm1d(3)(one)
    for layer in (BatchNorm1d(3, track_running_stats=False), BatchNorm1d(3, track_running_stats=False).eval()):
        with pytest.raises(ValueError, match="drop_last=True in the loader, or construct the layer with track_r"):
            layer(one)


@cases
def test_a_single_value_can_be_normalized_by_the_stored_statistics_instead(cls, shape):
    layer = made(cls, 3, single_element="population")
    one = torch.randn(1, 3, *[1] * (len(shape) - 2))
    y = layer(one)
    assert layer.num_batches_tracked == 0
    assert torch.equal(y, layer.eval()(one))
    layer.train()(torch.randn(shape))
    assert layer.num_batches_tracked == 1


def test_one_image_has_a_spread_and_is_measured_where_a_single_value_would_not_be():
    layer, image = made(BatchNorm2d, 3, single_element="population"), torch.randn(1, 3, 4, 4)
    y = layer(image)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(y.mean((0, 2, 3)), layer.bias, rtol=0, atol=1e-5)


@cases
def test_gradients_in_eval_mode_are_by_the_statistics_of_the_forward_also_when_they_move_before_the_backward(
    cls, shape
):
    layer = made(cls, 3)
    layer(torch.randn(shape) + 1)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape)
    expected = torch.autograd.grad((layer.eval()(x) * weight).sum(), [x, layer.weight, layer.bias])
    y = layer(x)
    layer.train()(5 * torch.randn(shape) - 2)
    found = torch.autograd.grad((y * weight).sum(), [x, layer.weight, layer.bias])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- against torch.nn over time ---------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-2}], ids=str)
def test_training_goes_where_torch_nn_goes(cls, shape, momentum, options):
    """Sixty steps of SGD in float64, on batches as small as can be: a biased stored variance is off by a factor."""
    ours, theirs = (c(3, momentum=momentum, dtype=torch.float64, **options) for c in (cls, THEIRS[cls]))
    for step in range(60):
        examples = 2 + step % 3
        x = (step % 5) + torch.randn(examples, *shape[1:], dtype=torch.float64)
        losses = [layer.train()(x).pow(3).sum() / x.numel() for layer in (ours, theirs)]
        for layer, loss in zip((ours, theirs), losses, strict=True):
            if list(layer.parameters()):
                loss.backward()
                torch.optim.SGD(layer.parameters(), lr=1e-2).step()
                layer.zero_grad()
    # float64 rounds at 1e-16; sixty steps that do not amplify stay far below 1e-11
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-11, atol=1e-11)


def test_the_stored_variance_is_the_unbiased_one():
    layer, x = BatchNorm1d(2, momentum=1), torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    layer(x)
    assert layer.running_var.tolist() == [2, 18]


# --- who is who -------------------------------------------------------------------------------------------


@cases
def test_layers_are_instances_of_torch_nns_where_tools_look_for_that(cls, shape):
    layer = cls(3)
    assert isinstance(layer, THEIRS[cls])
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert list(layer.state_dict()) == list(THEIRS[cls](3).state_dict())


def test_the_batch_norms_of_a_model_are_found_whoever_made_them():
    model = nn.Sequential(nn.Linear(2, 2), BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.SyncBatchNorm(2)))
    assert batch_norms(model) == {"1": model[1], "2.0": model[2][0], "2.1": model[2][1]}


def test_no_list_of_layers_leaves_one_out():
    written = {kind for kind in vars(layers).values() if isinstance(kind, type) and issubclass(kind, layers._Layer)}
    names = {kind.__name__ for kind in written - {layers._Layer}}
    assert len(names) == 3
    assert {kind.__name__ for kind in LAYERS} == set(SHAPES) == names
    assert all(theirs in ours.__bases__ for theirs, ours in OURS.items())
    assert all(ours._shapes is SHAPES[ours.__name__] for ours in LAYERS)
    assert set(bench._layer_names().values()) == names
    assert {name for name, home in batchnorm._HOMES.items() if home == "layers"} == names
    assert set(batchnorm.__all__) > names
    assert adoption._SIZES.keys() == OURS.keys()
