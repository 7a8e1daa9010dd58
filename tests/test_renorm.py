"""Batch renorm: the paper's algorithm in float64, forward and backward, in every combination with other settings."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from layouts import LAYOUTS, cases
from test_layers import made
from torch import nn

import batchnorm
from batchnorm import Ramp, Renorm
from batchnorm.kernels.reference import wide_dtype
from batchnorm.layers import BatchNorm1d, BatchNorm2d

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
LIMITS = {"free": (np.inf, np.inf), "clipped": (1.3, 0.4), "batch norm": (1.0, 0.0)}
limits = pytest.mark.parametrize(("rmax", "dmax"), LIMITS.values(), ids=LIMITS)


def along(values, x):
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def paper(x, grad, gamma, beta, mu, var, eps, rmax, dmax):
    """Algorithm 1 of Ioffe 2017 with its gradients, step by step in float64; sigma is that of eval mode."""
    axes, m = tuple(a for a in range(x.ndim) if a != 1), x.size // x.shape[1]
    mu_b, sigma = x.mean(axes), np.sqrt(var + eps)
    sigma_b = np.sqrt(((x - along(mu_b, x)) ** 2).mean(axes) + eps)
    r = np.clip(sigma_b / sigma, 1 / rmax, rmax)
    d = np.clip((mu_b - mu) / sigma, -dmax, dmax)
    x_hat = (x - along(mu_b, x)) / along(sigma_b, x) * along(r, x) + along(d, x)
    of_x_hat = grad * along(gamma, x)
    of_sigma = (of_x_hat * (x - along(mu_b, x)) * along(-r / sigma_b**2, x)).sum(axes)
    of_mean = (of_x_hat * along(-r / sigma_b, x)).sum(axes)
    d_x = of_x_hat * along(r / sigma_b, x)
    d_x = d_x + along(of_sigma / (m * sigma_b), x) * (x - along(mu_b, x)) + along(of_mean / m, x)
    y = x_hat * along(gamma, x) + along(beta, x)
    return oracle.Result(y, d_x, (grad * x_hat).sum(axes), grad.sum(axes)), r, d


def state_of(layer):
    tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    return [oracle.exact(t).copy() for t in tensors]


@cases
@dtypes
@limits
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda f: f.__name__)
def test_values_and_gradients_are_those_of_the_paper(cls, shape, dtype, rmax, dmax, layout):
    layer = made(cls, 3, dtype=dtype, renorm=Renorm(rmax, dmax))
    gamma, beta, mu, var = state_of(layer)
    x, grad = layout((2 + 3 * torch.randn(shape)).to(dtype)).requires_grad_(), torch.randn(shape).to(dtype)
    y = layer(x)
    y.backward(grad)
    values, wide = (oracle.exact(x), oracle.exact(grad)), wide_dtype(dtype)
    right, r, d = paper(*values, gamma, beta, mu, var, layer.eps, rmax, dmax)
    # p = (gamma r) z + (beta + gamma d) is a pass of batch norm with these parameters, each rounded twice more
    plain = oracle.train(*values, gamma * r, beta + gamma * d, layer.eps)
    bound = oracle.train_rounding(*values, gamma * r, plain, layer.eps, wide)
    u = torch.finfo(wide).eps
    size = np.abs(along(gamma * r, right.y) * plain.y) + np.abs(along(gamma * d, right.y)) + np.abs(right.y)
    oracle.assert_within(y, right.y, bound.y + 4 * u * size)
    oracle.assert_within(x.grad, right.d_x, bound.d_x + 4 * u * np.abs(right.d_x))
    # d_gamma = r sum g z + d sum g
    of_gamma = np.abs(r) * bound.d_gamma + np.abs(d) * bound.d_beta + 4 * u * (np.abs(right.d_gamma) + np.abs(d))
    oracle.assert_within(layer.weight.grad, right.d_gamma, of_gamma + 8 * u * np.abs(d * right.d_beta))
    oracle.assert_within(layer.bias.grad, right.d_beta, bound.d_beta)


@cases
@limits
def test_autograd_of_the_formula_with_constant_r_and_d_agrees(cls, shape, rmax, dmax):
    """Written as a framework would: plain batch norm, then an affine map whose numbers have no gradient."""
    layer = made(cls, 3, dtype=torch.float64, renorm=Renorm(rmax, dmax))
    plain = nn.BatchNorm1d(3, affine=False, track_running_stats=False).double()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = (1 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight, bias = (t.detach().clone().requires_grad_() for t in (layer.weight, layer.bias))
    rows = x.movedim(1, -1).reshape(-1, 3)
    std, of_batch = (var + layer.eps).sqrt(), (rows.var(0, correction=0) + layer.eps).sqrt()
    r = (of_batch / std).clamp(1 / rmax, rmax).detach()
    d = ((rows.mean(0) - mean) / std).clamp(-dmax, dmax).detach()
    right = weight * (plain(rows) * r + d) + bias
    grad = torch.randn_like(right)
    expected = torch.autograd.grad(right, (x, weight, bias), grad)
    y = layer(x)
    found = torch.autograd.grad(y.movedim(1, -1).reshape(-1, 3), (x, layer.weight, layer.bias), grad)
    for mine, theirs in zip((y.movedim(1, -1).reshape(-1, 3), *found), (right, *expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@cases
def test_without_clipping_train_mode_gives_the_results_of_eval_mode(cls, shape):
    layer, x = made(cls, 3, dtype=torch.float64, renorm=Renorm(np.inf, np.inf)), torch.randn(shape).double()
    right = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), right, rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_stored_statistics_move_as_without_renorm_and_after_r_and_d(cls, shape, momentum):
    layer, plain = made(cls, 3, renorm=Renorm(1.5, 1.0), momentum=momentum), made(cls, 3, momentum=momentum)
    plain.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = 4 + torch.randn(shape)
        layer(x)
        plain(x)
        for name, value in plain.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{"affine": False}, {"weight": False}, {"bias": False}], ids=str)
def test_layers_without_gamma_or_beta(options):
    layer, full = (made(BatchNorm1d, 3, renorm=Renorm(1.5, 1.0), **o) for o in (options, {}))
    full.load_state_dict({**full.state_dict(), **layer.state_dict()})
    with torch.no_grad():
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if getattr(layer, name) is None:
                getattr(full, name).fill_(value)
    x = torch.randn(8, 3)
    torch.testing.assert_close(layer(x), full(x))


@pytest.mark.parametrize("act", [None, "relu", "gelu", "leaky_relu"])
def test_residual_and_activation_follow(act):
    options = {"dtype": torch.float64, "renorm": Renorm(1.2, 0.3)}
    layer, plain = made(BatchNorm2d, 3, act=act, **options), made(BatchNorm2d, 3, **options)
    plain.load_state_dict(layer.state_dict())
    x, residual = (torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    function = {"relu": torch.relu, "gelu": nn.GELU(), "leaky_relu": nn.LeakyReLU(), None: lambda p: p}[act]
    right = function(plain(x) + residual)
    y = layer(x, residual)
    grads = [torch.autograd.grad(t.square().sum(), (x, residual)) for t in (y, right)]
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kernel", ["native", "formula"])
def test_first_and_second_derivatives_agree_with_finite_differences(kernel):
    """r and d change with x, but have no gradient: they are held by the layer's limits, so that differences exist."""
    layer = made(BatchNorm1d, 3, dtype=torch.float64, renorm=Renorm(1.0001, 1e-6), act="silu")
    with torch.no_grad():
        layer.running_mean.fill_(50)
        layer.running_var.fill_(1e-4)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    mask = torch.rand(6, 4) > 0.3 if kernel == "native" else torch.rand(6, 3, 4) > 0.3
    inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias)]
    layer.track_running_stats = False

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,), {"mask": mask})

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_masks_and_weights_give_moments_of_the_valid_values():
    x, valid = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 5) > 0.4
    layer, plain = (made(BatchNorm1d, 3, dtype=x.dtype, renorm=Renorm(1.3, 0.4)) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    given = torch.where(valid.unsqueeze(1), x, torch.nan).requires_grad_()
    y, right = layer(given, mask=valid), plain(x.movedim(1, -1)[valid])
    torch.testing.assert_close(y.movedim(1, -1)[valid], right)
    y.square().sum().backward()
    right.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert given.grad.isfinite().all()
    torch.testing.assert_close(layer(x, weight=valid.double()).movedim(1, -1)[valid], plain(x.movedim(1, -1)[valid]))


def test_channels_last_and_ghost_batches_have_their_own_r_and_d():
    layer, plain = (made(BatchNorm1d, 3, dtype=torch.float64, renorm=Renorm(1.2, 0.2)) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    layer.axis, layer.ghost_batch_size = -1, 4
    x = torch.randn(8, 5, 3, dtype=torch.float64)
    parts = [copy.deepcopy(plain)(x[i::2].movedim(-1, 1)).movedim(1, -1) for i in range(2)]
    y = layer(x)
    torch.testing.assert_close(y[0::2], parts[0])
    torch.testing.assert_close(y[1::2], parts[1])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_under_autocast_r_and_d_are_not_rounded_to_half(narrow):
    net = nn.Sequential(nn.Linear(4, 3), made(BatchNorm1d, 3, renorm=Renorm(1.5, 1.0)))
    x = torch.randn(64, 4)
    with torch.autocast("cpu", dtype=narrow):
        inside = net[0](x)
        before = copy.deepcopy(net[1])
        y = net[1](inside)
        y.float().square().sum().backward()
    assert inside.dtype == y.dtype == narrow
    assert net[1].running_mean.dtype == net[1].weight.grad.dtype == torch.float32
    right = before.double()(inside.double())
    # 8 roundings of the arithmetic's float32, and the one of the result
    error = (y.double() - right).abs()
    assert (error <= torch.finfo(narrow).eps / 2 * right.abs() + 2**-20 * (1 + right.abs())).all()


def test_the_papers_schedule_is_the_default_and_counts_batches():
    layer, plain = made(BatchNorm1d, 3, renorm=True), made(BatchNorm1d, 3)
    plain.load_state_dict(layer.state_dict())
    x = 3 + 2 * torch.randn(16, 3)
    torch.testing.assert_close(layer(x), plain(x))  # batch norm before batch 5,000
    at = {5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5), 40_000: (3, 5), 10**9: (3, 5)}
    for batches, right in at.items():
        found = [limit.item() for limit in Renorm().limits(torch.tensor(batches))]
        assert found == pytest.approx(right, rel=1e-6)
    layer.num_batches_tracked.fill_(40_000)
    fixed = copy.deepcopy(layer)
    fixed.renorm = Renorm(3, 5)
    torch.testing.assert_close(layer(x), fixed(x))


def test_a_function_of_the_number_of_batches_is_a_limit():
    seen = []

    def grow(batches):
        seen.append(int(batches))
        return 1.0 if batches < 2 else 2.0

    layer = made(BatchNorm1d, 3, renorm=Renorm(grow, 0.0))
    for _ in range(3):
        layer(torch.randn(8, 3))
    assert seen == [0, 1, 2]
    limits = [Renorm(rmax=Ramp(1, 2, 0, 10)).limits(torch.tensor(n))[0].item() for n in range(12)]
    assert all(a < b for a, b in pairwise(limits[:11]))
    assert limits[10] == limits[11] == 2


def test_compile_vmap_and_func_grad():
    layer = made(BatchNorm1d, 3, renorm=Renorm(1.3, Ramp(0, 2, 0, 4)))
    layer.num_batches_tracked.fill_(2)
    other, third = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(8, 3)
    right = layer(x)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), right)
    torch.testing.assert_close(other.running_var, layer.running_var)
    assert other.num_batches_tracked == 3
    params, buffers = dict(third.named_parameters()), {k: v.clone() for k, v in third.named_buffers()}

    def loss(params, x):
        return torch.func.functional_call(third, (params, buffers), (x,)).square().sum()

    found = torch.func.grad(loss)(params, x)
    right.square().sum().backward()
    torch.testing.assert_close(found["weight"], layer.weight.grad)
    stacked = torch.func.stack_module_state([made(BatchNorm1d, 3, renorm=Renorm(1.3, 1.0)) for _ in range(2)])
    run = torch.func.vmap(lambda p, b, x: torch.func.functional_call(third, (p, b), (x,)))
    assert run(*stacked, torch.randn(2, 8, 3)).shape == (2, 8, 3)


def test_copies_pickles_and_eval_mode():
    renorm = Renorm(1.5, Ramp(0, 1, 0, 5))
    layer, x = made(BatchNorm1d, 3, renorm=renorm), torch.randn(8, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.renorm == renorm
        assert repr(renorm) in repr(other)
        assert torch.equal(other(x), copy.deepcopy(layer)(x))
    plain = made(BatchNorm1d, 3)
    plain.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    one = layer.train()
    one.single_element = "population"
    assert torch.equal(one(x[:1]), plain(x[:1]))


def test_surgery_carries_renorm_and_says_what_torch_lacks():
    model = nn.Sequential(made(BatchNorm1d, 3, renorm=Renorm(1.5, 1.0)))
    assert batchnorm.replace(model, lambda *_: BatchNorm1d(3))[0].renorm == Renorm(1.5, 1.0)
    assert batchnorm.convert(model)[0].renorm == Renorm(1.5, 1.0)
    for change in (batchnorm.revert, batchnorm.for_export):
        with pytest.warns(UserWarning, match=r"without these settings: renorm=Renorm\(rmax=1.5, dmax=1.0\) at '0'"):
            plain = change(model)
        x = torch.randn(8, 3)
        torch.testing.assert_close(plain.eval()(x), model.eval()(x))


WRONG = {
    "small rmax": (lambda: Renorm(rmax=0.5), ValueError, r"rmax must be 1 or more, got 0\.5\. 1 is plain"),
    "negative dmax": (lambda: Renorm(dmax=-1), ValueError, "dmax must be 0 or more, got -1"),
    "NaN": (lambda: Renorm(dmax=float("nan")), ValueError, "dmax must be 0 or more, got nan"),
    "text": (lambda: Renorm(rmax="3"), TypeError, "rmax must be a number, got str"),
    "flag": (lambda: Renorm(rmax=True), TypeError, "rmax must be a number, got bool"),
    "setting": (lambda: BatchNorm1d(3, renorm=3.0), TypeError, "renorm must be True, False or a Renorm, got float"),
    "setting later": (lambda: setattr(BatchNorm1d(3), "renorm", "paper"), TypeError, "a Renorm, got str"),
    "class": (lambda: BatchNorm1d(3, renorm=Renorm), TypeError, "a Renorm, got the class Renorm"),
    "ramp": (lambda: Ramp(1, 3, 10, 10), ValueError, "finish must be more than begin, got 10 to 10"),
    "ramp of text": (lambda: Ramp(1, "3", 0, 10), TypeError, "Ramp's end must be a number, got str"),
    "no statistics": (
        lambda: BatchNorm1d(3, renorm=True, track_running_stats=False),
        ValueError,
        "needs stored statistics for renorm",
    ),
    "no statistics later": (
        lambda: setting_without_statistics()(torch.randn(4, 3)),
        ValueError,
        "needs stored statistics for renorm",
    ),
    "function": (
        lambda: BatchNorm1d(3, renorm=Renorm(lambda _: 0.5))(torch.randn(4, 3)),
        ValueError,
        "rmax must be 1 or more, got 0.5",
    ),
    "one value": (lambda: BatchNorm1d(3, renorm=True)(torch.randn(1, 3)), ValueError, "more than 1 value per channel"),
}


def setting_without_statistics():
    layer = BatchNorm1d(3, track_running_stats=False)
    layer.renorm = True
    return layer


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_settings_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()
