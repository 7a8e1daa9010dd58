"""batchnorm why MODEL, as its users type it."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import call

CODE = """
import sys
import torch
from torch import nn

def make(width=4):
    print("noise on standard output")
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))

def plain():
    return nn.Linear(3, 2)

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()
    def forward(self, x):
        return self.net(x), None

def fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
        def forward(self, x):
            return self.norm(x) @ torch.ones(7, 7)
    return Fails()

def leaves():
    sys.exit(0)

made = make()

def batches(count=8, size=8):
    random = torch.Generator().manual_seed(0)
    y = torch.arange(size) % 2
    return [(torch.randn(size, 3, generator=random) + 2 * y[:, None], y) for _ in range(count)]

def empty():
    return []

def ones():
    return batches(20, 1)

def single():
    return batches(1)

def broken():
    raise KeyError("no such file")

def breaks_later():
    yield from batches(2)
    raise OSError("the disk is gone")

def floats():
    return [(x, x) for x, _ in batches()]

def loss(output, batch):
    return torch.nn.functional.cross_entropy(output[0], batch[1])

def vector(output, batch):
    return output[:, 0]

number = 3
"""


FOLDER = {"net.py": CODE}
pytestmark = pytest.mark.usefixtures("folder")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def why(*args, quick=True):
    fast = ("--steps", "10", "--seeds", "2", "--rates", "0.01,0.1") if quick else ()
    return call("why", *args, *fast)


MAKE = ("net.py:make", "--data", "net.py:batches")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["net.py:make"], ["--data data.py:loader"]),
        (["net.py", "--data", "net.py:batches"], ["got the file net.py", "net.py:make_model"]),
        (["model.pt", "--data", "net.py:batches"], ["file.py:function", "'model.pt'"]),
        ([*MAKE, "--claim", "scale"], ["--claim is for the lecture's own networks"]),
        (["--data", "net.py:batches"], ["--data needs a model"]),
        (["--no-train"], ["--no-train needs a model"]),
        (["net.py:mak", "--data", "net.py:batches"], ["no 'mak'", "Did you mean 'make'?"]),
        (["none.py:make", "--data", "net.py:batches"], ["none.py is not a file"]),
        (["net.py:plain", "--data", "net.py:batches"], ["net.py:plain has no batch norm layer"]),
        (
            ["net.py:made", "--data", "net.py:batches"],
            ["net.py:made is a model already", "Name the function or class", "--no-train"],
        ),
        (["net.py:number", "--data", "net.py:batches"], ["net.py:number is a int"]),
        (["net.py:fails", "--data", "net.py:batches"], ["net.py:fails raised RuntimeError at net.py:"]),
        (["net.py:leaves", "--data", "net.py:batches"], ["net.py:leaves raised SystemExit"]),
        (["net.py:make", "--data", "net.py:empty"], ["--data needs batches, got none"]),
        (["net.py:make", "--data", "net.py:ones"], ["batches of 1", "batch_size"]),
        (["net.py:make", "--data", "net.py:single"], ["2 batches or more", "--test"]),
        (["net.py:make", "--data", "net.py:broken"], ["net.py:broken raised KeyError", "no such file"]),
        (["net.py:make", "--data", "net.py:breaks_later"], ["raised OSError", "the disk is gone"]),
        (["net.py:make", "--data", "net.py:number"], ["net.py:number gives int", "expected batches"]),
        (["net.py:make", "--data", "net.py:floats"], ["the default loss needs classes", "--loss file.py:loss"]),
        (["net.py:Pair", "--data", "net.py:batches"], ["got tuple", "--loss file.py:loss"]),
        ([*MAKE, "--loss", "net.py:vector"], ["a loss must be one number, got (8,)"]),
        ([*MAKE, "--loss", "net.py:number"], ["--loss needs a function", "int"]),
        ([*MAKE, "--set", "widht=3"], ["cannot be called with", "widht"]),
        ([*MAKE, "--set", "width"], ["--set needs key=value"]),
        ([*MAKE, "--weights", "none.pt"], ["none.pt"]),
        ([*MAKE, "-o", "why.pdf"], [".html, .json, .jsonl, .md"]),
        ([*MAKE, "--no-train"], ["--steps is about training"]),
    ],
)
def test_wrong_inputs_end_with_their_remedy_and_code_2(args, words, folder):
    result = why(*args)
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert "Traceback" not in text
    for word in words:
        assert word in text
    assert not (folder / "why.html").exists()


@pytest.mark.parametrize("rates", ["0.1", "a,b", "0,1", "-1,1", "1,inf", "0.1,nan"])
def test_rates_are_two_positive_numbers_or_more(rates):
    result = why(*MAKE, "--rates", rates, quick=False)
    assert result.exit_code == 2
    assert "two positive numbers or more" in " ".join(result.output.split())


@pytest.mark.slow
def test_the_plan_and_the_criteria_come_first_then_the_answers(folder):
    result = why(*MAKE)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "56 examples to train with, 8 held out; 4 arms, 2 seeds, 2 learning rates, 10 steps of 8: about" in text
    assert text.index("about") < text.index("set before the runs") < text.index("speed-steps")
    assert (folder / "why.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_json_is_alone_on_standard_output_and_repeats_exactly():
    outputs = [why(*MAKE, "-o", f"{name}.json", "--output-format", "json").stdout for name in "ab"]
    assert outputs[0] == outputs[1]
    data = json.loads(outputs[0])
    assert data["command"] == (
        "batchnorm why net.py:make --data net.py:batches --rates 0.01,0.1 --steps 10 --seed 0 --seeds 2"
    )
    assert data["model"] == "net.py:make"


@pytest.mark.slow
def test_a_loss_of_ones_own_for_a_model_that_gives_a_tuple(folder):
    result = why("net.py:Pair", "--data", "net.py:batches", "--loss", "net.py:loss", "-o", "a.md")
    assert result.exit_code == 0, result.output
    assert "| speed-steps |" in (folder / "a.md").read_text(encoding="utf-8")


def test_without_training_a_checkpoint_is_asked_and_nothing_is_said_about_learning(folder):
    exec(CODE, space := {})
    model = space["make"](5)
    model[1].running_mean += 9
    torch.save(model.state_dict(), folder / "w.pt")
    args = (*MAKE, "--set", "width=5", "--weights", "w.pt", "--no-train", "--seeds", "3", "-o", "a.json")
    result = why(*args, "--output-format", "md", quick=False)
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    assert not data["trained"]
    assert set(data["claims"]) == {"scale", "depth", "census", "noise", "test-time"}
    assert "was not asked" in data["headline"]
    assert data["command"].endswith("--set width=5 --no-train --seed 0 --seeds 3")


def test_a_model_that_is_one_already_may_be_looked_at():
    result = why("net.py:made", "--data", "net.py:batches", "--no-train", "-o", "a.md", quick=False)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_with_weights_the_checkpoint_answers_what_needs_no_training(folder):
    exec(CODE, space := {})
    torch.save(space["make"]().state_dict(), folder / "w.pt")
    result = why(*MAKE, "--weights", "w.pt", "-o", "a.json", "--output-format", "md")
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    assert {"speed", "shift", "census", "noise", "test-time"} <= set(data["claims"])
    assert "measured on --weights" in data["measured"]["Weights"]


@pytest.mark.slow
def test_an_interrupt_leaves_the_old_report_and_nothing_else(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    (folder / "why.html").write_text("old")
    monkeypatch.setattr("batchnorm.ablation.study.watch", interrupted)
    before = names(folder)
    result = why(*MAKE)
    assert result.exit_code == 130
    assert (folder / "why.html").read_text() == "old"
    assert names(folder) == before
