"""Files without statistics: adapters and parameters alone, found by the doctor and filled from the base's file."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import command_line
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm.checkpoint import read
from batchnorm.doctor import examine


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 2)
        for layer in (self.bn1, self.layer[1]):
            layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(0.5, 2), layer.num_batches_tracked.fill_(7)


LORA = {"conv.lora_A.weight": torch.ones(2, 3), "head.lora_B.weight": torch.ones(2, 2)}


def adapter(prefix: str = "base_model.model.", **more: torch.Tensor) -> dict:
    return {prefix + name: tensor for name, tensor in {**LORA, **more}.items()}


def affine(name: str, channels: int = 4) -> dict:
    return {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.ones(channels)}


def saved(path: str, state: object) -> str:
    save_file(state, path) if path.endswith(".safetensors") else torch.save(state, path)
    return path


def load(path: str) -> dict:
    return load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)


def told(path: str) -> list[str]:
    return [finding.measured for finding in examine(path).findings if finding.code == "BN510"]


PARAMETERS = {name: parameter.detach() for name, parameter in Net().named_parameters()}
SICK = {
    "adapter": (adapter(**affine("bn1")), "an adapter has gamma and beta, but no statistics, of base_model.model.bn1"),
    "copied module": (adapter(**affine("bn1.modules_to_save.default")), "bn1.modules_to_save.default"),
    "parameters alone": (PARAMETERS, "the file has gamma and beta, but no statistics, of bn1"),
    "in a dict": ({"model": PARAMETERS, "epoch": 3}, "of model.bn1"),
    "by other names": (
        {**affine("_bn0"), **affine("batch_norm"), **affine("net.BatchNorm_0"), **affine("norm_bn2a"), **affine("s.0")},
        "of _bn0, batch_norm, net.BatchNorm_0 and 1 more",
    ),
    "one layer of several": ({**Net().state_dict(), **affine("bn2")}, "of bn2"),
}  # fmt: skip
WELL = {
    "whole state": Net().state_dict(),
    "no batch norm": {"fc.weight": torch.ones(3, 2), **affine("ln1"), **affine("norm")},
    "another weight": {"bn.weight": torch.ones(4, 4), "bn.bias": torch.ones(4)},
    "other lengths": {"bn.weight": torch.ones(4), "bn.bias": torch.ones(3)},
    "gamma alone": {"bn.weight": torch.ones(4)},
    "adapter with statistics": adapter(**{f"bn1.{k}": v for k, v in nn.BatchNorm2d(4).state_dict().items()}),
}


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", SICK)
def test_layers_without_statistics_are_found(kind, form):
    state, text = SICK[kind]
    if form == "safetensors":
        state = state.get("model", state)
        text = text.replace("model.bn1", "bn1") if kind == "in a dict" else text
    (found,) = told(saved(f"a.{form}", state))
    assert text in found


@pytest.mark.parametrize("kind", WELL)
def test_other_files_have_no_such_finding(kind):
    assert told(saved("a.pt", WELL[kind])) == []


def test_an_adapter_without_batch_norm_is_not_judged():
    not_checked = examine(saved("a.safetensors", adapter())).not_checked
    assert "does not show the base model's layers" in not_checked["BN510"]
    assert "BN510" not in examine(saved("b.pt", WELL["no batch norm"])).not_checked


def test_a_plain_pickle_gets_a_remedy_that_is_possible():
    Path("a.pkl").write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in affine("bn1").items()}))
    (finding,) = [each for each in examine("a.pkl").findings if each.code == "BN510"]
    assert finding.remedy == "save model.state_dict(), which has the buffers too"


FILLED = {
    "adapter": (adapter(**affine("bn1")), "base_model.model.bn1", "base_model.model.layer.1"),
    "adapter without batch norm": (adapter(), "base_model.model.bn1", "base_model.model.layer.1"),
    "copied module": (
        adapter(**affine("bn1.modules_to_save.default")), "base_model.model.bn1.modules_to_save.default",
        "base_model.model.layer.1",
    ),
    "parameters alone": (PARAMETERS, "bn1", "layer.1"),
    "of a wrapper": ({f"module.{k}": v for k, v in PARAMETERS.items()}, "module.bn1", "module.layer.1"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", FILLED)
def test_the_bases_statistics_fill_the_file_and_nothing_else_changes(kind, form):
    state, first, second = FILLED[kind]
    base = saved("base.pt", {"state_dict": {f"module.{k}": v for k, v in Net().state_dict().items()}})
    path = saved(f"a.{form}", state)
    before = Path(path).read_bytes()
    code, text = command_line.told("fix", path, "--base", base)
    assert (code, f"filled 2 layers with the statistics of base.pt: {first}, {second}" in text) == (0, True), text
    assert Path(path).read_bytes() == before
    found = load(f"a.fixed.{form}")
    own = Net().state_dict()
    expected = dict(state)
    for place, name in ((first, "bn1"), (second, "layer.1")):
        expected |= {f"{place}.{k}": own[f"{name}.{k}"] for k in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in expected.items()}
    assert told(f"a.fixed.{form}") == []
    if kind == "parameters alone":
        Net().load_state_dict(found, strict=True)
    assert "no statistics are missing" in command_line.told("fix", f"a.fixed.{form}", "--base", base)[1]


def test_every_dict_of_the_file_with_these_layers_is_filled():
    saved("base.pt", Net().state_dict())
    path = saved("a.pt", {"model": PARAMETERS, "model_ema": dict(PARAMETERS), "optimizer": {0: torch.ones(2)}})
    assert "filled 4 layers" in command_line.told("fix", path, "--base", "base.pt")[1]
    for part in ("model", "model_ema"):
        Net().load_state_dict(load("a.fixed.pt")[part], strict=True)


def test_only_missing_statistics_are_copied():
    saved("base.pt", Net().state_dict())
    state = {name: tensor for name, tensor in Net().state_dict().items() if not name.startswith("layer.1.running")}
    state["bn1.running_mean"] = torch.full((4,), 9.0)
    del state["layer.1.num_batches_tracked"]
    assert "filled 1 layer " in command_line.told("fix", saved("a.pt", state), "--base", "base.pt")[1]
    found = load("a.fixed.pt")
    assert torch.equal(found["bn1.running_mean"], state["bn1.running_mean"])
    assert torch.equal(found["layer.1.running_var"], Net().layer[1].running_var)


def test_a_base_with_a_block_of_the_same_name_does_not_mislead():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn1, self.block = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Net()
            self.bn1.running_mean.fill_(5)

    saved("base.pt", Two().state_dict())
    state = {f"base_model.model.{name}": value.detach() for name, value in Two().named_parameters()}
    code, _ = command_line.told("fix", saved("a.pt", state), "--base", "base.pt")
    found = load("a.fixed.pt")
    assert code == 0
    assert torch.equal(found["base_model.model.bn1.running_mean"], torch.full((4,), 5.0))
    assert torch.equal(found["base_model.model.block.bn1.running_mean"], Net().bn1.running_mean)
    assert len(read("a.fixed.pt").layers) == 3


def test_layers_that_the_base_lacks_are_named_and_the_exit_code_is_1():
    saved("base.pt", Net().state_dict())
    code, text = command_line.told("fix", saved("a.pt", adapter(**affine("bn9"))), "--base", "base.pt")
    assert (code, "not filled, since base.pt has no statistics of such layers: base_model.model.bn9" in text) == (
        1,
        True,
    )


def test_diff_writes_nothing_and_in_place_writes_over():
    base, path = saved("base.pt", Net().state_dict()), saved("a.safetensors", adapter())
    before = Path(path).read_bytes()
    code, text = command_line.told("fix", path, "--base", base, "--diff")
    assert (code, "would fill 2 layers" in text, "nothing written" in text) == (0, True, True)
    assert {each.name for each in Path().iterdir()} == {"base.pt", "a.safetensors"}
    assert Path(path).read_bytes() == before
    assert command_line.told("fix", path, "--base", base, "--in-place")[0] == 0
    assert len(load(path)) == 8


BAD = {
    "no such base": (["a.pt", "--base", "zzz.pt"], "zzz.pt: expected a file, got no such path. Check"),
    "a base without layers": (["a.pt", "--base", "a.pt"], "--base needs a file with statistics .*, got a.pt. Give"),
    "another model's base": (["other.pt", "--base", "base.pt"], "other.pt has no module of the base base.pt. Give"),
    "other channels": (["wide.pt", "--base", "base.pt"], "'base_model.model.bn1' has 5 channels, and 4 in the base"),
    "a model": (["net.py:Net", "--base", "base.pt"], "--base needs a file to fill, got the model net.py:Net. Give"),
    "with weights": (["a.pt", "--base", "base.pt", "--weights", "b.pt"], "--weights needs a model"),
    "with unsafe": (["a.pt", "--base", "base.pt", "--unsafe-fixes"], "got --unsafe-fixes as well. Run"),
    "with a state": (["a.pt", "--base", "base.pt", "--state", "ema"], "got --state as well. Run"),
    "empty": (["a.pt", "--base", ""], "--base"),
    "there already": (["a.pt", "--base", "base.pt", "-o", "base.pt"], "base.pt exists already. Pass --force"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_told_with_a_remedy_and_nothing_is_written(kind):
    words, text = BAD[kind]
    saved("base.pt", Net().state_dict()), saved("a.pt", adapter(**affine("bn1")))
    saved("other.pt", affine("foo")), saved("wide.pt", adapter(**affine("bn1", 5)))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    result = command_line.call("fix", *words)
    output = " ".join(result.output.split())
    assert result.exit_code == 2, output
    assert re.search(text, output), output
    assert "Traceback" not in output
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
