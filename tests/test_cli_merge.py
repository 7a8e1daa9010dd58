"""batchnorm merge: what is written, what is said, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint import read

told = partial(command_line.told, "merge")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    net[1].running_mean.uniform_(-1, 1), net[1].running_var.uniform_(0.5, 2)
    net[1].num_batches_tracked.fill_(seed)
    return net


def saved(path: str, state: object) -> str:
    save_file(state, path) if path.endswith(".safetensors") else torch.save(state, path)
    return path


def load(path: str) -> dict:
    return load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)


FORMS = {
    "state dicts": ("a.pt", lambda s: s, "b.pt", lambda s: s, "d.pt"),
    "safetensors": ("a.safetensors", lambda s: s, "b.safetensors", lambda s: s, "d.safetensors"),
    "both formats": ("a.pt", lambda s: s, "b.safetensors", lambda s: s, "d.safetensors"),
    "wrapped and nested": (
        "a.ckpt", lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3, "optimizer": {}},
        "b.pth", lambda s: {f"module.{k}": v for k, v in s.items()}, "d.pt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_files_are_merged_as_their_state_dicts_are(form):
    a, first, b, second, place = FORMS[form]
    states = [network(seed).state_dict() for seed in (1, 2)]
    before = {
        path: Path(saved(path, make(state))).read_bytes()
        for path, make, state in zip((a, b), (first, second), states, strict=True)
    }
    code, text = told(a, b, "-o", place, "--counts", "3000,1000")
    assert code == 0, text
    expected = bn.merge_statistics(states, [3000, 1000])
    found = load(place)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    network(3).load_state_dict(found, strict=True)
    assert "merged 2 files: 1 batch norm layer, 9 tensors the weights differ:" in text
    assert f"wrote {place} next: batchnorm doctor {place}" in text
    assert {path: Path(path).read_bytes() for path in (a, b)} == before
    assert {str(path) for path in Path().iterdir()} == {a, b, place}  # nothing is left over


def test_the_variance_between_the_files_is_in_the_result():
    states = [nn.BatchNorm1d(2).state_dict() for _ in range(3)]
    for i, state in enumerate(states):
        state["running_mean"].fill_(6.0 * i)
        saved(f"{i}.pt", state)
    code, text = told("0.pt", "1.pt", "2.pt", "-o", "d.pt", "--counts", "101,101,101")
    assert code == 0
    rows = np.repeat([0.0, 6.0, 12.0], 101)
    m2 = 3 * 100 + ((rows - rows.mean()) ** 2).sum()
    np.testing.assert_allclose(load("d.pt")["running_var"], m2 / 302, rtol=1e-6)
    assert "the weights are equal: the statistics are those of all data together" in text


def test_without_counts_files_count_alike_and_it_says_so():
    states = [network(seed).state_dict() for seed in (1, 2)]
    saved("a.pt", states[0]), saved("b.pt", states[1])
    code, text = told("a.pt", "b.pt", "-o", "d.pt")
    assert (code, "without --counts, the files count alike" in text) == (0, True)
    expected = bn.merge_statistics(states)
    assert all(torch.equal(value, expected[name]) for name, value in load("d.pt").items())


def test_versions_of_modules_are_kept():
    states = [{"state_dict": network(seed).state_dict()} for seed in (1, 2)]
    saved("a.pt", states[0]), saved("b.pt", states[1])
    assert told("a.pt", "b.pt", "-o", "d.pt")[0] == 0
    assert load("d.pt")._metadata["1"] == {"version": 2}
    prefixed = nn.Sequential()
    prefixed.add_module("module", network(1))
    saved("a.pt", prefixed.state_dict())
    assert told("a.pt", "b.pt", "-o", "e.pt")[0] == 0
    assert load("e.pt")._metadata["1"] == {"version": 2}


def test_one_state_of_each_file_is_merged_and_the_others_are_named():
    for name, seeds in (("a.pt", (1, 2)), ("b.pt", (3, 4))):
        raw, ema = (network(seed).state_dict() for seed in seeds)
        saved(name, {"model": raw, "model_ema": ema})
    code, text = told("a.pt", "b.pt", "-o", "d.pt")
    assert (code, "a.pt: used 'model', not model_ema" in text) == (0, True)
    expected = bn.merge_statistics([network(1), network(3)])
    assert torch.equal(load("d.pt")["1.running_var"], expected["1.running_var"])
    assert told("a.pt", "b.pt", "-o", "e.pt", "--state", "model_ema")[0] == 0
    expected = bn.merge_statistics([network(2), network(4)])
    assert torch.equal(load("e.pt")["1.running_var"], expected["1.running_var"])


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        (["--local", "statistics"], {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        (
            ["--local", "batch_norm", "--local", "3"],
            {*(f"1.{k}" for k in nn.BatchNorm2d(1).state_dict()), "3.weight", "3.bias"},
        ),
        (["--local", "3.bias"], {"3.bias"}),
    ],
)
def test_local_tensors_are_left_out(options, absent):
    for i in (1, 2):
        saved(f"{i}.pt", network(i).state_dict())
    assert told("1.pt", "2.pt", "-o", "d.pt", *options)[0] == 0
    assert set(network(1).state_dict()) - set(load("d.pt")) == absent


def test_keep_weights_and_biased():
    states = [network(seed).state_dict() for seed in (1, 2)]
    saved("a.pt", states[0]), saved("b.pt", states[1])
    assert told("a.pt", "b.pt", "-o", "d.pt", "--keep-weights", "--biased", "--counts", "9,9")[0] == 0
    expected = bn.merge_statistics(states, [9, 9], others="keep", correction=0)
    assert all(torch.equal(value, expected[name]) for name, value in load("d.pt").items())


def test_the_result_is_read_and_examined():
    for i in (1, 2):
        saved(f"{i}.pt", network(i).state_dict())
    told("1.pt", "2.pt", "-o", "d.pt", "--counts", "1000,1000")
    assert read("d.pt").layers["1"].num_batches_tracked == 2
    assert command_line.told("doctor", "d.pt")[0] == 0


def test_a_file_is_written_over_only_on_demand_and_a_link_keeps_pointing():
    for i in (1, 2):
        saved(f"{i}.pt", network(i).state_dict())
    Path("real.pt").write_bytes(b"old")
    Path("link.pt").symlink_to("real.pt")
    code, text = told("1.pt", "2.pt", "-o", "link.pt")
    assert (code, "link.pt exists already. Pass --force" in text) == (2, True)
    assert Path("real.pt").read_bytes() == b"old"
    assert told("1.pt", "2.pt", "-o", "link.pt", "--force")[0] == 0
    assert Path("link.pt").is_symlink()
    assert set(load("real.pt")) == set(network(1).state_dict())


def onnx_model() -> bytes:
    """One BatchNormalization node."""
    names = ("scale", "bias", "mean", "var")
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 1.0]) for name in names]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 3, 3]) for name in "xy"]
    node = helper.make_node("BatchNormalization", ["x", *names], ["y"])
    return helper.make_model(helper.make_graph([node], "net", ends[:1], ends[1:], tensors)).SerializeToString()


def other(**changes: object) -> dict:
    state = copy.deepcopy(network(2).state_dict())
    for name, value in changes.items():
        state[name.replace("_", ".", 1)] = value
    return state


BAD = {
    "one file": (["a.pt"], "needs at least two files, got 1. Name them"),
    "no file": ([], "needs at least two files, got 0"),
    "not there": (["a.pt", "zzz.pt"], "zzz.pt: expected a file, got no such path. Check"),
    "a folder": (["a.pt", "."], "expected a file, got"),
    "code": (["a.pt", "net.py"], "expected a function, got the file net.py"),
    "garbage": (["a.pt", "garbage.pt"], "garbage.pt: expected a file of torch.save"),
    "onnx": (["a.pt", "m.onnx"], "got the ONNX model m.onnx. Merge the checkpoints that"),
    "pickle": (["a.pt", "p.pkl"], "got the plain pickle p.pkl. Load it, and save"),
    "empty dicts": (["e.pt", "e.pt"], "got e.pt without a tensor. Pass model.state_dict()"),
    "counts": (["a.pt", "b.pt", "--counts", "3;4"], "--counts needs numbers with commas between them"),
    "too few counts": (["a.pt", "b.pt", "--counts", "3"], "each of 2 states, got 1"),
    "small counts": (["a.pt", "b.pt", "--counts", "1,1"], "must be above 1, got 1"),
    "nan counts": (["a.pt", "b.pt", "--counts", "nan,5"], "finite and 0 or more, got nan"),
    "no state": (["a.pt", "b.pt", "--state", "ema"], "a.pt has no state 'ema'"),
    "no path": (["a.pt", "b.pt", "--local", "head"], "got 'head', which has no tensors"),
    "NaN": (["a.pt", "nan.pt"], "got nan in '1.running_var' of nan.pt, channel 0 (4 of 4 channels). Leave"),
    "wide": (["a.pt", "wide.pt"], "'1.running_mean' of shape (4,) in a.pt and of shape (5,) in wide.pt"),
    "further": (["a.pt", "further.pt"], "got further.pt with '1.more', unlike a.pt"),
    "itself": (["a.pt", "b.pt", "-o", "a.pt", "--force"], "a.pt is one of the files that are merged"),
    "into a folder": (["a.pt", "b.pt", "-o", "."], "cannot write .: it is a folder"),
    "into no folder": (["a.pt", "b.pt", "-o", "no/d.pt"], "cannot write no/d.pt: No such file or directory"),
    "extra state": (["x.pt", "x.pt", "-o", "d.safetensors"], "tensors alone, got '_extra_state', a dict. Write d.pt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_told_with_a_remedy_and_nothing_is_written(kind):
    words, text = BAD[kind]
    saved("a.pt", network(1).state_dict()), saved("b.pt", network(2).state_dict())
    saved("nan.pt", other(**{"1_running_var": torch.full((4,), torch.nan)}))
    saved("wide.pt", other(**{"1_running_mean": torch.ones(5), "1_running_var": torch.ones(5)}))
    saved("further.pt", other(**{"1_more": torch.ones(5)}))
    saved("x.pt", {**network(1).state_dict(), "_extra_state": {"a": 1}})
    Path("garbage.pt").write_bytes(b"garbage" * 100)
    Path("net.py").write_text("x = 1")
    saved("e.pt", {"epoch": 3})
    Path("p.pkl").write_bytes(pickle.dumps({k: v.numpy() for k, v in network(1).state_dict().items()}))
    Path("m.onnx").write_bytes(onnx_model())
    before = {path: Path(path).read_bytes() for path in Path().iterdir()}
    code, output = told(*words, *([] if "-o" in words else ["-o", "d.pt"]))
    assert code == 2, output
    assert text in output
    assert "Traceback" not in output
    assert {path: Path(path).read_bytes() for path in Path().iterdir()} == before


def test_files_that_would_run_code_are_refused():
    class Evil:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    saved("a.pt", network(1).state_dict())
    torch.save({**network(2).state_dict(), "evil": Evil()}, "b.pt")
    code, output = told("a.pt", "b.pt", "-o", "d.pt")
    assert (code, Path("owned").exists(), Path("d.pt").exists()) == (2, False, False), output
