"""Padding, lengths and weights: results and statistics are those of the float64 oracle on the valid positions alone."""

from __future__ import annotations

import copy
import itertools

import oracle
import pytest
import torch
from test_layers import check_stored_statistics, made
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.kernels import Sample, reference
from batchnorm.kernels.reference import wide_dtype
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.padded_models import _by_formula

CASES = {
    "rows": (BatchNorm1d, (40, 3)),
    "short lines": (BatchNorm1d, (6, 3, 7)),
    "long lines": (BatchNorm1d, (3, 2, 1100)),
    "images": (BatchNorm2d, (4, 5, 6, 3)),
    "volumes": (BatchNorm3d, (2, 3, 4, 2, 3)),
}
cases = pytest.mark.parametrize(("cls", "shape"), CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def batch(shape, dtype=torch.float64, *, channels_last=False):
    """Values, and the valid positions (N, ...): some positions of all examples."""
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    valid = torch.rand(shape[0], *shape[2:]) > 0.4
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x), valid


def spoiled(x: Tensor, valid: Tensor) -> Tensor:
    """A tensor with NaN in the padding, in its memory layout."""
    return torch.empty_like(x).copy_(torch.where(valid.unsqueeze(1), x, torch.nan))


def rows(x: Tensor, valid: Tensor) -> Tensor:
    """The valid positions of ``x`` as a batch (M, C)."""
    return x.movedim(1, -1)[valid]


@cases
@dtypes
@layouts
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_valid_positions_are_normalized_as_if_they_were_the_batch(cls, shape, dtype, channels_last, training):
    x, valid = batch(shape, dtype, channels_last=channels_last)
    layer = made(cls, shape[1], dtype=dtype).train(training)
    before = oracle.exact(layer.running_mean).copy(), oracle.exact(layer.running_var).copy()
    given, grad = spoiled(x, valid).requires_grad_(), torch.randn(shape).to(dtype)
    y = layer(given, mask=valid)
    y.backward(spoiled(grad, valid))
    values, wide = (oracle.exact(rows(x, valid)), oracle.exact(rows(grad, valid))), wide_dtype(dtype)
    gamma, beta = oracle.exact(layer.weight), oracle.exact(layer.bias)
    if training:
        right = oracle.train(*values, gamma, beta, layer.eps)
        bound = oracle.train_rounding(*values, gamma, right, layer.eps, wide)
    else:
        right = oracle.evaluate(*values, *before, gamma, beta, layer.eps)
        bound = oracle.evaluate_rounding(*values, *before, gamma, right, layer.eps, wide)
    found = [rows(y, valid), rows(given.grad, valid), layer.weight.grad, layer.bias.grad]
    for value, expected, error in zip(found, right, bound, strict=True):
        oracle.assert_within(value, expected, error)
    check_stored_statistics(layer, values[0], before, wide)
    assert not rows(y, ~valid).any()
    assert not rows(given.grad, ~valid).any()
    assert y.stride() == x.stride()


@cases
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
@pytest.mark.parametrize("kernel", ["native", "formula"])
def test_a_residual_and_an_activation_are_left_out_of_the_padding_too(cls, shape, act, kernel):
    """A residual that is NaN there has the gradient 0, and the result is 0 although act(beta) is not."""
    x, valid = batch(shape)
    residual = torch.randn(shape, dtype=x.dtype)
    layer, plain = made(cls, shape[1], dtype=x.dtype, act=act), made(BatchNorm1d, shape[1], dtype=x.dtype, act=act)
    plain.load_state_dict(layer.state_dict())
    mask = valid if kernel == "native" else valid.unsqueeze(1).expand(shape)
    given = [spoiled(x, valid).requires_grad_(), spoiled(residual, valid).requires_grad_()]
    packed = [rows(x, valid).requires_grad_(), rows(residual, valid).requires_grad_()]
    y, right, grad = layer(*given, mask=mask), plain(*packed), torch.randn(shape, dtype=x.dtype)
    y.backward(spoiled(grad, valid))
    right.backward(rows(grad, valid))
    assert torch.allclose(rows(y, valid), right)
    assert not rows(y, ~valid).any()
    for mine, theirs in zip(given, packed, strict=True):
        assert torch.allclose(rows(mine.grad, valid), theirs.grad)
        assert not rows(mine.grad, ~valid).any()
    for name in ("weight", "bias"):
        assert torch.allclose(getattr(layer, name).grad, getattr(plain, name).grad)


@cases
def test_a_kept_padding_is_normalized_and_has_a_gradient_but_is_not_counted(cls, shape):
    x, valid = batch(shape)
    layer = made(cls, shape[1], dtype=x.dtype, padding="keep")
    mean, var = (t.detach() for t in reference.measure(rows(x, valid)))
    given = x.clone().requires_grad_()
    y = layer(given, mask=valid)
    layer.eval()
    layer.running_mean, layer.running_var = mean, var
    assert torch.allclose(y, layer(x))
    y.sum().backward()
    assert rows(given.grad, ~valid).abs().max() > 0


@cases
@pytest.mark.parametrize("kernel", ["native", "formula"])
def test_derivatives_agree_with_finite_differences(cls, shape, kernel):
    shape = (*shape[:2], *[min(size, 5) for size in shape[2:]])
    x, valid = batch((min(shape[0], 5), *shape[1:]))
    mask = valid if kernel == "native" else valid.unsqueeze(1).expand(x.shape)
    layer = made(cls, shape[1], dtype=x.dtype, act="silu").eval()
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    residual = torch.randn_like(x)
    inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias, residual)]

    def function(x, weight, bias, residual):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual), {"mask": mask})

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_weight_is_a_number_of_equal_values():
    x, weight = torch.randn(6, 3, 5, dtype=torch.float64), torch.tensor([2, 1, 0, 3, 1, 1])
    layer, plain = (BatchNorm1d(3, dtype=x.dtype) for _ in range(2))
    given, repeated = x.clone().requires_grad_(), x.repeat_interleave(weight, 0).requires_grad_()
    y, right = layer(given, weight=weight), plain(repeated)
    assert torch.allclose(y.repeat_interleave(weight, 0), right)
    assert torch.allclose(layer.running_mean, plain.running_mean)
    assert torch.allclose(layer.running_var, plain.running_var)
    (y.square() * weight.reshape(-1, 1, 1)).sum().backward()
    right.square().sum().backward()
    examples = torch.arange(6).repeat_interleave(weight)
    assert torch.allclose(given.grad, torch.zeros_like(x).index_add(0, examples, repeated.grad), atol=1e-12)
    assert y[2].abs().min() > 0  # an example of weight 0 is normalized like the others


@pytest.mark.parametrize("form", ["(N, L)", "(N, 1, L)", "(N, C, L)", "lengths", "list of lengths"])
def test_masks_of_all_shapes_and_lengths_say_the_same(form):
    x, lengths = torch.randn(4, 3, 9), torch.tensor([9, 5, 1, 0])
    valid = torch.arange(9) < lengths.unsqueeze(1)
    options = {
        "(N, L)": {"mask": valid},
        "(N, 1, L)": {"mask": valid.unsqueeze(1)},
        "(N, C, L)": {"mask": valid.unsqueeze(1).expand(4, 3, 9)},
        "lengths": {"lengths": lengths},
        "list of lengths": {"lengths": lengths.tolist(), "length_axis": -1},
    }[form]
    layer, plain = BatchNorm1d(3), BatchNorm1d(3)
    y = layer(x, **options)
    assert torch.allclose(rows(y, valid), plain(rows(x, valid)), atol=1e-6)
    assert torch.allclose(layer.running_var, plain.running_var)


def test_a_mask_may_differ_between_channels():
    x, mask = torch.randn(8, 3, 5, dtype=torch.float64), torch.rand(8, 3, 5) > 0.5
    layer = BatchNorm1d(3, dtype=x.dtype, momentum=1.0)
    layer(torch.where(mask, x, torch.nan), mask=mask)
    for c in range(3):
        values = x[:, c][mask[:, c]]
        assert torch.isclose(layer.running_mean[c], values.mean())
        assert torch.isclose(layer.running_var[c], values.var())


@pytest.mark.parametrize("axis", [2, 3, -1])
def test_lengths_count_along_the_axis_that_is_named(axis):
    x, lengths = torch.randn(3, 2, 6, 6), torch.tensor([6, 4, 2])
    y = BatchNorm2d(2)(x, lengths=lengths, length_axis=axis)
    for example, length in enumerate(lengths):
        outside = y[example].movedim(axis if axis < 0 else axis - 1, 0)[length:]
        assert not outside.any()


def test_packed_and_nested_sequences_have_no_padding():
    lengths, x = torch.tensor([5, 3, 2]), torch.randn(3, 5, 4)
    layer, plain, third = (BatchNorm1d(4, momentum=1.0) for _ in range(3))
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    result = layer(packed)
    assert torch.allclose(result.data, plain(packed.data))
    assert torch.equal(result.batch_sizes, packed.batch_sizes)
    nested = torch.nested.nested_tensor([e[:n] for e, n in zip(x, lengths, strict=True)], layout=torch.jagged)
    whole = third(nested)
    assert torch.equal(whole.offsets(), nested.offsets())
    assert torch.allclose(whole.values().sort(0).values, result.data.sort(0).values, atol=1e-6)
    assert torch.allclose(layer.running_var, third.running_var)
    with pytest.raises(ValueError, match="needs a packed or nested input alone"):
        layer(packed, lengths=lengths)
    with pytest.raises(TypeError, match="BatchNorm2d needs a tensor"):
        BatchNorm2d(4)(packed)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("options", [{"own_weight": 0.5}, {"ghost_batch_size": 2}, {"ghost_batch_size": 3}], ids=str)
def test_a_sequence_is_one_example(options, is_sorted, axis):
    """An example's own moments, and ghost batches of examples, as for the padded batch with lengths."""
    lengths, x = torch.tensor([5, 4, 3, 2] if is_sorted else [2, 5, 3, 4]), torch.randn(4, 5, 3, dtype=torch.float64)
    layer = made(BatchNorm1d, 3, dtype=x.dtype, axis=axis, **options).train("own_weight" not in options)
    padded, values = copy.deepcopy(layer), x.clone().requires_grad_()
    given = values if axis == -1 else values.transpose(1, 2)
    right = padded(given, lengths=lengths, length_axis=1 if axis == -1 else 2)
    right = right if axis == -1 else right.transpose(1, 2)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
    result = copy.deepcopy(layer)(packed)
    assert torch.allclose(pad_packed_sequence(result, batch_first=True)[0], right)
    rows_of_all = [e[:n].clone().requires_grad_() for e, n in zip(x, lengths, strict=True)]
    whole = layer(torch.nested.as_nested_tensor(rows_of_all, layout=torch.jagged))
    valid = torch.arange(5) < lengths.unsqueeze(1)
    assert torch.allclose(whole.values(), right[valid])
    if layer.training:
        assert torch.allclose(layer.running_var, padded.running_var)
        assert layer.num_batches_tracked == padded.num_batches_tracked
    right[valid].pow(3).sum().backward()
    whole.values().pow(3).sum().backward()
    assert torch.allclose(torch.cat([e.grad for e in rows_of_all]), values.grad[valid])


@pytest.mark.parametrize("threads", [1, 2])
@cases
def test_results_have_the_same_bits_for_any_number_of_threads(cls, shape, threads):
    torch.manual_seed(0)
    x, valid = batch((64, *shape[1:]), torch.float32)
    layer = cls(shape[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        right = layer(x, mask=valid)
        torch.set_num_threads(threads)
        assert torch.equal(layer(x, mask=valid), right)
    finally:
        torch.set_num_threads(before)


@cases
def test_a_mask_without_padding_changes_nothing(cls, shape):
    x, _ = batch(shape, torch.float32)
    layer, plain = cls(shape[1]), cls(shape[1])
    assert torch.allclose(layer(x, mask=torch.ones(shape[0], *shape[2:], dtype=torch.bool)), plain(x), atol=1e-6)
    assert torch.allclose(layer.running_var, plain.running_var, rtol=1e-6)


def test_all_positions_masked():
    layer = BatchNorm1d(3)
    x, none = torch.full((2, 3, 4), torch.nan), torch.zeros(2, 4, dtype=torch.bool)
    before = layer.running_mean.clone()
    with pytest.raises(ValueError, match="needs 2 valid positions in train mode, got none"):
        layer(x, mask=none)
    one = none.clone()
    one[0, 0] = True
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x, mask=one)
    assert torch.equal(layer.running_mean, before)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.eval()(x, mask=none), torch.zeros(2, 3, 4))


def test_one_valid_value_is_normalized_by_stored_statistics_where_that_is_the_policy():
    layer = BatchNorm1d(3, single_element="population")
    x, one = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.bool)
    one[0, 0] = True
    assert torch.allclose(layer(x, mask=one)[0, :, 0], x[0, :, 0], atol=1e-4)
    assert layer.num_batches_tracked == 0


WRONG = {
    "ints": ({"mask": torch.ones(4, 9)}, TypeError, "True means valid, got torch.float32.*pass ~mask"),
    "list": ({"mask": [[True]]}, TypeError, "True means valid, got list"),
    "shape": (
        {"mask": torch.ones(4, 8, dtype=torch.bool)},
        ValueError,
        r"of shape \(4, 9\), \(4, 1, 9\) or \(4, 3, 9\)",
    ),
    "device": ({"mask": torch.ones(4, 9, dtype=torch.bool, device="meta")}, ValueError, "on cpu.*got .* on meta"),
    "both": ({"mask": torch.ones(4, 9, dtype=torch.bool), "lengths": [1, 1, 1, 1]}, ValueError, "got both"),
    "long": ({"lengths": [9, 5, 10, 1]}, ValueError, "lengths from 0 to 9.*got 1 to 10"),
    "negative length": ({"lengths": [9, 5, -1, 1]}, ValueError, "got -1 to 9"),
    "few": ({"lengths": [9, 5]}, ValueError, r"shape \(4,\), got \(2,\)"),
    "relative": ({"lengths": torch.tensor([1.0, 0.5, 0.2, 0.1])}, TypeError, "whole numbers, got torch.float32"),
    "text": ({"lengths": "9513"}, TypeError, "whole numbers, got str"),
    "axis": ({"lengths": [9, 5, 3, 1], "length_axis": 1}, ValueError, "length_axis= to be 2 .*got 1"),
    "axis alone": ({"length_axis": 2}, ValueError, "lengths= with length_axis="),
    "negative": ({"weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}, ValueError, "weights of 0 or more, got -1"),
    "NaN": ({"weight": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, ValueError, "weights of 0 or more"),
    "bool": ({"weight": torch.ones(4, dtype=torch.bool)}, TypeError, "weight of numbers, got torch.bool"),
    "small": ({"weight": torch.full((4,), 0.01)}, ValueError, "add up to more than 1"),
}


@pytest.mark.parametrize(("options", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_say_what_was_expected(options, error, words):
    layer = BatchNorm1d(3)
    with pytest.raises(error, match=words):
        layer(torch.randn(4, 3, 9), **options)
    assert layer.num_batches_tracked == 0


def test_lengths_of_images_need_an_axis():
    with pytest.raises(ValueError, match=r"length_axis= to be 2 or 3 for an input of shape \(2, 3, 4, 4\), got None"):
        BatchNorm2d(3)(torch.randn(2, 3, 4, 4), lengths=[4, 2])
    with pytest.raises(ValueError, match="an input"):
        BatchNorm1d(3)(torch.randn(2, 3), lengths=[1, 1])


def test_a_compiler_a_transform_and_torch_fx_see_the_mask():
    x, valid = batch((6, 3, 7), torch.float32)
    layer = BatchNorm1d(3).eval()
    right = layer(x, mask=valid)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask=valid), right, atol=1e-6)
    stacked = torch.func.vmap(lambda x, valid: layer(x, mask=valid))(x.repeat(2, 1, 1, 1), valid.repeat(2, 1, 1))
    assert torch.allclose(stacked[1], right, atol=1e-6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = layer

        def forward(self, x, valid):
            return self.bn(x, mask=valid)

    assert torch.equal(torch.fx.symbolic_trace(Net())(x, valid), right)


def test_a_compiled_training_step_stores_the_same_statistics():
    x, valid = batch((6, 3, 7), torch.float32)
    layer, plain = BatchNorm1d(3), BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, mask=valid), plain(x, mask=valid), atol=1e-6)
    assert torch.allclose(layer.running_mean, plain.running_mean, atol=1e-6)
    assert torch.allclose(layer.running_var, plain.running_var, atol=1e-6)
    assert layer.num_batches_tracked == 1


def test_counts_of_a_sample_are_its_mask_times_its_weight():
    mask, weight = torch.tensor([[True, False]]), torch.tensor([[2.0, torch.nan]])
    assert torch.equal(Sample(mask, weight).counts(torch.zeros(1, 2)), torch.tensor([[2.0, 0.0]]))


# -- whole models ---------------------------------------------------------------------------------------------


POOLS = {"no pooling": nn.Identity, "mean": nn.AvgPool1d, "maximum": nn.MaxPool1d}


def encoder(stride, pool):
    """Convolutions with strides, dilation and batch norm, with statistics of their own."""
    model = nn.Sequential(
        nn.Conv1d(4, 8, 5, stride=stride, padding=2), BatchNorm1d(8, act="relu"),
        POOLS[pool](3, 2, padding=1),
        nn.Conv1d(8, 6, 3, padding="same", dilation=2), nn.Dropout(0.1), BatchNorm1d(6), nn.SiLU(),
        nn.ConvTranspose1d(6, 5, 4, stride=2, padding=1), BatchNorm1d(5),
    )  # fmt: skip
    model(torch.randn(16, 4, 40))
    return model.double().eval()


@pytest.mark.parametrize(("stride", "pool"), [*itertools.product([1, 2, 3], POOLS)])
def test_the_valid_results_of_a_padded_batch_are_those_of_each_example_alone(stride, pool):
    model, lengths = encoder(stride, pool), [50, 31, 17, 8]
    x = torch.randn(4, 4, 50, dtype=torch.float64)
    for example, length in enumerate(lengths):
        x[example, :, length:] = torch.nan
    with batchnorm.padding(model, lengths):
        y = model(x)
    for example, length in enumerate(lengths):
        alone = model(x[example : example + 1, :, :length])[0]
        assert torch.allclose(y[example, :, : alone.shape[1]], alone, rtol=0, atol=1e-12)
        assert not y[example, :, alone.shape[1] :].any()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_padding_counts_only_valid_positions_in_training():
    model, lengths = nn.Sequential(nn.Conv1d(2, 3, 1), BatchNorm1d(3, momentum=1.0)), torch.tensor([7, 3])
    x = torch.randn(2, 2, 7)
    with batchnorm.padding(model, lengths):
        model(x)
    values = rows(model[0](x), torch.arange(7) < lengths.unsqueeze(1))
    assert torch.allclose(model[1].running_mean, values.mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, values.var(0), atol=1e-6)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "around"), [(2, 3, 0), (3, 2, 1), (2, 2, 1), (3, 4, 1), (5, 3, 2)])
def test_poolings_change_lengths_as_torch_does(kernel, stride, around, ceil_mode):
    pool = nn.MaxPool1d(kernel, stride, padding=around, ceil_mode=ceil_mode)
    lengths = torch.arange(kernel, 20)
    right = [pool(torch.zeros(1, 1, int(length))).shape[2] for length in lengths]
    assert _by_formula(pool, lengths, 0).tolist() == right


class Halved(nn.Module):
    def forward(self, x):
        return x[:, :, ::2]


def test_a_rule_says_how_other_modules_change_lengths():
    model = nn.Sequential(BatchNorm1d(2), Halved(), BatchNorm1d(2)).eval()
    x = torch.randn(2, 2, 9)
    with (
        batchnorm.padding(model, [9, 4]),
        pytest.raises(ValueError, match=r"knows them for 9, got an input of size 5.*rule="),
    ):
        model(x)
    with batchnorm.padding(model, [9, 4], rule=lambda _, lengths: (lengths + 1) // 2):
        assert not model(x)[1, :, 2:].any()
    assert model(x)[1, :, 2:].any()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.BatchNorm1d(2)), "got BatchNorm1d at '0'.*batchnorm.convert"),
        (nn.Linear(1, 1), "no batch norm"),
    ],
)
def test_padding_needs_layers_of_this_package(model, words):
    with pytest.raises(ValueError, match=words), batchnorm.padding(model, [1]):
        pass


def test_padding_leaves_layers_without_a_length_axis_alone():
    model = nn.Sequential(BatchNorm1d(2), nn.AdaptiveMaxPool1d(1), nn.Flatten(), BatchNorm1d(2))
    model[3].register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    seen = {}
    with batchnorm.padding(model, [9, 4], rule=lambda _, lengths: lengths.clamp_max(1)):
        assert model(torch.randn(2, 2, 9)).shape == (2, 2)
    assert seen == {}


@pytest.mark.parametrize("axis", [-3, -1, 0, 1])
def test_padding_names_the_axes_that_can_have_lengths(axis):
    with (
        pytest.raises(ValueError, match=f"needs a length_axis of 2 or more, got {axis}. It is the axis along which"),
        batchnorm.padding(BatchNorm1d(2), [9, 4], length_axis=axis),
    ):
        pass


@pytest.mark.parametrize("axis", [2.0, "2", None, True])
def test_padding_needs_a_whole_number_as_axis(axis):
    with (
        pytest.raises(TypeError, match="length_axis must be a whole number"),
        batchnorm.padding(BatchNorm1d(2), [1], length_axis=axis),
    ):
        pass


@pytest.mark.parametrize("what", ["model", "in place", "part"])
@torch.no_grad()
def test_compiled_models_get_the_lengths_of_every_block(what):
    model, x = (
        nn.Sequential(nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), BatchNorm1d(3)), nn.ReLU()),
        torch.randn(2, 2, 8),
    )
    right = {}
    for length in (5, 3):
        with batchnorm.padding(model, [8, length]):
            right[length] = model(x)
    compiled = torch.compile(model, backend="eager") if what == "model" else model
    if what == "in place":
        model.compile(backend="eager")
    if what == "part":
        model[0] = torch.compile(model[0], backend="eager")
    compiled(x)
    for length in (5, 3):
        with batchnorm.padding(compiled, [8, length]):
            assert torch.allclose(compiled(x), right[length], atol=1e-6)


class Checkpointed(nn.Module):
    """Two parts that are computed again in the backward pass; None computes them once."""

    def __init__(self, *parts, use_reentrant):
        super().__init__()
        self.parts, self.use_reentrant = nn.ModuleList(parts), use_reentrant

    def forward(self, x):
        for part in self.parts:
            x = part(x) if self.use_reentrant is None else checkpoint(part, x, use_reentrant=self.use_reentrant)
        return x


def gradients_of_padded(model, x, lengths, *, is_inside):
    """Gradients of two batches that wait for their backward pass, in each block's lengths."""
    outputs = []
    for length in lengths:
        with batchnorm.padding(model, length):
            outputs.append(model(x).pow(3).sum())
            if is_inside:
                outputs.pop().backward()
    for y in reversed(outputs):
        y.backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_inside", [False, True], ids=["behind the block", "inside"])
def test_activation_checkpointing_repeats_a_forward_with_its_lengths(use_reentrant, is_inside):
    """The first size comes back with other lengths: 5 positions become 3, and these 6."""
    parts = [nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), BatchNorm1d(3)),
             nn.Sequential(nn.ConvTranspose1d(3, 2, 4, stride=2, padding=1), BatchNorm1d(2))]  # fmt: skip
    plain = Checkpointed(*parts, use_reentrant=None).double()
    model = Checkpointed(*copy.deepcopy(parts), use_reentrant=use_reentrant)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    lengths = [[8, 5, 3], [2, 8, 7]]
    right = gradients_of_padded(plain, x.clone().requires_grad_(), lengths, is_inside=True)
    found = gradients_of_padded(model, x.clone().requires_grad_(), lengths, is_inside=is_inside)
    for mine, theirs in zip(found, right, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_backward_pass_that_fails_leaves_no_lengths_behind():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("on purpose")

    layer, x = nn.Sequential(BatchNorm1d(2)), torch.randn(2, 2, 8, requires_grad=True)
    with batchnorm.padding(layer, [8, 3]):
        y = layer(Fails.apply(x))
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    assert layer(x)[1, :, 3:].abs().min() > 0


@pytest.mark.parametrize(
    "first", [nn.ConstantPad1d(1, 0), nn.Upsample(scale_factor=2), nn.ReflectionPad1d(2), Halved()]
)
def test_a_module_in_front_that_changes_the_size_needs_a_rule(first):
    model, x = nn.Sequential(first, nn.Conv1d(2, 3, 1), BatchNorm1d(3)).eval(), torch.randn(2, 2, 9)
    with batchnorm.padding(model, [9, 4]), pytest.raises(ValueError, match=r"knows them for 9, got .*rule="):
        model(x)
    lengths = [first(x[:, :, :length]).shape[2] for length in (9, 4)]
    with batchnorm.padding(model, [9, 4], rule=lambda module, _: torch.tensor(lengths) if module is first else None):
        y = model(x)
    assert not y[1, :, lengths[1] :].any()
    assert y[1, :, : lengths[1]].all()


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize(("features", "new"), [(4, 7), (30, 20)])
def test_a_linear_layer_in_front_changes_no_lengths(features, new):
    parts = nn.Sequential(nn.Linear(features, new), nn.ReLU())
    model = nn.Sequential(parts, Transposed(), nn.Conv1d(new, 3, 3, padding=1), BatchNorm1d(3))
    with batchnorm.padding(model, [9, 4]):
        y = model(torch.randn(2, 9, features))
    assert not y[1, :, 4:].any()


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_needs_convolutions_that_pad_with_zeros(mode):
    model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode=mode), BatchNorm1d(2))
    with pytest.raises(ValueError, match=f"Conv1d at '0' with padding_mode='{mode}'"), batchnorm.padding(model, [1]):
        pass
    harmless = nn.Sequential(nn.Conv1d(2, 2, 3, padding_mode=mode), BatchNorm1d(2))
    with batchnorm.padding(harmless, [9, 4]):
        assert not harmless(torch.randn(2, 2, 9))[1, :, 2:].any()


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(2), nn.GroupNorm(1, 2)])
def test_padding_warns_of_norms_that_count_it(norm):
    model = nn.Sequential(norm, BatchNorm1d(2))
    with pytest.warns(RuntimeWarning, match=f"{type(norm).__name__} at '0'"), batchnorm.padding(model, [9, 4]):
        pass


def test_a_head_without_positions_has_no_padding():
    body = [nn.Conv1d(2, 3, 3, padding=1), BatchNorm1d(3), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    head = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4))
    model, seen = nn.Sequential(*body, *head), []
    handle = head[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with batchnorm.padding(model, [9, 4, 2]):
        y = model(torch.randn(3, 2, 9))
    handle.remove()
    assert torch.allclose(y, head(*seen))


def test_positions_that_became_examples_are_refused():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), Transposed(), nn.Flatten(0, 1), BatchNorm1d(3))
    with batchnorm.padding(model, [9, 4]), pytest.raises(ValueError, match=r"with 2 examples.*got shape \(18, 3\)"):
        model(torch.randn(2, 2, 9))


@pytest.mark.parametrize("is_positional", [False, True])
def test_a_mask_inside_of_a_block_is_refused(is_positional):
    layer, x, mask = BatchNorm1d(2), torch.randn(2, 2, 9), torch.ones(2, 9, dtype=torch.bool)
    with batchnorm.padding(layer, [9, 4]), pytest.raises(ValueError, match=r"block of padding.*mask= of its own"):
        layer(x, None, mask) if is_positional else layer(x, mask=mask)


# -- statistics and the doctor --------------------------------------------------------------------------------


class Masked(nn.Module):
    """A model that gets padded sequences with their lengths."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv1d(2, channels, 1), BatchNorm1d(channels), BatchNorm1d(channels)

    def forward(self, x, lengths):
        return self.last(self.bn(self.conv(x), lengths=lengths).relu(), lengths=lengths)


def padded(examples, length=12):
    lengths = torch.randint(2, length, (examples,))
    lengths[0] = length
    x = torch.randn(examples, 2, length) + 2
    return torch.where(torch.arange(length) < lengths.reshape(-1, 1, 1), x, 0), lengths


@pytest.mark.parametrize("memory", [None, 0], ids=["waiting", "restarted"])
def test_recalibrate_counts_what_the_layers_count(memory):
    model, batches = Masked(), [padded(8) for _ in range(3)]
    found = batchnorm.recalibrate(model, batches, memory=memory)
    values = torch.cat([rows(model.conv(x), torch.arange(12) < n.unsqueeze(1)) for x, n in batches])
    assert torch.allclose(model.bn.running_mean, values.mean(0), atol=1e-6)
    assert torch.allclose(model.bn.running_var, values.var(0), rtol=1e-5)
    assert found["bn"].count.tolist() == [len(values)] * 3
    model.eval()
    with torch.no_grad():
        inner = torch.cat([rows(model.bn(model.conv(x)).relu(), torch.arange(12) < n.unsqueeze(1)) for x, n in batches])
    assert torch.allclose(model.last.running_var, inner.var(0), rtol=1e-5)


def test_recalibrate_inside_of_padding_counts_valid_positions():
    model, batches = nn.Sequential(nn.Conv1d(2, 3, 1), BatchNorm1d(3)), [padded(8) for _ in range(3)]

    def forward(model, batch):
        with batchnorm.padding(model, batch[1]):
            return model(batch[0])

    batchnorm.recalibrate(model, batches, forward=forward)
    values = torch.cat([rows(model[0](x), torch.arange(12) < n.unsqueeze(1)) for x, n in batches])
    assert torch.allclose(model[1].running_var, values.var(0), rtol=1e-5)


def test_forwards_that_wait_for_each_other_have_lengths_of_their_own():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), BatchNorm1d(3), nn.Conv1d(3, 3, 1), BatchNorm1d(3)).double()
    whole, x = copy.deepcopy(model), torch.randn(4, 2, 12, dtype=torch.float64)
    lengths = torch.tensor([12, 3, 7, 2])

    def forward(model, batch):
        with batchnorm.padding(model, batch[1]):
            return model(batch[0])

    parts = list(zip(x.split(2), lengths.split(2), strict=True))
    batchnorm.step_backward(model, parts, lambda y, _: y.pow(3).sum(), forward=forward, reduction="sum")
    forward(whole, (x, lengths)).pow(3).sum().backward()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad)
    with torch.no_grad():
        batchnorm.recalibrate(model, parts, forward=forward)
        valid = torch.arange(12) < lengths.unsqueeze(1)
        h = model[2](model[1].eval()(model[0](x)))
    assert torch.allclose(model[3].running_var, rows(h, valid).var(0))


def test_exact_statistics_refuse_a_mask_for_each_channel():
    class PerChannel(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x, mask=x > 0)

    with pytest.raises(ValueError, match=r"for all channels, got \(4, 3, 5\)"):
        batchnorm.recalibrate(PerChannel(), [torch.randn(4, 3, 5)])


def test_the_doctor_finds_counted_padding_and_nothing_once_the_lengths_are_given():
    class Counting(Masked):
        def forward(self, x, lengths):
            return self.last(self.bn(self.conv(x)).relu())

    batches = [padded(16) for _ in range(6)]
    codes = {}
    for cls in (Counting, Masked):
        model = cls()
        batchnorm.recalibrate(model, batches)
        codes[cls] = {finding.code for finding in batchnorm.examine(model.eval(), batches).findings}
    assert "BN207" in codes[Counting]
    assert "BN207" not in codes[Masked]
