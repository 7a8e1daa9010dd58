"""Layers of other libraries, programs and calls of torch's function in every room: done, or said why not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from foreign_layers import Activated, FrozenByHand, NormAct
from torch import nn

import batchnorm as bn
from batchnorm.population.freezing import Frozen
from batchnorm.surgery import fold, foldable


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(layer: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer or nn.BatchNorm2d(4), nn.ReLU()).eval()


class CallsTheFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(self.conv(x), self.mean, self.var, None, None, self.training)


def exported() -> nn.Module:
    return torch.export.export(net(), (images(),)).module()


def unflattened() -> nn.Module:
    return torch.export.unflatten(torch.export.export(net(), (images(),)))


def scripted() -> nn.Module:
    return torch.jit.script(net())


def traced() -> nn.Module:
    return torch.jit.trace(net(), images())


def called() -> nn.Module:
    return nn.Sequential(CallsTheFunction().eval(), nn.ReLU())


def traced_call() -> nn.Module:
    return torch.fx.symbolic_trace(CallsTheFunction().eval())


OUT_OF_REACH = {
    exported: "'1' is an operation of an exported program. Use the model as it was before torch.export",
    unflattened: "'1' is an operation of an exported program. Use the model as it was before torch.export",
    scripted: "'1' is compiled by TorchScript. Use the model as it was before torch.jit",
    traced: "'1' is compiled by TorchScript. Use the model as it was before torch.jit",
    called: r"'0' calls torch's batch_norm in its own forward \(CallsTheFunction\). Use a layer, such as nn.BatchN",
    traced_call: "'batch_norm' is a call of torch's function in traced code. Use a layer, such as nn.BatchNorm2d",
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*is deprecated.*:FutureWarning"
)


@pytest.mark.parametrize("make", OUT_OF_REACH)
def test_what_no_room_reaches_is_named_with_what_to_do(make):
    model, x, reason = make(), images(), OUT_OF_REACH[make]
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match="recalibrate measured nothing.*" + reason):
        assert bn.recalibrate(model, [x]) == {}
    with pytest.raises(ValueError, match="adapt needs.*" + reason):
        bn.adapt(model, [x])
    with pytest.raises(ValueError, match="ShiftMonitor needs.*" + reason):
        bn.ShiftMonitor(model)
    with pytest.warns(RuntimeWarning, match="freeze found no layer: " + reason):
        bn.freeze(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [exported, called, traced_call])
def test_fold_and_convert_name_what_they_do_not_reach(make):
    model, x, reports = make(), images(), []
    result = fold(model, x, report=reports.append)
    assert torch.equal(result(x), model(x))
    assert str(reports[0]).startswith("folded 0 of 1 batch norm layers")
    [[path, reason]] = reports[0].layers.items()
    assert foldable(model) == {path: reason}
    with pytest.warns(UserWarning, match=OUT_OF_REACH[make]):
        bn.convert(model)


def frozen_program() -> nn.Module:
    return torch.jit.freeze(scripted())


@pytest.mark.parametrize("make", [scripted, traced, frozen_program])
def test_a_program_of_torchscript_is_refused_by_surgery(make):
    for change in (fold, lambda model, x: bn.convert(model, example=x)):
        with pytest.raises(TypeError, match="needs a model of modules, got a program of TorchScript"):
            change(make(), images())


def test_a_frozen_program_is_refused_by_examine():
    with pytest.raises(TypeError, match=r"got a model from torch.jit.freeze. Examine it before torch.jit"):
        bn.examine(frozen_program())


class HoldsOneOfThatName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.batch_norm(x)


@pytest.mark.parametrize("model", [net(), HoldsOneOfThatName(), net(NormAct(4, nn.ReLU())), nn.Linear(2, 2)])
def test_layers_are_not_out_of_reach(model):
    from batchnorm.other_libraries import out_of_reach

    assert out_of_reach(model) == {}
    assert out_of_reach(torch.fx.symbolic_trace(net())) == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_of_quantization_are_left_to_it():
    from torch.ao import quantization as q

    model = q.fuse_modules_qat(net().train(), [["0", "1", "2"]])
    model.qconfig = q.get_default_qat_qconfig("fbgemm")
    model = q.prepare_qat(model).eval()
    model(images())
    assert "belongs to a ConvBnReLU2d of quantization-aware training" in foldable(model, images())["0.bn"]
    static = nn.Sequential(q.QuantStub(), nn.BatchNorm2d(3), q.DeQuantStub()).eval()
    static.qconfig = q.get_default_qconfig("fbgemm")
    static = q.prepare(static)
    static(images())
    assert foldable(q.convert(static))["1"] == "it is a quantized BatchNorm2d. Do this before quantization"


# --- frozen layers of others ----------------------------------------------------------------------------------


def test_a_frozen_layer_of_others_is_told_of_where_nothing_is_measured():
    model, x = net(FrozenByHand(4)), images()
    told = "'1' is a FrozenByHand, a frozen layer of another library. Put a live layer in its place: batchnorm.replace"
    with pytest.warns(RuntimeWarning, match="recalibrate measured nothing.*" + told):
        bn.recalibrate(model, [x])
    mean = model[0](x).detach().mean((0, 2, 3))
    with bn.adapted(model, [x]):  # whoever asks for it by name gets it
        torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model[1].running_mean, mean, atol=1e-3)
    before = copy.deepcopy(model.state_dict())
    bn.freeze(model.train())
    bn.unfreeze(model)
    assert type(model[1]) is FrozenByHand
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_remedy_for_a_frozen_layer_works():
    model, x = net(FrozenByHand(4)), images()
    live = bn.replace(model, lambda path, layer: bn.BatchNorm2d(len(layer.running_mean)))
    # rounding of float32 in values of up to 10
    torch.testing.assert_close(live.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    assert isinstance(live[1].weight, nn.Parameter)
    assert bn.recalibrate(live, [x]).keys() == {"1"}
    assert bn.adapt(live, [x]).keys() == {"1"}


def test_a_monitor_observes_frozen_layers_of_others():
    model, x = net(FrozenByHand(4)), images()
    with torch.no_grad():
        y = model[0](x)
        model[1].running_mean.copy_(y.mean((0, 2, 3)))
        model[1].running_var.copy_(y.var((0, 2, 3)))
    own = nn.Sequential(model[0], nn.BatchNorm2d(4), model[2]).eval()
    own[1].load_state_dict({**model[1].state_dict(), "num_batches_tracked": torch.tensor(0)})
    found = []
    for each in (model, own):
        monitor = bn.ShiftMonitor(each, budget=None, arl=None)
        with torch.no_grad(), monitor:
            for seed in range(20):
                each(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 2)
        found.append(monitor.alarm)
    assert found[0] is not None
    assert (found[0].layers if hasattr(found[0], "layers") else str(found[0])) == (
        found[1].layers if hasattr(found[1], "layers") else str(found[1])
    )


def test_live_layers_of_others_are_measured_adapted_and_frozen():
    model, x = net(Activated(4)).train(), images()
    expected = model[0](x).detach().double()
    found = bn.recalibrate(model, [x])["1"]
    torch.testing.assert_close(found.mean.double(), expected.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    # Bessel's factor of 216 values
    unbiased = expected.var((0, 2, 3), correction=1)
    torch.testing.assert_close(model[1].running_var.double(), unbiased, rtol=1e-5, atol=1e-6)
    bn.adapt(model.eval(), [x + 1])
    assert not torch.allclose(model[1].running_mean.double(), expected.mean((0, 2, 3)), atol=1e-3)
    state = copy.deepcopy(model[1].state_dict())
    bn.freeze(model.train())(x)
    assert isinstance(model[1], Frozen)
    assert all(torch.equal(value, state[name]) for name, value in model[1].state_dict().items())
    bn.unfreeze(model)(x)
    assert type(model[1]) is Activated
    assert not torch.equal(model[1].running_mean, state["running_mean"])


def test_nothing_is_said_where_layers_were_measured():
    model = nn.Sequential(*net(), nn.Conv2d(4, 4, 1), FrozenByHand(4)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bn.recalibrate(model, [images()]).keys() == {"1"}
