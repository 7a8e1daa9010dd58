"""The Triton kernels against the reference in float64: what test_triton.py runs in a process of its own.

On any CPU in Triton's interpreter, where TRITON_INTERPRET=1 was set before Triton was imported; else on the GPU.
"""

import oracle_activations
import pytest
import torch

from batchnorm.kernels import reference
from batchnorm.kernels import triton as kernels
from batchnorm.kernels.activations import NAMES, sign_shows
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Layer

EPS = 1e-5
PLAIN = Layer(eps=EPS)
DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if kernels.INTERPRETED:
    ROUNDOFF[torch.bfloat16] = 2**-7  # the interpreter cuts off what does not fit instead of rounding it

WHOLE = [(7, 5), (1, 4), (300, 3), (4, 7, 1), (5, 3, 3, 3), (9, 10, 2, 1), (3, 2, 5, 3, 4)]
SPLIT = [(520, 17), (3, 1, 50, 44), (2, 2, 11, 401), (700, 2, 9)]


def case(shape, dtype, *, rows=False, mean=3.0, device=DEVICE):
    """x, weight, bias, residual, gradient."""
    x = (torch.randn(shape, dtype=torch.float64, device=device) * 2 + mean).to(dtype)
    if rows:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    channels = {"dtype": reference.wide_dtype(dtype), "device": device}
    weight, bias = torch.rand(shape[1], **channels) + 0.5, torch.randn(shape[1], **channels)
    return x, weight, bias, torch.randn_like(x), torch.randn_like(x)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def close(actual, expected, dtype, *, count, terms=1.0):
    """Within the rounding of the result's own type at its largest value, and of sums of ``count`` values in lanes.

    The latter is at the size of the ``terms`` that are added up, which may cancel.
    """
    largest = float(expected.abs().max())
    sums = ROUNDOFF[reference.wide_dtype(dtype)] * (16 + count**0.5) * max(largest, float(terms))
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= ROUNDOFF[dtype] * largest + sums


def check(x, weight, bias, residual, grad, act=None, param=0.0):
    """Forward, backward and eval equal the reference."""
    assert kernels.supports(x)
    dtype, count, layer = x.dtype, x.numel() // x.shape[1], Layer(weight, bias, EPS, act, param)
    near, roundoff = reference.wide_dtype(dtype), ROUNDOFF[reference.wide_dtype(dtype)]
    x_, weight_, bias_, residual_ = wide(x, weight, bias, residual)
    layer_ = layer._replace(weight=weight_, bias=bias_)
    y, (mean, var) = kernels.train_forward(x, layer, residual)
    y_, statistics_ = reference.train_forward(x_, layer_, residual_)
    mean_, var_ = statistics_
    close(y, y_, dtype, count=count)
    assert y.stride() == x.stride()
    # deviations are rounded at their own size, whatever the mean is; blocks are merged in float64
    furthest = (x_ - reference.along_channels(mean_, x)).abs().max()
    assert ((mean - mean_).abs() <= 4 * roundoff * furthest + 4 * ROUNDOFF[torch.float64] * mean_.abs()).all()
    assert ((var - var_).abs() <= (16 + count**0.5) * roundoff * var_).all()
    close(kernels.normalize(x, ChannelStatistics(mean, var), layer, residual), y_, dtype, count=count)

    # a derivative that jumps where p is 0, 3 or -3 may be read on either side of the jump
    p = reference.train_forward(x_, layer_._replace(act=None), residual_)[0]
    grad = torch.where((p.abs() < 1e-4) | ((p.abs() - 3).abs() < 1e-4), 0, grad)
    found = kernels.train_backward(grad, ForwardPass(x, ChannelStatistics(mean, var), layer, residual))
    expected = reference.train_backward(grad.double(), ForwardPass(x_, statistics_, layer_, residual_))
    # d_x = slope (g - mean g - z mean gz): each term is at most slope |g| (1 + z^2), and |a'| is at most 1.5
    z = reference.train_forward(x_, PLAIN)[0].abs().max()
    slope = ((1 if weight is None else weight_) * (var_ + EPS).rsqrt()).max()
    g = 1.5 * grad.double().abs().max()
    close(found[0], expected[0], dtype, count=count, terms=slope * g * (1 + z * z))
    for sums, sums_ in zip(found[1:3], expected[1:3], strict=True):
        # a sum's rounding grows with the sum of magnitudes, not with the sum
        assert sums.dtype == near
        assert ((sums.double() - sums_).abs() <= 16 * roundoff * g * count * (1 + z)).all()
    assert (found[3] is None) == (expected[3] is None)
    if found[3] is not None:
        close(found[3], expected[3], dtype, count=1)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [pytest.param(shape, False, id=f"{shape}") for shape in WHOLE + SPLIT]
    + [pytest.param(shape, True, id=f"{shape}, channels last") for shape in WHOLE + SPLIT if len(shape) > 2],
)
def test_forward_backward_and_eval_equal_the_reference_in_float64(shape, rows, dtype):
    x, weight, bias, residual, grad = case(shape, dtype, rows=rows)
    assert (kernels._cut(x, kernels._WHOLE).parts > 1) == (shape in SPLIT)
    check(x, weight, bias, residual, grad)


@pytest.fixture
def small_blocks(monkeypatch):
    """Few values are split as many are: the interpreter takes its time for each."""
    monkeypatch.setattr(kernels, "_WHOLE", 1024)
    monkeypatch.setattr(kernels, "_PART", 1024)
    assert kernels._cut(torch.empty(5, 3, 6, 7), 1024).parts == 1
    assert kernels._cut(torch.empty(520, 3), 1024).parts == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (520, 3)], ids=["whole", "split"])
@pytest.mark.parametrize("met", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("act", NAMES)
def test_activations_and_residuals_are_part_of_the_same_pass(small_blocks, act, met, shape, dtype):
    x, weight, bias, residual, grad = case(shape, dtype)
    check(x, weight, bias, residual if met else None, grad, act, {"leaky_relu": 0.2, "elu": 1.25}.get(act, 0.0))


@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (520, 3)], ids=["whole", "split"])
@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
def test_weight_and_bias_may_be_absent(small_blocks, given, shape):
    x, weight, bias, residual, grad = case(shape, torch.float32)
    check(x, weight if given == "weight" else None, bias if given == "bias" else None, residual, grad, "silu")


@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (520, 3)], ids=["whole", "split"])
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_y_stands_for_the_residual_where_its_sign_is_enough(small_blocks, act, shape):
    assert sign_shows(act, 0.1)
    x, weight, bias, residual, grad = case(shape, torch.float32)
    layer = Layer(weight, bias, EPS, act, 0.1)
    y, statistics = kernels.train_forward(x, layer, residual)
    found = kernels.train_backward(grad, ForwardPass(x, statistics, layer, None, y))
    expected = kernels.train_backward(grad, ForwardPass(x, statistics, layer, residual))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (520, 3)], ids=["whole", "split"])
@pytest.mark.parametrize("act", [None, "silu"])
def test_the_halves_are_the_whole(small_blocks, act, shape, dtype):
    """Statistics have the same bits; one program subtracts the mean in other parts, and adds gradients in float32."""
    x, weight, bias, residual, grad = case(shape, dtype)
    count, layer = x.numel() // 3, Layer(weight, bias, EPS, act)
    for added in (None, residual):
        y, statistics = kernels.train_forward(x, layer, added)
        measured = kernels.measure(x)
        assert all(torch.equal(a, b) for a, b in zip(measured, statistics, strict=True))
        exact_layer = Layer(*wide(weight, bias), EPS, act)
        again = reference.normalize(x.double(), statistics, exact_layer, *wide(added))
        close(kernels.normalize(x, measured, layer, added), again, dtype, count=1)
        close(y, again, dtype, count=1)
        forward = ForwardPass(x, statistics, layer, added)
        sums, g = kernels.sum_gradients(grad, forward)
        d_x = kernels.input_gradient(grad, forward, sums / count, g)
        whole = kernels.train_backward(grad, forward)
        assert (g is None) == (whole[3] is None)
        assert g is None or torch.equal(g, whole[3])
        exact = ForwardPass(x.double(), statistics, exact_layer, *wide(added))
        expected = reference.train_backward(grad.double(), exact)
        slope = (weight.double() * (statistics.var + EPS).rsqrt()).max()
        z = reference.normalize(x.double(), statistics, PLAIN).abs().max()
        terms = 1.5 * grad.double().abs().max() * (1 + z * z) * max(slope, 1)
        for found in (d_x, whole[0]):
            # g is rounded to the type of x where an activation met a residual
            close(found, expected[0], dtype, count=count, terms=terms * (1 + 2 * ROUNDOFF[dtype] / 2**-24))
        assert torch.allclose(sums[0].float(), whole[2], rtol=0, atol=float(count * terms) * 16 * 2**-24)
        assert torch.allclose(sums[1].float(), whole[1], rtol=0, atol=float(count * terms) * 16 * 2**-24)


@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (520, 3)], ids=["whole", "split"])
def test_fixed_statistics_have_no_share_in_the_gradient(small_blocks, shape):
    x, weight, bias, _, grad = case(shape, torch.float32)
    layer, statistics = Layer(weight, bias, EPS, "silu"), ChannelStatistics(*torch.rand(2, 3, device=DEVICE).double())
    found = kernels.train_backward(grad, ForwardPass(x, statistics, layer, constant=True))
    exact = Layer(*wide(weight, bias), EPS, "silu")
    expected = reference.train_backward(grad.double(), ForwardPass(x.double(), statistics, exact, constant=True))
    terms = 1.5 * (weight / (statistics.var + EPS).sqrt()).max() * grad.abs().max()
    close(found[0], expected[0], torch.float32, count=1, terms=terms)


def test_an_activation_that_is_not_in_the_table_is_refused():
    x, weight, bias, _, grad = case((7, 5), torch.float32)
    for call in oracle_activations.calls(kernels, x, grad, Layer(weight, bias, EPS, "softsign")):
        with pytest.raises(ValueError, match=r"act must be None or one of relu, .* got 'softsign'"):
            call()


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", [(8, 3, 10, 10), (32, 2, 20, 23)], ids=["whole", "split"])
def test_values_far_from_zero_keep_the_digits_that_their_format_has(shape, rows):
    x = case(shape, torch.float32, rows=rows, mean=1e5)[0]
    y, _ = kernels.train_forward(x, PLAIN)
    expected, _ = reference.train_forward(x.double(), PLAIN)
    assert (y.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_first_image_of_zeros_and_an_outlier_do_not_spoil_the_statistics():
    x = torch.randn(16, 2, 40, 40, device=DEVICE) + 1000
    x[0] = 0
    x[3, 1, 5, 5] = 1e6
    _, (mean, var) = kernels.train_forward(x, PLAIN)
    mean_, var_ = reference.measure(x.double())
    assert ((mean - mean_).abs() <= 1e-6 * var_.sqrt()).all()
    assert ((var - var_).abs() <= 1e-6 * var_).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as the channels past the last have variance 0
@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e37])
@pytest.mark.parametrize("shape", [(8, 3, 10), (520, 17)], ids=["whole", "split"])
def test_the_variance_of_what_float32_can_hold_is_finite_and_not_zero(shape, scale):
    x = torch.randn(shape, device=DEVICE) * scale
    layer = Layer(eps=0.0)
    y, (mean, var) = kernels.train_forward(x, layer)
    y_, (mean_, var_) = reference.train_forward(x.double(), layer)
    close(y, y_, torch.float32, count=520)
    assert ((mean - mean_).abs() <= 1e-6 * var_.sqrt()).all()
    assert ((var - var_).abs() <= 1e-5 * var_).all()
    close(kernels.normalize(x, ChannelStatistics(mean, var), layer), y_, torch.float32, count=520)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, with which the interpreter computes
@pytest.mark.parametrize("act", [None, *NAMES])
@pytest.mark.parametrize("shape", [(8, 3, 9), (520, 3, 5)], ids=["whole", "split"])
@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_nan_and_infinity_stay_in_their_channel(rows, shape, act):
    x, weight, bias, _, grad = case(shape, torch.float32, rows=rows)
    x[2, 0, 1], x[1, 1, 0] = torch.nan, torch.inf
    layer = Layer(weight, bias, EPS, act)
    y, statistics = kernels.train_forward(x, layer)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isnan().any()
    assert y[:, 2].isfinite().all()
    d_x, *_ = kernels.train_backward(grad, ForwardPass(x, statistics, layer))
    assert d_x[:, 0].isnan().all()
    assert d_x[:, 2].isfinite().all()


@pytest.mark.parametrize("shape", [(32, 19), (8, 19, 7, 7), (8, 3, 33, 33)], ids=str)
def test_an_example_has_the_same_bits_alone_and_in_any_batch(shape):
    x, weight, bias, *_ = case(shape, torch.bfloat16)
    statistics = ChannelStatistics(torch.randn(shape[1], device=DEVICE), torch.rand(shape[1], device=DEVICE) + 0.1)
    layer = Layer(weight, bias, EPS, "silu")
    whole = kernels.normalize(x, statistics, layer)
    for i in (0, 7):
        alone = kernels.normalize(x[i : i + 1].clone(), statistics, layer)
        assert torch.equal(alone, whole[i : i + 1])


@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (520, 3)], ids=["whole", "split"])
def test_parameters_of_any_type_and_layout_are_read(small_blocks, shape):
    x, weight, bias, *_ = case(shape, torch.float32)
    y, _ = kernels.train_forward(x, Layer(weight.half(), torch._neg_view(bias), EPS))
    expected, _ = kernels.train_forward(x, Layer(weight.half().float(), -bias, EPS))
    assert torch.equal(y, expected)


def test_a_gradient_of_another_layout_type_or_sign_is_taken():
    x, weight, bias, _, grad = case((4, 6, 5, 5), torch.float32)
    layer = Layer(weight, bias, EPS)
    forward = ForwardPass(x, kernels.train_forward(x, layer)[1], layer)
    expected = kernels.train_backward(grad, forward)[:3]
    for other in (grad.to(memory_format=torch.channels_last), grad.double(), torch._neg_view(-grad)):
        found = kernels.train_backward(other, forward)[:3]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_has_not_the_shape_of_x_is_refused():
    x, weight, bias, *_ = case((4, 6, 5, 5), torch.float32)
    layer = Layer(weight, bias, EPS)
    _, statistics = kernels.train_forward(x, layer)
    with pytest.raises(ValueError, match=r"needs shape \(4, 6, 5, 5\), got \(3, 6, 5, 5\)"):
        kernels.train_backward(x[:3], ForwardPass(x, statistics, layer))
    with pytest.raises(ValueError, match=r"parameters of shape \(6,\) on .*, got \(5,\)"):
        kernels.train_forward(x, Layer(weight[:5], bias, EPS))


def test_what_the_kernels_do_not_know_is_left_to_the_reference():
    x = torch.randn(4, 6, 5, 5, device=DEVICE)
    assert kernels.supports(x)
    assert not kernels.supports(x[..., ::2])
    assert not kernels.supports(x[:0])
    assert not kernels.supports(torch._neg_view(x))
    assert not kernels.supports(x.to("meta"))
    assert not kernels.supports(x.int())
    assert not kernels.supports(x[0, 0, 0])


def test_values_behind_the_first_2_to_the_31_are_found():
    if DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB of free memory")
    x = torch.zeros(3, 1, 2**30 + 7, dtype=torch.float16, device=DEVICE)
    x[2] = 3
    y, statistics = kernels.train_forward(x, PLAIN)
    mean, var = statistics
    assert (mean.item(), var.item()) == pytest.approx((1, 2))
    for i, expected in enumerate((-(0.5**0.5), -(0.5**0.5), 2**0.5)):
        assert (float(y[i].min()), float(y[i].max())) == pytest.approx((expected, expected), rel=2**-11)
    d_x, *_ = kernels.train_backward(y, ForwardPass(x, statistics, PLAIN))
    assert d_x.abs().max() < 1e-4  # y stands for z, along which nothing changes the loss but eps
