"""Evidence of live models: what is read off layers, wrappers, optimizers and loaders, with nothing changed by it."""

import inspect
from functools import partial

import pytest
import torch
from fingerprint import Net as Everything
from fingerprint import fingerprint, trained_net
from planted import CHANNELS, LAYERS, Net, batches, bn603, images, layer_of, loader, trained
from small_networks import Written
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.doctor import examine
from batchnorm.doctor.measuring.live_layers import layers_of, stored_of
from batchnorm.doctor.measuring.model_evidence import modules_of, of_model, optimizer_of, structure_of
from batchnorm.doctor.measuring.neighbours_in_code import graph_of

NO_LOOP = {"batch_size": None, "accumulation": 1, "world_size": 1, "max_examples": 64, "name": ""}


def evidence(model, data=None, **settings):
    return of_model(model, data, **({"example": None, "optimizer": None, "reference": None} | NO_LOOP | settings))


class Foreign(nn.Module):
    """A fixed batch norm layer of another library."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.eps = 1e-3

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def foreign():
    model = trained()
    model.stem[1] = Foreign()
    return model


# -- nothing is changed ------------------------------------------------------------------------------------------


def _all_train(model):
    return model.train()


def _all_eval(model):
    return model.eval()


def _train_with_a_frozen_layer(model):
    bn.freeze(layer_of(model.train()))
    return model


def _train_with_a_layer_in_eval(model):
    layer_of(model.train()).eval()
    return model


def _eval_with_a_layer_in_train(model):
    layer_of(model.eval()).train()
    return model


MODES = [_all_train, _all_eval, _train_with_a_frozen_layer, _train_with_a_layer_in_eval, _eval_with_a_layer_in_train]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("data", [None, "batches", "shuffled"])
def test_a_look_leaves_everything_as_it_was(mode, data):
    model = mode(trained_net())
    x = torch.randn(64, 3)
    given = {None: None, "batches": list(x.split(16)), "shuffled": loader(x, 16, shuffle=True)}[data]
    before = fingerprint(model)
    evidence(model, given, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), reference=model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("example", [None, "batch"])
def test_a_look_at_the_graph_leaves_everything_as_it_was(mode, example):
    model = mode(trained_net())
    x = torch.randn(16, 3) if example else None
    before = fingerprint(model)
    graph_of(model, x)
    assert fingerprint(model) == before


class Raises(Everything):
    def forward(self, x):
        hidden = self.theirs(self.first(x))
        if not isinstance(x, torch.fx.Proxy) and not self.drop.training:
            self.history.append(x)
            raise RuntimeError("sensor unplugged")
        return hidden


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_raises_on_the_example_is_left_as_it_was(mode):
    model, x = mode(Raises()), torch.randn(8, 3)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="raises RuntimeError on the example: sensor unplugged"):
        graph_of(model, x)
    found, _ = evidence(model, example=x)
    assert fingerprint(model) == before
    assert found.graph is None
    assert "sensor unplugged" in found.why_not("graph")


def test_the_order_of_a_shuffled_loader_is_not_used_up():
    data = loader(images(64), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    expected = [batch[0] for batch in data]
    data.generator.manual_seed(3)
    evidence(trained(), data)
    assert all(map(torch.equal, expected, [batch[0] for batch in data]))


# -- what is given -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [3, None, nn.BatchNorm1d, [nn.BatchNorm1d(2)]])
def test_what_is_no_model_is_refused(target):
    with pytest.raises(TypeError, match=r"needs a path or an nn\.Module, got [\w ]+\. Pass the model itself"):
        examine(target)


def test_data_that_are_no_batches_are_refused():
    with pytest.raises(TypeError, match="needs an iterable of batches, got int"):
        evidence(trained(), 3)


def test_words_say_what_was_measured_on_and_parts_are_there_as_far_as_they_are_known():
    bare, words = evidence(trained())
    assert words == ""
    assert (bare.target, bare.measured, bare.run, bare.loop, bare.optimizer, bare.reference) == ("Net", *[None] * 5)
    assert bare.why_not("measured") == "needs data"
    full, words = evidence(trained(), batches(), name="mine", max_examples=100)
    assert words == "100 examples in 4 batches"
    assert full.target == "mine"
    assert list(full.stored) == list(full.modules) == list(full.measured) == list(LAYERS)
    assert full.graph.calls == dict.fromkeys(LAYERS, 1)


def test_an_iterator_gives_its_first_batch_to_the_measurement():
    found, words = evidence(trained(), iter(batches()))
    assert words == "64 examples in 2 batches"
    assert found.graph.calls == {"stem.1": 1, "body.1": 1}


# -- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_what_a_layer_stores_is_what_its_state_dict_has(norm):
    model = trained(Net(norm))
    stored = stored_of("stem.1", model.stem[1])
    for name, tensor in model.stem[1].state_dict().items():
        found = getattr(stored, name)
        assert found == 100 if name == "num_batches_tracked" else list(found) == tensor.double().tolist()
    assert (stored.name, stored.eps, stored.momentum, stored.channels) == ("stem.1", 1e-5, 0.1, CHANNELS)
    assert stored.dtypes == dict.fromkeys(("running_mean", "running_var", "weight", "bias"), "float32")


def test_half_precision_is_told_and_widened_exactly():
    layer = trained().bfloat16().stem[1]
    stored = stored_of("", layer)
    assert stored.dtypes["running_var"] == "bfloat16"
    assert list(stored.running_var) == layer.running_var.double().tolist()


@pytest.mark.parametrize(
    "layer",
    [nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, device="meta")],
    ids=["lazy", "on the meta device"],
)
def test_a_layer_without_values_stores_nothing_and_can_be_examined(layer):
    stored = stored_of("", layer)
    assert (stored.running_mean, stored.running_var, stored.weight, stored.bias) == (None,) * 4
    assert stored.channels == 0
    assert not stored.num_batches_tracked
    assert not examine(layer).at_least(2)


def test_a_parametrized_layer_is_read_as_it_computes():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = trained()
    weight = model.stem[1].weight.tolist()
    for name in ("weight", "bias"):
        parametrize.register_parametrization(model.stem[1], name, Doubled())
    assert list(stored_of("", model.stem[1]).weight) == [2 * value for value in weight]
    found = modules_of(model)["stem.1"]
    assert found.affine
    assert found.trainable
    model.stem[1].requires_grad_(False)
    assert not modules_of(model)["stem.1"].trainable


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.BatchNorm1d(3), {"kind": "BatchNorm1d", "momentum": 0.1, "training": True, "trainable": True}),
        (lambda: nn.BatchNorm1d(3, 1e-3, None), {"eps": 1e-3, "momentum": None}),
        (lambda: nn.BatchNorm1d(3, affine=False), {"affine": False, "trainable": False}),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), {"tracks": False}),
        (lambda: nn.BatchNorm1d(3).eval().requires_grad_(False), {"training": False, "trainable": False}),
        (lambda: bn.freeze(nn.BatchNorm1d(3)).train(), {"frozen": True, "training": False}),
        (lambda: nn.SyncBatchNorm(3), {"is_sync": True, "syncs_on_cpu": False, "device": "cpu"}),
        (lambda: bn.BatchNorm1d(3, sync=True), {"is_sync": True, "syncs_on_cpu": True, "device": "cpu"}),
        (lambda: nn.LazyBatchNorm1d(), {"is_lazy": True}),
        (lambda: nn.BatchNorm1d(3, device="meta"), {"device": "meta"}),
        (lambda: bn.BatchNorm1d(3, device="meta"), {"device": "meta", "skipped_updates": 0}),
        (lambda: Foreign(), {"kind": "Foreign", "frozen": True, "eps": 1e-3, "trainable": False}),
    ],
)
def test_settings_of_a_layer(make, expected):
    found = modules_of(make())[""]
    assert {name: getattr(found, name) for name in expected} == expected


def test_batches_that_our_layers_left_out_are_told():
    layer = bn.BatchNorm1d(2)
    with pytest.warns(RuntimeWarning, match="NaN"):
        layer(torch.full((4, 2), float("nan")))
    assert modules_of(layer)[""].skipped_updates == 1


def test_what_its_owner_ignores_is_carried_along():
    model = trained()
    model.stem[1].batchnorm_ignore = {"BN103", "BN2"}
    model.body[1].batchnorm_ignore = "BN1"
    assert [modules_of(model)[path].ignored for path in LAYERS] == [{"BN103", "BN2"}, {"BN1"}]


def test_a_layer_of_another_library_is_examined_like_any_other():
    model = foreign()
    assert list(layers_of(model)) == list(LAYERS)
    assert examine(model, batches()).layers[0].mode == "frozen"
    model.stem[1].running_var[2] = -1
    assert [(f.code, f.layer) for f in examine(model).at_least(2)] == [("BN103", "stem.1")]
    assert list(layers_of(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.LayerNorm(3)))) == []


def test_where_is_the_line_of_the_class_that_holds_the_layer():
    path, line = modules_of(trained())["stem.1"].where.rsplit(":", 1)
    assert path.endswith("planted.py")
    assert int(line) == inspect.getsourcelines(Net)[1]
    assert modules_of(nn.Sequential(nn.BatchNorm1d(3)))["0"].where == ""
    assert modules_of(nn.BatchNorm1d(3))[""].where == ""


# -- wrappers and names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "prefix", "wrapper"),
    [
        (nn.DataParallel, "module.", "DataParallel"),
        (AveragedModel, "module.", "AveragedModel"),
        (partial(torch.compile, backend="eager"), "_orig_mod.", "OptimizedModule"),
    ],
)
def test_wrapped_models_keep_their_own_paths(wrap, prefix, wrapper):
    model = wrap(trained())
    found, _ = evidence(model)
    assert list(found.stored) == list(found.modules) == [prefix + path for path in LAYERS]
    assert found.structure.wrappers == (wrapper,)
    assert (found.graph is None) is (wrapper == "OptimizedModule")


def test_settings_of_wrappers_are_told():
    parallel = structure_of(bn603(None)["target"])
    assert (parallel.wrappers, parallel.broadcasts_buffers) == (("DistributedDataParallel",), False)
    assert structure_of(AveragedModel(trained(), use_buffers=True)).averages_buffers is True
    assert structure_of(AveragedModel(trained())).averages_buffers is False
    plain = structure_of(trained())
    assert (plain.training, plain.wrappers, plain.broadcasts_buffers, plain.averages_buffers) == (False, (), None, None)
    assert structure_of(trained().train()).training


def test_every_name_of_a_layer_is_told():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model.append(model[0])
    assert structure_of(model).names == {"0": ("0", "2")}


# -- optimizers --------------------------------------------------------------------------------------------------


def test_decay_and_what_an_optimizer_does_not_know():
    model = trained()
    model.body[1].requires_grad_(False)
    found = optimizer_of(model, torch.optim.AdamW(model.parameters(), weight_decay=0.05))
    assert (found.kind, dict(found.decay), found.unlisted) == ("AdamW", {"stem.1": 0.05}, ())
    body = torch.optim.SGD(model.body.parameters(), lr=0.1)
    assert optimizer_of(model, body).unlisted == ("stem.1",)
    groups = [{"params": model.stem[1].parameters(), "weight_decay": 0.0}, {"params": model.head.parameters()}]
    assert optimizer_of(model, torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)).decay == {}


def test_schedule_free_optimizers_are_known_by_their_groups_or_name():
    class AdamWScheduleFree(torch.optim.SGD):
        pass

    model = trained()
    assert not optimizer_of(model, torch.optim.SGD(model.parameters())).is_schedule_free
    assert optimizer_of(model, AdamWScheduleFree(model.parameters())).is_schedule_free
    assert optimizer_of(model, torch.optim.SGD([{"params": model.parameters(), "train_mode": True}])).is_schedule_free


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="needs a torch optimizer, got int"):
        examine(trained(), optimizer=3)


# -- models of any kind ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("data", [None, [torch.randn(8, 3)]])
def test_scripted_models_are_examined(data):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var[0] = -1.0
    assert "BN103" in {f.code for f in examine(torch.jit.script(model), data).findings}


@pytest.mark.parametrize("before", [[], [nn.Linear(3, 4)]])
def test_a_layer_of_two_sizes_is_a_finding(before):
    layer = nn.BatchNorm1d(4)
    layer.running_mean = torch.zeros(7)
    layer.running_var *= 2
    found = examine(nn.Sequential(*before, layer))
    assert "BN109" in {finding.code for finding in found.findings}


def test_a_model_that_makes_layers_as_it_runs_is_examined_without_its_graph():
    def grow(net, x):
        if not hasattr(net, "late"):
            net.late = nn.BatchNorm1d(3)
        return net.late(net.bn(x))

    found = examine(Written(grow, bn=nn.BatchNorm1d(3)), [torch.randn(8, 3)])
    assert list(found.layers[0].name) == list("bn")


def test_a_momentum_in_a_tensor_is_a_number():
    layer = nn.BatchNorm1d(3, momentum=torch.tensor(0.25))
    assert '"momentum": 0.25' in examine(nn.Sequential(layer)).to_json()


@pytest.mark.parametrize("ignored", ["", (), None, [""]])
def test_an_owner_who_ignores_nothing_silences_nothing(ignored):
    layer = nn.BatchNorm1d(3)
    layer.running_var[0] = -1.0
    layer.batchnorm_ignore = ignored
    assert "BN103" in {finding.code for finding in examine(nn.Sequential(layer)).findings}


def test_what_an_owner_ignores_is_named_by_code_or_slug_and_must_be_known():
    layer = nn.BatchNorm1d(3)
    layer.running_var[0] = -1.0
    layer.batchnorm_ignore = "negative-variance"
    assert "BN103" not in {finding.code for finding in examine(nn.Sequential(layer)).findings}
    layer.batchnorm_ignore = "BN777"
    with pytest.raises(ValueError, match=r"batchnorm_ignore of layer '0': no rule 'BN777'\. Did you mean"):
        examine(nn.Sequential(layer))
    layer.batchnorm_ignore = 3
    with pytest.raises(TypeError, match=r"batchnorm_ignore of layer '0' must be codes of rules, got 3\."):
        examine(nn.Sequential(layer))
