"""convert and revert: layers change, and nothing else about the model does."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from fingerprint import fingerprint, trained_net
from surgery_checks import ResNet, assert_same, image, measured, trained
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery import comparison, convert, fusion, revert

PAIRS = {
    "1d": (nn.BatchNorm1d, bn.BatchNorm1d, (8, 3)),
    "1d of sequences": (nn.BatchNorm1d, bn.BatchNorm1d, (8, 3, 4)),
    "2d": (nn.BatchNorm2d, bn.BatchNorm2d, (8, 3, 2, 2)),
    "3d": (nn.BatchNorm3d, bn.BatchNorm3d, (8, 3, 2, 2, 2)),
}
SETTINGS = {
    "default": {},
    "momentum": {"momentum": 0.5, "eps": 0.1},
    "cumulative": {"momentum": None},
    "no gamma, no beta": {"affine": False},
    "no beta": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "float64": {"dtype": torch.float64},
}


class OwnNorm(nn.BatchNorm2d):
    """A user's subclass that does something else."""

    def forward(self, x):
        return super().forward(x) + 1


class Square(nn.Module):
    def forward(self, x):
        return x * x


# --- convert and revert ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS.values(), ids=PAIRS)
def test_a_layer_alone_is_converted_and_reverted(theirs, ours, shape, setting):
    x = torch.randn(shape, dtype=setting.get("dtype"))
    layer = trained(theirs(3, **setting), x)
    before = fingerprint(layer)
    result = convert(layer, example=x)
    back = revert(result)
    assert fingerprint(layer) == before
    assert (type(result), type(back)) == (ours, theirs)
    assert_same(layer, result, x)
    assert_same(layer, back, x)
    assert vars(back).keys() == vars(layer).keys()
    assert str(back) == str(layer)
    for a, b in ((layer, result), (result, layer), (result, back), (back, result)):
        assert list(a.state_dict()) == list(b.state_dict())
        copy.deepcopy(b).load_state_dict(a.state_dict(), strict=True)


def test_everything_else_about_a_model_is_the_same():
    net = trained_net()
    before = fingerprint(net)
    result = convert(net)
    assert fingerprint(net) == before
    assert type(result.theirs) is type(result.ours) is bn.BatchNorm1d
    assert [type(m) for m in revert(result).modules() if m is not result.ours][:3] == [type(m) for m in net.modules()][
        :3
    ]
    assert result.tied.weight is result.last.weight
    assert not result.theirs.training
    assert result.ours.training
    assert not result.first.weight.requires_grad
    for (name, p), (other, q) in zip(net.named_parameters(), result.named_parameters(), strict=True):
        assert name == other
        assert p is not q
        assert p.requires_grad == q.requires_grad


def test_parameters_that_are_not_trained_stay_so():
    layer = nn.BatchNorm2d(3)
    layer.weight.requires_grad_(False)
    for result in (convert(layer), revert(convert(layer))):
        assert (result.weight.requires_grad, result.bias.requires_grad) == (False, True)


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_layer_stays_frozen_there_and_back(affine):
    x = image()
    net = bn.freeze(trained(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), x), affine)
    for result in (convert(net, example=x), revert(convert(net))):
        assert result.train()[0].training is False
        assert result[0].weight.requires_grad is not affine
        assert_same(net, result, x)
        bn.unfreeze(result)
        assert result[0].training
        assert result[0].weight.requires_grad
    assert type(bn.unfreeze(convert(net))[0]) is bn.BatchNorm2d
    assert type(bn.unfreeze(revert(convert(net)))[0]) is nn.BatchNorm2d


def left_alone() -> dict[str, nn.Module]:
    parametrized, own_forward = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", Square())
    own_forward.forward = partial(torch.mul, other=2)
    return {
        "lazy": nn.LazyBatchNorm2d(),
        "subclass": OwnNorm(3),
        "parametrized": parametrized,
        "own forward": own_forward,
        "eps=0": nn.BatchNorm2d(3, eps=0),
        "ours": bn.BatchNorm2d(3, single_element="population"),
        "instance norm": nn.InstanceNorm2d(3, affine=True),
    }


@pytest.mark.parametrize("sync", [None, True, False])
def test_sync_batch_norm_becomes_ours_and_back_with_hooks_and_activation(sync):
    calls = []
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.SyncBatchNorm(4, momentum=0.3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 6), nn.SyncBatchNorm(6), nn.BatchNorm1d(6),
    )  # fmt: skip
    model[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(8, 3, 5)
    result = convert(model, fuse=True, sync=sync)
    assert [type(result[i]) for i in (1, 5, 6)] == [bn.BatchNorm1d] * 3
    assert [result[i].sync for i in (1, 5, 6)] == {None: [True, True, False], True: [True] * 3, False: [False] * 3}[
        sync
    ]
    assert (result[5].process_group, result[1].momentum, result[1].bias) == (None, 0.3, None)
    back = revert(result)
    assert [type(back[i]) for i in (1, 5, 6)] == [nn.SyncBatchNorm, nn.SyncBatchNorm, nn.BatchNorm1d]
    assert [vars(back[i]).keys() for i in (1, 5, 6)] == [vars(model[i]).keys() for i in (1, 5, 6)]
    for mode in (True, False):
        y = model.train(mode)(x)
        torch.testing.assert_close(result.train(mode)(x), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back.train(mode)(x), y, rtol=1e-5, atol=1e-5)
    assert len(calls) == 6
    assert list(result.state_dict()) == list(model.state_dict())


def test_a_sync_batch_norm_alone_becomes_a_layer_for_inputs_of_any_number_of_axes():
    layer = convert(bn.freeze(nn.SyncBatchNorm(3)))
    assert (layer.sync, layer.training) == (True, False)
    layer = bn.unfreeze(layer)
    for ndim in range(2, 6):
        assert pickle.loads(pickle.dumps(layer))(torch.randn(4, 3, *[2] * (ndim - 2))).ndim == ndim
    back = revert(layer)
    assert type(back) is nn.SyncBatchNorm
    assert (type(convert(back, inplace=True)), type(revert(back, inplace=True))) == (bn.BatchNorm2d, nn.SyncBatchNorm)


def test_layers_that_stay_local_are_named():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, eps=0), bn.freeze(nn.BatchNorm1d(3, eps=0)))
    with pytest.warns(UserWarning, match=r"convert synchronizes layers of this package only, and left '1' local"):
        assert convert(model, sync=True)[0].sync
    with pytest.raises(TypeError, match="sync must be True or False, got int"):
        convert(model, sync=2)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        convert(model, process_group="all")


@pytest.mark.parametrize("kind", left_alone())
def test_other_layers_are_left_as_they_are(kind):
    layer = left_alone()[kind]
    told = pytest.warns(UserWarning, match="'0' is a OwnNorm that applies what our layers do not: add")
    with told if kind == "subclass" else contextlib.nullcontext():
        result = convert(nn.Sequential(layer, nn.BatchNorm2d(3)))
    assert type(result[0]).__name__ == type(layer).__name__
    assert str(result[0]) == str(layer)
    assert vars(result[0]).keys() == vars(layer).keys()
    assert type(result[1]) is bn.BatchNorm2d
    assert (type(revert(result)[0]) is nn.BatchNorm2d) == (kind in {"ours", "eps=0", "own forward"})


def test_half_precision_layers_get_wide_statistics_and_torchs_type_back():
    layer = nn.BatchNorm1d(3).bfloat16()
    result = convert(layer)
    assert (result.weight.dtype, result.running_var.dtype) == (torch.bfloat16, torch.float32)
    back = revert(result)
    assert (back.weight.dtype, back.running_var.dtype) == (torch.bfloat16, torch.bfloat16)
    assert back(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16


def test_a_shared_layer_is_replaced_once_under_all_its_names():
    shared = nn.BatchNorm1d(3)
    net = nn.Sequential(shared, nn.Linear(3, 3), shared)
    net.also = [shared, {"here": shared}]  # references that no module knows of
    for result in (convert(net), convert(copy.deepcopy(net), inplace=True), revert(convert(net))):
        assert result[0] is result[2] is result.also[0] is result.also[1]["here"]
    assert net[0] is shared


def test_in_place_an_optimizer_goes_on_and_a_copy_leaves_it_alone():
    x = torch.randn(8, 3)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert convert(net, inplace=True) is net
    (net(x) - 1).square().sum().backward()
    before = net[1].bias.detach().clone()
    optimizer.step()
    assert not net[1].bias.equal(before)
    assert net[1].weight is optimizer.param_groups[0]["params"][2]


def hooks_of(layer: nn.Module) -> dict[str, list]:
    return {
        name: list(value.values()) for name, value in vars(layer).items() if isinstance(value, dict) and "hook" in name
    }


def test_hooks_of_every_kind_are_carried_and_their_handles_work():
    seen: list[str] = []

    def note(name):
        return lambda *args, **kwargs: seen.append(name)

    layer = nn.BatchNorm1d(3)
    layer.register_forward_pre_hook(note("pre"))
    layer.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("forward"))
    layer.register_forward_hook(note("forward with kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("always"), always_call=True)
    layer.register_full_backward_pre_hook(note("backward pre"))
    layer.register_full_backward_hook(note("backward"))
    layer.register_state_dict_pre_hook(note("state pre"))
    layer.register_state_dict_post_hook(note("state"))
    layer.register_load_state_dict_pre_hook(note("load pre"))
    layer.register_load_state_dict_post_hook(note("load"))
    removed = layer.register_forward_hook(note("removed"))
    expected = {name: len(hooks) for name, hooks in hooks_of(layer).items()}

    def run(model):
        seen.clear()
        model(torch.randn(4, 3, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        with pytest.raises(ValueError, match="more than 1 value"):
            model(torch.randn(1, 3))
        return list(seen)

    before = run(layer)
    assert {"pre", "always", "backward pre", "load"} <= set(before)
    for result in (convert(layer), revert(convert(layer))):
        assert {name: len(hooks) for name, hooks in hooks_of(result).items()} == expected
        assert run(result) == before
    convert(layer, inplace=True)
    removed.remove()
    assert run(layer) == [name for name in before if name != "removed"]


def test_what_an_owner_put_on_a_layer_is_carried():
    x = image()
    layer = trained(nn.BatchNorm2d(3), x)
    layer.note = "mine"
    layer.register_buffer("extra", torch.ones(2), persistent=False)
    layer.child = nn.Linear(2, 2)
    net = nn.Sequential(layer)
    for result in (convert(net, example=x), revert(convert(net))):
        assert result[0].note == "mine"
        assert result[0].extra.equal(torch.ones(2))
        assert list(result.state_dict()) == list(net.state_dict())


def test_pruning_goes_on_and_can_be_made_permanent():
    layer = trained(nn.BatchNorm2d(3), image())
    prune.l1_unstructured(layer, "weight", amount=1)
    keys, weight = list(layer.state_dict()), layer.weight.detach().clone()
    for change in (convert, revert):
        change(layer, inplace=True)  # torch cannot copy what pruning computes
        layer(image()).sum().backward()
        assert list(layer.state_dict()) == keys
        assert layer.weight.equal(weight)
    prune.remove(layer, "weight")
    assert layer._parameters["weight"].equal(weight)


def test_settings_that_were_changed_after_construction_are_those_of_the_result():
    x = image()
    layer = trained(nn.BatchNorm2d(3), x)
    layer.momentum, layer.eps, layer.track_running_stats = 0.7, 0.3, False
    layer._non_persistent_buffers_set.add("running_mean")
    result = convert(layer)
    assert_same(layer, result, x)
    assert result.running_mean.equal(layer.running_mean)
    assert list(result.state_dict()) == list(layer.state_dict())


def test_a_reverted_layer_has_nothing_of_ours():
    layer = bn.BatchNorm2d(3, single_element="population", memory="save", weight=False)
    back = revert(layer)
    assert back.weight is None
    assert vars(back).keys() == vars(nn.BatchNorm2d(3)).keys()


def test_an_activation_of_its_own_cannot_be_reverted():
    net = nn.Sequential(bn.BatchNorm2d(3), bn.BatchNorm2d(3, act="relu"))
    before = fingerprint(net)
    with pytest.raises(
        ValueError, match="needs layers whose activation convert fused, got layers constructed with one: 1"
    ):
        revert(net, inplace=True)
    assert fingerprint(net) == before


@pytest.mark.parametrize("change", [convert, revert])
def test_a_model_that_is_none_or_cannot_be_copied_is_refused(change):
    with pytest.raises(TypeError, match=r"needs an nn.Module, got list|must be an nn.Module, got list"):
        change([nn.BatchNorm1d(3)])
    net = nn.Sequential(nn.BatchNorm1d(3))
    net.output = net(torch.randn(4, 3))
    with pytest.raises(
        RuntimeError, match=rf"{change.__name__} needs a model that copy.deepcopy can copy.*inplace=True.* itself"
    ):
        change(net)
    assert change(net, inplace=True) is net


def test_random_states_and_global_hooks_are_as_before():
    x = image()
    net = trained(ResNet(), x)
    before = torch.get_rng_state(), dict(torch.nn.modules.module._global_forward_hooks)
    convert(net, fuse=True, example=x)
    assert torch.get_rng_state().equal(before[0])
    assert torch.nn.modules.module._global_forward_hooks == before[1]


def test_a_converted_model_is_pickled_with_its_class():
    x = image()
    net = trained(ResNet(), x)
    result = pickle.loads(pickle.dumps(convert(net)))
    assert type(result) is ResNet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(result, x, True).keys() == measured(net, x, True).keys()


# --- the comparison -------------------------------------------------------------------------------------------


def spoil(change):
    def spoiled(model, example):
        change(model)

    return spoiled


WRONG = {
    "an activation": (lambda net: setattr(net.bn1, "act", "silu"), "the output"),
    "a statistic": (lambda net: setattr(net.bn1, "momentum", 0.2), "the buffers"),
    "a gradient": (lambda net: net.bn1.weight.requires_grad_(False), "the gradients"),
    "an error": (lambda net: setattr(net, "fc", None), "TypeError on the example"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "where"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_result_that_does_something_else_is_refused_with_the_difference(monkeypatch, change, where, inplace):
    x = image()
    net = trained(ResNet(), x)
    before = fingerprint(net)
    monkeypatch.setattr(fusion, "fuse", spoil(change))
    with pytest.raises(
        RuntimeError, match=f"needs a result that computes the same as the model, got in .* mode .*{where}"
    ):
        convert(net, fuse=True, example=x, inplace=inplace)
    assert fingerprint(net) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "example",
    [image, lambda: [image(), torch.tensor(3)], lambda: {"x": image()}],
    ids=["tensor", "list", "mapping"],
)
def test_examples_are_what_recalibrate_takes_from_a_loader(example):
    example = example()
    assert convert(ResNet(), fuse=True, example=example).bn1.act == "relu"


def test_an_example_that_the_model_does_not_take_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.ReLU())
    for fuse in (True, False):
        with pytest.raises(
            ValueError, match="needs an example on which the model runs in train and eval mode, got ValueError in train"
        ):
            convert(net, fuse=fuse, example=torch.randn(1, 3))


class InHalf(nn.Module):
    """Bound to its type, with an integer input, several outputs and one that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bn = nn.Embedding(5, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.embed(x).to(torch.bfloat16)
        y = self.bn(y @ torch.eye(3, dtype=torch.bfloat16))
        return {"y": y, "more": (y.relu().detach(), x, None)}


def test_a_model_that_is_bound_to_its_type_is_compared_in_it():
    net = InHalf()
    net.bn.bfloat16()
    x = torch.randint(0, 5, (16,))
    assert type(convert(net, example=x).bn) is bn.BatchNorm1d
    result = convert(net)
    result.bn.bias.data += 1
    with pytest.raises(RuntimeError, match=r"in eval mode a relative difference of .* in the output"):
        comparison.check(net, result, x)


def test_values_that_are_nan_in_both_are_the_same():
    net = nn.Sequential(nn.BatchNorm1d(3))
    net[0].bias.data[0] = torch.nan
    assert type(convert(net, example=torch.randn(4, 3))[0]) is bn.BatchNorm1d
