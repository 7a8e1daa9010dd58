"""step: stored statistics move once for all micro-batches, towards the moments of the union of their values."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.layers import BatchNorm1d, BatchNorm2d

momenta = pytest.mark.parametrize("momentum", [0.1, None, 1.0])


def values(*sizes, channels=3):
    return [torch.randn(size, channels, dtype=torch.float64) * (k + 1) + 3 * k for k, size in enumerate(sizes)]


def stepped(model, parts):
    """The outputs of a step of micro-batches."""
    with bn.step(model):
        return [model(micro) for micro in parts]


def check(layer, before, x, momentum, tracked=1):
    """Stored statistics are those that one batch of all values ``x`` leaves."""
    mean, var = oracle.updated(*before, oracle.exact(x), 1.0 if momentum is None else momentum)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == tracked


def stored(layer):
    return [oracle.exact(t).copy() for t in (layer.running_mean, layer.running_var)]


@momenta
@pytest.mark.parametrize("options", [{}, {"act": "relu"}, {"memory": "save", "act": "leaky_relu"}], ids=str)
def test_statistics_are_those_of_the_union(momentum, options):
    layer = BatchNorm1d(3, momentum=momentum, **options).double()
    parts, before, alone = values(8, 2, 5), stored(layer), copy.deepcopy(layer)
    with bn.step(layer):
        for micro in parts:
            x = micro.clone().requires_grad_()
            layer(x * 1).square().sum().backward()
            theirs = micro.clone().requires_grad_()
            alone(theirs * 1).square().sum().backward()
            assert torch.equal(x.grad, theirs.grad)
            assert layer.num_batches_tracked == 0
    check(layer, before, torch.cat(parts), momentum)
    assert torch.equal(layer.weight.grad, alone.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_a_step_are_exact_in_every_type(dtype):
    layer, parts = BatchNorm2d(2, momentum=1.0), [torch.randn(4, 2, 5, 5).add(100).to(dtype) for _ in range(3)]
    with bn.step(layer):
        for micro in parts:
            layer(micro)
    mean, var = oracle.updated(*stored(layer), oracle.exact(torch.cat(parts)), 1.0)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=2e-7)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-5)


def test_masks_and_weights_count_as_in_a_call():
    layer = BatchNorm1d(3, momentum=1.0).double()
    x, y, z = (torch.randn(6, 3, 4, dtype=torch.float64) * k + k for k in (1, 2, 3))
    mask, lengths = torch.rand(6, 4) > 0.4, torch.tensor([4, 3, 2, 1, 4, 2])
    weight = torch.tensor([1, 2, 3, 0, 1, 1])
    with bn.step(layer):
        layer(x, mask=mask)
        layer(y, lengths=lengths)
        layer(z, weight=weight)
    of_y = torch.arange(4) < lengths.unsqueeze(1)
    rows = [t.movedim(1, -1) for t in (x, y, z)]
    repeated = torch.repeat_interleave(rows[2], weight, 0).reshape(-1, 3)
    check(layer, stored(layer), torch.cat([rows[0][mask], rows[1][of_y], repeated]), 1.0)


def test_a_layer_called_twice_counts_all_values():
    layer = BatchNorm1d(3).double()
    parts, before = values(8, 5), stored(layer)
    with bn.step(layer):
        for micro in parts:
            layer(micro)
            layer(2 * micro + 1)
    check(layer, before, torch.cat([t for x in parts for t in (x, 2 * x + 1)]), 0.1)


def test_complex_values():
    layer = BatchNorm1d(3, momentum=1.0, dtype=torch.complex128)
    parts = [torch.randn(size, 3, dtype=torch.complex128) * size for size in (8, 2, 5)]
    one = copy.deepcopy(layer)
    stepped(layer, parts)
    one(torch.cat(parts))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"renorm": bn.Renorm(rmax=2.0, dmax=1.0)}, {"ghost_batch_size": 4}], ids=str)
def test_renorm_and_ghost_batches_store_the_union(options):
    layer = BatchNorm1d(3, **options).double()
    parts, before = values(8, 12), stored(layer)
    stepped(layer, parts)
    check(layer, before, torch.cat(parts), 0.1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_renorm_is_repeated_as_in_the_first_forward(use_reentrant):
    layer = BatchNorm1d(3, renorm=bn.Renorm(rmax=2.0, dmax=1.0)).double()
    plain, x = copy.deepcopy(layer), values(8)[0]
    gradients = []
    for each, run in ((plain, plain), (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))):
        given = x.clone().requires_grad_()
        y = run(given)
        each(x * 7 + 3)  # moves the stored statistics before the backward pass
        y.square().sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    assert layer.num_batches_tracked == 2


def test_layers_that_move_nothing_stay_as_they_are():
    model = nn.ModuleDict(
        {name: BatchNorm1d(3).double() for name in ("used", "unused", "evaluated", "frozen", "ended")}
        | {"without": BatchNorm1d(3, track_running_stats=False).double()}
    )
    model["evaluated"].eval()
    bn.freeze(model["frozen"])
    state, x = copy.deepcopy(model.state_dict()), values(8)[0]
    with bn.step(model):
        for name in ("used", "evaluated", "frozen", "without", "ended"):
            model[name](x)
        model["ended"].eval()
    same = {
        name
        for name, each in model.items()
        if all(torch.equal(v, state[f"{name}.{k}"]) for k, v in each.state_dict().items())
    }
    assert same == {"unused", "evaluated", "frozen", "without"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_counts_once(use_reentrant):
    layer = BatchNorm1d(3).double()
    parts, before = values(8, 5), stored(layer)
    with bn.step(layer):
        for micro in parts:
            checkpoint(layer, micro.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    check(layer, before, torch.cat(parts).detach(), 0.1)


def test_a_step_that_recomputes_after_its_end_stores_no_more():
    layer = BatchNorm1d(3).double()
    parts, before = [x.requires_grad_() for x in values(8, 5)], stored(layer)
    with bn.step(layer):
        losses = [checkpoint(layer, micro, use_reentrant=False).square().sum() for micro in parts]
    sum(losses).backward()
    check(layer, before, torch.cat(parts).detach(), 0.1)


def test_an_exception_stores_nothing():
    layer, x = BatchNorm1d(3), torch.randn(8, 3)
    state = copy.deepcopy(layer.state_dict())

    def interrupted():
        yield x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stepped(layer, interrupted())
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    layer(x)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@momenta
def test_values_that_are_not_finite_are_handled_as_in_one_batch(bad, momentum):
    layer = BatchNorm1d(2, momentum=momentum).double()
    one, parts = copy.deepcopy(layer), values(4, 4, channels=2)
    parts[0][1, 0] = bad
    with pytest.warns(RuntimeWarning, match="1 of 2 channels"):
        stepped(layer, parts)
    with pytest.warns(RuntimeWarning):
        one(torch.cat(parts))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert layer.skipped_updates == one.skipped_updates == 1


def test_one_value_counts_where_it_is_allowed():
    layer = BatchNorm1d(3, single_element="population").double()
    parts, before = values(8, 1), stored(layer)
    with bn.step(layer):
        for micro in parts:
            layer(micro)
    check(layer, before, torch.cat(parts), 0.1)
    with bn.step(layer):
        layer(parts[1])
    check(layer, before, torch.cat(parts), 0.1)


def test_empty_batches_change_nothing():
    layer = BatchNorm1d(3)
    with bn.step(layer):
        layer(torch.empty(0, 3))
    assert layer.num_batches_tracked == 0


def test_a_copy_of_a_model_in_a_step_is_in_no_step():
    layer, x = BatchNorm1d(3), torch.randn(8, 3)
    with bn.step(layer):
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other(x)
            assert other.num_batches_tracked == 1
    assert layer.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_torch_func_inside_a_step():
    layer = BatchNorm1d(3).double()
    parts, before = values(8, 5), stored(layer)
    with bn.step(layer):
        for micro in parts:
            torch.func.grad(lambda x: layer(x).square().sum())(micro)
    check(layer, before, torch.cat(parts), 0.1)


def preserved(model, batches):
    with bn.preserve_state(model):
        model(batches[0])


LOOKS = {
    "preserve_state": preserved,
    "probe": lambda model, batches: bn.probe(model, batches[0]),
    "examine": lambda model, batches: bn.examine(model, batches),
    "tool in a tool": lambda model, batches: preserved(nn.Sequential(model), batches),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_tool_may_look_inside_a_step(look):
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4), nn.Linear(4, 4), BatchNorm1d(4)).double()
    parts, alone = values(8, 5), copy.deepcopy(model)
    stepped(alone, parts)
    with bn.step(model):
        model(parts[0])
        look(model, [each * 5 + 3 for each in values(32, 32)])
        model(parts[1])
    for mine, theirs in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_tool_may_look_inside_a_loss_of_step_backward():
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4)).double()
    parts, alone = values(8, 5), copy.deepcopy(model)
    other = values(32)[0]

    def loss(y, _):
        bn.probe(model, other)
        return y.pow(3).sum()

    bn.step_backward(model, parts, loss, reduction="sum")
    bn.step_backward(alone, parts, lambda y, _: y.pow(3).sum(), reduction="sum")
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_buffers_that_are_passed_move_in_place_of_the_layers_own():
    layer = BatchNorm1d(3).double()
    sets = [{name: t.clone() for name, t in layer.state_dict().items()} for _ in range(2)]
    parts, before = values(8, 5, 6, 7), stored(layer)
    with bn.step(layer):
        for k, micro in enumerate(parts[:3]):
            torch.func.functional_call(layer, sets[k % 2], (micro,))
        layer(parts[3])
        assert all(each["num_batches_tracked"] == 0 for each in sets)
    check(layer, before, parts[3], 0.1)
    for each, own in zip(sets, ([parts[0], parts[2]], [parts[1]]), strict=True):
        expected = BatchNorm1d(3).double()
        expected.load_state_dict(each)
        check(expected, before, torch.cat(own), 0.1)


def test_buffers_that_end_with_a_transform_are_refused():
    layer, x = BatchNorm1d(3).double(), values(8)[0]

    def loss(state):
        return torch.func.functional_call(layer, state, (x,)).sum()

    state = {name: t.clone() for name, t in layer.state_dict().items() if t.is_floating_point()}
    with bn.step(layer), pytest.raises(RuntimeError, match="step needs buffers that stay"):
        torch.func.grad(loss)(state)


def test_an_ensemble_under_vmap_is_refused():
    layer = BatchNorm1d(3)
    with pytest.raises(RuntimeError, match=r"got an ensemble under torch.func.vmap"), bn.step(layer):
        torch.func.vmap(layer)(torch.randn(2, 8, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model_inside_a_step(checkpointed):
    layer = BatchNorm1d(3).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    parts = [torch.randn(8, 3, dtype=torch.float64) * k for k in (1, 2, 3)]
    for _ in range(2):
        before, tracked = stored(layer), int(layer.num_batches_tracked)
        with bn.step(compiled):
            for micro in parts:
                x = micro.clone().requires_grad_()
                y = checkpoint(compiled, x, use_reentrant=False) if checkpointed else compiled(x)
                y.square().sum().backward()
        check(layer, before, torch.cat(parts), 0.1, tracked + 1)
    compiled(parts[0])
    assert layer.num_batches_tracked == 3


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"step needs an nn.Module"), bn.step("model"):
        pass
    with (
        pytest.raises(ValueError, match=r"step needs layers of this package, got no batch norm layer. Convert"),
        bn.step(nn.Linear(2, 2)),
    ):
        pass
    foreign = nn.Sequential(nn.BatchNorm1d(3), BatchNorm1d(3))
    with pytest.raises(ValueError, match="got BatchNorm1d at '0'"), bn.step(foreign):
        pass
    with (
        pytest.raises(ValueError, match=r"needs a model in train mode.*Call model.train"),
        bn.step(BatchNorm1d(3).eval()),
    ):
        pass
    with pytest.raises(ValueError, match=r"got LazyBatchNorm1d at ''. Run the model"), bn.step(bn.LazyBatchNorm1d()):
        pass
    with bn.step(bn.freeze(BatchNorm1d(3))):
        pass


def test_nested_blocks_are_refused_and_the_outer_goes_on():
    model = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3))
    x = torch.randn(8, 3)
    with bn.step(model):
        model(x)
        with pytest.raises(RuntimeError, match=r"layer '' inside one"), bn.step(model[1]):
            pass
        model(x)
    assert model[1].num_batches_tracked == 1
    with bn.step(model[1]):
        pass
