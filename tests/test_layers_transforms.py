"""Layers under torch.func, torch.compile and torch.export: the same numbers and the same stored statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

# forward mode and inductor make torch load parts of its own that still use the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

MODELS = 3
# both sides run the same operations on the same values, but sums may be taken in another order: at most
# path(n) u of the values' size, which is below 4e-15 for the sums here
SAME = {"rtol": 1e-13, "atol": 1e-13}


def network(**options) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 5), BatchNorm1d(5, **options), nn.Tanh(), nn.Linear(5, 3)).double()
    if net[1].weight is not None:
        nn.init.normal_(net[1].weight)
    return net


def ensemble(**options) -> tuple[list[nn.Sequential], dict, dict]:
    models = [network(**options) for _ in range(MODELS)]
    return models, *stack_module_state(copy.deepcopy(models))


def call(models: list[nn.Sequential]):
    return lambda parameters, buffers, x: functional_call(models[0], (parameters, buffers), (x,))


def assert_same_buffers(models: list[nn.Sequential], buffers: dict) -> None:
    for name, stacked in buffers.items():
        torch.testing.assert_close(stacked, torch.stack([m.get_buffer(name) for m in models]), **SAME)


OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}]


# --- ensembles under vmap ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("data", ["own data", "shared data"])
def test_an_ensemble_trains_as_its_models_do_one_by_one(options, data):
    models, parameters, buffers = ensemble(**options)
    apply = call(copy.deepcopy(models))
    for _ in range(2):
        x = torch.randn(MODELS, 8, 4, dtype=torch.float64)
        in_dims = (0, 0, 0)
        if data == "shared data":
            x, in_dims = x[0], (0, 0, None)
        together = vmap(apply, in_dims)(parameters, buffers, x)
        apart = torch.stack([m(x if x.ndim == 2 else x[i]) for i, m in enumerate(models)])
        torch.testing.assert_close(together, apart, **SAME)
    together.pow(3).sum().backward()
    apart.pow(3).sum().backward()
    for name, stacked in parameters.items():
        gradients = torch.stack([m.get_parameter(name).grad for m in models])
        torch.testing.assert_close(stacked.grad, gradients, **SAME)
    assert_same_buffers(models, buffers)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_inside_vmap_are_those_of_the_models(options):
    models, parameters, buffers = ensemble(**options)
    apply, x = call(copy.deepcopy(models)), torch.randn(MODELS, 8, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in parameters.items()}
    found = vmap(grad(lambda *args: apply(*args).pow(3).sum()))(parameters, buffers, x)
    for i, model in enumerate(models):
        model(x[i]).pow(3).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, **SAME)
    assert_same_buffers(models, buffers)


@pytest.mark.parametrize(
    ("cls", "shape"), [(BatchNorm2d, (4, 3, 2, 5)), (BatchNorm3d, (2, 3, 2, 2, 3))], ids=["2d", "3d"]
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_models_may_be_on_any_axis_of_the_input(cls, shape, axis):
    layer = cls(3, track_running_stats=False)
    x = torch.randn(MODELS, *shape)
    found = vmap(layer, axis, axis)(x.movedim(0, axis))
    torch.testing.assert_close(found.movedim(axis, 0), torch.stack([layer(one) for one in x]))


def test_ensembles_of_ensembles_keep_all_statistics_apart():
    layer = BatchNorm1d(4).double()
    buffers = {name: b.expand(2, MODELS, *b.shape).clone() for name, b in layer.named_buffers()}
    x = torch.randn(2, MODELS, 6, 4, dtype=torch.float64)
    y = vmap(vmap(lambda b, x: functional_call(layer, b, (x,))))(buffers, x)
    for i in range(2):
        for j in range(MODELS):
            alone = copy.deepcopy(layer)
            torch.testing.assert_close(y[i, j], alone(x[i, j]), **SAME)
            for name, value in alone.named_buffers():
                torch.testing.assert_close(buffers[name][i, j], value, **SAME)


def test_a_model_that_diverges_does_not_touch_its_neighbours():
    models, parameters, buffers = ensemble()
    x = torch.randn(MODELS, 8, 4, dtype=torch.float64)
    x[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="5 of 15 channels"):
        y = vmap(call(models))(parameters, buffers, x)
    assert y[[0, 2]].isfinite().all()
    assert not buffers["1.running_mean"][1].any()
    assert all(buffers["1.running_mean"][i].all() for i in (0, 2))


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(lambda x: f(x).sum()))], ids=["vmap", "vmap grad"])
def test_statistics_shared_by_the_models_are_refused(transform):
    layer = BatchNorm1d(4)
    with pytest.raises(RuntimeError, match=r"needs running statistics for each model, got one set shared by 3\. Pass"):
        transform(layer)(torch.randn(MODELS, 8, 4))
    assert not layer.running_mean.any()
    assert layer.num_batches_tracked == 0
    assert transform(layer.eval())(torch.randn(MODELS, 8, 4)).shape == (MODELS, 8, 4)


# --- derivatives ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_directional_derivative_is_that_of_finite_differences(training):
    net = network(track_running_stats=not training).train(training)
    x, direction, h = *torch.randn(2, 8, 4, dtype=torch.float64), 1e-5
    y, found = jvp(net, (x,), (direction,))
    torch.testing.assert_close(y, net(x), **SAME)
    # central differences are off by h^2 / 6 times a third derivative of order 1e2, and by u / h
    expected = (net(x + h * direction) - net(x - h * direction)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-8)


def test_stored_statistics_are_updated_once_inside_a_derivative():
    net, other = network(), None
    other = copy.deepcopy(net)
    x = torch.randn(8, 4, dtype=torch.float64)
    grad(lambda x: net(x).sum())(x)
    jvp(net, (x,), (x,))
    other(x)
    other(x)
    assert_same_buffers([other], {name: b[None] for name, b in net.named_buffers()})


# --- torch.compile ----------------------------------------------------------------------------------------


def assert_compiled_equals_eager(net: nn.Module, x: torch.Tensor, backend: str) -> None:
    other = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for _ in range(2):
        found, expected = compiled(x), other(x)
        torch.testing.assert_close(found, expected, **SAME)
        for y, model in ((found, net), (expected, other)):
            model.zero_grad()
            y.pow(3).sum().backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **SAME)
    for (name, a), b in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, **SAME, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_network_equals_the_eager_one(options, training):
    x = torch.randn(8, 4, dtype=torch.float64)
    assert_compiled_equals_eager(network(**options).train(training), x, "aot_eager")


def _inductor_has_a_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not _inductor_has_a_compiler(), reason="inductor itself needs a C++ compiler")
def test_a_compiled_network_equals_the_eager_one_through_inductor():
    assert_compiled_equals_eager(network(momentum=None), torch.randn(8, 4, dtype=torch.float64), "inductor")


def test_a_compiled_layer_keeps_channels_last():
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for training in (True, False):
        compiled = torch.compile(BatchNorm2d(3).train(training), backend="aot_eager", fullgraph=True)
        assert compiled(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_compiled_network_takes_batches_of_any_size():
    net = network()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (8, 5, 2, 13):
        x = torch.randn(n, 4, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), copy.deepcopy(net)(x), **SAME)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 4, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("of", [grad, lambda f: vmap(grad(f))], ids=["grad", "vmap grad"])
def test_a_compiled_derivative_equals_the_eager_one(of):
    net = network(track_running_stats=False)
    derivative = of(lambda x: net(x).pow(3).sum())
    x = torch.randn(*([8, 4] if of is grad else [MODELS, 8, 4]), dtype=torch.float64)
    compiled = torch.compile(derivative, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), derivative(x), **SAME)


# --- torch.export -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
def test_an_exported_network_equals_the_eager_one_on_any_batch_size(options, training):
    net = network(**options).train(training)
    before = copy.deepcopy(net)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(net, (torch.randn(8, 4, dtype=torch.float64),), dynamic_shapes=shapes)
    assert_same_buffers([before], {name: b[None] for name, b in net.named_buffers()})  # export is only a look
    exported = program.module()
    for n in (8, 3):
        x = torch.randn(n, 4, dtype=torch.float64)
        torch.testing.assert_close(exported(x), net(x), **SAME)
    assert_same_buffers([net], {name: b[None] for name, b in exported.named_buffers() if "skipped" not in name})


def test_fx_takes_a_layer_for_a_leaf_as_it_does_with_torchs_own():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BatchNorm2d(4), torch.nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes if node.op == "call_module"] == [
        ("call_module", "0"),
        ("call_module", "1"),
        ("call_module", "2"),
    ]
    assert traced.get_submodule("1") is model[1]
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    assert torch.equal(traced(x), model(x))
