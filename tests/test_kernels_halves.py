"""The halves of a pass: each kernel's are its whole pass, and other sets of values can be put between them."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import oracle_activations
import pytest
import torch
from layouts import channels_last, contiguous

from batchnorm.kernels import Layer, cpu, reference, values_per_channel
from batchnorm.kernels.activations import NAMES, parameter
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass
from batchnorm.moments import Moments

EPS = 1e-5
KERNELS = [
    reference,
    pytest.param(cpu, marks=pytest.mark.skipif(cpu.INSTRUCTION_SET is None, reason="built without a compiler")),
]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.rpartition(".")[2])
layouts = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
# what the native kernels keep together, and what they cut: rows, small planes, large planes
SHAPES = [(7, 5), (3000, 33), (8, 6, 7), (2011, 3, 7, 7), (3, 2, 23, 23), (3, 2, 150, 150)]


def case(shape, dtype, layout, act):
    """x, grad, residual and a layer."""
    x, grad, residual = (layout(torch.randn(shape).to(dtype)) for _ in range(3))
    gamma, beta = torch.randn(2, shape[1], dtype=reference.wide_dtype(dtype))
    return 1 + 2 * x, grad, residual, Layer(gamma, beta, EPS, act, parameter(act, None))


def by_halves(kernel, grad, x, layer, residual):
    """y, statistics and the four gradients."""
    statistics = kernel.measure(x)
    y = kernel.normalize(x, statistics, layer, residual)
    forward = ForwardPass(x, statistics, layer, residual)
    sums, g = kernel.sum_gradients(grad, forward)
    d_x = kernel.input_gradient(grad, forward, sums / values_per_channel(x), g)
    return y, statistics, (d_x, *sums.flip(0), g)


@pytest.mark.slow
@kernels
@layouts
@dtypes
@pytest.mark.parametrize("act", [None, *NAMES])
def test_the_halves_have_the_bits_of_the_whole(kernel, layout, dtype, act):
    for shape, met in itertools.product(SHAPES, [False, True]):
        x, grad, residual, layer = case(shape, dtype, layout, act)
        residual = residual if met else None
        y, statistics = kernel.train_forward(x, layer, residual)
        d_x, d_gamma, d_beta, d_residual = kernel.train_backward(grad, ForwardPass(x, statistics, layer, residual))
        found_y, found_statistics, found = by_halves(kernel, grad, x, layer, residual)
        assert torch.equal(found_y, y)
        for one, other in zip(found_statistics, statistics, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(found[1].to(d_gamma.dtype), d_gamma)
        assert torch.equal(found[2].to(d_beta.dtype), d_beta)
        assert (found[3] is None) == (d_residual is None) == (act is None or not met)
        if d_residual is not None:
            assert torch.equal(found[3], d_residual)
        if d_residual is None or kernel is cpu or dtype in {torch.float32, torch.float64}:
            assert torch.equal(found[0], d_x)
        else:  # the reference rounds g to the type of x between its halves, and not within the whole
            values = [oracle.exact(t) for t in (x, grad, residual, layer.weight, layer.bias)]
            expected, bound = oracle_activations.fused(*values, EPS, act, layer.param, dtype)
            oracle.assert_within(found[0], expected.d_x, bound.d_x)


@kernels
@dtypes
@pytest.mark.parametrize("act", [None, "leaky_relu", "silu"])
@pytest.mark.parametrize("met", [False, True], ids=["alone", "residual"])
def test_two_processes_with_a_part_of_a_batch_each_compute_the_whole(kernel, dtype, act, met):
    """Moments are added forward and sums backward; parts of different sizes, and of different means."""
    x, grad, residual, layer = case((24, 3, 5, 7), dtype, contiguous, act)
    x[9:] = x[9:] * 3 + 2
    residual = residual if met else None
    parts = [(slice(0, 9), 9 * 35), (slice(9, 24), 15 * 35)]
    measured = [kernel.measure(x[part].contiguous()) for part, _ in parts]
    merged = sum(Moments.from_var(count, *statistics) for statistics, (_, count) in zip(measured, parts, strict=True))
    statistics = ChannelStatistics(merged.mean, merged.var)
    forwards = [
        ForwardPass(x[part], statistics, layer, None if residual is None else residual[part]) for part, _ in parts
    ]
    y = torch.cat([kernel.normalize(f.x, statistics, layer, f.residual) for f in forwards])
    own = [kernel.sum_gradients(grad[part], f) for f, (part, _) in zip(forwards, parts, strict=True)]
    sums = own[0][0] + own[1][0]
    means = sums / merged.count
    d_x = torch.cat(
        [
            kernel.input_gradient(grad[part], f, means, g)
            for f, (part, _), (_, g) in zip(forwards, parts, own, strict=True)
        ]
    )
    values = [oracle.exact(t) for t in (x, grad, residual, layer.weight, layer.bias)]
    expected, bound = oracle_activations.fused(*values, EPS, act, layer.param, dtype)
    wide = reference.wide_dtype(dtype)
    oracle.assert_within(y, expected.y, bound.y)
    oracle.assert_within(d_x, expected.d_x, bound.d_x)
    oracle.assert_within(sums[0].to(wide), expected.d_beta, bound.d_beta)
    oracle.assert_within(sums[1].to(wide), expected.d_gamma, bound.d_gamma)
    if act is not None and met:
        oracle.assert_within(torch.cat([g for _, g in own]), expected.d_residual, bound.d_residual)


@kernels
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_a_channel_can_be_normalized_by_a_part_of_its_values(kernel, act):
    """Statistics of the values that a mask keeps; the others are normalized by them, and have no part in them."""
    x, grad, _, layer = case((6, 3, 4, 5), torch.float64, contiguous, act)
    mask = torch.rand(x.shape) < 0.7
    measured = Moments.of(x, mask=mask)
    statistics = ChannelStatistics(measured.mean, measured.var)
    forward = ForwardPass(x, statistics, layer)
    sums, g = kernel.sum_gradients(grad, forward)
    inside = kernel.input_gradient(grad, forward, sums / measured.count, g)
    outside = kernel.input_gradient(grad, forward, None, g)

    leaf = x.clone().requires_grad_()
    along = lambda t: t[None, :, None, None]  # noqa: E731
    mean = along((leaf * mask).sum((0, 2, 3)) / mask.sum((0, 2, 3)))
    var = along(((leaf - mean).square() * mask).sum((0, 2, 3)) / mask.sum((0, 2, 3)))
    p = along(layer.weight) * (leaf - mean) / (var + EPS).sqrt() + along(layer.bias)
    expected = p if act is None else getattr(torch.nn.functional, act)(p)
    (d_x,) = torch.autograd.grad(expected, leaf, grad)
    # about a hundred float64 roundings of values below 100
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(kernel.normalize(x, statistics, layer), expected.detach(), **close)
    torch.testing.assert_close(torch.where(mask, inside, outside), d_x, **close)


@kernels
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_fixed_statistics_have_no_share_in_the_gradient(kernel, act):
    for met in (False, True):
        x, grad, residual, layer = case((40, 3), torch.float64, contiguous, act)
        residual = residual if met else None
        statistics = ChannelStatistics(torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5)
        forward = ForwardPass(x, statistics, layer, residual, constant=True)
        sums, g = kernel.sum_gradients(grad, forward)
        d_x = kernel.input_gradient(grad, forward, None, g)
        whole = kernel.train_backward(grad, forward)
        assert torch.equal(d_x, whole[0])
        assert torch.equal(sums, torch.stack((whole[2], whole[1])))
        stored = [oracle.exact(t) for t in statistics]
        values = [oracle.exact(t) for t in (x, grad, residual, layer.weight, layer.bias)]
        expected, bound = oracle_activations.fused(*values, EPS, act, layer.param, torch.float64, stored)
        oracle.assert_within(d_x, expected.d_x, bound.d_x)


@kernels
def test_y_stands_for_the_residual_between_the_halves_too(kernel):
    x, grad, residual, layer = case((30, 3, 5), torch.float32, contiguous, "relu")
    y, statistics = kernel.train_forward(x, layer, residual)
    sums = [kernel.sum_gradients(grad, ForwardPass(x, statistics, layer, *kept)) for kept in ((residual,), (None, y))]
    assert torch.equal(sums[0][0], sums[1][0])
    assert torch.equal(sums[0][1], sums[1][1])


def test_a_batch_of_no_values_has_no_statistics_and_sums_of_zero():
    x = torch.empty(0, 3, 4)
    statistics = reference.measure(x)
    assert all(t.isnan().all() for t in statistics)
    sums, _ = reference.sum_gradients(x, ForwardPass(x, statistics, Layer()))
    assert not sums.any()
    nothing = Moments.from_var(0, *statistics)
    other = reference.measure(torch.tensor([[1.0, 2, 3], [5, 5, 5]]))
    merged = nothing + Moments.from_var(2, *other)
    np.testing.assert_array_equal(merged.mean, other.mean)


@pytest.mark.skipif(cpu.INSTRUCTION_SET is None, reason="built without a compiler")
def test_the_native_half_asks_for_the_gradient_that_it_cannot_compute_again():
    x, grad, residual, layer = case((30, 3, 5), torch.float32, contiguous, "silu")
    forward = ForwardPass(x, cpu.measure(x), layer, residual)
    with pytest.raises(ValueError, match="needs g if there are an activation and a residual"):
        cpu.input_gradient(grad, forward, torch.zeros(2, 3))
