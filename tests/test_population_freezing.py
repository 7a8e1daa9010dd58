"""freeze: stored statistics whatever the mode, and unfreeze takes back every bit of it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm import freeze, frozen, unfreeze


class OwnNorm(nn.BatchNorm1d):
    """A user's subclass, with an argument of its own."""

    def __init__(self, size: int, note: str = "mine") -> None:
        super().__init__(size)
        self.note = note


LAYERS = {
    "torch 1d": (nn.BatchNorm1d, (8, 3)),
    "torch 2d": (nn.BatchNorm2d, (8, 3, 2, 2)),
    "torch 3d": (nn.BatchNorm3d, (8, 3, 2, 2, 2)),
    "torch sync": (nn.SyncBatchNorm, (8, 3, 2)),
    "ours 1d": (bn.BatchNorm1d, (8, 3)),
    "ours 2d": (bn.BatchNorm2d, (8, 3, 2, 2)),
    "ours 3d": (bn.BatchNorm3d, (8, 3, 2, 2, 2)),
    "subclass": (OwnNorm, (8, 3)),
}
MAKERS = [nn.BatchNorm1d, bn.BatchNorm1d]


@pytest.fixture(params=LAYERS)
def layer_and_shape(request):
    make, shape = LAYERS[request.param]
    layer = make(3)
    torch.nn.init.normal_(layer.weight)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer, shape


def small_net(make: type) -> nn.Sequential:
    """After three batches of training, so that stored and batch statistics differ."""
    net = nn.Sequential(nn.Linear(3, 4), make(4), nn.ReLU(), make(4), nn.Linear(4, 2))
    for _ in range(3):
        net(torch.randn(16, 3) * 3 + 2)
    return net


def statistics(net: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in net.buffers()]


def switch_by_model(net: nn.Module) -> None:
    net.train()


def switch_by_layer(net: nn.Module) -> None:
    for module in net.modules():
        module.train()


def switch_by_attribute(net: nn.Module) -> None:
    for module in net.modules():
        module.training = True


def switch_back_and_forth(net: nn.Module) -> None:
    net.eval()
    net.train()


SWITCHES = [switch_by_model, switch_by_layer, switch_by_attribute, switch_back_and_forth]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__)
def test_a_frozen_layer_answers_as_in_eval_mode_and_keeps_its_statistics(layer_and_shape, switch):
    layer, shape = layer_and_shape
    x = torch.randn(shape) * 2 + 1
    expected = layer.eval()(x)
    before = statistics(layer)
    switch(freeze(layer))
    assert layer(x).equal(expected)
    assert all(now.equal(then) for now, then in zip(layer.buffers(), before, strict=True))
    switch(unfreeze(layer))
    if not isinstance(layer, nn.SyncBatchNorm):  # which trains on a GPU only
        assert not layer(x).equal(expected)


def test_freeze_and_unfreeze_leave_no_trace(layer_and_shape):
    layer, _ = layer_and_shape
    layer.weight.requires_grad_(False)
    layer.eval()
    model = nn.Sequential(nn.Linear(3, 3), layer)
    before = fingerprint(model)
    assert unfreeze(freeze(model, affine=True)) is model
    assert fingerprint(model) == before
    with frozen(model, affine=True) as inside:
        assert inside is model
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_unfrozen_layers_are_in_the_mode_that_was_asked_last():
    net = freeze(small_net(nn.BatchNorm1d))
    net.eval()
    net[3].train()
    unfreeze(net)
    assert (net.training, net[1].training, net[3].training) == (False, False, True)


def test_a_frozen_layer_is_still_what_it_was_to_isinstance_and_state_dict(layer_and_shape):
    layer, _ = layer_and_shape
    kind, keys, values = type(layer), list(layer.state_dict()), copy.deepcopy(layer.state_dict())
    freeze(layer)
    assert isinstance(layer, kind)
    assert type(layer).__name__ == f"Frozen{kind.__name__}"
    assert repr(layer).startswith(f"Frozen{kind.__name__}(3")
    assert list(layer.state_dict()) == keys
    kind(3).load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(values, strict=True)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies_of_a_frozen_layer_are_frozen_and_can_be_unfrozen(layer_and_shape, copied):
    layer, shape = layer_and_shape
    x = torch.randn(shape)
    kind, flags = type(layer), [p.requires_grad for p in layer.parameters()]
    other = copied(freeze(layer, affine=True))
    assert type(other) is type(layer)
    assert other.train()(x).equal(layer(x))
    unfreeze(other)
    assert type(other) is kind
    assert other.training
    if copied is not copy.copy:  # which shares the parameters
        assert [p.requires_grad for p in other.parameters()] == flags


def test_affine_parameters_keep_learning_unless_they_are_frozen_too():
    net = small_net(nn.BatchNorm1d)
    x = torch.randn(5, 3)
    freeze(net)(x).sum().backward()
    assert net[1].weight.grad is not None
    assert net[0].weight.grad is not None
    net.zero_grad()
    freeze(net, affine=True)(x).sum().backward()
    assert net[1].weight.grad is net[1].bias.grad is None
    assert net[0].weight.grad is not None


def test_freezing_twice_is_harmless():
    net = small_net(nn.BatchNorm1d)
    net[1].bias.requires_grad_(False)
    kinds, flags = [type(m) for m in net], [p.requires_grad for p in net.parameters()]
    freeze(freeze(freeze(net), affine=True), affine=True)
    freeze(net)
    assert type(net[1]).__bases__[1] is nn.BatchNorm1d
    unfreeze(unfreeze(net))
    assert [type(m) for m in net] == kinds
    assert [p.requires_grad for p in net.parameters()] == flags


def test_parameters_tied_between_layers_can_be_trained_again_after_unfreeze():
    net = small_net(nn.BatchNorm1d)
    net[3].weight = net[1].weight
    unfreeze(freeze(net, affine=True))
    assert net[1].weight.requires_grad
    with frozen(net, affine=True):
        assert not net[1].weight.requires_grad
    assert net[1].weight.requires_grad


def test_layers_frozen_before_the_block_are_frozen_after_it():
    net = small_net(nn.BatchNorm1d)
    freeze(net[1])

    def look() -> None:
        with frozen(net, affine=True):
            assert not net[3].train().training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert type(net[1]).__name__ == "FrozenBatchNorm1d"
    assert type(net[3]) is nn.BatchNorm1d
    assert all(p.requires_grad for p in net.parameters())


def test_a_layer_told_not_to_track_but_with_statistics_uses_them():
    """Lightning's BaseFinetuning.freeze writes this flag; alone, it makes train mode use the batch."""
    net = small_net(nn.BatchNorm1d)
    x = torch.randn(16, 3) + 5
    expected = copy.deepcopy(net).eval()(x)
    for layer in (net[1], net[3]):
        layer.track_running_stats = False
    assert not torch.allclose(net.train()(x), expected)
    assert freeze(net).train()(x).equal(expected)


@pytest.mark.parametrize("bad", [nn.BatchNorm1d(4, track_running_stats=False), nn.LazyBatchNorm1d()])
def test_a_layer_without_stored_statistics_is_refused_by_its_path_and_nothing_is_frozen(bad):
    net = nn.ModuleDict({"stem": nn.BatchNorm1d(4), "head": nn.Sequential(nn.Linear(4, 4), bad)})
    message = rf"^freeze needs layers with stored statistics, got none in 'head.1' \({type(bad).__name__}\). Construct"
    for attempt in (freeze, lambda model: frozen(model).__enter__()):
        with pytest.raises(ValueError, match=message):
            attempt(net)
        assert type(net["stem"]) is nn.BatchNorm1d


def test_a_model_without_batch_norm_is_left_as_it_is():
    net = nn.Linear(2, 2)
    before = fingerprint(net)
    assert unfreeze(freeze(net)) is net
    assert fingerprint(net) == before


def test_a_class_built_on_a_frozen_one_cannot_be_unfrozen_and_says_so():
    layer = freeze(nn.BatchNorm1d(2))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with pytest.raises(RuntimeError, match=r"^unfreeze needs the class that freeze made, got Parametrized"):
        unfreeze(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(unfreeze(layer)) is nn.BatchNorm1d


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_a_compiled_model_follows_freeze_and_unfreeze(make):
    net = small_net(make)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 3) + 2
    compiled(x)
    expected = copy.deepcopy(net).eval()(x)
    before = statistics(net)
    freeze(net).train()
    # other kernels: each rounds deviation, scale and sum once
    torch.testing.assert_close(compiled(x), expected, rtol=2**-21, atol=2**-21)
    compiled(x).sum().backward()
    assert net[0].weight.grad is not None
    assert all(now.equal(then) for now, then in zip(net.buffers(), before, strict=True))
    unfreeze(net)
    compiled(x)
    assert int(net[1].num_batches_tracked) == int(before[2]) + 1


@pytest.mark.parametrize("make", MAKERS)
def test_a_frozen_model_can_be_exported_in_train_mode(make):
    net = small_net(make)
    x = torch.randn(16, 3)
    expected = copy.deepcopy(net).eval()(x)
    exported = torch.export.export(freeze(net).train(), (x,)).module()
    # other kernels: each rounds deviation, scale and sum once
    torch.testing.assert_close(exported(x), expected, rtol=2**-21, atol=2**-21)


def test_a_frozen_layer_of_torch_is_a_leaf_to_fx_and_can_be_scripted():
    net = small_net(nn.BatchNorm1d)
    x = torch.randn(16, 3)
    expected = copy.deepcopy(net).eval()(x)
    freeze(net).train()
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    assert traced.train()(x).equal(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert torch.jit.script(net)(x).equal(expected)


def test_ensembles_of_frozen_models_run_under_vmap():
    nets = [freeze(small_net(bn.BatchNorm1d)).train() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    x = torch.randn(3, 16, 3)
    y = torch.vmap(lambda p, b, x: torch.func.functional_call(nets[0], (p, b), (x,)))(parameters, buffers, x)
    for net, alone, together in zip(nets, x, y, strict=True):
        # a batched matmul may add in another order: a few roundings of sums of 3 and 4 products
        torch.testing.assert_close(net(alone), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action", [freeze, unfreeze])
def test_what_is_no_model_is_refused(action):
    with pytest.raises(TypeError, match=r"must be an nn.Module, got int"):
        action(3)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("undo", [bn.unfreeze, None], ids=["unfreeze", "leaving frozen"])
def test_a_tool_that_saves_and_restores_flags_leaves_no_mode_behind_the_freeze(mode, undo):
    """It reads False of a frozen layer, and writes that back."""

    def look(net: nn.Module) -> None:
        flags = {module: module.training for module in net.modules()}
        net.eval()
        for module, flag in flags.items():
            module.training = flag

    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())).train(mode)
    if undo is None:
        with bn.frozen(net):
            look(net)
    else:
        look(bn.freeze(net))
        bn.unfreeze(net)
    assert [module.training for module in net.modules()] == [mode] * 5
    assert "_training_may_be_read_back" not in vars(net[1][0])


def test_a_mode_that_is_asked_of_a_frozen_layer_itself_holds_after_the_freeze():
    net = bn.freeze(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).train())
    net[0].eval()
    bn.unfreeze(net)
    assert [layer.training for layer in net] == [False, True]
