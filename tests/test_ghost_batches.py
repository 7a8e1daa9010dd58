"""Ghost batches: each is normalized as a batch of its own would be; stored statistics are those of all values."""

from __future__ import annotations

import copy
import pickle

import oracle
import pytest
import torch
from layouts import LAYOUTS
from test_layers import check_stored_statistics, made
from torch import nn

import batchnorm
from batchnorm.kernels import cpu
from batchnorm.kernels.reference import wide_dtype
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

CASES = {
    "rows": (BatchNorm1d, (3,)),
    "lines": (BatchNorm1d, (3, 5)),
    "images": (BatchNorm2d, (3, 5, 2)),
    "volumes": (BatchNorm3d, (3, 4, 2, 3)),
}
cases = pytest.mark.parametrize(("cls", "example"), CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
# N, size, and the examples of each ghost batch, written out
MEMBERS = {
    "divisible": (12, 4, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]),
    "even rest": (12, 5, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]),
    "uneven": (11, 4, [[0, 2, 4, 6], [1, 3, 5, 7], [8, 9, 10]]),
    "one more": (5, 4, [[0, 1, 2], [3, 4]]),
    "as large as the batch": (6, 6, [[0, 1, 2, 3, 4, 5]]),
    "larger than the batch": (5, 100, [[0, 1, 2, 3, 4]]),
}
members = pytest.mark.parametrize(("n", "size", "ghosts"), MEMBERS.values(), ids=MEMBERS)


@cases
@dtypes
@members
def test_each_ghost_batch_is_normalized_by_its_own_moments(cls, example, dtype, n, size, ghosts):
    layer = made(cls, 3, dtype=dtype, ghost_batch_size=size)
    before = oracle.exact(layer.running_mean).copy(), oracle.exact(layer.running_var).copy()
    x, grad = (2 + 3 * torch.randn(n, *example)).to(dtype).requires_grad_(), torch.randn(n, *example).to(dtype)
    y = layer(x)
    y.backward(grad)
    wide, gamma, beta = wide_dtype(dtype), oracle.exact(layer.weight), oracle.exact(layer.bias)
    sums, allowed = [0.0, 0.0], [0.0, 0.0]
    for ghost in ghosts:
        values = oracle.exact(x)[ghost], oracle.exact(grad)[ghost]
        right = oracle.train(*values, gamma, beta, layer.eps)
        bound = oracle.train_rounding(*values, gamma, right, layer.eps, wide)
        oracle.assert_within(y[ghost], right.y, bound.y)
        oracle.assert_within(x.grad[ghost], right.d_x, bound.d_x)
        sums = [a + b for a, b in zip(sums, right[2:], strict=True)]
        # each ghost batch's gradient is rounded to the parameter's type before they are added
        rounding = torch.finfo(dtype).eps
        allowed = [a + e + 2 * rounding * (abs(v) + e) for a, e, v in zip(allowed, bound[2:], right[2:], strict=True)]
    for parameter, value, error in zip((layer.weight, layer.bias), sums, allowed, strict=True):
        oracle.assert_within(parameter.grad, value, len(ghosts) * error)
    check_stored_statistics(layer, oracle.exact(x), before, wide)
    assert layer.num_batches_tracked == 1


@cases
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [8, 7])
@pytest.mark.parametrize("act", [None, "relu"])
def test_layouts_residuals_and_activations(cls, example, layout, n, act):
    layer = made(cls, 3, dtype=torch.float64, ghost_batch_size=4, act=act)
    x, residual = (layout(torch.randn(n, *example, dtype=torch.float64)) for _ in range(2))
    y = layer(x, residual)
    if layout.__name__ in {"contiguous", "channels_last"}:
        assert y.stride() == x.stride()
    plain = made(cls, 3, dtype=torch.float64, act=act)
    plain.load_state_dict(layer.state_dict())
    ghosts = [[0, 2, 4, 6], [1, 3, 5, 7]] if n == 8 else [[0, 1, 2, 3], [4, 5, 6]]
    for ghost in ghosts:
        torch.testing.assert_close(y[ghost], plain(x[ghost], residual[ghost]))


@pytest.mark.parametrize("n", [8, 7])
def test_the_kernels_get_a_contiguous_batch_without_a_copy_and_without_a_loop(n, monkeypatch):
    x, read = torch.randn(n, 3, 5), []
    train = cpu.train_forward
    monkeypatch.setattr(cpu, "train_forward", lambda x, *args: read.append(x.data_ptr()) or train(x, *args))
    made(BatchNorm1d, 3, ghost_batch_size=2)(x)
    addresses = {8: [x.data_ptr()], 7: [x.data_ptr(), x[6:].data_ptr()]}  # 6 examples in 3 parts, and 1
    assert read == addresses[n]


@pytest.mark.parametrize("kernel", ["native", "formula"])
@pytest.mark.parametrize("n", [6, 5])
def test_derivatives_agree_with_finite_differences(kernel, n):
    layer = made(BatchNorm1d, 3, dtype=torch.float64, ghost_batch_size=3, act="silu")
    layer.track_running_stats = False
    x = torch.randn(n, 3, 4, dtype=torch.float64)
    mask = None if kernel == "native" else torch.rand(n, 4) > 0.3
    inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias, torch.randn_like(x))]

    def function(x, weight, bias, residual):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual), {"mask": mask})

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("form", ["(N, L)", "(N, C, L)", "lengths", "weight"])
@pytest.mark.parametrize("n", [8, 7])
def test_masks_and_weights_count_within_each_ghost_batch(form, n):
    x, lengths = torch.randn(n, 3, 5, dtype=torch.float64), torch.arange(n) % 4 + 2
    valid = torch.arange(5) < lengths.unsqueeze(1)
    options = {
        "(N, L)": {"mask": valid},
        "(N, C, L)": {"mask": valid.unsqueeze(1).expand(n, 3, 5)},
        "lengths": {"lengths": lengths},
        "weight": {"weight": torch.arange(n) + 1.0},
    }[form]
    layer, plain = (made(BatchNorm1d, 3, dtype=x.dtype) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    layer.ghost_batch_size = 4
    spoiled = x if form == "weight" else torch.where(valid.unsqueeze(1), x, torch.nan)
    y = layer(spoiled, **options)
    for ghost in [[0, 2, 4, 6], [1, 3, 5, 7]] if n == 8 else [[0, 1, 2, 3], [4, 5, 6]]:
        part = {k: torch.as_tensor(v)[ghost] for k, v in options.items()}
        torch.testing.assert_close(y[ghost], copy.deepcopy(plain)(spoiled[ghost], **part))
    plain(spoiled, **options)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_the_stored_variance_has_the_differences_between_ghost_batches():
    """Two ghost batches, each constant: their variances are 0, that of all values is not."""
    layer = BatchNorm1d(1, momentum=1.0, ghost_batch_size=2, dtype=torch.float64)
    x = torch.tensor([[0.0], [10.0], [0.0], [10.0]], dtype=torch.float64)
    layer(x)
    assert layer.running_mean.item() == 5
    assert layer.running_var.item() == pytest.approx(x.var().item(), rel=1e-12)


def test_a_loader_that_sorts_examples_does_not_give_each_ghost_batch_one_group():
    x = torch.arange(64.0).reshape(64, 1)
    layer = BatchNorm1d(1, ghost_batch_size=16, affine=False)
    means = [x[i::4].mean().item() for i in range(4)]
    assert max(means) - min(means) == 3  # consecutive examples would differ by 48
    y = layer(x)
    for i in range(4):
        torch.testing.assert_close(y[i::4].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_far_from_zero_no_digits_are_lost():
    x = 1e5 + torch.randn(64, 3)
    layer = BatchNorm1d(3, momentum=1.0, ghost_batch_size=16)
    layer(x)
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-5, atol=0)


@cases
def test_eval_mode_is_the_plain_layer(cls, example):
    layer, plain = made(cls, 3, ghost_batch_size=2), made(cls, 3)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(5, *example)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert layer.eval()(x[:0]).shape == (0, *example)
    assert layer.train()(x[:0]).shape == (0, *example)
    assert layer.num_batches_tracked == 0


def test_without_stored_statistics_eval_mode_has_ghost_batches_too():
    layer, x = BatchNorm1d(3, ghost_batch_size=2, track_running_stats=False).eval(), torch.randn(4, 3)
    torch.testing.assert_close(layer(x)[::2], BatchNorm1d(3)(x[::2]))


def test_ghost_batches_of_one_example_with_positions_are_allowed():
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(BatchNorm1d(3, ghost_batch_size=1)(x), nn.InstanceNorm1d(3)(x))


@pytest.mark.parametrize("n", [3, 5, 7])
def test_an_odd_batch_in_pairs_has_one_ghost_batch_of_three(n):
    x, pairs = torch.randn(n, 3), n // 2 - 1
    y = BatchNorm1d(3, ghost_batch_size=2)(x)
    for members in [slice(3), *[slice(3 + pair, None, pairs) for pair in range(pairs)]]:
        assert torch.allclose(y[members], BatchNorm1d(3)(x[members]), atol=1e-5)


@pytest.mark.parametrize(("n", "size"), [(4, 1), (3, 1), (1, 8), (1, 2)])
def test_a_ghost_batch_of_one_value_follows_the_policy(n, size):
    layer, x = made(BatchNorm1d, 3, ghost_batch_size=size), torch.randn(n, 3)
    with pytest.raises(ValueError, match=rf"in every ghost batch, .*ghost_batch_size={size} for shape \({n}, 3\)"):
        layer(x)
    assert layer.num_batches_tracked == 0
    layer.single_element = "population"
    y = layer(x)
    assert layer.num_batches_tracked == 0
    assert torch.equal(y, layer.eval()(x))


def test_a_ghost_batch_that_is_all_padding_is_refused():
    layer, mask = BatchNorm1d(3, ghost_batch_size=2), torch.ones(4, 5, dtype=torch.bool)
    mask[::2] = False
    with pytest.raises(ValueError, match="needs 2 valid positions in train mode, got none"):
        layer(torch.randn(4, 3, 5), mask=mask)


def test_channels_last_axis_and_more_channels_than_memory_order():
    layer, plain = (made(BatchNorm2d, 3, dtype=torch.float64) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    layer.axis, layer.ghost_batch_size = -1, 3
    x = torch.randn(6, 4, 2, 3, dtype=torch.float64)
    y = layer(x)
    assert y.is_contiguous()
    for i in range(2):
        torch.testing.assert_close(y[i::2], plain(x[i::2].movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize("n", [8, 7])
def test_compile_vmap_and_func_grad(n):
    layer = made(BatchNorm1d, 3, ghost_batch_size=4)
    other, third, x = copy.deepcopy(layer), copy.deepcopy(layer), torch.randn(n, 3, 5)
    right = layer(x)
    torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(x), right)
    torch.testing.assert_close(other.running_var, layer.running_var)
    params, buffers = dict(third.named_parameters()), {k: v.clone() for k, v in third.named_buffers()}
    run = lambda p, x: torch.func.functional_call(third, (p, buffers), (x,)).square().sum()  # noqa: E731
    right.square().sum().backward()
    torch.testing.assert_close(torch.func.grad(run)(params, x)["weight"], layer.weight.grad)
    stacked = torch.func.stack_module_state([third, third])
    ensemble = torch.func.vmap(lambda p, b, x: torch.func.functional_call(third, (p, b), (x,)))
    y = ensemble(*stacked, torch.stack([x, x]))
    torch.testing.assert_close(y[1], right)


def test_results_have_the_same_bits_for_any_number_of_threads():
    layer, x, before = BatchNorm2d(16, ghost_batch_size=8), torch.randn(32, 16, 9, 9), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_copies_and_surgery_carry_the_size():
    layer, x = made(BatchNorm1d, 3, ghost_batch_size=2), torch.randn(4, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "ghost_batch_size=2" in repr(other)
        assert torch.equal(other(x), copy.deepcopy(layer)(x))
    model = nn.Sequential(layer)
    assert batchnorm.replace(model, lambda *_: BatchNorm1d(3))[0].ghost_batch_size == 2
    with pytest.warns(UserWarning, match="without these settings: ghost_batch_size=2 at '0'"):
        batchnorm.revert(model)
    layer.ghost_batch_size = None
    batchnorm.revert(model)


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (0, ValueError, "ghost_batch_size must be 1 or more, got 0"),
        (-4, ValueError, "ghost_batch_size must be 1 or more, got -4"),
        (2.0, TypeError, "ghost_batch_size must be a whole number, got float"),
        (True, TypeError, "ghost_batch_size must be a whole number, got bool"),
        ("8", TypeError, "ghost_batch_size must be a whole number, got str"),
    ],
)
def test_wrong_sizes_say_what_was_expected(size, error, words):
    with pytest.raises(error, match=words):
        BatchNorm1d(3, ghost_batch_size=size)
    layer = BatchNorm1d(3)
    with pytest.raises(error, match=words):
        layer.ghost_batch_size = size
    assert layer.ghost_batch_size is None


def test_rows_of_many_channels_agree_with_the_oracle_by_whatever_kernel():
    """512 ghost batches of 16 channels are 8,192 channels: for so many the reference is faster than native kernels."""
    layer, x = made(BatchNorm1d, 16, ghost_batch_size=4), torch.randn(2048, 16, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    gamma, beta = oracle.exact(layer.weight), oracle.exact(layer.bias)
    for ghost in (0, 200, 511):
        values = oracle.exact(x)[ghost::512], oracle.exact(grad)[ghost::512]
        right = oracle.train(*values, gamma, beta, layer.eps)
        bound = oracle.train_rounding(*values, gamma, right, layer.eps, torch.float32)
        oracle.assert_within(y[ghost::512], right.y, bound.y)
        oracle.assert_within(x.grad[ghost::512], right.d_x, bound.d_x)


@pytest.mark.parametrize(
    "options", [{"ghost_batch_size": 3}, {"renorm": True}, {"own_weight": 0.3}, {"axis": -1}], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_program_compiled_for_any_batch_size_agrees(options, training):
    """5 and 7 examples are two parts of ghost batches, 6 are one."""
    layer = made(BatchNorm1d, 3, **options).train(training)
    other = copy.deepcopy(layer)
    program = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 5, 7, 9):
        x = torch.randn(n, 3, 4) if "axis" not in options else torch.randn(n, 4, 3)
        torch.testing.assert_close(program(x), layer(x))
    torch.testing.assert_close(other.running_var, layer.running_var)
