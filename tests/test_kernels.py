"""The operators: right values, right derivatives of any order, and what torch.library demands of them."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from layouts import LAYOUTS, channels_last, contiguous, expanded
from torch.autograd import gradcheck, gradgradcheck

from batchnorm import kernels
from batchnorm.kernels import ChannelStatistics, Layer, Running, reference, wide_rows
from batchnorm.kernels.interface import ForwardPass

# forward mode makes torch load formulas of its own that still use the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

EPS = 1e-5
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
affine = pytest.mark.parametrize(
    ("weight", "bias"), AFFINE, ids=["gamma and beta", "gamma alone", "beta alone", "neither"]
)


def arguments(x: torch.Tensor, weight: bool, bias: bool) -> tuple[torch.Tensor | None, ...]:
    gamma, beta = (torch.randn(x.shape[1], dtype=x.dtype) if on else None for on in (weight, bias))
    return x, gamma, beta


def tracked(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def normalized(x, *gamma_and_beta):
    return kernels.train(x, Layer(*gamma_and_beta, EPS))


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(8000, 3), (16, 3, 24, 24), (4, 3, 9, 10, 11)], ids=str)
def test_values_far_from_zero_are_normalized_to_the_precision_of_float32(shape, layout):
    """Mean 1e5 and std 1 in float32: x itself is rounded to 1/128, and nothing more is lost."""
    x = layout(1e5 + torch.randn(shape)).requires_grad_()
    grad = torch.randn(shape)
    y, mean, var = kernels.train_forward(x, None, None, EPS)
    y.backward(grad)
    wide_x, wide_grad = oracle.exact(x), oracle.exact(grad)
    expected = oracle.train(wide_x, wide_grad, None, None, EPS)
    bound = oracle.train_rounding(wide_x, wide_grad, None, expected, EPS, torch.float32)
    oracle.assert_within(y, expected.y, bound.y)
    oracle.assert_within(x.grad, expected.d_x, bound.d_x)
    true_mean, true_var = oracle.statistics(wide_x)
    u, p = 2.0**-24, oracle.path(x.numel() // 3)
    oracle.assert_within(mean, true_mean, u * p * np.sqrt(true_var))
    oracle.assert_within(var, true_var, u * (p + 3) * true_var)


def test_the_bound_for_values_far_from_zero_would_catch_statistics_in_plain_float32():
    """torch.nn's answer for the same values breaks it, so the test above can fail."""
    x = 1e5 + torch.randn(8000, 3)
    y = torch.nn.functional.batch_norm(x, None, None, training=True)
    wide = oracle.exact(x)
    expected = oracle.train(wide, wide, None, None, EPS)
    with pytest.raises(AssertionError, match="times what is allowed"):
        oracle.assert_within(y, expected.y, oracle.train_rounding(wide, wide, None, expected, EPS, torch.float32).y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    x = (50000 + 1000 * torch.randn(256, 2)).to(dtype)  # whose squares overflow float16
    y, mean, var = kernels.train_forward(x, None, None, EPS)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == torch.float64
    true_mean, true_var = oracle.statistics(oracle.exact(x))
    u, p = 2.0**-24, oracle.path(256)
    oracle.assert_within(mean, true_mean, u * p * np.sqrt(true_var))
    oracle.assert_within(var, true_var, u * (p + 3) * true_var)


def test_a_constant_channel_becomes_beta_exactly():
    x = torch.full((7, 2), 1.1)
    y = normalized(x, torch.tensor([2.0, 3.0]), torch.tensor([0.25, -1.0]))
    assert torch.equal(y, torch.tensor([0.25, -1.0]).expand(7, 2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 4, 2, 3)], ids=str)
def test_results_are_laid_out_in_memory_as_torch_empty_like_the_input(shape, layout):
    x = layout(torch.randn(shape)).requires_grad_()
    y = normalized(x, None, None)
    y.sum().backward()
    assert y.stride() == torch.empty_like(x).stride()
    (d_x,) = torch.autograd.grad(normalized(x, None, None).sum(), x)
    assert d_x.stride() == torch.empty_like(x).stride()


def test_one_example_is_normalized_to_the_same_bits_in_any_company():
    statistics = ChannelStatistics(torch.randn(5), torch.rand(5) + 0.1)
    layer = Layer(torch.randn(5), torch.randn(5), EPS)
    x = torch.randn(33, 5, 7, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for layout in (contiguous, channels_last):
            batch = layout(x.to(dtype))
            together = kernels.normalize(batch, statistics, layer)
            alone = [kernels.normalize(one, statistics, layer) for one in batch.split(1)]
            assert torch.equal(together, torch.cat(alone))


# --- derivatives ------------------------------------------------------------------------------------------


@affine
@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2), (2, 2, 1, 2), (2, 1, 2, 1, 2)], ids=str)
def test_first_and_second_derivatives_agree_with_finite_differences(shape, weight, bias):
    inputs = tracked(*arguments(torch.randn(shape, dtype=torch.float64), weight, bias))
    assert gradcheck(normalized, inputs, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(normalized, inputs, check_batched_grad=True, check_fwd_over_rev=True)


def test_third_derivatives_agree_with_finite_differences():
    inputs = tracked(*arguments(torch.randn(4, 1, dtype=torch.float64), True, True))

    def first(*args):
        return torch.autograd.grad(normalized(*args).pow(3).sum(), args, create_graph=True)

    assert gradgradcheck(first, inputs)


@pytest.mark.slow
def test_derivatives_in_a_strided_layout_are_the_same():
    x = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    for layout in LAYOUTS[1:4]:
        inputs = tracked(*arguments(x, True, True))
        assert gradcheck(lambda x, *rest, layout=layout: normalized(layout(x), *rest), inputs)
        assert gradgradcheck(lambda x, *rest, layout=layout: normalized(layout(x), *rest), inputs)


def test_functional_and_recorded_derivatives_agree():
    x, gamma, beta = arguments(torch.randn(6, 3, dtype=torch.float64), True, True)

    def loss(x, gamma, beta):
        return normalized(x, gamma, beta).pow(3).sum()

    inputs = tracked(x, gamma, beta)
    recorded = torch.autograd.grad(loss(*inputs), inputs)
    functional = torch.func.grad(loss, (0, 1, 2))(x, gamma, beta)
    for a, b in zip(recorded, functional, strict=True):
        torch.testing.assert_close(a, b)
    hessian = torch.autograd.functional.hessian(lambda x: loss(x, gamma, beta), x)
    torch.testing.assert_close(torch.func.hessian(loss)(x, gamma, beta), hessian)


def test_the_statistics_carry_no_gradient():
    for x in (torch.randn(4, 2, requires_grad=True),):
        _, mean, var = kernels.train_forward(x, None, None, EPS)
        assert not mean.requires_grad
        assert not var.requires_grad


@affine
def test_no_values_have_gradients_of_zero_and_of_the_second_order_too(weight, bias):
    inputs = tracked(*arguments(torch.empty(0, 3, 4, dtype=torch.float64), weight, bias))
    y = normalized(*inputs)
    assert y.shape == (0, 3, 4)
    given = [t for t in inputs if t is not None]
    first = torch.autograd.grad(y.sum(), given, create_graph=True)
    second = torch.autograd.grad([d.sum() for d in first if d.requires_grad], given, allow_unused=True)
    for derivative in (*first, *second):
        assert derivative is None or not derivative.any()  # NaN would count as any


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_each_gradient_has_the_type_of_what_it_belongs_to(dtype):
    x = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    gamma, beta = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    d_x, d_gamma, d_beta = torch.autograd.grad(normalized(x, gamma, beta).sum(), (x, gamma, beta))
    assert (d_x.dtype, d_gamma.dtype, d_beta.dtype) == (dtype, torch.float32, torch.float32)


# --- the update of stored statistics ----------------------------------------------------------------------


def update(mean, var, batches, skipped, new_mean, new_var, count, momentum):
    kernels.update_running(Running(mean, var, batches, skipped, momentum), ChannelStatistics(new_mean, new_var), count)


def stored(channels: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype), torch.tensor(4), torch.tensor(0)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_an_update_moves_towards_the_mean_and_the_unbiased_variance(momentum):
    x = torch.randn(5, 3, dtype=torch.float64)
    mean, var, batches, skipped = stored(dtype=torch.float64)
    expected = oracle.updated(mean.numpy().copy(), var.numpy().copy(), x.numpy(), momentum)
    update(mean, var, batches, skipped, x.mean(0), x.var(0, correction=0), 5, momentum)
    for found, value in zip((mean, var), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=0, atol=16 * 2.0**-53)
    assert (batches.item(), skipped.item()) == (5, 0)


def test_without_momentum_all_batches_weigh_the_same():
    mean, var, skipped = torch.randn(2), torch.rand(2), torch.tensor(0)
    batches = torch.tensor(0)
    values = torch.randn(6, 2), torch.rand(6, 2)
    for new_mean, new_var in zip(*values, strict=True):
        update(mean, var, batches, skipped, new_mean, new_var * 0.5, 2, None)
    u = 2.0**-24
    torch.testing.assert_close(mean, values[0].mean(0), rtol=0, atol=6 * 4 * u * values[0].abs().max().item())
    torch.testing.assert_close(var, values[1].mean(0), rtol=6 * 4 * u, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spoiled", ["mean", "var"])
def test_a_channel_that_is_not_finite_keeps_what_is_stored_and_the_others_move(bad, spoiled):
    mean, var, batches, skipped = stored()
    before = mean.clone(), var.clone()
    new = {"mean": torch.ones(3), "var": torch.ones(3)}
    new[spoiled][1] = bad
    with pytest.warns(RuntimeWarning, match="batch statistics of 1 of 3 channels: these channels keep their running"):
        update(mean, var, batches, skipped, new["mean"], new["var"], 4, 0.5)
    for found, old in zip((mean, var), before, strict=True):
        assert found[1] == old[1]
        assert (found[[0, 2]] != old[[0, 2]]).all()
    assert (batches.item(), skipped.item()) == (5, 1)


def test_a_variance_that_overflows_when_made_unbiased_is_not_stored():
    mean, var, batches, skipped = stored(1)
    with pytest.warns(RuntimeWarning, match="1 of 1 channels"):
        update(mean, var, batches, skipped, torch.ones(1), torch.full((1,), 3e38), 2, 0.5)
    assert var.isfinite().all()
    assert skipped == 1


def test_an_average_of_all_batches_leaves_a_spoiled_one_out_as_a_whole():
    """There is one count for all channels: a batch in which one is not finite may not weigh on the others."""
    mean, var, batches, skipped = torch.zeros(2), torch.ones(2), torch.tensor(0), torch.tensor(0)
    with pytest.warns(RuntimeWarning, match="1 of 2 channels: this batch is left out of all running"):
        update(mean, var, batches, skipped, torch.tensor([torch.nan, 9]), torch.ones(2), 2, None)
    for value in (2.0, 4.0):
        update(mean, var, batches, skipped, torch.full((2,), value), torch.ones(2), 2, None)
    assert mean.tolist() == [3, 3]
    assert (batches.item(), skipped.item()) == (2, 1)


def test_the_models_of_an_ensemble_are_updated_each_by_its_own():
    one_by_one, at_once = [stored() for _ in range(2)], [torch.empty(0)] * 3
    at_once = [torch.stack([s[i] for s in one_by_one]) for i in range(3)]
    new = torch.randn(2, 3), torch.rand(2, 3)
    update(*at_once, torch.tensor(0), *new, 7, None)
    for i, single in enumerate(one_by_one):
        update(*single, new[0][i], new[1][i], 7, None)
        for found, expected in zip(at_once, single, strict=False):
            # other kernels may contract a multiplication with an addition: one rounding less
            torch.testing.assert_close(found[i], expected, rtol=2**-23, atol=2**-24)


# --- what torch.library demands ---------------------------------------------------------------------------

SAMPLES = {
    "gamma and beta": (torch.randn(5, 3, 2, dtype=torch.float64), True, True),
    "gamma alone": (torch.randn(5, 3), True, False),
    "beta alone": (torch.randn(5, 3), False, True),
    "neither": (torch.randn(2, 3, 2, 2, 2), False, False),
    "channels last": (channels_last(torch.randn(2, 3, 4, 5)), True, True),
    "every second": (torch.randn(4, 6, 8)[::2, ::2, ::2], True, True),
    "expanded": (expanded(torch.randn(4, 3, 2)), True, True),
    "half": (torch.randn(5, 3, 2, dtype=torch.float16), True, True),
    "bfloat16": (torch.randn(5, 3, 2, dtype=torch.bfloat16), True, False),
}
samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


@samples
def test_the_forward_operator_passes_opcheck(sample):
    x, gamma, beta = tracked(*arguments(*sample))
    torch.library.opcheck(kernels.train_forward, (x, gamma, beta, EPS))


@pytest.mark.slow
def test_the_forward_operator_passes_opcheck_without_values():
    """Its last test takes the NaN statistics of no values for a difference, so compiled values are compared here."""
    inputs = tracked(*arguments(torch.randn(0, 3, 2), True, True))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels.train_forward, (*inputs, EPS), test_utils=tests)
    compiled = torch.compile(kernels.train_forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for found, expected in zip(compiled(*inputs, EPS), kernels.train_forward(*inputs, EPS), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [*SAMPLES.values(), (torch.randn(0, 3, 2), True, True)], ids=[*SAMPLES, "empty"])
def test_the_backward_operator_passes_opcheck(sample):
    x, gamma, _ = tracked(*arguments(*sample))
    grad = torch.randn_like(x).requires_grad_()
    statistics = reference.measure(x.detach())
    torch.library.opcheck(kernels.train_backward, (grad, x, *statistics, gamma, EPS))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("models", [(), (2,)], ids=["one model", "ensemble"])
def test_the_update_operator_passes_opcheck(momentum, dtype, models):
    mean, var, new_mean, new_var = torch.rand(4, *models, 3, dtype=dtype)
    batches = torch.zeros(models, dtype=torch.long)
    torch.library.opcheck(
        kernels.running_operators.moved_running, (mean, var, batches, torch.tensor(0), new_mean, new_var, 5, momentum)
    )


@pytest.mark.parametrize("channels", [4096, 8192, 8193, 20_000])
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rows_of_many_channels_have_the_bits_of_the_reference_block_by_block(channels, act, with_residual):
    x, grad, residual = torch.randn(3, 7, channels)
    residual = residual if with_residual else None
    layer = Layer(torch.randn(channels), torch.randn(channels), 1e-5, act)
    results = []
    for kernel in (wide_rows, reference):
        y, statistics = kernel.train_forward(x, layer, residual)
        forward = ForwardPass(x, statistics, layer, residual=residual)
        sums, g = kernel.sum_gradients(grad, forward)
        results.append([
            y, *statistics, *kernel.train_backward(grad, forward), *kernel.measure(x), sums, g,
            kernel.normalize(x, statistics, layer, residual), kernel.input_gradient(grad, forward, sums / 7, g),
            kernel.input_gradient(grad, forward, None, g),
        ])  # fmt: skip
    for mine, theirs in zip(*results, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
