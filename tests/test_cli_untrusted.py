"""What the doctor does with code that misbehaves, with odd names, and with files that are none."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import forked
import numpy as np
import pytest
import torch
from checkpoint_files import Payload, in_safetensors
from command_line import call as cli
from torch import nn

from batchnorm import addresses
from batchnorm.doctor import examine
from batchnorm.doctor.diagnosis_report import report
from batchnorm.doctor.family_text import full
from batchnorm.reporting.formats import FORMATS, rendered

CODE = """
import sys
import torch
from torch import nn

print("loading")

def sick():
    print("making")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    model[1].running_var.fill_(-1)
    return model

def leaves():
    sys.exit(0)

def batches():
    yield torch.randn(8, 3, 8, 8)
    raise RuntimeError("disk is gone")

class Missing:
    def __iter__(self):
        return open("pictures/1.png")

def missing():
    return Missing()

def misfits():
    return [torch.randn(8, 5, 8, 8)] * 2

def interrupted():
    raise KeyboardInterrupt

def base():
    raise BaseException("base")

def generator_exit():
    raise GeneratorExit("x")

def silent():
    raise RuntimeError

class Rows(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return torch.zeros(3, 8, 8)

rows = Rows()
tensor = torch.zeros(8, 3, 8, 8)
text = "abc"

class Loader:
    def __iter__(self):
        return iter([torch.randn(8, 3, 8, 8)] * 2)

def arrays():
    import numpy
    return [numpy.zeros((4, 3, 8, 8))]
"""
# every one of them steers something: a terminal, a browser, a workflow, a table, XML, the direction of writing
EVIL = (
    "<script>alert(1)</script>", "x\n::error::planted", "\x1b[31mred", "\x9b31m", "a\x00b", "|`*_[a](b)\\", "%0A::x::y",
    "\u202eleft", "\u200bhidden", "]]>&amp;", "\r::warning::x", "\ud800", "\ufffe", "é" * 120,
)  # fmt: skip
STEERING = {chr(i) for i in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), 0x200B)} - {"\n"}


FOLDER = {"mine.py": CODE}


@pytest.fixture
def folder(folder):
    torch.save(sick().state_dict(), folder / "sick.pt")
    return folder


def sick():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    model[1].running_var.fill_(-1)
    return model


def run(*args, **env):
    command = [sys.executable, "-m", "batchnorm", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["mine.py:leaves"], ["SystemExit at mine.py:15"]),
        (["mine.py:sick", "--data", "mine.py:batches"], ["RuntimeError at mine.py:19", "disk is gone"]),
        (["mine.py:sick", "--data", "mine.py:missing"], ["FileNotFoundError at mine.py:23", "pictures"]),
        (["mine.py:sick", "--data", "mine.py:misfits"], ["expected 3 channels at axis 1", "(8, 5, 8, 8)"]),
        (["mine.py"], ["got the file mine.py", "mine.py:make_model"]),
    ],
)
def test_code_that_fails_is_told_in_one_message_and_is_no_finding(folder, args, words):
    done = forked.command("doctor", *args)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6
    for word in words:
        assert word in done.stderr


def test_ctrl_c_is_no_finding(folder):
    assert forked.command("doctor", "mine.py:interrupted").returncode == 130


@pytest.mark.slow
def test_what_the_user_s_code_prints_stays_out_of_the_output(folder):
    done = forked.command("doctor", "mine.py:sick", "--output-format", "json")
    assert json.loads(done.stdout)["findings"][0]["code"] == "BN103"
    assert "loading\nmaking" in done.stderr


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nbatchnorm = 3", "[tool.batchnorm]\nfail-on = 3"])
def test_a_project_file_of_another_shape_is_told(folder, text):
    Path("pyproject.toml").write_text(text)
    done = run("doctor", "sick.pt")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "rules" not in done.stderr


def examine_with(name):
    """A diagnosis whose target, layer and reason are all of one name."""
    diagnosis = examine(sick(), name="model")
    findings = tuple(replace(f, layer=name, measured=name, remedy=f"fix {name}") for f in diagnosis.findings)
    layers = tuple(replace(row, name=name) for row in diagnosis.layers)
    return replace(diagnosis, target=name, findings=findings, layers=layers, not_checked={"BN201": name})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_no_name_steers_what_shows_it(form, name):
    text = rendered(report(examine_with(name)), form)
    text.encode()
    assert not STEERING & set(text)
    assert "<script" not in text or form not in {"html", "md", "junit"}
    if form == "github":
        assert all(line.startswith(("::error ", "::warning ", "::notice ")) for line in text.splitlines())


@pytest.mark.slow
def test_the_next_command_is_one_that_can_be_typed(folder):
    name = "a b;touch pwned.pt"
    shutil.copy("sick.pt", name)
    done = run("doctor", name)
    command = "batchnorm fix model.py:make_model --weights 'a b;touch pwned.pt' --data data.py:train_loader --diff"
    assert f"next: {command}" in done.stdout
    done = forked.command("doctor", "mine.py:sick", "--weights", "sick.pt")
    assert "next: batchnorm fix mine.py:sick --weights sick.pt --data data.py:train_loader --diff" in done.stdout


@pytest.mark.slow
def test_a_model_with_weights_has_its_place_in_its_file(folder):
    done = forked.command("doctor", "mine.py:sick", "--weights", "sick.pt", "--output-format", "sarif")
    place = json.loads(done.stdout)["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "mine.py"


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take UTF-8 only")
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_name_of_other_bytes_is_written_about(folder, form):
    name = os.fsdecode(b"bad\xff.pt")
    shutil.copy("sick.pt", name)
    assert run("doctor", name, "--output-format", form, "-o", "out").returncode == 1
    assert Path("out").read_text(encoding="utf-8")


def test_a_link_stays_a_link(folder):
    Path("link.json").symlink_to("real.json")
    assert run("doctor", "sick.pt", "-o", "link.json").returncode == 1
    assert Path("link.json").is_symlink()
    assert json.loads(Path("real.json").read_text())["findings"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_to_and_not_replaced(folder):
    os.mkfifo("pipe")
    read = []
    reader = Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    assert run("doctor", "sick.pt", "--output-format", "json", "-o", "pipe").returncode == 1
    reader.join(10)
    assert json.loads(read[0])["findings"]
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


def test_never_fails_no_case():
    diagnosis = examine(sick())
    assert 'failures="1"' in rendered(report(diagnosis), "junit")
    assert 'failures="1"' not in rendered(report(diagnosis, fail_on=None), "junit")


@pytest.mark.slow
def test_a_terminal_of_ascii_has_no_question_marks(folder):
    done = run("doctor", "sick.pt", PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("sick.pt - 1 batch norm layer - 4 channels\n\n[x error] Stored statistics")
    assert "?" not in done.stdout


def test_select_is_completed(folder):
    done = run(_BATCHNORM_COMPLETE="bash_complete", COMP_WORDS="batchnorm doctor --select BN10", COMP_CWORD="3")
    assert "BN101" in done.stdout


def test_full_is_at_most_eighty_wide_for_any_name():
    for name in EVIL:
        lines = full(examine_with(name), command="batchnorm doctor").splitlines()
        assert max(len(line) for line in lines if not line.startswith("next: ")) <= 80


# -- options, pipes and places -----------------------------------------------------------------------------------


def shell(line, **env):
    """What a shell makes of a line in which B is the command."""
    line = line.replace("B ", f"{sys.executable} -m batchnorm ")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=os.environ | env)


@pytest.mark.parametrize(("line", "code"), [("B doctor sick.pt >&-", 1), ("B fix sick.pt --diff >&-", 1)])
def test_a_closed_output_is_written_nothing(folder, line, code):
    done = shell(line)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("command", ["rules", "explain --all", "completion bash"])
def test_a_reader_that_goes_away_is_no_error(folder, command):
    done = shell(f"set -o pipefail; B {command} | true")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", ["doctor /{}/sick.pt -q", "fix /{}/sick.pt --diff"])
def test_a_current_folder_that_is_gone_does_no_harm(folder, command):
    done = shell(f"mkdir gone; cd gone; rmdir ../gone; B {command.format(folder)}")
    assert done.returncode == 1
    assert "Errno" not in done.stderr


def refused(*args):
    """The one message of a command that did not run."""
    done = cli(*args)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_what_is_nested_without_end_is_told(folder):
    Path("deep.json").write_text("[" * 100_000 + "]" * 100_000)
    assert "deep.json is not a baseline: RecursionError" in refused("doctor", "sick.pt", "--baseline", "deep.json")
    Path("pyproject.toml").write_text("a=" + "[" * 5000 + "]" * 5000)
    assert "pyproject.toml is nested too deeply" in refused("doctor", "sick.pt")


@pytest.mark.parametrize("value", ["false", "3", '""', '["a"]'])
def test_a_baseline_in_the_project_file_is_a_path(folder, value):
    Path("pyproject.toml").write_text(f"[tool.batchnorm]\nbaseline = {value}")
    assert "baseline must be the path of a file, got" in refused("doctor", "sick.pt")


@pytest.mark.parametrize("command", ["doctor", "fix"])
@pytest.mark.parametrize(("name", "kind"), [("base", "BaseException"), ("generator_exit", "GeneratorExit")])
def test_whatever_users_code_raises_is_told(folder, command, name, kind):
    assert f"mine.py:{name} raised {kind} at mine.py:" in refused(command, f"mine.py:{name}")


def test_an_error_without_a_message_ends_its_sentence(folder):
    assert re.search(r"RuntimeError at mine\.py:\d+\. --debug", refused("doctor", "mine.py:silent"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("Rows", "gives Rows, whose items are examples, expected batches. Return DataLoader(rows, batch_size=32)."),
        ("rows", "gives Rows, whose items are examples, expected batches. Return DataLoader(rows, batch_size=32)."),
        ("tensor", "gives one Tensor, expected batches. Return a list of batches: [x]."),
        ("text", "gives str, expected batches. Return a DataLoader or a list."),
        ("arrays", "got ndarray without any. Make the loader yield tensors"),
    ],
)
def test_data_that_are_no_batches_are_named(folder, data, words):
    message = refused("doctor", "mine.py:sick", "--data", f"mine.py:{data}")
    assert words in message
    assert ".." not in message


def test_a_class_of_batches_is_called(folder):
    assert cli("doctor", "mine.py:sick", "--data", "mine.py:Loader", "-q").exit_code == 1


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: torch.save([], "w.pt"), "expected a dict of tensors, got a list in w.pt."),
        (lambda: torch.save({**sick().state_dict(), "x": Payload("ran")}, "w.pt"), "w.pt: expected tensors and plain"),
        (
            lambda: torch.save({**sick().state_dict(), "x": range(3)}, "w.pt"),
            "w.pt: torch.load(weights_only=True) raises UnpicklingError. Save the state dict alone",
        ),
        (
            lambda: torch.save(sick(), "w.pt"),
            "w.pt: torch.load(weights_only=True) raises UnpicklingError. Save the state dict alone",
        ),
        (lambda: torch.save({"state_dict": sick().state_dict(), "loss": np.float64(3)}, "w.pt"), ""),
        (lambda: torch.save({3: torch.ones(2), **sick().state_dict()}, "w.pt"), ""),
        (
            lambda: Path("w.pt").write_bytes(in_safetensors({"__metadata__": {"a": [1]}})),
            "w.pt: safetensors cannot read it: Error while deserializing header",
        ),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "fix"])
def test_weights_that_cannot_be_loaded_are_named(folder, command, made, words):
    made()
    if words:
        message = refused(command, "mine.py:sick", "--weights", "w.pt")
        assert words in message
        assert "raised" not in message
    else:
        assert cli(command, "mine.py:sick", "--weights", "w.pt").exit_code == 1


@pytest.mark.parametrize("value", ["{[]:1}", "(" * 10_000, "-" * 20_000 + "1"])
def test_a_setting_that_is_no_literal_is_text(value):
    assert addresses.parsed([f"a={value}"]) == {"a": value}


@pytest.mark.parametrize("option", ["--baseline", "--write-baseline", "--reference", "--weights", "--data"])
def test_an_option_of_nothing_is_told(folder, option):
    assert f"{option} needs a value, got ''." in refused("doctor", "mine.py:sick", option, "")


@pytest.mark.parametrize("target", ["mine.py::sick", ".mine:sick", "a..b:c"])
def test_an_address_of_another_form_is_told(folder, target):
    assert "an address is file.py:name or package.module:name" in refused("doctor", target)


def test_a_long_name_is_not_written_to(folder):
    assert "cannot write" not in refused("doctor", "a" * 5000 + ":x")


@pytest.mark.parametrize("rule", ["", ",", " "])
def test_explain_needs_a_rule(rule):
    assert "explain needs a rule, got none" in refused("explain", rule)


@pytest.mark.parametrize("command", ["doctor", "fix"])
def test_a_file_that_may_not_be_read_is_not_written_to(folder, command, monkeypatch):
    def refuses(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuses)
    assert "sick.pt cannot be read: Permission denied. Make it readable." in refused(command, "sick.pt")
