"""Activation checkpointing: a forward repeated in a backward pass changes no statistic, and has the same bits."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchnorm as bn
from batchnorm import recomputation
from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.open_checkpoints import open_checkpoints
from batchnorm.variants.renorm import Renorm

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
STATE = ("running_mean", "running_var", "num_batches_tracked")


class Recorded(nn.Module):
    """A layer whose results are recorded, then squared: autograd keeps them, so that no repetition ends before."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.results = layer, []

    def forward(self, x, **options):
        y = self.layer(x, **options)
        self.results.append(y.detach().clone())
        return y.square()


def network(**options):
    return nn.Sequential(
        nn.Linear(3, 5), BatchNorm1d(5, act="relu", **options), nn.Linear(5, 4), BatchNorm1d(4)
    ).double()


def after(model, run, x):
    """Gradients and state after one pass forward and backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    run(model, x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())], model.state_dict()


def check_same(model, run, x):
    """Two steps with checkpointing leave the bits that two steps without it leave."""
    plain = copy.deepcopy(model)
    for _ in range(2):
        expected, state = after(plain, lambda m, x: m(x), x)
        found, stored = after(model, run, x)
        for a, b in zip([*expected, *state.values()], [*found, *stored.values()], strict=True):
            assert torch.equal(a, b)


def nested(use_reentrant):
    def run(model, x):
        def inner(x):
            return checkpoint(model[:2], x, use_reentrant=use_reentrant)

        return checkpoint(lambda x: model[2:](inner(x)), x, use_reentrant=use_reentrant)

    return run


RUNS = {
    "whole": lambda r: lambda m, x: checkpoint(m, x, use_reentrant=r),
    "nested": nested,
    "sequential": lambda r: lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=r),
    "without random state": lambda r: lambda m, x: checkpoint(m, x, use_reentrant=r, preserve_rng_state=False),
}


@reentrant
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_repeated_forward_changes_nothing(run, use_reentrant, momentum):
    check_same(network(momentum=momentum), run(use_reentrant), torch.randn(8, 3, dtype=torch.float64))


def test_early_stop_can_be_off():
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        check_same(network(), RUNS["whole"](False), torch.randn(8, 3, dtype=torch.float64))


@reentrant
def test_a_layer_used_twice_moves_its_statistics_twice(use_reentrant):
    layer = BatchNorm1d(3)
    model = nn.Sequential(layer, nn.ReLU(), layer).double()
    check_same(model, RUNS["whole"](use_reentrant), torch.randn(8, 3, dtype=torch.float64))
    assert layer.num_batches_tracked == 4


@reentrant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(use_reentrant, dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, act="silu"), nn.Dropout(0.3), nn.Conv2d(4, 2, 3))

    def run(model, x, by=lambda model, x: model(x)):
        with torch.autocast("cpu", dtype):
            return by(model, x).float()

    x, plain = torch.randn(4, 3, 8, 8), copy.deepcopy(model)
    expected, state = after(plain, run, x)
    found, stored = after(model, lambda m, x: run(m, x, RUNS["whole"](use_reentrant)), x)
    for a, b in zip([*expected, *state.values()], [*found, *stored.values()], strict=True):
        assert torch.equal(a, b)


@reentrant
def test_masks_weights_and_residuals(use_reentrant):
    x, layer = torch.randn(8, 3, 5, dtype=torch.float64), BatchNorm1d(3, act="relu").double()
    mask = torch.rand(8, 5) > 0.3
    weight = torch.rand(8, dtype=torch.float64) + 1

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x, x.sin(), mask=mask), weight=weight)

    check_same(Called(), RUNS["whole"](use_reentrant), x)


@reentrant
@pytest.mark.filterwarnings("ignore:NaN or infinity")
def test_a_batch_with_nan_is_counted_once(use_reentrant):
    layer, x = BatchNorm1d(2), torch.tensor([[1.0, torch.nan], [2.0, 3.0]], requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert layer.skipped_updates == 1
    assert layer.num_batches_tracked == 1


@reentrant
def test_a_repeated_forward_has_the_bits_of_the_first(use_reentrant):
    layer = Recorded(BatchNorm1d(3, memory="save", act="leaky_relu"))
    x = torch.randn(8, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    first, again = layer.results
    assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_torch_func_moves_statistics_as_before():
    layer = BatchNorm1d(3).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.func.grad(lambda x: layer(x).square().sum())(x)
    torch.func.jvp(layer, (x,), (x,))
    assert layer.num_batches_tracked == 2


# --- stored statistics that moved between a forward and its repetition --------------------------------------


def single(**options):
    return Recorded(BatchNorm1d(3, single_element="population", **options).double())


@reentrant
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_a_single_value_is_normalized_again_by_the_statistics_of_its_forward(use_reentrant, masked):
    model = single()
    x = torch.randn(1, 3, 2 if masked else 1, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False]]) if masked else None
    y = checkpoint(lambda x: model(x, mask=mask), x, use_reentrant=use_reentrant)
    scale = 1 / (model.layer.running_var + model.layer.eps).sqrt()
    model.layer(torch.randn(8, 3, dtype=torch.float64) * 5 + 2)  # moves the stored statistics
    y.sum().backward()
    first, again = model.results
    assert torch.equal(first, again)
    torch.testing.assert_close(x.grad[0, :, 0], 2 * first[0, :, 0] * scale, rtol=1e-12, atol=0)


@reentrant
def test_each_repetition_finds_its_own_forward(use_reentrant):
    model = single()
    inputs = [torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    results = []
    for x in inputs:
        results.append(checkpoint(model, x, use_reentrant=use_reentrant))
        model.layer(torch.randn(8, 3, dtype=torch.float64) * 3)
    first, model.results = model.results, []
    for k in (2, 0, 4, 1, 3):
        results[k].sum().backward()
        assert torch.equal(model.results[-1], first[k])


@reentrant
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_equal_batches_find_their_own_forwards_in_every_order(use_reentrant, order):
    model = single()
    x, results = torch.randn(1, 3, dtype=torch.float64, requires_grad=True), []
    for _ in range(3):
        results.append(checkpoint(model, x, use_reentrant=use_reentrant))
        model.layer(torch.randn(8, 3, dtype=torch.float64) * 3)
    first, model.results = model.results, []
    for k in order:
        results[k].sum().backward()
        assert torch.equal(model.results[-1], first[k])


def renormed():
    return BatchNorm1d(3, renorm=Renorm(rmax=3.0, dmax=5.0), momentum=0.5).double()


def gradient_after(look, run):
    """The gradient of a renorm layer's input if ``look`` gets the layer and the batch before the backward pass."""
    torch.manual_seed(1)
    layer, x = renormed(), torch.randn(8, 3, dtype=torch.float64).mul(3).add(4).requires_grad_()
    y = run(layer, x)
    look(layer, x)
    y.pow(3).sum().backward()
    return x.grad


def look_without_gradients(layer, x):
    with torch.no_grad():
        layer(x)


LOOKS = {
    "no gradients": look_without_gradients,
    "gradients": lambda layer, x: layer(x),
    "probe": lambda layer, x: bn.probe(layer, x.detach()),
    "another checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
}


@reentrant
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_another_forward_of_the_batch_is_not_taken_for_the_first(look, run, use_reentrant):
    checked = RUNS["whole"](use_reentrant)
    if run is RUNS["nested"]:
        checked = lambda layer, x: checkpoint(  # noqa: E731
            lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), x, use_reentrant=use_reentrant
        )
    elif run is not RUNS["sequential"]:
        checked = run(use_reentrant)
    assert torch.equal(gradient_after(look, checked), gradient_after(look, lambda layer, x: layer(x)))


@reentrant
def test_a_layer_called_twice_on_one_batch_is_repeated_in_order(use_reentrant):
    def twice(layer, x):
        return layer(x).pow(3) + layer(x).sin()

    def run(layer, x):
        return checkpoint(lambda x: twice(layer, x), x, use_reentrant=use_reentrant)

    nothing = lambda layer, x: None  # noqa: E731
    assert torch.equal(gradient_after(nothing, run), gradient_after(nothing, twice))


class OwnCheckpoint(Function):
    """A checkpoint of another library."""

    @staticmethod
    def forward(context, run, x):
        context.run = run
        context.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(context, grad):
        x = context.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            context.run(x).backward(grad)
        return None, x.grad


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_checkpoints_of_other_libraries(look):
    found = gradient_after(look, lambda layer, x: OwnCheckpoint.apply(layer, x))
    assert torch.equal(found, gradient_after(look, lambda layer, x: layer(x)))


@reentrant
def test_what_a_checkpoint_keeps_leaves_with_its_graph(use_reentrant):
    layer, kept = renormed(), []
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        y = layer(x)
        kept.extend(weakref.ref(each) for c in open_checkpoints()[0] for each in vars(c)[recomputation._KEPT][layer])
        return y

    y = checkpoint(run, x, use_reentrant=use_reentrant)
    assert [each() is not None for each in kept] == [True]
    y.sum().backward()
    del y
    gc.collect()
    assert all(each() is None for each in kept)


def test_without_a_checkpoint_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(recomputation, "_copies", None)
    layer = renormed()
    layer(torch.randn(8, 3, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(8, 3, dtype=torch.float64))


def test_a_second_backward_finds_the_forward_again():
    model = single()
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward(retain_graph=True)
    model.layer(torch.randn(8, 3, dtype=torch.float64))
    y.sum().backward(retain_graph=True)
    assert all(torch.equal(model.results[0], each) for each in model.results[1:])


def test_a_forward_that_repeats_nothing_warns():
    layer = renormed()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda grad: layer(x.detach()).sum() * grad)
    with pytest.warns(RuntimeWarning, match="no first forward of a checkpoint had this batch"):
        x.sum().backward()


# --- compiled programs --------------------------------------------------------------------------------------


@reentrant
@pytest.mark.slow
def test_a_compiled_layer_inside_a_checkpoint(use_reentrant):
    layer = BatchNorm1d(3).double()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    checkpoint(compiled, x, use_reentrant=use_reentrant).square().sum().backward()
    assert layer.num_batches_tracked == 1
    with torch.no_grad():
        expected = 0.1 * x.mean(0)
    torch.testing.assert_close(layer.running_mean, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_a_checkpoint_inside_a_compiled_function():
    layer = BatchNorm1d(3).double()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")
        run(x).square().sum().backward()
    assert layer.num_batches_tracked == 1


@reentrant
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_outer", [False, True])
@pytest.mark.parametrize(
    ("options", "size"), [({"renorm": Renorm(rmax=3.0, dmax=5.0)}, 8), ({"single_element": "population"}, 1)]
)
def test_a_compiled_repetition_that_reads_stored_statistics_is_refused(is_outer, options, size, use_reentrant):
    layer = BatchNorm1d(3, **options).double()
    x = torch.randn(size, 3, dtype=torch.float64, requires_grad=True)

    def checked(x, run=layer):
        return checkpoint(lambda x: run(x).square(), x, use_reentrant=use_reentrant)

    if is_outer:
        y = torch.compile(checked, backend="aot_eager")(x)
    else:
        y = checked(x, torch.compile(layer, backend="aot_eager"))
    with pytest.raises(RuntimeError, match="must not run again inside a backward pass"):
        y.sum().backward()
