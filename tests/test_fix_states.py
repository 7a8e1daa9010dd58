"""fix and doctor with a model and a file of several states: each is loaded, treated and written to its place."""

import copy
from pathlib import Path

import pytest
import torch
from command_line import told as call
from planted import Net, batches, trained
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm.checkpoint import model_loading
from batchnorm.doctor import examine

MODEL = """
from planted import Net as model, batches, images
from torch import nn
loader = batches()
other = batches(2 * images(mean=1.0))
def small(): return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.again, self.head = self.norm, nn.Flatten()
    def forward(self, x): return self.head(self.norm(x))
"""


FOLDER = {"statenet.py": MODEL}


def fix(path, *args, model="model", data="loader"):
    given = ["--data", f"statenet.py:{data}"] if data else []
    return call("fix", f"statenet.py:{model}", "--weights", str(path), *given, *args)


def average(model, by=1.5):
    """Other weights everywhere, and the statistics of the model."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(by)
    return other


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def exact(state, data=None):
    """Statistics of the data behind these weights, in NumPy's float64."""
    model = Net().double()
    model.load_state_dict(state)
    x = torch.cat(batches() if data is None else data).double()
    values = {}
    with torch.no_grad():
        for name, part in (("stem", model.stem), ("body", model.body)):
            y = part[0](x).numpy()
            values[f"{name}.1"] = y.mean((0, 2, 3)), y.var((0, 2, 3), ddof=1)
            part[1].running_mean.copy_(torch.tensor(values[f"{name}.1"][0]))
            part[1].running_var.copy_(torch.tensor(values[f"{name}.1"][1]))
            x = part.eval()(x)
    return values


def assert_measured(state):
    for layer, (mean, var) in exact(state).items():
        # float32 sums in 8 batches: 2^-24 sqrt(256 * 64) = 8e-6 of a standard deviation, times 4 for a margin
        torch.testing.assert_close(state[f"{layer}.running_mean"].double(), torch.tensor(mean), rtol=3e-5, atol=3e-5)
        # batches of equal size: the unbiased variance of all
        torch.testing.assert_close(state[f"{layer}.running_var"].double(), torch.tensor(var), rtol=1e-4, atol=0)


def at(saved, keys):
    for key in keys:
        saved = saved[key]
    return saved


OWN = trained()
A, B = OWN.state_dict(), average(OWN).state_dict()
BY_REFERENCE = {key: A[key] if "running" in key or "num_batches" in key else value for key, value in B.items()}
FILES = {
    "average": (lambda: {"model": A, "model_ema": B}, [("model", ""), ("model_ema", "")]),
    "average first": (lambda: {"ema": B, "net": A, "epoch": 3}, [("net", ""), ("ema", "")]),
    "target network": (lambda: {"q_net": A, "q_net_target": B}, [("q_net", ""), ("q_net_target", "")]),
    "list": (lambda: {"members": [A, B, average(OWN, 0.7).state_dict()]},
             [("members", 0, ""), ("members", 1, ""), ("members", 2, "")]),
    "one dict": (lambda: {"state_dict": {**under("model.", A), **under("ema.module.", B)}},
                 [("state_dict", "model."), ("state_dict", "ema.module.")]),
    "callback": (lambda: {"state_dict": A, "callbacks": {"EMA": {"ema_weights": under("module.", B)}}},
                 [("state_dict", ""), ("callbacks", "EMA", "ema_weights", "module.")]),
    "AveragedModel": (lambda: {"net": A, "swa": {"n_averaged": torch.tensor(2), **under("module.", B)}},
                      [("net", ""), ("swa", "module.")]),
    "flat": (lambda: {"state_dict": {**under("net.", A), **under("net_ema.", B)}},
             [("state_dict", "net."), ("state_dict", "net_ema.")]),
    "flat, three": (
        lambda: {**under("net.", A), **under("net_target.", average(OWN, 0.7).state_dict()), **under("netEMA.", B)},
        [("net.",), ("net_target.",), ("netEMA.",)]),
    "flat, deep": (lambda: {**under("learner.student.", A), **under("learner.teacher.", B)},
                   [("learner.student.",), ("learner.teacher.",)]),
    "flat, a wrapper inside": (
        lambda: {"net_ema.n_averaged": torch.tensor(2), **under("net.", A), **under("net_ema.module.", B)},
        [("net.",), ("net_ema.module.",)]),
    "flat, beside the root": (lambda: {**A, **under("target.", B)}, [("",), ("target.",)]),
    "flat, no word tells": (lambda: {"state_dict": {**under("left.body_of.", A), **under("right.body_of.", B)}},
                            [("state_dict", "left.body_of."), ("state_dict", "right.body_of.")]),
    # what torch.save keeps: one memory for the statistics of both
    "by reference": (lambda: {"model": A, "ema": BY_REFERENCE}, [("model", ""), ("ema", "")]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("make", "places"), FILES.values(), ids=FILES)
def test_every_state_is_measured_on_its_own_weights_and_written_to_its_place(folder, make, places):
    torch.save(make(), "f.pt")
    before = torch.load("f.pt")
    code, told = fix("f.pt")
    assert code == 0, told
    after = torch.load("f.fixed.pt")
    for number, (*keys, prefix) in enumerate(places):
        old, new = at(before, keys), at(after, keys)
        assert list(old) == list(new)
        state = {key.removeprefix(prefix): value for key, value in new.items() if key.startswith(prefix)}
        state = {key: value for key, value in state.items() if key in A}
        if number:
            assert_measured(state)
        for key, value in new.items():
            kept = number == 0 or not key.startswith(prefix) or "running" not in key
            if kept and key.removeprefix(prefix) in A and "num_batches" not in key:
                assert torch.equal(value, old[key]), key
    assert examine("f.fixed.pt").findings == ()
    assert "eps taken as" not in told  # the model tells it
    assert "each by itself" in told


@pytest.mark.slow
def test_the_state_that_is_named_is_treated_alone_and_the_exit_code_is_true(folder):
    torch.save({"model": A, "model_ema": B}, "f.pt")
    code, told = fix("f.pt", "--state", "model_ema")
    words = "loaded into the model: model_ema not loaded: model: another state was asked for"
    assert (code, words in told) == (0, True)
    after = torch.load("f.fixed.pt")
    assert_measured(after["model_ema"])
    assert all(torch.equal(value, A[key]) for key, value in after["model"].items())
    code, told = fix("f.pt", "--state", "model", "--force")
    assert code == 1
    assert "BN115" in told


def test_a_state_that_no_file_has_is_told_with_those_that_it_has(folder):
    torch.save({"model": A, "model_ema": B}, "f.pt")
    for code, told in (
        fix("f.pt", "--state", "ema"), call("fix", "f.pt", "--state", "ema"), call("doctor", "f.pt", "--state", "ema"),
        call("doctor", "statenet.py:model", "--weights", "f.pt", "--state", "ema"),
    ):  # fmt: skip
        assert code == 2, told
        assert "f.pt has no state 'ema'; it has 'model', 'model_ema'. Choose one of them." in told
    for command in ("fix", "doctor"):
        code, told = call(command, "statenet.py:model", "--state", "ema")
        assert (code, "--state selects a state of a checkpoint" in told) == (2, True)


@pytest.mark.slow
def test_a_state_of_another_model_is_named_and_counts_as_left(folder):
    torch.manual_seed(0)
    other = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    torch.save({"generator": A, "discriminator": other.state_dict()}, "gan.pt")
    code, told = fix("gan.pt")
    assert code == 1
    assert "not loaded: discriminator: it does not fit Net" in told
    assert "Treat it with its own model, or choose another state: --state NAME" in told
    assert fix("gan.pt", "--state", "generator")[0] == 0
    assert fix("gan.pt", "--state", "discriminator", model="small")[0] == 0
    # the model says which of them it is
    code, told = call("doctor", "statenet.py:small", "--weights", "gan.pt", "--output-format", "concise")
    assert "loaded into the model: discriminator" in told


def test_without_data_the_average_is_left_and_the_exit_code_says_so(folder):
    torch.save({"model": A, "model_ema": B}, "f.pt")
    for code, told in (fix("f.pt", data=None), call("fix", "f.pt")):
        assert code == 1
        assert "BN115 averaged-weights model_ema: needs --data" in told
    assert not Path("f.fixed.pt").exists()


def test_a_file_alone_is_mended_in_every_state_or_in_one(folder):
    tiny = {key: value.clone() for key, value in B.items()}
    for state in (tiny, ill := {key: value.clone() for key, value in A.items()}):
        state["stem.1.running_var"][3] = -1e-14
    torch.save({"net": ill, "q": tiny}, "f.pt")
    assert call("fix", "f.pt")[0] == 0
    after = torch.load("f.fixed.pt")
    assert after["net"]["stem.1.running_var"][3] == after["q"]["stem.1.running_var"][3] == 0
    code, told = call("fix", "f.pt", "--state", "q", "--force")
    assert (code, "treated: q not treated, since --state asks for another state: net" in told) == (1, True)
    after = torch.load("f.fixed.pt")
    assert (after["net"]["stem.1.running_var"][3] < 0, after["q"]["stem.1.running_var"][3] == 0) == (True, True)


@pytest.mark.slow
def test_states_in_safetensors_are_treated_too(folder):
    tensors = {**under("model.", A), **under("ema.", B)}
    save_file({key: value.clone() for key, value in tensors.items()}, "f.safetensors")
    code, told = fix("f.safetensors")
    assert code == 0, told
    after = load_file("f.fixed.safetensors")
    assert_measured({key.removeprefix("ema."): value for key, value in after.items() if key.startswith("ema.")})
    assert all(torch.equal(after[f"model.{key}"], value) for key, value in A.items())


def test_a_shared_layer_is_written_under_all_its_names(folder):
    norm = nn.BatchNorm2d(3)
    norm.running_var.fill_(float("nan"))
    torch.save(nn.ModuleDict({"norm": norm, "again": norm}).state_dict(), "f.pt")
    fix("f.pt", model="Shared")
    after = torch.load("f.fixed.pt")
    assert after["norm.running_var"].data_ptr() == after["again.running_var"].data_ptr()
    assert after["norm.running_var"].isfinite().all()


@pytest.mark.slow
def test_doctor_examines_a_model_with_each_state(folder):
    ill = average(OWN).state_dict()
    ill["body.1.running_mean"] = ill["body.1.running_mean"] + 9
    torch.save({"model": A, "model_ema": ill}, "f.pt")
    _, told = call("doctor", "statenet.py:model", "--weights", "f.pt", "--data", "statenet.py:loader",
                   "--output-format", "concise")  # fmt: skip
    assert "loaded into the model, each by itself: model, model_ema" in told
    assert "model_ema.body.1: BN" in told
    assert ": body.1: BN116" not in told
    one = call("doctor", "statenet.py:model", "--weights", "f.pt", "--state", "model", "--output-format", "concise")[1]
    assert "model_ema.body.1" not in one


@pytest.mark.slow
def test_doctor_tells_foreign_statistics_of_a_loaded_state_unless_data_show_that_they_fit(folder):
    torch.save({"model": A, "model_ema": average(OWN, 1.5).state_dict()}, "f.pt")
    words = ["doctor", "statenet.py:model", "--weights", "f.pt", "--output-format", "concise"]
    code, told = call(*words)
    assert (code, "model_ema: BN115 error" in told) == (1, True)
    calm = average(OWN, 1.0)
    calm.stem[0].weight.data.mul_(1 + 1e-6)
    torch.save({"model": A, "model_ema": calm.state_dict()}, "f.pt")
    assert "BN115" in call(*words)[1]
    assert "BN115" not in call(*words, "--data", "statenet.py:loader")[1]


def test_shift_says_which_state_it_loaded(folder):
    torch.save({"model_ema": B, "net": A}, "f.pt")
    words = ["shift", "statenet.py:model", "--data", "statenet.py:loader", "--weights", "f.pt"]
    assert "f.pt: loaded 'net'; it has the states 'net', 'model_ema'" in call(*words)[1]
    torch.save(A, "f.pt")
    assert "f.pt: loaded" not in call(*words)[1]


def test_weights_beside_an_average_in_one_dict_are_loaded_alone(tmp_path):
    torch.save({**A, **under("ema.module.", B)}, tmp_path / "f.pt")
    model = Net()
    assert model_loading.load_weights(model, str(tmp_path / "f.pt")) == "."
    assert torch.equal(model.stem[0].weight, A["stem.0.weight"])
    assert model_loading.load_weights(model, str(tmp_path / "f.pt"), "ema.module") == "ema.module"
    assert torch.equal(model.stem[0].weight, B["stem.0.weight"])


def test_the_model_chooses_among_states(tmp_path):
    torch.save({"generator": A, "discriminator": nn.Sequential(nn.BatchNorm2d(4)).state_dict()}, tmp_path / "f.pt")
    assert model_loading.load_weights(Net(), str(tmp_path / "f.pt")) == "generator"
    assert model_loading.load_weights(nn.Sequential(nn.BatchNorm2d(4)), str(tmp_path / "f.pt")) == "discriminator"
