"""step_backward: micro-batches give the loss, gradients and statistics of one batch; exact ones to rounding."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.micro_batches import step_totals

SIZES = ([8, 8, 8, 8], [1, 2, 20, 9], [32])
parts_held = pytest.mark.parametrize("segments", [1, 2, 99])
D = torch.float64


def square(output, micro):
    """A mean over examples."""
    return (output.flatten(1) - micro[-1]).square().mean()


class Blocks(nn.Module):
    """A residual network in which every layer's result is added to a stream, before or after the layer."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.layers = nn.ModuleList(BatchNorm2d(4, act="relu") for _ in range(4))
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x):
        h = self.first(x)
        for layer, convolution in zip(self.layers, self.convolutions, strict=True):
            h = self.order(h, layer, convolution)
        return self.last(h.mean((2, 3)))


def behind(h, layer, convolution):
    return layer(convolution(h), h)


def before(h, layer, convolution):
    return h + convolution(layer(h))


def in_place(h, layer, convolution):
    y = convolution(layer(h))
    y += h
    return y


def stream_in_place(h, layer, convolution):
    h += convolution(layer(h * 1))
    return torch.nn.functional.silu(h, True)


def around(h, layer, convolution):
    y = layer(convolution(h))
    y.add_(layer(h))  # the layer's first result is changed behind its second call
    return y.relu_()


def view_in_place(h, layer, convolution):
    y = convolution(layer(h * 1))
    h[:, :2] += y[:, 2:]
    return h + y


class Opaque(Function):
    """A square whose input torch's function mode does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def unseen(h, layer, convolution):
    return layer(convolution(h)) + Opaque.apply(h)


class Dense(nn.Module):
    """Every layer reads the results of all layers before it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(5 + 4 * k, 4) for k in range(4))
        self.layers = nn.ModuleList(BatchNorm1d(4, act="gelu", affine=k != 2) for k in range(4))

    def forward(self, x):
        found = [x]
        for linear, layer in zip(self.linear, self.layers, strict=True):
            found.append(layer(linear(torch.cat(found, 1))))
        return torch.cat(found, 1)


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.second = nn.Linear(5, 6), BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.layer(self.first(x)).tanh()
        return self.layer(self.second(h)) + h


def moved(layer):
    """A layer whose stored statistics are not those of a new layer."""
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def plain(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


NETWORKS = {
    "behind": (lambda: Blocks(behind), (2, 5, 5)),
    "before": (lambda: Blocks(before), (2, 5, 5)),
    "in place": (lambda: Blocks(in_place), (2, 5, 5)),
    "stream in place": (lambda: Blocks(stream_in_place), (2, 5, 5)),
    "around": (lambda: Blocks(around), (2, 5, 5)),
    "dense": (Dense, (5,)),
    "shared": (Shared, (5,)),
    "activations in place": (
        plain(
            lambda: nn.Linear(5, 6), lambda: BatchNorm1d(6), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(6, 4),
            lambda: BatchNorm1d(4, memory="save", act="leaky_relu"),
        ),
        (5,),
    ),
    "first and last": (
        plain(lambda: BatchNorm1d(5), lambda: nn.Linear(5, 4), lambda: BatchNorm1d(4, momentum=None)), (5,)
    ),
    "without statistics": (
        plain(lambda: nn.Linear(5, 4), lambda: BatchNorm1d(4, track_running_stats=False), lambda: nn.Linear(4, 3)),
        (5,),
    ),
    "last axis": (
        plain(lambda: nn.Linear(5, 4), lambda: BatchNorm1d(4, axis=-1, act="elu"), lambda: nn.Linear(4, 3)), (3, 5)
    ),
    "own weight": (plain(lambda: nn.Linear(5, 4), lambda: BatchNorm1d(4, own_weight=0.3)), (5,)),
    "renorm": (
        plain(
            lambda: nn.Linear(5, 4), lambda: moved(BatchNorm1d(4, renorm=bn.Renorm(rmax=1.3, dmax=0.4))),
            lambda: nn.Linear(4, 4), lambda: moved(BatchNorm1d(4, renorm=bn.Renorm(rmax=3.0, dmax=5.0))),
        ),
        (5,),
    ),
    "alone": (plain(lambda: nn.Linear(5, 4), lambda: BatchNorm1d(4, single_element="population")), (5,)),
}  # fmt: skip
networks = pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS)


def expected(model, x, forward, loss=square):
    """The model after one pass on the whole batch, its loss, and a target."""
    whole = copy.deepcopy(model)
    output = forward(whole, (x,))
    target = torch.randn(output.flatten(1).shape, dtype=D)
    value = loss(output, (x, target))
    value.backward()
    return whole, value.detach(), target


def check(model, x, sizes, *, forward=lambda model, micro: model(micro[0]), **options):
    """``step_backward`` on parts of ``x`` does what one pass on ``x`` does."""
    whole, loss, target = expected(model, x, forward)
    micros = list(zip(x.split(sizes), target.split(sizes), strict=True))
    found = bn.step_backward(model, micros, square, forward=forward, **options)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-14)
    norm = torch.stack([p.grad.norm() for p in whole.parameters() if p.grad is not None]).norm()
    for name, p in whole.named_parameters():
        mine = model.get_parameter(name).grad
        assert (mine is None) == (p.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, p.grad, rtol=1e-10, atol=1e-12 * float(norm))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-11, atol=1e-13)


@networks
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@parts_held
def test_exact_gradients_are_those_of_the_whole_batch(make, shape, sizes, segments):
    check(make().double(), torch.randn(32, *shape, dtype=D) * 2 + 1, sizes, segments=segments)


@pytest.mark.parametrize("order", [view_in_place, unseen])
def test_graphs_that_cannot_be_cut_are_held_whole(order):
    x = torch.randn(12, 2, 5, 5, dtype=D)
    check(Blocks(order).double(), x, [4, 8])
    with pytest.warns(RuntimeWarning, match="holds the graphs of all micro-batches instead of 3 segments"):
        check(Blocks(order).double(), x, [4, 8], segments=3)


@networks
def test_without_waiting_forwards_the_result_is_the_same(make, shape, monkeypatch):
    monkeypatch.setattr(step_totals, "why_not", lambda model: "greenlet is not installed")
    check(make().double(), torch.randn(32, *shape, dtype=D), [8, 14, 10])


class Remembering(Shared):
    """A model that keeps a tensor as its attribute between its layers."""

    def forward(self, x):
        self.kept = self.layer(self.first(x)).tanh()
        return self.layer(self.second(self.kept)) + self.kept


def test_a_model_that_keeps_tensors_in_itself():
    check(Remembering().double(), torch.randn(32, 5, dtype=D), [8, 14, 10])


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("kind", ["mask", "channels", "lengths", "weight", "keep"])
def test_masks_lengths_and_weights(kind, segments):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 3, 1)
            self.layers = nn.ModuleList(
                BatchNorm1d(3, act="silu", padding="keep" if kind == "keep" else "zero") for _ in range(2)
            )

        def forward(self, x, option):
            options = {{"channels": "mask", "keep": "mask"}.get(kind, kind): option}
            h = self.layers[0](self.first(x), **options)
            return self.layers[1](self.second(h), h, **options)

    model, x = Masked().double(), torch.randn(24, 2, 6, dtype=D)
    option = {
        "mask": torch.rand(24, 6) > 0.4,
        "keep": torch.rand(24, 6) > 0.4,
        "channels": torch.rand(24, 3, 6) > 0.4,
        "lengths": torch.randint(0, 7, (24,)),
        "weight": torch.rand(24, dtype=D),
    }[kind]
    at = {id(part): o for part, o in ((x, option),)}

    def forward(model, micro):
        return model(micro[0], at[id(micro[0])] if id(micro[0]) in at else micro[1])

    whole, loss, target = expected(model, x, forward)
    micros = list(zip(x.split([3, 9, 12]), option.split([3, 9, 12]), target.split([3, 9, 12]), strict=True))
    found = bn.step_backward(model, micros, square, forward=lambda m, micro: m(*micro[:2]), segments=segments)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-11, atol=1e-13)


class Noise(nn.Module):
    """Dropout by three sources of random numbers; records its factors."""

    def __init__(self):
        super().__init__()
        self.factors = []

    def forward(self, x):
        factor = (torch.rand(x.shape, dtype=D) > 0.5).double() * (1 + random.random())
        self.factors.append(factor)
        return x * factor


class Given(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@parts_held
@pytest.mark.parametrize("waits", [True, False])
def test_random_numbers_are_the_same_in_every_run(segments, waits, monkeypatch):
    if not waits:
        monkeypatch.setattr(step_totals, "why_not", lambda model: "greenlet is not installed")

    def network(noises):
        return nn.Sequential(nn.Linear(5, 6), noises[0], BatchNorm1d(6), noises[1], nn.Linear(6, 6), BatchNorm1d(6))

    noises = [Noise(), Noise()]
    model, x, t = network(noises).double(), torch.randn(32, 5, dtype=D), torch.randn(32, 6, dtype=D)
    plain, sizes = copy.deepcopy(model), [8, 14, 10]
    torch.manual_seed(3)
    random.seed(3)
    for micro in x.split(sizes):
        plain(micro)
    after = torch.rand(()), random.random()
    torch.manual_seed(3)
    random.seed(3)
    bn.step_backward(model, list(zip(x.split(sizes), t.split(sizes), strict=True)), square, segments=segments)
    assert (torch.rand(()), random.random()) == after
    drawn = [list(plain[k].factors) for k in (1, 3)]
    for k, factors in zip((1, 3), drawn, strict=True):
        assert all(any(torch.equal(f, g) for g in factors) for f in model[k].factors)
    whole = network([Given(torch.cat(factors)) for factors in drawn]).double()
    whole.load_state_dict(plain.state_dict())
    for layer in (whole[2], whole[5]):
        layer.reset_running_stats()
    square(whole(x), (x, t)).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(model[5].running_var, whole[5].running_var, rtol=1e-11, atol=0)


@pytest.mark.parametrize("segments", [1, 3])
def test_graphs_are_freed(segments):
    alive = []

    class Marked(Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Marking(Dense):
        def forward(self, x):
            return super().forward(Marked.apply(x * self.linear[0].weight[0])).relu()

    bn.step_backward(Marking(), torch.randn(16, 5).split(8), lambda y, _: y.square().sum(), segments=segments)
    gc.collect()
    assert len(alive) > 2
    assert not any(ref() is not None for ref in alive)


@parts_held
def test_complex_numbers(segments):
    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, dtype=torch.complex128)

    model = nn.Sequential(linear(3, 4), BatchNorm1d(4, dtype=torch.complex128), linear(4, 2))
    x, whole = torch.randn(16, 3, dtype=torch.complex128) + 2, copy.deepcopy(model)
    bn.step_backward(model, x.split([5, 11]), lambda y, _: y.abs().pow(3).mean(), segments=segments)
    whole(x).abs().pow(3).mean().backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-11, atol=1e-13)


def test_gradients_of_inputs_and_earlier_gradients_stay():
    model, x = Shared().double(), torch.randn(16, 5, dtype=D)
    whole = copy.deepcopy(model)
    parts = [part.clone().requires_grad_() for part in x.split(8)]
    joined = x.clone().requires_grad_()
    for each in (model, whole):
        each.first.weight.grad = torch.ones(6, 5, dtype=D)
    bn.step_backward(model, parts, lambda output, micro: output.square().sum(), reduction="sum")
    whole(joined).square().sum().backward()
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), joined.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.first.weight.grad, whole.first.weight.grad, rtol=1e-10, atol=1e-12)


def test_a_mean_counts_each_loss_by_its_examples_and_a_sum_adds():
    x, t = torch.randn(12, 5, dtype=D), torch.randn(12, 6, dtype=D)
    micros = list(zip(x.split([2, 10]), t.split([2, 10]), strict=True))
    for reduction, loss in (("mean", square), ("sum", lambda y, micro: (y - micro[1]).square().sum() / (12 * 6))):
        model, whole = Shared().double(), None
        torch.manual_seed(0)
        model.load_state_dict(Shared().double().state_dict())
        whole = copy.deepcopy(model)
        found = bn.step_backward(model, micros, loss, reduction=reduction)
        torch.testing.assert_close(found, square(whole(x), (x, t)), rtol=1e-12, atol=0)


def test_layers_in_eval_mode_and_frozen_layers_stay():
    model = nn.Sequential(nn.Linear(5, 4), BatchNorm1d(4), nn.Linear(4, 4), BatchNorm1d(4), BatchNorm1d(4)).double()
    model[1].eval()
    bn.freeze(model[3])
    check(model, torch.randn(16, 5, dtype=D), [8, 8])
    assert model[1].num_batches_tracked == model[3].num_batches_tracked == 0


def test_parts_without_gradients():
    class Partly(Shared):
        def forward(self, x):
            with torch.no_grad():
                h = self.layer(self.first(x))
            return self.second(h)

    check(Partly().double(), torch.randn(16, 5, dtype=D), [8, 8])


@parts_held
def test_under_autocast(segments):
    model = nn.Sequential(nn.Linear(5, 8), BatchNorm1d(8, act="relu"), nn.Linear(8, 4), BatchNorm1d(4))
    x, t = torch.randn(64, 5), torch.randn(64, 4)
    whole = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        square(whole(x).float(), (x, t)).backward()
        micros = list(zip(x.split(16), t.split(16), strict=True))
        bn.step_backward(model, micros, lambda y, micro: square(y.float(), micro), segments=segments)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 2**-7 * (q.grad.norm() + whole[0].weight.grad.norm())


def test_constant_gradients_are_those_of_constant_statistics():
    model, x, t = Dense().double(), torch.randn(32, 5, dtype=D), torch.randn(32, 21, dtype=D)
    whole = copy.deepcopy(model)
    micros = list(zip(x.split(8), t.split(8), strict=True))
    found = bn.step_backward(model, micros, square, gradient="constant")
    torch.testing.assert_close(found, square(copy.deepcopy(whole)(x), (x, t)).detach(), rtol=1e-12, atol=0)
    given = {}
    for path, layer in whole.named_modules():  # the whole batch's statistics, as constants of eval mode
        if isinstance(layer, BatchNorm1d):
            layer.momentum = 1.0
            given[path] = layer
    count = 32
    whole(x)
    for layer in given.values():
        layer.running_var *= (count - 1) / count
    square(whole.eval()(x), (x, t)).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:NaN or infinity")
@pytest.mark.parametrize("gradient", ["exact", "constant"])
def test_values_that_are_not_finite_are_not_stored(gradient):
    model, x = nn.Sequential(BatchNorm1d(3)).double(), torch.randn(16, 3, dtype=D)
    x[3, 1] = torch.nan
    before = model[0].running_mean.clone()
    bn.step_backward(model, x.split(8), lambda y, _: y.nan_to_num().sum(), gradient=gradient)
    assert model[0].skipped_updates == model[0].num_batches_tracked == 1
    assert model[0].running_mean[1] == before[1]
    assert model[0].running_mean[0] != before[0]


def test_an_empty_micro_batch_is_left_out():
    model, x = Shared().double(), torch.randn(16, 5, dtype=D)
    whole = copy.deepcopy(model)
    bn.step_backward(model, x.split([8, 0, 8]), lambda y, _: y.square().sum(), reduction="sum")
    whole(x).square().sum().backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


# --- bad input ----------------------------------------------------------------------------------------------


def total(output, _micro):
    return output.square().sum()


def test_bad_arguments_are_refused():
    model, micros = Shared(), list(torch.randn(16, 5).split(8))
    wrong = [
        (("model", micros, total), {}, TypeError, "step_backward needs an nn.Module"),
        ((model, torch.randn(16, 5), total), {}, TypeError, r"needs a list of micro-batches, got a? ?Tensor.*x.split"),
        ((model, [], total), {}, ValueError, "at least one micro-batch, got none"),
        ((model, 3, total), {}, TypeError, "needs a list of micro-batches"),
        ((model, [None], total), {}, TypeError, "needs a batch that holds tensors"),
        ((model, micros, 3), {}, TypeError, r"needs a function loss\(output, micro\)"),
        ((model, micros, total), {"forward": 3}, TypeError, r"needs a function forward\(model, micro\)"),
        ((model, micros, total), {"gradient": "approximate"}, ValueError, "gradient must be 'exact' or 'constant'"),
        ((model, micros, total), {"reduction": "max"}, ValueError, "reduction must be 'mean' or 'sum'"),
        ((model, micros, total), {"segments": 0}, ValueError, "segments must be 1 or more, got 0"),
        ((model, micros, total), {"segments": 1.5}, TypeError, "segments must be a whole number"),
        ((model, micros, lambda y, _: y), {}, ValueError, r"a loss that is one real number, got shape \(8, 6\)"),
        ((model, micros, lambda y, _: 3.0), {}, ValueError, "a loss that is one real number, got"),
        ((nn.Linear(5, 2), micros, total), {}, ValueError, r"got no batch norm layer. Convert the model"),
        ((nn.BatchNorm1d(5), micros, total), {}, ValueError, r"got BatchNorm1d at ''. Convert the model"),
        ((Shared().eval(), micros, total), {}, ValueError, r"needs a model in train mode"),
        ((nn.DataParallel(model), micros, total), {}, ValueError, r"without DataParallel.*Pass model.module"),
        ((model, [torch.randn(1, 5)], total), {}, ValueError, r"more than 1 value per channel in a step, got 1 at"),
        (
            (BatchNorm1d(5, ghost_batch_size=4), micros, total),
            {},
            ValueError,
            "got ghost_batch_size=4 at ''. Use batchn",
        ),
        (
            (bn.LazyBatchNorm1d(), micros, total),
            {},
            ValueError,
            "got LazyBatchNorm1d at ''. Run the model on one batch",
        ),
        ((model, [{}], total), {}, TypeError, "needs a batch that holds tensors"),
    ]
    for arguments, options, error, message in wrong:
        with pytest.raises(error, match=message):
            bn.step_backward(*arguments, **options)
        if isinstance(arguments[0], nn.Module):
            assert not any(getattr(module, "_step", None) for module in arguments[0].modules())
    assert all(p.grad is None for p in model.parameters())
    assert model.layer.num_batches_tracked == 0


@pytest.mark.parametrize("gradient", ["exact", "constant"])
def test_after_an_exception_everything_is_as_before(gradient):
    model, micros = Shared(), list(torch.randn(16, 5).split(8))
    model.first.weight.grad = torch.ones(6, 5)
    state = copy.deepcopy(model.state_dict())

    def loss(output, micro):
        if micro is micros[1]:
            raise KeyboardInterrupt
        return output.square().sum()

    with pytest.raises(KeyboardInterrupt):
        bn.step_backward(model, micros, loss, gradient=gradient)
    assert torch.equal(model.first.weight.grad, torch.ones(6, 5))
    assert model.second.weight.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    bn.step_backward(model, micros, total, gradient=gradient)


def test_forwards_that_take_different_ways_are_refused():
    class Way(Shared):
        def forward(self, x):
            return self.layer(self.first(x)) if x.sum() > 0 else self.second(self.first(x))

    x = torch.rand(16, 5)
    for micros in ([x, -x], [-x, x]):
        with pytest.raises(ValueError, match=r"needs (micro-batches that run|every micro-batch to reach)"):
            bn.step_backward(Way(), micros, total)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("gradient", ["exact", "constant"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@parts_held
def test_a_model_that_recomputes_is_refused(gradient, use_reentrant, segments):
    class Recomputing(Shared):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    x = [part.requires_grad_() for part in torch.randn(16, 5).split(8)]
    with pytest.raises(RuntimeError, match="runs a model that recomputes nothing itself"):
        bn.step_backward(Recomputing(), x, total, gradient=gradient, segments=segments)
    assert torch._C._is_fwd_grad_enabled()  # which every waiting forward found off, inside an autograd Function


def test_a_step_inside_a_step_is_refused():
    model = Shared()
    with bn.step(model), pytest.raises(RuntimeError, match="outside of such a block"):
        bn.step_backward(model, torch.randn(16, 5).split(8), total)


def test_an_input_that_is_changed_in_place_is_refused():
    class Overwriting(Shared):
        def forward(self, x):
            h = self.first(x)
            y = self.layer(h)
            h.mul_(2)
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        bn.step_backward(Overwriting(), torch.randn(16, 5).split(8), total)


class Bracketed(Shared):
    """A model that multiplies a layer's input by its own first column, by means that last for a forward."""

    def __init__(self, means):
        super().__init__()
        self.means = [means]

    def forward(self, x):
        scale = x[:, :1]
        if bool((scale == 1).all()):
            return super().forward(x)
        with self.means[0](self.second, scale):
            return super().forward(x)


@contextlib.contextmanager
def by_hook(module, scale):
    handle = module.register_forward_hook(lambda _, __, y: y * scale)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def by_hook_of_all(module, scale):
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, y: y * scale if m is module else None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def by_attribute(module, scale):
    module.forward = lambda x: nn.Linear.forward(module, x) * scale
    try:
        yield
    finally:
        del module.forward


@pytest.mark.parametrize(
    ("means", "ones"),  # examples whose forward has no such means; attributes are watched in the first micro-batch
    [(by_hook, 0), (by_hook, 8), (by_hook, 22), (by_hook_of_all, 0), (by_hook_of_all, 8), (by_attribute, 0)],
)
def test_what_lasts_for_a_forward_does_not_reach_other_forwards(means, ones):
    x = torch.randn(32, 5, dtype=D)
    x[:ones, 0] = 1
    check(Bracketed(means).double(), x, [8, 14, 10])


@parts_held
def test_padding_in_the_forward(segments):
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), BatchNorm1d(4), nn.Conv1d(4, 3, 3), BatchNorm1d(3)).double()
    lengths, x = torch.randint(3, 9, (12,)), torch.randn(12, 3, 8, dtype=D)

    def padded(model, micro):
        with bn.padding(model, micro[1]):
            return model(micro[0])

    whole = copy.deepcopy(model)
    loss = padded(whole, (x, lengths)).pow(3).sum()
    loss.backward()
    micros = list(zip(x.split(5), lengths.split(5), strict=True))
    found = bn.step_backward(
        model, micros, lambda y, _: y.pow(3).sum(), forward=padded, reduction="sum", segments=segments
    )
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12 * float(theirs.grad.norm() + 1))


def penalty_of(kind):
    """A loss with a gradient of the output with respect to a parameter, a hidden tensor, or an output itself."""

    def loss(y, micro):
        y, model, h = y
        if kind == "parameter":
            grad = torch.autograd.grad(y.sum(), model.second.weight, create_graph=True)[0]
        elif kind == "hidden tensor":
            grad = torch.autograd.grad(y.sum() + h.sum(), h, create_graph=True, allow_unused=True)[0]
        else:
            y.sum().backward(retain_graph=True) if kind == "backward" else torch.autograd.backward(
                y.sum(), retain_graph=True
            )
            grad = y
        return grad.square().sum()

    return loss


class WithHidden(Shared):
    def forward(self, x):
        h = self.layer(self.first(x)).tanh()
        return self.layer(self.second(h)) + h, self, h


@parts_held
@pytest.mark.parametrize("kind", ["parameter", "hidden tensor", "backward", "function backward"])
def test_a_gradient_penalty_is_refused(kind, segments):
    model = WithHidden()
    with pytest.raises(RuntimeError, match="needs a forward and a loss that call no backward pass through batch norm"):
        bn.step_backward(model, torch.randn(16, 5).split(8), penalty_of(kind), segments=segments)
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_beside_batch_norm_is_allowed():
    """Forces of an own small graph, and gradients in the level before the first layer."""

    class Beside(Shared):
        def forward(self, x):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                slope = torch.autograd.grad(self.first(z).sin().sum(), z)[0]
            return super().forward(x + slope.detach())

    check(Beside().double(), torch.randn(32, 5, dtype=D), [8, 14, 10])
