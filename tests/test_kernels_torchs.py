"""torch's batch norm as a kernel, the table that chooses it, and the native kernels where numbers are hard."""

from __future__ import annotations

import itertools
import types

import numpy as np
import oracle
import oracle_activations
import pytest
import torch
from layouts import channels_last, contiguous

from batchnorm.kernels import Layer, choice, cpu, reference, torch_batch_norm
from batchnorm.kernels.activations import NAMES, parameter
from batchnorm.kernels.interface import ForwardPass
from batchnorm.kernels.running_statistics import Running
from batchnorm.layers import BatchNorm1d, BatchNorm2d

EPS = 1e-5
PLAIN = Layer(eps=EPS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
built = pytest.mark.skipif(cpu.INSTRUCTION_SET is None, reason="built without a compiler")


def stored(channels=3, dtype=torch.float32, momentum=0.1):
    """Running statistics of some batches."""
    mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5
    return Running(mean, var, torch.tensor(2), torch.tensor(0), momentum)


def copied(r):
    return Running(*(t.clone() for t in r[:4]), r.momentum)


# --- torch's own ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("act", [None, *NAMES])
def test_torchs_results_are_the_oracles_within_rounding(act, dtype):
    """y is rounded to the type of x before the residual and again before the activation."""
    wide, param = reference.wide_dtype(dtype), parameter(act, None)
    for shape, with_residual in itertools.product([(40, 3), (6, 3, 5, 2)], [True, False]):
        x, r, grad = (torch.randn(shape).to(dtype) for _ in range(3))
        gamma, beta = torch.randn(2, 3, dtype=wide)
        inputs = [t.requires_grad_() for t in ((x, r, gamma, beta) if with_residual else (x, gamma, beta))]
        r = r if with_residual else None
        y = torch_batch_norm.train(x, Layer(gamma, beta, EPS, act, param), r, None)
        assert y.dtype == dtype
        found = dict(zip(("x", "r", "gamma", "beta") if with_residual else ("x", "gamma", "beta"),
                         torch.autograd.grad(y, inputs, grad), strict=True))  # fmt: skip
        # computing all of it in the narrow type: its roundoff in the place of the wide one
        values = [oracle.exact(t) for t in (x, grad, r, gamma, beta)]
        expected, bound = oracle_activations.fused(*values, EPS, act, param, dtype, narrowly=True)
        oracle.assert_within(y, expected.y, bound.y)
        for name, value, allowed in zip(("x", "gamma", "beta", "r"), expected[1:], bound[1:], strict=True):
            if name in found:
                oracle.assert_within(found[name], value, allowed)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
@dtypes
def test_torchs_running_statistics_are_the_references(dtype, of, momentum):
    x, ours = (2 + torch.randn(9, 3)).to(dtype), stored(dtype=of, momentum=momentum)
    theirs = copied(ours)
    for _ in range(2):
        torch_batch_norm.train(x, Layer(eps=EPS, act="relu"), None, ours)
        choice.update_running(theirs, reference.measure(x), 9)
    # torch's are in float32 at least, and 9 values of size 5 are added and squared
    u = torch.finfo(reference.wide_dtype(dtype)).eps / 2 + torch.finfo(of).eps / 2
    for found, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=32 * u, atol=32 * u)
    assert (ours.batches.item(), ours.skipped.item()) == (4, 0)
    assert ours.mean.dtype == of


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_torchs_statistics_that_are_not_finite_are_not_stored(bad, momentum):
    x, ours = torch.randn(9, 3), stored(momentum=momentum)
    x[4, 1] = bad
    before = copied(ours)
    with pytest.warns(RuntimeWarning, match="1 of 3 channels"):
        torch_batch_norm.train(x, PLAIN, None, ours)
    stays = [1] if momentum else [0, 1, 2]
    assert torch.equal(ours.mean[stays], before.mean[stays])
    assert torch.equal(ours.var[stays], before.var[stays])
    assert ours.skipped == 1
    assert ours.batches == (3 if momentum else 2)
    if momentum:
        assert (ours.mean[[0, 2]] != before.mean[[0, 2]]).all()


@pytest.mark.parametrize(
    ("of_x", "of_gamma"), [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if a != b or a.itemsize == 2], ids=str
)
def test_torchs_takes_every_pair_of_types_that_a_layer_takes(of_x, of_gamma):
    x, gamma, beta = torch.randn(8, 3).to(of_x), *torch.randn(2, 3).to(of_gamma)
    y = torch_batch_norm.train(x, Layer(gamma, beta, EPS), None, stored())
    assert y.dtype == of_x
    expected, _ = reference.train_forward(x, Layer(gamma, beta, EPS))
    torch.testing.assert_close(y, expected)


def test_torchs_passes_no_values():
    empty = torch.empty(0, 3)
    assert torch_batch_norm.train(empty, Layer(eps=EPS, act="relu"), empty, None).shape == (0, 3)


@layouts
def test_torchs_keeps_the_layout(layout):
    x = layout(torch.randn(4, 3, 5, 2))
    assert torch_batch_norm.train(x, Layer(eps=EPS, act="silu"), x, None).stride() == x.stride()


# --- the table --------------------------------------------------------------------------------------------


class Gpu(types.SimpleNamespace):
    """What the table asks a CUDA tensor."""

    is_cuda, device, ndim = True, "cuda:0", 4

    def is_contiguous(self):
        return self.planes

    def numel(self):
        return self.values


ROWS = {"Fast GPU": {"float32 planes": 1000, "bfloat16 rows": 0}}


@pytest.mark.parametrize(
    ("name", "dtype", "planes", "ndim", "values", "faster"),
    [
        ("Fast GPU", torch.float32, True, 4, 1000, True),
        ("Fast GPU", torch.float32, True, 4, 999, False),
        ("Fast GPU", torch.float32, False, 4, 10**6, False),
        ("Fast GPU", torch.float32, True, 2, 10**6, False),
        ("Fast GPU", torch.bfloat16, True, 2, 1, True),
        ("Fast GPU", torch.bfloat16, False, 4, 1, True),
        ("Fast GPU", torch.float16, True, 4, 10**6, False),
        ("Other GPU", torch.float32, True, 4, 10**6, False),
    ],
)
def test_a_row_of_the_table_says_from_how_many_values_on_triton_is_faster(
    monkeypatch, name, dtype, planes, ndim, values, faster
):
    monkeypatch.setattr(choice, "_measured", lambda: ROWS)
    monkeypatch.setattr(choice, "_FORCED", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    x = Gpu(dtype=dtype, planes=planes, ndim=ndim, values=values)
    assert choice._faster_by_triton(x) == faster
    assert choice.is_torchs(x) != faster


def test_an_empty_table_asks_no_device(monkeypatch):
    monkeypatch.setattr(choice, "_measured", dict)
    monkeypatch.setattr(choice, "_FORCED", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", None)
    x = Gpu(dtype=torch.float32, planes=True, values=10**6)
    assert choice.is_torchs(x)
    for forced in ("reference", "triton"):
        monkeypatch.setattr(choice, "_FORCED", forced)
        assert not choice.is_torchs(x)


@dtypes
def test_nothing_on_the_cpu_is_torchs(dtype):
    assert not choice.is_torchs(torch.randn(4, 3).to(dtype))
    assert not choice.is_torchs(torch.empty(0, 3))


def test_the_table_that_is_shipped_can_be_read():
    for name, rows in choice._measured().items():
        assert isinstance(name, str)
        for row, values in rows.items():
            dtype, layout = row.split()
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert layout in {"planes", "rows"}
            assert values >= 0


# --- moments ----------------------------------------------------------------------------------------------

SHAPES = [(50, 3), (7, 70, 5), (6, 5, 9, 11), (3, 2, 40, 40), (2, 3, 4, 5, 6), (300, 1)]


@built
@dtypes
@layouts
def test_moments_are_numpys_in_float64(dtype, layout):
    for shape in SHAPES:
        x = layout((3 + 2 * torch.randn(shape)).to(dtype))
        mean, var = (t.numpy() for t in cpu.measure(x, exact=True))
        true_mean, true_var = oracle.statistics(oracle.exact(x))
        u, p = 2.0**-53, oracle.path(x.numel() // shape[1])
        # sums are around a guess within two standard deviations of the mean: at most 4 var + 3 var
        assert (np.abs(mean - true_mean) <= u * (3 * p * np.sqrt(true_var) + 4 * np.abs(true_mean))).all()
        assert (np.abs(var - true_var) <= u * 8 * (p + 3) * true_var).all()


@built
@layouts
def test_moments_far_from_zero_keep_six_digits(layout):
    """Mean 1e6 and deviation 1e-3 in float64: x has spacing 1e-10, the variance of 1e-6 keeps six digits of it."""
    for shape in SHAPES:
        x = layout(1e6 + 1e-3 * torch.randn(shape, dtype=torch.float64))
        mean, var = cpu.measure(x, exact=True)
        exact = x.numpy().astype(np.longdouble)
        axes = tuple(a for a in range(x.ndim) if a != 1)
        true = exact.mean(axes, keepdims=True)
        true_var = ((exact - true) ** 2).mean(axes)
        assert (np.abs(mean.numpy() - true.ravel()) <= 1e-9).all()
        assert (np.abs(var.numpy() - true_var) <= 1e-6 * true_var).all()


@built
def test_moments_of_constant_channels_are_exact():
    for dtype, value in itertools.product(DTYPES, [0.0, 1.1, -3e4]):
        x = torch.full((9, 5, 7), value, dtype=dtype)
        mean, var = cpu.measure(x, exact=True)
        assert (mean == x[0, 0, 0].double()).all()
        assert not var.any()


# --- the native kernels where numbers are hard ------------------------------------------------------------


def check(x, grad=None, gamma=None, beta=None):
    """The native kernels' y and gradients are the oracle's, within rounding."""
    grad = torch.randn(x.shape).to(x.dtype) if grad is None else grad
    layer = Layer(gamma, beta, EPS)
    y, statistics = cpu.train_forward(x, layer)
    d_x, d_gamma, d_beta, _ = cpu.train_backward(grad, ForwardPass(x, statistics, layer))
    values = [oracle.exact(t) for t in (x, grad, gamma)]
    expected = oracle.train(*values, oracle.exact(beta), EPS)
    bound = oracle.train_rounding(*values, expected, EPS, reference.wide_dtype(x.dtype))
    for found, value, allowed in zip((y, d_x, d_gamma, d_beta), expected, bound, strict=True):
        oracle.assert_within(found, value, allowed)
    return statistics


@built
@layouts
@pytest.mark.parametrize("scale", [1e10, 1e18, 1e20, 1e25, 1e30], ids=str)
def test_values_whose_squares_are_infinite_are_normalized_and_differentiated_right(scale, layout):
    for shape in [(64, 3), (4, 3, 7, 5), (2, 2, 40, 40)]:
        check(layout(scale * (1 + torch.randn(shape))))


@built
@pytest.mark.parametrize("scale", [1e20, 1e25])
def test_a_variance_that_float32_cannot_hold_is_not_stored(scale):
    layer = BatchNorm1d(3)
    x = torch.randn(64, 3)
    x[:, 1] *= scale
    with pytest.warns(RuntimeWarning, match="1 of 3 channels"):
        y = layer(x)
    assert y.isfinite().all()
    assert layer.running_var.isfinite().all()
    assert layer.running_mean.isfinite().all()
    assert layer.running_var[1] == 1
    assert layer.skipped_updates == 1


@built
@layouts
def test_a_first_image_of_zeros_an_outlier_and_constants(layout):
    first = torch.randn(16, 4, 12, 12) + 1000
    first[0] = 0
    outlier = torch.randn(16, 4, 12, 12)
    outlier[3, 1, 5, 5] = 1e6
    constant = torch.randn(16, 4, 12, 12)
    constant[:, 2], constant[:, 3] = 1e6 / 7, 0
    for x in (first, outlier, constant):
        mean, var = (t.numpy() for t in check(layout(x)))
        true_mean, true_var = oracle.statistics(oracle.exact(x))
        u, p = 2.0**-24, oracle.path(16 * 144)
        assert (np.abs(mean - true_mean) <= u * (p + 16) * np.sqrt(true_var) + 2.0**-50 * np.abs(true_mean)).all()
        assert (np.abs(var - true_var) <= 4 * u * (p + 16) * true_var).all()


@built
@pytest.mark.parametrize(
    "shape", [(400, 5), (5000, 3), (33, 6, 4, 4), (4, 3, 50, 50), (40, 1), (3, 2, 300, 300)], ids=str
)
@layouts
def test_sorted_batches_and_channels_of_different_sizes_get_a_better_guess(shape, layout):
    """The guess is of the first rows' values; in a sorted batch, or behind 1e4, it is far from the mean."""
    x = torch.randn(shape).sort(0).values * 10.0 ** torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    for values in (x, x.flip(0), x + 1e4, x.pow(3), torch.cat([x[:-1], x[-1:] + 1e5])):
        check(layout(values))


@built
@layouts
def test_every_small_size_equals_the_oracle(layout):
    for n, c in itertools.product(
        [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 40], [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 70]
    ):
        inner = (n * c) % 5
        x = 1 + 2 * torch.randn(n, c, *([inner] if inner else []))
        r, grad, gamma, beta = torch.randn_like(x), torch.randn_like(x), *torch.randn(2, c)
        x = layout(x)
        layer = Layer(gamma, beta, EPS, "silu")
        y, statistics = cpu.train_forward(x, layer, r)
        found = (y, *cpu.train_backward(grad, ForwardPass(x, statistics, layer, r)))
        values = [oracle.exact(t) for t in (x, grad, r, gamma, beta)]
        for one, value, allowed in zip(
            found, *oracle_activations.fused(*values, EPS, "silu", 0.0, x.dtype), strict=True
        ):
            oracle.assert_within(one, value, allowed)


@built
@pytest.mark.parametrize(
    "shape",
    [(64 * 4096 + 1, 1), (15, 2, 4 * 4096 + 1), (1, 2, 64 * 4096 + 63), (4, 3, 256 * 257), (5, 2, 12 * 4096 + 11)],
    ids=str,
)
def test_the_last_values_of_a_plane_that_is_cut_are_there(shape):
    """A plane is cut into pieces of whole blocks: what is left over by less than a piece belongs to the last."""
    x, poison = torch.randn(shape), torch.full(shape, torch.nan)
    y, statistics = cpu.train_forward(x, PLAIN)
    expected, true = reference.train_forward(x.double(), PLAIN)
    (mean, var), (true_mean, true_var) = statistics, true
    assert poison.isnan().all()
    assert (y - expected).abs().max() <= 1e-5
    assert ((mean - true_mean).abs() <= 1e-7).all()
    assert ((var - true_var).abs() <= 1e-6).all()
    d_x, *_ = cpu.train_backward(x, ForwardPass(x, statistics, PLAIN))
    d_x_, *_ = reference.train_backward(x.double(), ForwardPass(x.double(), true, PLAIN))
    assert (d_x - d_x_).abs().max() <= 1e-5
    y = cpu.normalize(x, statistics, PLAIN)
    assert (y - expected).abs().max() <= 1e-5
    exact_mean, exact_var = cpu.measure(x, exact=True)
    assert ((exact_mean - true_mean).abs() <= 1e-12).all()
    assert ((exact_var - true_var).abs() <= 1e-11).all()


@built
@pytest.mark.parametrize("gamma", [0.0, 1e-30, 1e30])
def test_any_gamma_has_right_gradients(gamma):
    x = torch.randn(40, 3)
    layer = BatchNorm1d(3)
    torch.nn.init.constant_(layer.weight, gamma)
    leaf = x.clone().requires_grad_()
    grad = torch.randn(40, 3)
    d_x, d_gamma, d_beta = torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], grad)
    values = [oracle.exact(t) for t in (x, grad, layer.weight)]
    expected = oracle.train(*values, np.zeros(3), EPS)
    bound = oracle.train_rounding(*values, expected, EPS, torch.float32)
    for found, value, allowed in zip((d_x, d_gamma, d_beta), expected[1:], bound[1:], strict=True):
        oracle.assert_within(found, value, allowed)


@built
def test_planes_of_one_value_are_rows_in_either_layout():
    x = torch.randn(6, 5, 1, 1)
    layer = BatchNorm2d(5)
    strange = x.as_strided((6, 5, 1, 1), (5, 1, 77, 3))
    torch.testing.assert_close(layer(strange), layer(x))
