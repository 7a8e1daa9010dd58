"""States of a file, statistics that were copied from one to another, and layers that are stored once."""

import copy
from argparse import Namespace

import pytest
import torch
from checkpoint_files import saved, trained
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.checkpoint import read
from batchnorm.checkpoint.identical_parts import find_twins
from batchnorm.doctor import examine
from batchnorm.rules import Severity


class Net(nn.Module):
    """Convolutions in front of batch norm, a head behind it, and the head registered first if that is asked for."""

    def __init__(self, *, head_first=False):
        super().__init__()
        if head_first:
            self.head = nn.Linear(6, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        if not head_first:
            self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3)))


def net(seed=0, **settings):
    """A model whose statistics, gamma and beta are those of some training."""
    torch.manual_seed(seed)
    model = Net(**settings)
    for layer in bn.find(model).values():
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, std=0.2)
    for _ in range(60):
        model(torch.randn(16, 3, 8, 8))
    return model


def moved(model, *names, by=1.01):
    """A copy with other parameters; all of them, if none is named."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if not names or name.startswith(names):
            parameter.data.mul_(by)
    return other


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def write(tmp_path, value):
    (tmp_path / "c.pt").write_bytes(saved(value))
    return tmp_path / "c.pt"


def twins(path):
    return [(each.first, each.second) for each in find_twins(read(path))]


A = net().state_dict()
B = moved(net()).state_dict()
PAIRS = {
    "target network": ({"q_net": A, "q_net_target": B}, "q_net", "q_net_target", "warning"),
    "a list": ([A, B], "0", "1", "warning"),
    "a list in a dict": ({"models": [A, B], "epoch": 3}, "models.0", "models.1", "warning"),
    "parts of one module": (
        {"state_dict": {**under("student.", A), **under("teacher.", B)}}, "state_dict.student", "state_dict.teacher",
        "warning"),
    "beside the model": ({**A, **under("target.", B)}, "", "target", "warning"),
    "deep": ({"a": {"b": {"c": {"online": A, "target": B}}}}, "a.b.c.online", "a.b.c.target", "warning"),
    "an average": ({"model": A, "model_ema": B}, "model", "model_ema", "error"),
    "an average first": ({"ema_state": B, "net": A}, "net", "ema_state", "error"),
    "an average in one module": (
        {"state_dict": {**under("net.ema_encoder.", B), **under("net.encoder.", A)}},
        "state_dict.net.ema_encoder", "state_dict.net.encoder", "error"),
    "AveragedModel": ({"model": A, "best": {"n_averaged": torch.tensor(2), **under("module.", B)}}, "model",
                      "best.module", "error"),
    "in a callback": (
        {"state_dict": under("module.", A), "callbacks": {"WeightEMA": {"ema_weights": under("module.", B)}}},
        "state_dict", "callbacks.WeightEMA.ema_weights", "error"),
    # torch.save keeps what shares memory: the average was saved with the very statistics of the model
    "statistics by reference": (
        {"model": A, "ema": {k: A[k] if "running" in k or "num" in k else v for k, v in B.items()}}, "model", "ema",
        "error"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "first", "second", "severity"), PAIRS.values(), ids=PAIRS)
def test_equal_statistics_behind_other_weights_are_foreign(tmp_path, value, first, second, severity):
    path = write(tmp_path, value)
    assert twins(path) == [(first, second)]
    (finding,) = [each for each in examine(path).findings if each.code == "BN115"]
    assert str(finding.severity) == severity
    blamed = first if "ema" in first else second
    assert finding.layer in {blamed, f"{blamed}.module", blamed.removeprefix("state_dict.")}
    assert "BN302" not in {each.code for each in examine(path).findings}


def test_a_pair_is_seen_in_safetensors_whose_names_are_sorted(tmp_path):
    for behind in (B, {**A, "head.weight": 2 * A["head.weight"]}):
        tensors = {k: v.clone() for k, v in {**under("online.", A), **under("target.", behind)}.items()}
        save_file(tensors, tmp_path / "c.safetensors")
        assert twins(tmp_path / "c.safetensors") == ([("online", "target")] if behind is B else [])


def test_the_state_is_named_as_it_can_be_chosen(tmp_path):
    path = write(tmp_path, PAIRS["in a callback"][0])
    (finding,) = [each for each in examine(path).findings if each.code == "BN115"]
    assert finding.layer == "callbacks.WeightEMA.ema_weights.module"
    again = next(each for each in examine(path, state=finding.layer).findings if each.code == "BN115")
    assert (again.layer, again.measured) == (finding.layer, finding.measured)


def test_each_of_three_states_is_named_once(tmp_path):
    path = write(tmp_path, {"model": A, "ema": B, "swa": moved(net(), by=1.02).state_dict()})
    assert [each.layer for each in examine(path).findings] == ["ema", "swa"]


def half(state):
    return {k: v.half() if v.is_floating_point() and "running" not in k else v for k, v in state.items()}


def uncounted(state):
    return {key: value for key, value in state.items() if "num_batches" not in key}


def partly(state):
    return {key: value + 0.1 if key == "bn2.running_mean" else value for key, value in state.items()}


def fitted(model):
    """An average whose statistics were measured on its own weights."""
    other = moved(model)
    bn.recalibrate(other, [torch.randn(16, 3, 8, 8) for _ in range(4)])
    return other


HEADS = moved(net(), "head", by=2.0).state_dict()
FIRST = net(head_first=True)
FROZEN = moved(net(), "conv").state_dict()
APART = {
    "initial": lambda: {"a": Net().state_dict(), "ema": Net().state_dict()},
    "two heads on one backbone": lambda: {"a": A, "b": HEADS},
    "two heads, registered first": lambda: {
        "a": FIRST.state_dict(), "ema": moved(FIRST, "head", by=2.0).state_dict()},
    "one layer of its own": lambda: {"a": A, "ema": partly(B)},
    "everything the same": lambda: {"a": A, "ema": copy.deepcopy(A)},
    "the same object": lambda: {"a": A, "ema": A},
    "frozen layers": lambda: {"a": uncounted(A), "ema": uncounted(FROZEN)},
    "a copy in half precision": lambda: {"a": half(A), "optimizer": {"master": A}},
    "measured again": lambda: {"a": A, "ema": fitted(net()).state_dict()},
    "other models": lambda: {"generator": A, "discriminator": trained(1).state_dict()},
}  # fmt: skip


@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_equal_statistics_that_may_be_right_are_not_named(tmp_path, make):
    path = write(tmp_path, make())
    assert twins(path) == []
    assert not {"BN115", "BN302"} & {finding.code for finding in examine(path).findings}


# -- layers that are stored once ----------------------------------------------------------------------------------


def test_one_layer_behind_two_linear_ones_is_shared_and_no_copy_of_itself(tmp_path):
    """Its statistics are the same bits in both branches, whose weights differ: it is one layer, stored once."""
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(16, 4) + 1)
    branches = nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 4), norm) for name in ("left", "right")})
    torch.save(branches.state_dict(), path := tmp_path / "siamese.pt")
    assert twins(path) == []
    codes = {finding.code for finding in examine(path).findings}
    assert "BN302" in codes
    assert "BN115" not in codes


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm

    def forward(self, x):
        return self.norm(self.conv(x))


class Alias(nn.Module):
    """One backbone under two names, called once."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(Block(nn.BatchNorm2d(4)), Block(nn.BatchNorm2d(4)))
        self.body = self.encoder
        self.last = self.encoder[1].norm
        self.last_conv = self.encoder[1].conv

    def forward(self, x):
        return self.encoder(x)


def run(model):
    for _ in range(60):
        model(torch.randn(8, 4, 5, 5))
    return model


def in_turn():
    norm = nn.BatchNorm2d(4)
    return run(nn.Sequential(norm, nn.ReLU(), norm))


def behind_two_convolutions():
    norm = nn.BatchNorm2d(4)
    return run(nn.Sequential(Block(norm), Block(norm), Block(nn.BatchNorm2d(4))))


def siamese():
    block = Block(nn.BatchNorm2d(4))
    return run(nn.ModuleDict({"left": block, "right": block})["left"]), nn.ModuleDict({"left": block, "right": block})


STORED_ONCE = {
    "in turn": (lambda: in_turn().state_dict(), "warning", "one layer under 2 names: 0, 2"),
    "behind two": (
        lambda: behind_two_convolutions().state_dict(), "warning", "one layer under 2 names: 0.norm, 1.norm"),
    "two encoders": (lambda: siamese()[1].state_dict(), "info", "one layer under 2 names: left, right"),
    "in a checkpoint": (lambda: {"model": in_turn().state_dict(), "epoch": 1}, "warning", "one layer under 2 names"),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("make", "severity", "told"), STORED_ONCE.values(), ids=STORED_ONCE)
def test_a_layer_of_two_names_is_seen_in_the_file(tmp_path, make, severity, told, legacy):
    torch.save(make(), tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    (finding,) = [each for each in examine(tmp_path / "c.pt").findings if each.code == "BN302"]
    assert str(finding.severity) == severity
    assert told in finding.measured
    assert finding.consequence.startswith(("If each", "Harmless"))


def test_a_second_name_for_one_call_is_no_more_than_something_to_know(tmp_path):
    model = run(Alias())
    torch.save(model.state_dict(), tmp_path / "c.pt")
    found = [each for each in examine(tmp_path / "c.pt").findings if each.code == "BN302"]
    assert {each.severity for each in found} == {Severity.INFO}
    assert "BN302" not in {each.code for each in examine(model.eval(), [torch.randn(8, 4, 5, 5)] * 4).findings}


def test_what_only_looks_alike_is_not_one_layer(tmp_path):
    flat = torch.rand(64)
    apart = {f"{name}.{key}": flat[i * 8 : i * 8 + 4] for name, i in (("a", 0), ("b", 4))
             for key, i in (("running_mean", i), ("running_var", i + 1))}  # fmt: skip
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    second.weight = first.weight  # as BN302 advises
    mean = {
        "a.running_mean": flat[:4],
        "b.running_mean": flat[:4],
        "a.running_var": flat[4:8],
        "b.running_var": flat[8:12],
    }
    for state in (apart, nn.Sequential(first, second).state_dict(), mean, {"model": A, "again": dict(A)}):
        torch.save(state, tmp_path / "c.pt")
        assert "BN302" not in {each.code for each in examine(tmp_path / "c.pt").findings}


def test_nodes_that_read_the_same_statistics_are_one_layer(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    def model(*stems):
        kinds = {"s": 1.0, "b": 0.0, "m": 0.5, "v": 2.0}
        tensors = {f"{stem}.{key}": value for stem in stems for key, value in kinds.items()}
        nodes = [
            helper.make_node(
                "BatchNormalization", [f"x{i}", *(f"{stem}.{key}" for key in kinds)], [f"x{i + 1}"], f"n{i}"
            )
            for i, stem in enumerate(stems)
        ]
        made = [numpy_helper.from_array(torch.full((4,), value).numpy(), name) for name, value in tensors.items()]
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 5]) for name in ("x0", f"x{len(stems)}")
        ]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], made)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)]), tmp_path / "m.onnx")
        return [each.measured for each in examine(tmp_path / "m.onnx").findings if each.code == "BN302"]

    (told,) = model("a", "a", "b")
    assert told.startswith("it normalizes different inputs at 2 places")
    assert model("a", "b") == []


# -- what is examined ---------------------------------------------------------------------------------------------


def sick(state, layer="bn1"):
    return {k: torch.full_like(v, -1) if k == f"{layer}.running_var" else v for k, v in state.items()}


SICK = {
    "state_dict_ema": lambda: {"state_dict": A, "state_dict_ema": sick(B)},
    "swa_state": lambda: {"net": A, "swa_state": sick(B)},
    "discriminator": lambda: {"generator": A, "discriminator": sick(B)},
    "1": lambda: [A, sick(B)],
    "optimizer.master": lambda: {"model": half(A), "optimizer": {"master": sick(A)}},
    "teacher": lambda: {"state_dict": {**under("student.", A), **under("teacher.", sick(B))}},
    "callbacks.EMA.module": lambda: {
        "state_dict": A, "callbacks": {"EMA": {"n_averaged": torch.tensor(1), **under("module.", sick(B))}}},
    "a.b.c.target": lambda: {"a": {"b": {"c": {"online": A, "target": sick(B)}}}},
    "ema": lambda: AveragedModel(net()).state_dict() and {"model": A, "ema": sick(B)},
}  # fmt: skip


@pytest.mark.parametrize(("path", "make"), SICK.items(), ids=SICK)
def test_a_sick_layer_is_found_in_every_state_and_named_by_its_path(tmp_path, path, make):
    diagnosis = examine(write(tmp_path, make()))
    (finding,) = [each for each in diagnosis.findings if each.code == "BN103"]
    # what all layers of a file have in front is left out, as for one state
    assert finding.layer.endswith("bn1")
    assert path.endswith(finding.layer.removesuffix(".bn1"))
    assert len(diagnosis.layers) == 4
    assert not diagnosis.ok


def test_a_state_that_repeats_another_is_named_and_told_once(tmp_path):
    ill = sick(A)
    for value in ({"model": ill, "ema": copy.deepcopy(ill)}, [ill, copy.deepcopy(ill)]):
        diagnosis = examine(write(tmp_path, value))
        assert [each.code for each in diagnosis.findings] == ["BN103"]
        assert any("bit for bit: findings in them are reported once" in note for note in diagnosis.notes)
    diagnosis = examine(write(tmp_path, {"model": ill, "again": ill}))
    assert diagnosis.notes == ("again is model itself, under another name",)


def test_one_state_can_be_chosen(tmp_path):
    path = write(tmp_path, {"model": sick(A, "bn2"), "ema": sick(B)})
    found = {state: [each.layer for each in examine(path, state=state).findings] for state in ("model", "ema")}
    assert found == {"model": ["bn2"], "ema": ["ema.bn1"]}
    with pytest.raises(ValueError, match="has no state 'swa'; it has 'model', 'ema'"):
        examine(path, state="swa")
    with pytest.raises(ValueError, match="state selects a state of a file, got 'ema' for a model"):
        examine(net(), state="ema")


def test_an_average_that_is_chosen_still_has_the_statistics_of_others(tmp_path):
    path = write(tmp_path, {"model": A, "ema": B})
    assert [each.code for each in examine(path, state="ema").findings] == ["BN115"]
    assert examine(path, state="model").findings == ()


def test_a_file_with_one_state_keeps_its_names(tmp_path):
    diagnosis = examine(write(tmp_path, {"state_dict": under("module.", sick(A)), "epoch": 1}))
    assert [each.layer for each in diagnosis.findings if each.code == "BN103"] == ["bn1"]
    assert diagnosis.states == ("state_dict.module",)
    assert diagnosis.notes == ()


def test_a_target_without_layers_is_not_called_healthy(tmp_path):
    for target in (write(tmp_path, {"weight": torch.ones(2)}), nn.Linear(2, 3)):
        assert "no batch norm layers · " in str(examine(target))
        assert "no findings" not in str(examine(target))


def test_a_missing_counter_is_looked_for_in_the_versions_of_its_own_state(tmp_path):
    """load_state_dict(strict=True) refuses a state of version 2 without a counter, and takes one without versions."""

    def without_counter(keep):
        state = net().state_dict()  # the same numbers in both copies
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]
        return state if keep else dict(state)

    for name, (own, other) in {"ema": (False, True), "": (True, False)}.items():
        torch.save({"model": without_counter(own), "ema": without_counter(other)}, tmp_path / "c.pt")
        found = [each.layer for each in examine(tmp_path / "c.pt").findings if each.code == "BN112"]
        assert found
        assert all(layer.startswith("ema.") == bool(name) for layer in found), found
    torch.save({"args": Namespace(lr=1), "model": without_counter(True)}, tmp_path / "c.pt")
    assert "BN112" in {each.code for each in examine(tmp_path / "c.pt").findings}


def test_counters_of_every_copy_are_compared_with_what_it_stores(tmp_path):
    """eps, momentum and counter of a copy are its own: a layer of the same name in another copy has others."""
    begun, done = net().state_dict(), net().state_dict()
    for state, count in ((begun, 10), (done, 1000)):
        for key in state:
            if key.endswith("num_batches_tracked"):
                state[key] = torch.tensor(count)
            if key.endswith("running_var"):
                state[key] = torch.full_like(state[key], 0.9**10)
    for key in done:
        if key.endswith("running_mean"):
            done[key] += 1
    torch.save({"model": done, "ema": begun}, tmp_path / "c.pt")
    found = [each.layer for each in examine(tmp_path / "c.pt").findings if each.code == "BN114"]
    assert found
    assert all(layer.startswith("ema.") for layer in found)


def test_what_is_not_checked_is_that_of_the_state_that_was_chosen(tmp_path):
    """Of three states one is sick, and one cannot be read: a finding in another state is no look at this one."""
    unread = {key: torch.empty_like(value, device="meta") for key, value in B.items()}
    torch.save({"model": sick(A), "ema": unread}, tmp_path / "c.pt")
    assert "BN103" in {each.code for each in examine(tmp_path / "c.pt", state="model").findings}
    of_ema = examine(tmp_path / "c.pt", state="ema")
    assert "BN103" not in of_ema.checked
    assert "could not be read" in of_ema.not_checked["BN103"]
    assert "ema.bn1" in of_ema.not_checked["BN103"]
    torch.save({"model": A, "ema": unread, "swa": dict(unread)}, tmp_path / "c.pt")
    every = examine(tmp_path / "c.pt")
    assert {"ema.bn1", "swa.bn1"} <= set(
        every.not_checked["BN107"].strip(")").replace("(", " ").replace(",", " ").split()
    )


def test_a_state_that_repeats_another_one_is_told_when_it_is_chosen(tmp_path):
    torch.save({"model": sick(A), "ema": sick(A)}, tmp_path / "c.pt")
    assert [each.layer for each in examine(tmp_path / "c.pt").findings if each.code == "BN103"] == ["bn1"]
    assert [each.layer for each in examine(tmp_path / "c.pt", state="ema").findings if each.code == "BN103"] == [
        "ema.bn1"
    ]
