"""memory="save": a leaky ReLU written over its input, and results that the backward pass computes again."""

from __future__ import annotations

import copy
import threading

import oracle
import oracle_activations
import pytest
import torch
from layouts import LAYOUTS, channels_last, contiguous
from test_layers import made
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm import memory
from batchnorm.kernels import choice, cpu
from batchnorm.kernels.activations import NAMES
from batchnorm.layers import BatchNorm1d, BatchNorm2d

NATIVE = choice.kernel_for(torch.zeros(2, 2)) is cpu
in_place = pytest.mark.skipif(not NATIVE, reason="only the native kernels write in place")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TWICE = (
    "memory='save' wrote the result over the input, but second derivatives and batched gradients need the input. "
    "Set memory=None."
)


# a leaky ReLU is written over its input; what is kept of the others is what this file calls saving
KINDS = [*(name for name in NAMES if name != "leaky_relu"), None]
kinds = pytest.mark.parametrize("act", KINDS)


def leaky(dtype=torch.float32, channels=3, cls=BatchNorm1d, **options):
    """A layer whose gamma is far enough from 0 for its input to be recovered."""
    layer = made(cls, channels, dtype=dtype, act="leaky_relu", memory="save", **options)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign() * (0.5 + layer.weight.abs()))
    return layer


# --- a leaky ReLU written over its input ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("slope", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("shape", [(20, 3), (4, 17, 5, 2), (2, 3, 70, 70)], ids=str)
def test_gradients_recovered_from_the_result_stay_within_rounding(shape, slope, layout, dtype):
    """z is off by one rounding of y, over gamma: e_z = u (|y| steepness + |r| + |beta|) / |gamma| + that of before."""
    cls = BatchNorm1d if len(shape) == 2 else BatchNorm2d
    layer = leaky(dtype, shape[1], cls, act_param=slope)
    leaf = layout((1 + 2 * torch.randn(shape)).to(dtype)).requires_grad_()
    x = leaf * 1
    y = layer(x)
    assert (y is x) == NATIVE
    grad = torch.randn(shape).to(dtype)
    wanted = [leaf, layer.weight, layer.bias]
    found = torch.autograd.grad(y, wanted, grad)
    values = [oracle.exact(t) for t in (leaf, grad, None, layer.weight, layer.bias)]
    expected, bound = oracle_activations.fused(*values, layer.eps, "leaky_relu", slope, dtype)
    oracle.assert_within(y, expected.y, bound.y)
    e_x, e_gamma = recovered(values, expected, layer.eps, slope, dtype)
    limits = [bound.d_x + e_x, bound.d_gamma + e_gamma, bound.d_beta]
    for one, value, limit in zip(found, expected[1:4], limits, strict=True):
        oracle.assert_within(one, value, limit)


def recovered(values, expected, eps, slope, dtype):
    """What the error of a recovered z adds to that of d_x and d_gamma."""
    x, _, _, gamma, beta = values
    axes, n = tuple(axis for axis in range(x.ndim) if axis != 1), x.size // x.shape[1]

    def along(v):
        return v.reshape(1, -1, *[1] * (x.ndim - 2))

    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    p = abs(along(gamma) * (x - along(x.mean(axes))) / along(x.var(axes) + eps) ** 0.5 + along(beta))
    # y was rounded once to its type, where float16 has spacing 2^-24 at least; slope and beta by `wide`
    rounded = torch.finfo(dtype).eps / 2 * p + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / min(
        slope, 1
    )
    e_z = (rounded + 6 * wide * (p + abs(along(beta)))) / abs(along(gamma))
    g = abs(expected.d_residual)
    rstd = along(x.var(axes) + eps) ** -0.5
    z = abs(x - along(x.mean(axes))) * rstd
    e_gamma, gz = (g * e_z).sum(axes), (g * z).sum(axes)
    return abs(along(gamma)) * rstd * (z * along(e_gamma) / n + e_z * along(gz) / n + e_z * along(e_gamma) / n), e_gamma


def check_as_if_kept(layer, x, residual=None):
    """Gradients are those of a z that is off by 32 roundings at most, which is what a small gamma is refused for."""
    dtype, leaf, grad = x.dtype, x.clone().requires_grad_(), torch.randn(x.shape).to(x.dtype)
    found = torch.autograd.grad(layer(leaf * 1, residual=residual), [leaf, layer.weight], grad)
    values = [oracle.exact(t) for t in (leaf, grad, residual, layer.weight, layer.bias)]
    expected, bound = oracle_activations.fused(*values, layer.eps, "leaky_relu", layer.act_param, dtype)
    wide, n, g = values[0], len(x), abs(expected.d_residual)
    rstd = (wide.var(0) + layer.eps) ** -0.5
    z = abs(wide - wide.mean(0)) * rstd
    e_z = 32 * torch.finfo(dtype).eps / 2 * (1 + z)
    e_gamma = (g * e_z).sum(0)
    e_x = abs(values[3]) * rstd * ((z + e_z) * e_gamma + e_z * (g * z).sum(0)) / n
    oracle.assert_within(found[0], expected.d_x, bound.d_x + e_x)
    oracle.assert_within(found[1], expected.d_gamma, bound.d_gamma + e_gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [10.0, 1e3, 5e4])
def test_a_residual_much_larger_than_the_result_does_not_spoil_gradients(size, dtype):
    """z is p - r over gamma, rounded at the size of p: the input must be kept where r is large."""
    if dtype == torch.float16 and size > 1e4:
        pytest.skip("the residual itself is infinite")
    check_as_if_kept(leaky(), torch.randn(64, 3).to(dtype), (size * torch.randn(64, 3)).to(dtype))


@pytest.mark.parametrize("slope", [1e-3, 1e-5, 1e-7, 1e-30, 1e-39, 1e3, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_slope_whose_results_leave_the_range_of_the_type_does_not_spoil_gradients(slope, dtype):
    """float16 ends at 6e-8 and 65504, float32 at 1e-45: what is behind cannot be recovered."""
    if dtype == torch.float16 and slope > 1e4:
        pytest.skip("y itself is infinite")
    check_as_if_kept(leaky(act_param=slope), torch.randn(64, 3).to(dtype))


@pytest.mark.parametrize(
    "same",
    [lambda x: x, lambda x: x[:], lambda x: x.detach(), lambda x: x.view(-1, 3)],
    ids=["itself", "a view", "detached", "reshaped"],
)
def test_the_input_as_its_own_residual_is_right_or_refused(same):
    layer, leaf, grad = leaky(), torch.randn(16, 3), torch.randn(16, 3)
    results = []
    for save in ("save", None):
        layer.memory = save
        start = leaf.clone().requires_grad_()
        x = start * 1
        results.append(torch.autograd.grad(layer(x, residual=same(x)), [start, layer.weight], grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_nobody_elses_tensor_is_overwritten():
    """Not a parameter, not data that needs no gradient, not a view, nor the base of a parameter."""
    layer = leaky()
    parameter = torch.randn(8, 3, requires_grad=True)
    base = torch.randn(8, 6, requires_grad=True) * 1
    for x in (parameter, base[:, :3].contiguous()[:], base.view(16, 3), parameter.detach(), torch.randn(8, 3)):
        before = x.detach().clone()
        y = layer(x)
        assert torch.equal(x, before)
        assert y is not x


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda layer: layer.weight.data[1].fill_(1e-3), {}),
        (lambda layer: layer.weight.data[1].fill_(0), {}),
        (lambda layer: layer.weight.data[1].fill_(torch.nan), {}),
        (lambda layer: layer.bias.data[2].fill_(1e3), {}),
        (lambda layer: layer.bias.data[2].fill_(torch.nan), {}),
        (lambda layer: layer.eval(), {}),
        (lambda layer: None, {"act_param": 0.0}),
        (lambda layer: None, {"act_param": -0.1}),
    ],
    ids=["tiny gamma", "gamma 0", "gamma NaN", "large beta", "beta NaN", "eval", "slope 0", "slope negative"],
)
def test_an_input_that_could_not_be_recovered_is_kept(change, options):
    layer = leaky(**options)
    change(layer)
    x = torch.randn(8, 3, requires_grad=True) * 1
    before = x.detach().clone()
    layer(x)
    assert torch.equal(x.detach(), before)


@kinds
def test_other_activations_are_not_written_over_their_input(act):
    x = torch.randn(8, 3, requires_grad=True) * 1
    before = x.detach().clone()
    layer = BatchNorm1d(3, act=act, memory="save")
    layer(x)
    with torch.no_grad():
        leaky()(x)
    with memory.saving():
        layer(x)
    assert torch.equal(x.detach(), before)


def test_what_the_reference_computes_is_not_written_over_its_input():
    x = (torch.randn(8, 3, 8, requires_grad=True) * 1)[..., ::2]
    before = x.detach().clone()
    leaky()(x).sum().backward()
    assert torch.equal(x.detach(), before)


@in_place
def test_an_input_that_others_need_for_their_gradients_is_an_error_of_torchs_not_a_wrong_gradient():
    x = torch.randn(8, 3, requires_grad=True).exp()
    y = leaky()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@in_place
def test_second_derivatives_and_batched_gradients_are_refused():
    x, layer = torch.randn(8, 3, requires_grad=True), leaky()
    y = layer(x * 1)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = layer(x * 1)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(y, x, torch.randn(2, 8, 3), is_grads_batched=True)


def test_transforms_do_not_write_over_the_input():
    layer, x = leaky(track_running_stats=False), torch.randn(8, 3)
    found = torch.func.grad(lambda x: layer(x * 1).pow(3).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf * 1).pow(3).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    batch = torch.randn(2, 8, 3)
    before = batch.clone()
    torch.vmap(layer)(batch)
    assert torch.equal(batch, before)


def test_gradients_may_be_asked_for_twice_and_one_by_one():
    layer, leaf = leaky(), torch.randn(8, 3, requires_grad=True)
    y = layer(leaf * 1)
    once = torch.autograd.grad(y.sum() * 3, (leaf, layer.weight), retain_graph=True)
    for i, of in enumerate((leaf, layer.weight)):
        assert torch.equal(torch.autograd.grad(y.sum() * 3, of, retain_graph=True)[0], once[i])


def test_stored_statistics_are_those_of_the_input_that_was_overwritten():
    layer = leaky()
    plain = copy.deepcopy(layer)
    plain.memory = None
    x = torch.randn(8, 3, requires_grad=True)
    layer(x * 1)
    plain(x * 1)
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


# --- saving -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer between two that keep their inputs."""

    def __init__(self, act="silu", save="save", dtype=torch.float32) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 1, dtype=dtype), nn.Conv2d(5, 2, 1, dtype=dtype)
        self.bn = made(BatchNorm2d, 5, act=act, memory=save, dtype=dtype)

    def forward(self, x, residual=None):
        return self.last(self.bn(self.first(x), residual=residual))


def gradients(net, x, *args):
    """All gradients of a pass inside of ``saving``, whose backward runs outside."""
    net.zero_grad()
    with memory.saving():
        y = net(x, *args)
    y.square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def both(net):
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, (BatchNorm1d, BatchNorm2d)):
            module.memory = None
    return net, plain


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_have_the_same_bits_as_without(act, dtype):
    net, plain = both(Net(act, dtype=dtype))
    for layout, with_residual in ((contiguous, False), (channels_last, False), (contiguous, True)):
        x = layout(torch.randn(4, 3, 9, 11).to(dtype))
        residual = torch.randn(4, 5, 9, 11).to(dtype) if with_residual else None
        assert_same_bits(gradients(net, x, residual), gradients(plain, x, residual))


@kinds
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("other", [None, contiguous, channels_last], ids=["alone", "contiguous", "channels last"])
def test_a_result_is_computed_again_with_its_own_layout(act, layout, other):
    layer, w = made(BatchNorm2d, 3, act=act, memory="save"), torch.randn(4, 3, 5, 2, requires_grad=True)
    x, residual = layout(torch.randn(4, 3, 5, 2)).requires_grad_(), other and other(torch.randn(4, 3, 5, 2))
    with memory.saving():
        y = layer(x, residual=residual)
        z = y * w
    (found,) = torch.autograd.grad(z.sum(), w)
    assert torch.equal(found, y)


def results_alive(net, x, *args):
    """How many results of layers are still in memory after a forward pass, and its own result."""
    refs = []

    def note(module, inputs, y):
        refs.append(StorageWeakRef(y.untyped_storage()))

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, (BatchNorm1d, BatchNorm2d))]
    with memory.saving():
        y = net(x, *args)
    for hook in hooks:
        hook.remove()
    return sum(not ref.expired() for ref in refs), y


@kinds
def test_results_are_freed_that_would_be_kept(act):
    net, plain = both(Net(act))
    x = torch.randn(4, 3, 16, 16)
    (saved, y), (unsaved, z) = results_alive(net, x), results_alive(plain, x)
    assert (saved, unsaved) == (0, 1)
    y.sum().backward()
    z.sum().backward()
    assert_same_bits([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_a_chain_of_layers_keeps_half_of_the_storages():
    def block():
        return nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3, act="silu", memory="save"))

    net, plain = both(nn.Sequential(*[block() for _ in range(4)], nn.Conv2d(3, 3, 1)))
    x = torch.randn(4, 3, 8, 8)
    counts = []
    for model in (net, plain):
        alive, y = results_alive(model, x)
        counts.append(alive)
        del y
    assert counts == [0, 4]
    assert_same_bits(gradients(net, x), gradients(plain, x))


@pytest.mark.parametrize(("act", "alive"), [("relu", 1), ("silu", 0), ("leaky_relu", 1)])
def test_with_a_residual_a_result_whose_sign_is_needed_is_kept(act, alive):
    net = Net(act)
    with torch.no_grad():
        net.bn.weight.fill_(1e-6)  # a leaky ReLU's input cannot be recovered then
    found, y = results_alive(net, torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6))
    assert found == alive
    y.sum().backward()


def test_blocks_may_be_nested():
    net, plain = both(Net())
    x = torch.randn(4, 3, 5, 5)
    with memory.saving():
        with memory.saving():
            inner = net(x)
        alive, outer = results_alive(net, x)
        assert alive == 0
    (inner + outer).sum().backward()
    (plain(x) + plain(x)).sum().backward()
    assert_same_bits([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("depth", [1, 2])
def test_after_an_error_nothing_is_computed_again(depth):
    def fail(depth):
        with memory.saving():
            if depth:
                fail(depth - 1)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail(depth)
    assert memory._recipes.by_address is None
    net = Net()
    y = net.bn(torch.randn(2, 5, 3, 3, requires_grad=True))
    ref = StorageWeakRef(y.untyped_storage())
    z = net.last(y)
    del y
    assert not ref.expired()
    z.sum().backward()


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y[1:].zero_(), lambda y: y.flatten(1).add_(1)])
def test_a_result_that_is_changed_in_place_is_kept_as_it_is_then(change):
    layer, w = made(BatchNorm1d, 3, act="silu", memory="save"), torch.randn(3, 3, requires_grad=True)
    x = torch.randn(8, 3, requires_grad=True)
    results = []
    for save in ("save", None):
        layer.memory = save
        with memory.saving():
            y = layer(x)
            change(y)
            z = (y @ w).pow(2).sum()
        results.append(torch.autograd.grad(z, [x, w, layer.weight]))
    assert_same_bits(*results)


def test_a_result_changed_after_others_kept_it_is_an_error_of_torchs_or_right():
    layer, w = made(BatchNorm1d, 3, act="silu", memory="save"), torch.randn(3, 3, requires_grad=True)
    with memory.saving():
        y = layer(torch.randn(8, 3, requires_grad=True))
        z, before = y @ w, y.detach().clone()
        with torch.no_grad():
            y.mul_(2)
    try:
        (found,) = torch.autograd.grad(z.sum(), w)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, before.sum(0)[:, None].expand(3, 3))


@pytest.mark.parametrize("what", ["input", "gamma", "residual"])
def test_what_a_recipe_needs_may_not_change_without_an_error(what):
    """Without saving, w's gradient does not depend on what happens to x, gamma and r after the forward pass."""
    layer, w = made(BatchNorm1d, 3, act="silu", memory="save"), torch.randn(3, 3, requires_grad=True)
    x, r = torch.randn(8, 3, requires_grad=True) * 1, torch.randn(8, 3)
    with memory.saving():
        y = layer(x, residual=r)
        z = y @ w
    expected = y.detach().sum(0)[:, None].expand(3, 3).clone()
    with torch.no_grad():
        {"input": x, "gamma": layer.weight, "residual": r}[what].mul_(2)
    try:
        (found,) = torch.autograd.grad(z.sum(), w)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, expected)


VIEWS = {
    "itself": lambda y: y,
    "flatten": lambda y: y.flatten(1),
    "transposed": lambda y: y.transpose(1, 2),
    "a part": lambda y: y[1:, :, 1:3],
    "expanded": lambda y: y[:1].expand(5, -1, -1),
    "detached": lambda y: y.detach() * y,
    "unbound": lambda y: y.unbind(1)[2],
    "complex": lambda y: torch.view_as_complex(y.unflatten(2, (2, 2))),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_a_result_are_computed_again_as_they_were(view):
    layer = made(BatchNorm1d, 3, act="silu", memory="save")
    x = torch.randn(6, 3, 4, requires_grad=True)
    results = []
    for save in ("save", None):
        layer.memory = save
        with memory.saving():
            v = view(layer(x))
            z = (v * v.exp()).abs().sum()
        results.append(torch.autograd.grad(z, [x, layer.weight, layer.bias]))
    assert_same_bits(*results)


def test_a_result_read_as_integers_keeps_its_bits():
    """Nothing differentiable does so, but a function of the user's may."""

    class Bits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y.detach().view(torch.int32))
            return y * 2

        @staticmethod
        def backward(ctx, grad):
            (bits,) = ctx.saved_tensors
            assert bits.dtype == torch.int32
            return grad * bits.view(torch.float32)

    layer, x = BatchNorm1d(3, act="silu", memory="save"), torch.randn(6, 3, requires_grad=True)
    with memory.saving():
        y = Bits.apply(layer(x))
    y.sum().backward()


def test_a_result_with_two_consumers_serves_both():
    layer = made(BatchNorm1d, 3, act="gelu", memory="save")
    a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    x, results = torch.randn(8, 3, requires_grad=True), []
    for save in ("save", None):
        layer.memory = save
        with memory.saving():
            y = layer(x)
            z = (y @ a).exp().sum() + (y.sigmoid() @ b).pow(2).sum() + y.pow(2).sum()
        results.append(torch.autograd.grad(z, [x, a, b, layer.weight]))
    assert_same_bits(*results)


def test_addresses_that_are_freed_and_used_again_are_not_mistaken():
    """Results that nobody keeps are freed at once; tensors of the same size that follow get their memory."""
    layer, x = made(BatchNorm1d, 64, act="silu", memory="save"), torch.randn(512, 64, requires_grad=True)
    w = torch.ones(512, 64, requires_grad=True)
    again, seen = 0, set()
    with memory.saving():
        for _ in range(20):
            with torch.no_grad():
                kept = layer(x.detach()).data_ptr()  # not remembered
            y = layer(x)
            seen.add(y.data_ptr())
            del y
            other = torch.full((512, 64), 3.0)
            again += other.data_ptr() in seen
            (found,) = torch.autograd.grad((other * w).sum(), w)
            assert torch.equal(found, other)
            assert kept
    assert again


def test_an_optimizers_step_between_two_passes_does_not_reach_back():
    net, plain = both(Net())
    for model in (net, plain):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with memory.saving():
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 3, 5, 5)).square().sum().backward()
                optimizer.step()
    assert_same_bits(net.parameters(), plain.parameters())
    assert_same_bits(net.buffers(), plain.buffers())


def test_the_graph_may_be_walked_twice_and_deeper():
    net, plain = both(Net("silu", dtype=torch.float64))
    x, results = torch.randn(4, 3, 5, 5, dtype=torch.float64), []
    for model in (net, plain):
        leaf = x.clone().requires_grad_()
        with memory.saving():
            z = model(leaf).pow(3).sum()
        (once,) = torch.autograd.grad(z, leaf, retain_graph=True)
        (first,) = torch.autograd.grad(z, leaf, create_graph=True)
        second = torch.autograd.grad(first.pow(2).sum(), [leaf, *model.parameters()], allow_unused=True)
        results.append([once, first, *(t for t in second if t is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_backward_inside_of_the_block_and_after_it_agree():
    net, plain = both(Net())
    x = torch.randn(4, 3, 5, 5)
    with memory.saving():
        net(x).square().sum().backward()
    assert_same_bits([p.grad for p in net.parameters()], gradients(plain, x))


def test_threads_save_each_for_itself():
    expected, found, errors = {}, {}, []
    nets = [both(Net()) for _ in range(4)]
    xs = [torch.randn(4, 3, 7, 7) for _ in nets]
    for i, (_, plain) in enumerate(nets):
        expected[i] = gradients(plain, xs[i])
    barrier = threading.Barrier(4)

    def work(i):
        try:
            barrier.wait()
            for _ in range(5):
                found[i] = gradients(nets[i][0], xs[i])
        except Exception as error:  # noqa: BLE001 - a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with memory.saving():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for i, values in expected.items():
        assert_same_bits(found[i], values)


def test_a_block_is_one_threads_alone():
    seen = []
    with memory.saving():
        thread = threading.Thread(target=lambda: seen.append(memory._recipes.by_address))
        thread.start()
        thread.join()
    assert seen == [None]


def test_backward_may_run_in_another_thread():
    net, plain = both(Net())
    x = torch.randn(4, 3, 5, 5)
    with memory.saving():
        z = net(x).square().sum()
    thread = threading.Thread(target=z.backward)
    thread.start()
    thread.join()
    assert_same_bits([p.grad for p in net.parameters()], gradients(plain, x))


def test_a_leaky_layer_writes_over_a_result_that_was_to_be_computed_again():
    first = made(BatchNorm1d, 3, act="silu", memory="save")
    second = leaky()
    x, w, results = torch.randn(8, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True), []
    for save in ("save", None):
        first.memory = second.memory = save
        with memory.saving():
            z = (second(first(x)) @ w).pow(2).sum()
        results.append(torch.autograd.grad(z, [x, w, first.weight, second.weight]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@kinds
def test_eval_mode_and_empty_batches_are_no_special_case(act):
    layer = made(BatchNorm1d, 3, act=act, memory="save")
    w = torch.randn(3, 3, requires_grad=True)
    with memory.saving():
        z = (layer(torch.empty(0, 3, requires_grad=True)) @ w).sum()
        y = layer.eval()(torch.randn(4, 3, requires_grad=True))
        v = (y @ w).sum()
    z.backward()
    assert not w.grad.any()
    v.backward()
    assert torch.equal(w.grad, torch.autograd.grad((y.detach() @ w).sum(), w)[0])
