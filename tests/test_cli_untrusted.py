"""What the doctor does with code that misbehaves, with odd names, and with files that are none."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import nn

from batchnorm.doctor import examine
from batchnorm.doctor.formats import FORMATS
from batchnorm.doctor.junit import junit
from batchnorm.doctor.text import full

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
"""
# every one of them steers something: a terminal, a browser, a workflow, a table, XML, the direction of writing
EVIL = (
    "<script>alert(1)</script>", "x\n::error::planted", "\x1b[31mred", "\x9b31m", "a\x00b", "|`*_[a](b)\\", "%0A::x::y",
    "\u202eleft", "\u200bhidden", "]]>&amp;", "\r::warning::x", "\ud800", "\ufffe", "é" * 120,
)  # fmt: skip
STEERING = {chr(i) for i in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), 0x200B)} - {"\n"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    torch.save(sick().state_dict(), tmp_path / "sick.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


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
        (["mine.py:sick", "--data", "mine.py:misfits"], ["RuntimeError", "expected input[8, 5, 8, 8]"]),
        (["mine.py"], ["mine.py is code", "mine.py:make_model"]),
    ],
)
def test_code_that_fails_is_told_in_one_message_and_is_no_finding(folder, args, words):
    done = run("doctor", *args)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6
    for word in words:
        assert word in done.stderr


def test_ctrl_c_is_no_finding(folder):
    assert run("doctor", "mine.py:interrupted").returncode == 130


def test_what_the_user_s_code_prints_stays_out_of_the_output(folder):
    done = run("doctor", "mine.py:sick", "--output-format", "json")
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
    text = FORMATS[form](examine_with(name))
    text.encode()
    assert not STEERING & set(text)
    assert "<script" not in text or form not in {"html", "md", "junit"}
    if form == "github":
        assert all(line.startswith(("::error ", "::warning ", "::notice ")) for line in text.splitlines())


def test_the_next_command_is_one_that_can_be_typed(folder):
    name = "a b;touch pwned.pt"
    shutil.copy("sick.pt", name)
    done = run("doctor", name)
    assert "next: batchnorm fix 'a b;touch pwned.pt' --data data.py:train_loader --diff" in done.stdout
    done = run("doctor", "mine.py:sick", "--weights", "sick.pt")
    assert "next: batchnorm fix mine.py:sick --weights sick.pt --data data.py:train_loader --diff" in done.stdout


def test_a_model_with_weights_has_its_place_in_its_file(folder):
    done = run("doctor", "mine.py:sick", "--weights", "sick.pt", "--output-format", "sarif")
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
    assert 'failures="1"' in junit(diagnosis)
    assert 'failures="1"' not in junit(diagnosis, None)


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
