"""Our layers in the hands of code that knows torch.nn's classes: the activation stays, or an error says so."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from surgery_checks import assert_same, measured, trained
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.kernels.activations import NAMES, has_parameter
from batchnorm.surgery.rewriting import Absorbed, dropped

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
to_sync = nn.SyncBatchNorm.convert_sync_batchnorm


class Written(nn.Module):
    """Activations as functions, one of them behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        z = F.silu(self.norm(self.conv(x)))
        return F.relu(self.norm2(self.conv2(z)) + z)


def chain(act=nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), act(), nn.Conv2d(5, 2, 1))


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), nn.ELU(0.5), nn.Conv2d(5, 2, 1))


MODELS = {
    "placeholder": chain,
    "rewritten": Written,
    "nested": nested,
    "leaky": lambda: chain(lambda: nn.LeakyReLU(0.2)),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def original(request):
    torch.manual_seed(0)
    return trained(request.param(), X).eval()


def fused(model: nn.Module) -> nn.Module:
    return bn.convert(model, fuse=True, example=X)


def own(act: str = "relu", **options) -> nn.Sequential:
    """Layers that were written with an activation, for which there is no placeholder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), bn.BatchNorm2d(5, act=act, **options), nn.Conv2d(5, 2, 1))
    return trained(model, X).eval()


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_eval_same(original: nn.Module, result: nn.Module) -> None:
    """To within rounding: both compute the same, one layer in one pass and the other in up to four."""
    with torch.no_grad():
        torch.testing.assert_close(result.eval()(X), original.eval()(X))


def assert_separated_same(original: nn.Module, result: nn.Module) -> None:
    """As assert_same, for layers that are now part of a module of two."""
    for mode in (False, True):
        found = {name.replace("norm.", ""): t for name, t in measured(result, X, mode).items()}
        torch.testing.assert_close(found, measured(original, X, mode), rtol=1e-7, atol=1e-9)


# --- a layer of another class in the place of a fused one --------------------------------------------------


@pytest.mark.parametrize(
    "go_round",
    [lambda m: m, copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(saved(m))],
    ids=["itself", "deepcopy", "torch.save", "pickle", "both"],
)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_sync_batch_norm_does_not_lose_the_activation(original, go_round, first):
    if isinstance(original, Written):
        original.norm2.requires_grad_(True)
    result = to_sync(go_round(fused(original))) if first else go_round(to_sync(fused(original)))
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in result.modules())
    assert_eval_same(original, result)
    assert dropped(result) == {}


def test_a_class_that_is_assigned_does_not_lose_the_activation(original):
    result = fused(original)
    for layer in bn.find(result).values():
        layer.__class__ = nn.BatchNorm2d
    assert_eval_same(original, result)


def test_replace_does_not_lose_the_activation(original):
    result = bn.replace(fused(original), lambda _, layer: nn.BatchNorm2d(layer.num_features))
    assert_same(original, result, X)
    assert dropped(result) == {}


def test_replace_by_our_own_layer_carries_its_settings(original):
    converted = fused(original)
    for layer in bn.find(converted).values():
        layer.single_element, layer.memory = "population", "save"
    result = bn.replace(converted, lambda _, layer: bn.BatchNorm2d(layer.num_features))
    assert_eval_same(original, result)
    for layer in bn.find(result).values():
        assert (layer.single_element, layer.memory) == ("population", "save")
    assert_eval_same(original, bn.revert(result))


def test_fusing_convolution_and_layer_does_not_lose_the_activation():
    original = trained(chain(), X).eval()
    result = fused(original)
    result[0], result[1] = fuse_conv_bn_eval(result[0], result[1]), nn.Identity()
    assert_eval_same(original, result)
    new = fused(original)
    built = nn.Sequential(fuse_conv_bn_eval(new[0], new[1]), new[2], new[3])
    assert dropped(built) == {"1": "silu"}  # the layer might be in use elsewhere
    del new
    assert_eval_same(original, built)
    assert dropped(built) == {}


def test_names_that_move_do_not_matter():
    original = trained(chain(), X).eval()
    result = fused(original)
    result.insert(0, nn.Identity())
    assert_eval_same(original, result)
    assert_eval_same(original, to_sync(result))


def test_parts_of_a_model_outlive_it():
    original = trained(chain(), X).eval()
    part = fused(original)[:3]
    assert_eval_same(original[:3], part)
    assert_eval_same(original[:3], copy.deepcopy(part))
    assert_eval_same(original[:3], to_sync(saved(part)))
    assert_eval_same(original[:3], to_sync(part))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_a_wrapped_layer_goes_on_applying_it(original, wrap):
    result = fused(original)
    for path in list(bn.find(result)):
        parent, _, name = path.rpartition(".")
        setattr(result.get_submodule(parent), name, wrap(result.get_submodule(path)))
    assert_eval_same(original, result)


@pytest.mark.slow
def test_a_compiled_model_sees_what_was_replaced(original):
    result = fused(original)
    run = torch.compile(result, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(X), original(X))
    to_sync(result).eval()
    torch.testing.assert_close(run(X), original(X))


@pytest.mark.parametrize("strict", [True, False])
def test_a_converted_model_is_exported_with_the_activation(original, strict):
    for result in (fused(original), to_sync(fused(original)).eval()):
        program = torch.export.export(result, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), original(X))


def test_a_traced_model_keeps_its_placeholders():
    original = trained(chain(), X).eval()
    graph = torch.fx.symbolic_trace(fused(original))
    assert_eval_same(original, graph)
    assert_eval_same(original, torch.fx.symbolic_trace(to_sync(fused(original)).eval()))
    assert_eval_same(original, bn.revert(graph))
    assert isinstance(graph.get_submodule("2"), Absorbed)


def test_a_replica_of_a_placeholder_knows_its_layer():
    result = fused(trained(chain(), X).eval())
    replica = result[2]._replicate_for_data_parallel()
    assert replica.is_idle()
    to_sync(result)
    assert not replica.is_idle()


def test_a_rewritten_forward_with_some_of_its_layers_replaced_is_refused():
    result = fused(trained(Written(), X).eval())
    result.norm = to_sync(result.norm)
    with pytest.raises(
        RuntimeError, match=r"needs all its fused layers or none, got other layers in the place of 'norm'"
    ):
        result(X)


def test_a_fused_model_is_freed_without_the_garbage_collector():
    result = fused(chain())
    alive = weakref.ref(result)
    del result
    assert alive() is None


def test_reverting_what_was_replaced_puts_the_activation_back(original):
    assert_eval_same(original, bn.revert(to_sync(fused(original))))
    assert_eval_same(original, bn.for_export(to_sync(fused(original))))


# --- layers that were written with an activation ------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda _: nn.BatchNorm2d(5), lambda _: nn.GroupNorm(1, 5), lambda _: nn.Identity()])
def test_replace_refuses_to_drop_an_activation(make):
    model = own()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"replace needs a module that applies 'relu' as the layer at '1' does, got"):
        bn.replace(model, lambda _, layer: make(layer), inplace=True)
    torch.testing.assert_close(model.state_dict(), before)
    assert model[1].act == "relu"


def test_replace_takes_a_module_that_applies_the_activation():
    result = bn.replace(own(), lambda _, layer: nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    assert float(result[:2](X).detach().min()) == 0
    assert float(bn.to_group_norm(own())[:2](X).detach().min()) == 0


@pytest.mark.parametrize("alive", [True, False], ids=["layer alive", "layer gone"])
@pytest.mark.parametrize(
    "change",
    [lambda m: m, copy.deepcopy, lambda m: saved(m), lambda m: m.double(), lambda m: bn.freeze(m)],
    ids=["itself", "deepcopy", "saved", "double", "frozen"],
)
def test_a_module_that_took_the_tensors_of_an_activated_layer_is_found(change, alive):
    model = change(own())
    kept = model[1] if alive else None
    assert dropped(model) == {}
    result = to_sync(model)
    assert dropped(result) == {"1": "relu"}
    assert dropped(nn.Sequential(result)) == {"0.1": "relu"}
    assert kept is None or kept.act == "relu"


def test_gamma_and_beta_tell_of_a_layer_that_is_gone():
    assert dropped(to_sync(own()).double()) == {"1": "relu"}  # other statistics, the same parameters


def test_tensors_that_are_shared_or_copied_on_purpose_are_no_loss():
    model, second = own(), nn.BatchNorm2d(5)
    second.weight, second.bias = model[1].weight, model[1].bias
    assert dropped(nn.Sequential(model, nn.Conv2d(2, 5, 1), second)) == {}
    assert dropped(nn.Sequential(nn.Conv2d(3, 5, 1), second, nn.ReLU())) == {}
    loaded = nn.BatchNorm2d(5)
    loaded.load_state_dict(model[1].state_dict())
    assert dropped(nn.Sequential(loaded)) == dropped(copy.deepcopy(nn.Sequential(loaded))) == {}
    for healthy in (bn.for_export(model), to_sync(bn.for_export(model)), bn.fold(model, X, report=None)):
        assert dropped(healthy) == {}


def test_a_layer_that_gave_its_activation_up_is_no_loss():
    model = own()
    model[1].act = None
    assert dropped(to_sync(model)) == {}
    model = fused(trained(chain(), X).eval())
    assert dropped(to_sync(bn.revert(model, inplace=True))) == {}


def test_the_doctor_names_what_was_dropped():
    codes = {finding.code: finding for finding in bn.examine(to_sync(own())).findings}
    assert codes["BN509"].layer == "1"
    assert "act='relu'" in codes["BN509"].measured
    assert "BN509" not in {finding.code for finding in bn.examine(own()).findings}
    assert "BN509" not in {finding.code for finding in bn.examine(bn.for_export(own())).findings}


def _with_values(layer, put):
    made = nn.BatchNorm2d(layer.num_features).eval()
    put(made, layer)
    return made


def _copied(made, layer):
    for key in ("weight", "bias", "running_mean", "running_var"):
        getattr(made, key).data.copy_(getattr(layer, key).data)


def _new_parameters(made, layer):
    made.weight, made.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
    made.running_mean, made.running_var = layer.running_mean.clone(), layer.running_var.clone()


VALUES = {
    "load_state_dict": lambda made, layer: made.load_state_dict(layer.state_dict(), strict=True),
    "copy_": _copied,
    "new Parameters": _new_parameters,
}


@pytest.mark.parametrize("put", VALUES.values(), ids=VALUES)
def test_an_activation_lost_with_copied_values_shows_beside_the_model_of_before(put):
    model = own()[:2]
    for separate in (model, bn.for_export(model)):
        conv, layer = separate[0], separate[1] if separate is model else separate[1].norm
        act = [] if separate is model else [separate[1].act]
        result = nn.Sequential(conv, _with_values(layer, put), *act).eval()
        codes = {finding.code for finding in bn.examine(result, [X] * 4, reference=model).findings}
        assert "BN509" not in codes
        assert ("BN502" in codes) == (separate is model)


def test_an_activation_lost_in_a_fused_convolution_shows_beside_the_model_of_before():
    model = own()[:2]
    norm, act = bn.for_export(model)[1].children()
    for parts, is_lost in (([fuse_conv_bn_eval(*model)], True), ([fuse_conv_bn_eval(model[0], norm), act], False)):
        findings = bn.examine(nn.Sequential(*parts).eval(), [X] * 4, reference=model).findings
        assert ("BN502" in {finding.code for finding in findings}) == is_lost


# --- for_export ---------------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


def test_for_export_gives_the_written_model_back(original):
    result = bn.for_export(fused(original))
    assert kinds(result) == kinds(original)
    assert list(result.state_dict()) == list(original.state_dict())
    assert_same(original, result, X)


@pytest.mark.parametrize("act", NAMES)
def test_for_export_writes_activations_as_modules(act):
    model = own(act, act_param=0.3 if has_parameter(act) else None)
    before = copy.deepcopy(model)
    result = bn.for_export(model)
    assert type(result[1].norm) is nn.BatchNorm2d
    assert type(result[1].act).__module__.startswith("torch.nn")
    assert_separated_same(before, result)
    assert model[1].act == act


def test_for_export_keeps_residuals_that_a_layer_adds():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm2d(3, act="relu")

        def forward(self, x):
            return self.norm(x, x + 1)

    model = trained(Adds(), X).eval()
    assert_eval_same(model, bn.for_export(model))
    assert_eval_same(model, torch.fx.symbolic_trace(bn.for_export(model)))


def test_for_export_folds_on_request():
    model = own()
    result = bn.for_export(model, fold=True, example=X)
    assert bn.find(result) == {}
    assert not result.training
    assert kinds(result) == {nn.Sequential, nn.Conv2d, *kinds(result[1])}
    assert_eval_same(model, result)
    with pytest.raises(ValueError, match=r"for_export\(fold=True\) needs an example, got none"):
        bn.for_export(model, fold=True)


def test_for_export_folds_a_fused_model(original):
    result = bn.for_export(fused(original), fold=True, example=X)
    assert bn.find(result) == {}
    assert {kind.__module__.partition(".")[0] for kind in kinds(result)} <= {"torch", "test_surgery_exporting"}
    assert_eval_same(original, result)


def test_for_export_makes_plain_layers_of_frozen_ones_in_eval_mode():
    result = bn.for_export(bn.freeze(fused(trained(chain(), X))).train())
    assert type(result[1]) is nn.BatchNorm2d
    assert (result.training, result[1].training) == (True, False)


def test_for_export_keeps_what_is_shared_and_takes_a_layer_alone():
    layer = bn.BatchNorm2d(3, act="relu")
    result = bn.for_export(nn.Sequential(layer, nn.Identity(), layer))
    assert result[0] is result[2]
    alone = bn.for_export(layer.eval())
    torch.testing.assert_close(alone(X), layer(X))
    group = bn.for_export(bn.to_group_norm(nn.Sequential(layer)))
    assert type(group[0].norm) is nn.GroupNorm


def test_for_export_names_subclasses_that_it_leaves():
    class Mine(bn.BatchNorm2d):
        pass

    with pytest.warns(UserWarning, match="does not change layers whose classes are derived from.*: 0"):
        bn.for_export(nn.Sequential(Mine(3)))


@pytest.mark.parametrize("make", [lambda: fused(trained(chain(nn.ReLU), X).eval()), own], ids=["fused", "own"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_tools_that_go_by_class_know_every_layer(make):
    from torch.fx.experimental.optimization import fuse

    model = make()
    result = fuse(bn.for_export(model))
    assert bn.find(result) == {}
    assert_eval_same(model, result)
