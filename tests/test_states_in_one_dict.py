"""A file of one dict that has two states or more: every command names the same ones and takes each by its name."""

import copy
import json

import pytest
import torch
from command_line import told as call
from planted import Net, batches, saved, trained
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint import model_loading, read
from batchnorm.checkpoint.states_in_file import with_state
from batchnorm.doctor import examine
from batchnorm.doctor.mending.mended_checkpoint import plan
from batchnorm.doctor.states_in_turn import loading

CODE = """
from planted import Net as model, batches
from torch import nn
loader = batches()
def clean(): return [(x, (x.mean((1, 2, 3)) > 0).long()) for x in batches()]
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.net_ema = model(), model()
    def forward(self, x): return self.net(x)
"""


FOLDER = {"pairnet.py": CODE}


def other(by):
    model = copy.deepcopy(OWN)
    for parameter in model.parameters():
        parameter.data.mul_(by)
    for layer in bn.find(model).values():
        layer.running_mean.add_(by)
    return model.state_dict()


def under(prefix, state):
    return {prefix + key: value.clone() for key, value in state.items()}


OWN = trained()
A, B, C = OWN.state_dict(), other(1.5), other(0.7)
HEAD = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).state_dict()
# tensors, the states that the file tells, and those of them that Net loads with the numbers that it then has
PAIRS = {
    "an average": ({**under("net.", A), **under("net_ema.", B)}, {"net": A, "net_ema": B}, {}),
    "an average first": ({**under("ema_net.", B), **under("net.", A)}, {"net": A, "ema_net": B}, {}),
    "humps": ({**under("net.", A), **under("netEMA.", B)}, {"net": A, "netEMA": B}, {}),
    "swa": ({**under("G.", A), **under("swa_G.", B)}, {"G": A, "swa_G": B}, {}),
    "shadow": ({**under("net.", A), **under("shadow.", B)}, {"net": A, "shadow": B}, {}),
    "teacher": ({**under("student.", A), **under("teacher.", B)}, {"student": A, "teacher": B}, {}),
    "model": ({**under("model.", A), **under("ema_model.", B)}, {"model": A, "ema_model": B}, {}),
    "keys": ({**under("encoder_k.", B), **under("encoder_q.", A)}, {"encoder_k": B, "encoder_q": A}, {}),
    "three": (
        {**under("net.", A), **under("net_ema.", B), **under("net_target.", C)},
        {"net": A, "net_target": C, "net_ema": B}, {}),
    "a predictor": (
        {**under("online_encoder.", A), **under("predictor.", HEAD), **under("target_encoder.", B)},
        {"online_encoder": A, "target_encoder": B}, {"predictor": HEAD}),
    "a loss": (
        {**under("net.", A), **under("net_ema.", B), "loss.weight": torch.ones(3)}, {"net": A, "net_ema": B}, {}),
    "wrapped": ({**under("module.net.", A), **under("module.net_ema.", B)}, {"module.net": A, "module.net_ema": B}, {}),
    "compiled": (
        {**under("net._orig_mod.", A), **under("net_ema._orig_mod.", B)},
        {"net._orig_mod": A, "net_ema._orig_mod": B}, {}),
    "wrapped in one": ({**under("net.module.", A), **under("net_ema.", B)}, {"net.module": A, "net_ema": B}, {}),
    "AveragedModel": (
        {**under("net.", A), "mean_net.n_averaged": torch.tensor(2), **under("mean_net.module.", B)},
        {"net": A, "mean_net.module": B}, {}),
    "deep": (
        {**under("learner.net.", A), **under("learner.net_ema.", B)}, {"learner.net": A, "learner.net_ema": B}, {}),
    "two families": (
        {**under("gen.net.", A), **under("gen.net_ema.", B), **under("disc.net.", C), **under("disc.net_ema.", B)},
        {"gen.net": A, "gen.net_ema": B, "disc.net": C, "disc.net_ema": B}, {}),
    "beside the root": ({**A, **under("target.", B)}, {".": A, "target": B}, {}),
    "two beside the root": (
        {**A, **under("net.", C), **under("net_ema.", B)}, {".": A, "net": C, "net_ema": B}, {}),
}  # fmt: skip
SUFFIXES = ("pt", "safetensors")


def write(folder, tensors, suffix):
    path = str(folder / f"f.{suffix}")
    save_file({**tensors}, path) if suffix == "safetensors" else torch.save({"state_dict": tensors}, path)
    return path


def named(states, suffix):
    """States as they are called in a file whose dict is behind a key, or is all of it."""
    front = "" if suffix == "safetensors" else "state_dict"
    return {(f"{front}.{name}".strip(".") if name != "." else front or "."): state for name, state in states.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("tensors", "states", "rest"), PAIRS.values(), ids=PAIRS)
def test_a_file_has_the_states_that_its_words_tell_and_each_is_loaded_by_its_name(
    tmp_path, tensors, states, rest, suffix
):
    path = write(tmp_path, tensors, suffix)
    expected, more = named(states, suffix), named(rest, suffix)
    assert read(path).states.keys() == expected.keys() | more.keys()
    assert set(examine(path).states) == expected.keys() | more.keys()
    found = loading(Net(), path)
    assert set(found.loaded) == expected.keys()
    assert found.others.keys() == more.keys()
    for name, state in expected.items():
        model = Net()
        assert model_loading.load_weights(model, path, name) == name
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert {row.name for row in examine(path, state=name).layers} == set(read(path).states[name].layers.values())
        assert plan(path, state=name).is_empty


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_layer_is_in_one_state(tmp_path, suffix):
    for tensors, _, _ in PAIRS.values():
        file = read(write(tmp_path, tensors, suffix))
        layers = [layer for state in file.states.values() for layer in state.layers.values()]
        assert sorted(layers) == sorted(file.every)


def block(words):
    return {f"{name}.{key}": value.clone() for name in words for key, value in HEAD.items()}


# layers whose names say ema or target for other reasons
WHOLE = {
    "branches": {**under("left.", A), **under("right.", B)},
    "attention in each block": block(["b1.conv", "b1.ema", "b2.conv", "b2.ema"]),
    "a small head of many": block(["a.0", "a.1", "a.2", "b.0", "b.1", "b.2", "b.3", "c.target"]),
    "other channels": {**under("net.", A), **under("target.", nn.Sequential(nn.BatchNorm1d(9)).state_dict())},
}


@pytest.mark.parametrize("tensors", WHOLE.values(), ids=WHOLE)
def test_what_is_one_model_stays_one_state(tmp_path, tensors):
    assert list(read(write(tmp_path, tensors, "pt")).states) == ["state_dict"]


class Both(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, Net())


@pytest.mark.parametrize("names", [("net", "net_ema"), ("student", "teacher"), ("model", "ema_model")])
def test_a_model_that_has_both_loads_the_dict_as_one_state(tmp_path, names):
    model = Both(*names)
    path = saved(tmp_path / "f.pt", {"state_dict": model.state_dict(), "epoch": 1})
    assert len(read(path).states) == 2
    again = Both(*names)
    found = loading(again, path)
    assert (found.loaded, dict(found.others)) == (("state_dict",), {})
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_path_chooses_what_no_word_tells_and_the_rest_is_named(folder):
    torch.save({"state_dict": {**under("left.", A), **under("right.", B)}}, "f.pt")
    for name in ("state_dict.right", "right"):
        code, told = call("doctor", "f.pt", "--state", name)
        assert (code, "state: state_dict.right; not examined: state_dict" in told) == (0, True)
    code, told = call("doctor", "pairnet.py:model", "--weights", "f.pt")
    assert (code, "each by itself: state_dict.left, state_dict.right" in told) == (0, True)
    code, told = call("doctor", "pairnet.py:model", "--weights", "f.pt", "--state", "nothing")
    assert code == 2
    assert "f.pt has no state 'nothing'; it has 'state_dict.left', 'state_dict.right'" in told


@pytest.mark.slow
def test_what_does_not_fit_is_named_and_fix_ends_with_1(folder):
    torch.save({**under("online_encoder.", A), **under("target_encoder.", B), **under("predictor.", HEAD)}, "f.pt")
    code, told = call("fix", "pairnet.py:model", "--weights", "f.pt", "--data", "pairnet.py:loader")
    assert code == 1
    assert "loaded into the model, each by itself: online_encoder, target_encoder" in told
    assert "not loaded: predictor: it does not fit Net" in told
    code, told = call("fix", "f.pt", "--diff")
    assert "treated: online_encoder, target_encoder, predictor" in told


@pytest.mark.slow
def test_the_name_that_a_finding_has_is_one_that_every_command_takes(folder):
    statistics = {key: value for key, value in A.items() if "running" in key or "num_batches" in key}
    torch.save({"state_dict": {**under("net.", A), **under("net_ema.", {**B, **statistics})}}, "f.pt")
    (finding,) = [each for each in examine("f.pt").findings if each.code == "BN115"]
    assert finding.layer == "state_dict.net_ema"
    assert call("doctor", "f.pt", "--state", finding.layer)[0] == 1
    asked = ("pairnet.py:model", "--weights", "f.pt", "--state", finding.layer)
    assert call("doctor", *asked)[0] == 1
    code, told = call("fix", *asked, "--data", "pairnet.py:loader", "-o", "g.pt")
    assert (code, "loaded into the model: state_dict.net_ema" in told) == (0, True)
    assert examine("g.pt").findings == ()
    after = torch.load("g.pt")["state_dict"]
    assert all(torch.equal(after[f"net.{key}"], value) for key, value in A.items())


def test_an_average_in_a_dict_of_its_own_is_named_as_what_it_is_of(tmp_path):
    both = {**under("net.", A), **under("net_ema.", B)}
    path = saved(tmp_path / "f.pt", {"state_dict": both, "callback": {"ema": under("net.", C)}})
    assert loading(Net(), path).loaded == ("state_dict.net", "state_dict.net_ema", "callback.ema.net")


def test_a_dict_that_is_there_twice_has_each_state_under_both_names(tmp_path):
    both = {**under("net.", A), **under("net_ema.", B)}
    path = saved(tmp_path / "f.pt", {"model": both, "again": both})
    assert list(read(path).states) == ["model.net", "model.net_ema"]
    assert model_loading.load_weights(Net(), path, "again.net_ema") == "model.net_ema"


def test_a_file_of_very_many_states_is_left_as_it_is(tmp_path):
    many = {key: value for i in range(100) for key, value in under(f"target_{i}.", HEAD).items()}
    assert list(read(write(tmp_path, many, "pt")).states) == ["state_dict"]


def test_the_model_chooses_among_states_of_a_reference(folder):
    torch.save({**under("ema.", B), **under("net.", A)}, "f.pt")
    model = Net()
    model.load_state_dict(A)
    for name, layer in bn.find(model).items():
        layer.eps = 1e-3 if name == "stem.1" else layer.eps
    found = [each.code for each in examine(model, batches(), reference="f.pt").findings]
    torch.save(A, "g.pt")
    assert found == [each.code for each in examine(model, batches(), reference="g.pt").findings]


LOADED = "f.pt: loaded 'net'; it has the states 'net', 'net_ema'"
CHOSEN = "f.pt: loaded 'net_ema'; it has the states 'net', 'net_ema'"


@pytest.mark.parametrize("option", ["--data", "--check-assumptions"])
def test_shift_says_which_state_it_loaded_and_takes_another_one(folder, option):
    torch.save({**under("net_ema.", B), **under("net.", A)}, "f.pt")
    words = ["shift", "pairnet.py:model", option, "pairnet.py:loader", "--weights", "f.pt"]
    assert LOADED in call(*words)[1]
    assert CHOSEN in call(*words, "--state", "net_ema")[1]
    torch.save(A, "f.pt")
    assert "was loaded" not in call(*words)[1]
    code, told = call("shift", "pairnet.py:model", option, "pairnet.py:loader", "--state", "net")
    assert (code, "--state selects a state of a checkpoint" in told) == (2, True)


def test_shift_repeats_the_state_in_its_command(folder):
    torch.save({**under("net_ema.", B), **under("net.", A)}, "f.pt")
    words = ["shift", "pairnet.py:model", "--data", "pairnet.py:loader", "--weights", "f.pt"]
    for more, name in (([], "net"), (["--state", "net_ema"], "net_ema")):
        call(*words, *more, "-o", "a.json")
        told = json.loads((folder / "a.json").read_text())
        assert f"--weights f.pt --state {name} " in told["command"]


def test_why_says_which_state_it_loaded(folder):
    torch.save({**under("net_ema.", B), **under("net.", A)}, "f.pt")
    words = ["why", "pairnet.py:model", "--data", "pairnet.py:clean", "--weights", "f.pt", "--no-train", "-q"]
    for more, sentence, name in (([], LOADED, "net"), (["--state", "net_ema"], CHOSEN, "net_ema")):
        code, told = call(*words, "--seeds", "2", "-o", "a.json", *more)
        assert code == 0, told
        assert sentence in told
        found = json.loads((folder / "a.json").read_text())
        assert found["measured"]["State"] == sentence
        assert f"--weights f.pt --state {name} " in found["command"]
    code, told = call("why", "pairnet.py:model", "--data", "pairnet.py:clean", "--state", "net")
    assert (code, "--state selects a state of a checkpoint" in told) == (2, True)


@pytest.mark.slow
def test_doctor_says_in_every_format_which_states_it_loaded(folder):
    torch.save({**under("net_ema.", B), **under("net.", A)}, "f.pt")
    for form in ("full", "json", "md", "sarif", "junit", "html"):
        told = call("doctor", "pairnet.py:model", "--weights", "f.pt", "--output-format", form)[1]
        assert "loaded into the model, each by itself: net, net" in told.replace("\\", ""), form


def test_a_state_that_is_one_already_leaves_the_file_as_it_is(tmp_path):
    file = read(write(tmp_path, PAIRS["an average"][0], "pt"))
    assert with_state(file, "net_ema") == (file, "state_dict.net_ema")
    whole, name = with_state(file, "state_dict")
    assert (name, list(whole.states)) == ("state_dict", ["state_dict"])
    assert set(whole.states["state_dict"].layers) == set(file.every)
