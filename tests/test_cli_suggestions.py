"""Commands that messages and reports suggest: each parses, and keeps the options that the user typed."""

import re
import shlex
from pathlib import Path

import click
import pytest
import torch
from command_line import told
from planted import trained

from batchnorm.cli import main
from batchnorm.reporting.command_line import file_word, number_word

FOLDER = {
    "net.py": """
from planted import Net, batches, changed

def make(width=1, name=""):
    return Net()

def sick(width=1, name=""):
    return changed(running_var=-1e-14)

loader = batches()
"""
}


def parsed(line: str) -> tuple[str, dict[str, object]]:
    """The name and the parameters of a suggested command, as click reads them."""
    program, name, *words = shlex.split(line)
    assert program == "batchnorm"
    command = main.get_command(click.Context(main), name)
    return name, command.make_context(name, words).params


def suggested(*words: object, code: int = 2, sign: str = "batchnorm ") -> tuple[str, dict[str, object]]:
    exit_code, text = told(*words)
    assert exit_code == code, text
    assert sign in text, text
    return parsed(("batchnorm " if sign == "batchnorm " else "") + text.rpartition(sign)[2].rstrip())


SETTINGS = ("--set", "width=2", "--set", "name=a b")
GIVEN = ("width=2", "name=a b")


@pytest.mark.parametrize(
    ("command", "options", "kept"),
    [
        ("fix", ("--data", "net.py:loader", "--unsafe-fixes", "--diff"), {"unsafe": True, "diff": True}),
        ("fix", ("--ignore", "BN1", "-o", "out file.pt"), {"ignore": ("BN1",), "output": Path("out file.pt")}),
        ("doctor", ("--data", "net.py:loader", "--batch-size", "8"), {"data": "net.py:loader", "batch_size": 8}),
        ("doctor", ("--reference", "a b.pt", "--select", "BN1", "--select", "BN2"), {"select": ("BN1", "BN2")}),
        ("shift", ("--data", "net.py:loader", "--alpha", "0.0123456789", "--unit", "batch"), {"alpha": 0.0123456789}),
        ("why", ("--data", "net.py:loader", "--rates", "0.012345678,0.1"), {"rates": (0.012345678, 0.1)}),
    ],
)
def test_a_file_in_place_of_a_model_gives_a_command_with_all_options(folder, command, options, kept):
    Path("a model.pt").write_bytes(b"")
    name, params = suggested(command, "a model.pt", *SETTINGS, "--state", "ema", *options)
    target = (
        params["models"][0] if command == "shift" else params["target" if command in {"fix", "doctor"} else "model"]
    )
    assert (name, target, params["weights"], params["state"]) == (command, "model.py:make_model", "a model.pt", "ema")
    assert params["given"] == GIVEN
    assert {key: params[key] for key in kept} == kept


def test_weights_that_the_user_typed_stay(folder):
    assert suggested("fix", "a.pt", "--weights", "b.pt")[1]["weights"] == "b.pt"


def test_why_without_a_model_suggests_a_command_with_model_and_data(folder):
    _, params = suggested("why", *SETTINGS, "--no-train")
    assert (params["model"], params["data"], params["given"]) == ("model.py:make_model", "data.py:loader", GIVEN)
    assert suggested("why", "--data", "net.py:loader")[1]["data"] == "net.py:loader"


def _save_states():
    sick = trained().state_dict()
    sick["stem.1.running_var"][3] = -1e-14
    torch.save({"model": trained().state_dict(), "model_ema": sick}, "both states.pt")


def test_fix_suggests_an_examination_of_its_result_with_the_same_options(folder):
    _save_states()
    words = ("--state", "model_ema", "--ignore", "BN401", "--select", "BN104,BN103")
    name, params = suggested("fix", "both states.pt", *words, code=0, sign="next: ")
    assert (name, params["target"], params["state"]) == ("doctor", "both states.fixed.pt", "model_ema")
    assert (params["ignore"], params["select"]) == (("BN401",), ("BN104,BN103",))


def test_fix_of_a_model_suggests_an_examination_with_its_settings(folder):
    torch.save(trained().state_dict(), "w.pt")
    found = suggested("fix", "net.py:sick", "-o", "a b.pt", *SETTINGS, "--select", "BN1", code=0, sign="next: ")[1]
    assert (found["target"], found["weights"], found["given"]) == ("net.py:sick", "a b.pt", GIVEN)
    assert found["select"] == ("BN1",)


@pytest.mark.parametrize("broken", [-1e-14, float("nan")])
def test_doctor_suggests_a_fix_of_the_state_that_was_asked_for(folder, broken):
    sick = trained().state_dict()
    sick["stem.1.running_var"][3] = broken
    torch.save({"model": trained().state_dict(), "model_ema": sick}, "-both.pt")
    text = told("doctor", "--state", "model_ema", "--", "-both.pt")[1]
    name, params = parsed(re.search(r"next: (.*? --diff)", text)[1])
    file = params["weights"] or params["target"]
    assert (name, Path(file), params["state"]) == ("fix", Path("-both.pt"), "model_ema")


def test_a_missing_baseline_with_a_space_is_quoted(folder):
    torch.save(trained().state_dict(), "w.pt")
    assert "--write-baseline 'a b.json'" in told("doctor", "w.pt", "--baseline", "a b.json")[1]


def test_fix_keeps_the_folder_in_the_name_that_it_suggests(folder):
    torch.save(trained().state_dict(), "w.pt")
    assert "Name it out/new.pt." in told("fix", "w.pt", "-o", "out/new.safetensors")[1]
    text = told("fix", "net.py:sick", "-o", "out/new.safetensors")[1]
    assert "fix writes the state dict of a model to a .pt file" in text


def test_words_of_a_command_line_read_back_as_they_were():
    assert [file_word(path) for path in ("a.pt", "a b.pt", "-x.pt")] == ["a.pt", "'a b.pt'", "./-x.pt"]
    for value in (0.1, 1.0, 1e-5, 0.0123456789, 1 / 3):
        assert float(number_word(value)) == value
    assert [number_word(value) for value in (1.0, 0.1)] == ["1", "0.1"]
