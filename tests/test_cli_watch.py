"""``batchnorm watch``: the address it prints, how it ends, and what it says when it cannot begin."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request

import command_line
import pytest
from test_live import small_log

from batchnorm.live.server import listen


@pytest.fixture
def folder(tmp_path):
    small_log(tmp_path / "run", steps=5)
    return tmp_path / "run"


def call(*arguments, **environment):
    return command_line.call("watch", *arguments, env=environment)


def words(result):
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.slow
def test_it_prints_an_address_that_answers_and_ctrl_c_ends_it_with_0(folder):
    command = [sys.executable, "-m", "batchnorm", "watch", str(folder), "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address)
        with urllib.request.urlopen(address) as answer:
            assert b"Layers over time" in answer.read()
        stream = urllib.request.urlopen(address.replace("/?", "/events?"))  # a page that is still open
        assert stream.readline() == b"retry: 500\n"
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=20)
        stream.close()
    assert process.returncode == 0
    assert said == ""
    assert complaints.strip() == "Ctrl-C ends the command."


def test_the_page_is_written_as_a_file_and_the_command_ends(folder, tmp_path):
    result = call(folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "wrote" in result.output
    assert 'id="data"' in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_a_folder_without_a_log_ends_with_2_and_its_remedy(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = call(tmp_path / name)
    assert result.exit_code == 2
    assert "has no record.jsonl. Give the folder that watch(model, log=...) writes to." in words(result)
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_ends_with_2_and_its_remedy(folder):
    with listen() as taken:
        port = taken.getsockname()[1]
        result = call(folder, "--port", port)
    assert result.exit_code == 2
    assert f"port {port} of 127.0.0.1" in words(result)
    assert "Choose another with --port N." in words(result)


def test_a_missing_extra_ends_with_2_and_the_command_that_installs_it(monkeypatch, folder):
    monkeypatch.setattr("batchnorm.cli.preconditions.find_spec", lambda name: None if name == "uvicorn" else ...)
    result = call(folder)
    assert result.exit_code == 2
    assert "watch needs uvicorn, not installed here. Run: pip install 'batchnorm[live]'" in words(result)


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "with a space in it", "é" * 20])
def test_a_token_that_is_easily_guessed_or_no_part_of_an_address_is_refused(folder, token):
    given = [call(folder, "--token", token)]
    given += [call(folder, BATCHNORM_TOKEN=token)] if token else []  # an empty variable is none
    for result in given:
        assert result.exit_code == 2
        assert "--token needs 16 to 200 letters" in words(result)


def test_a_log_of_a_newer_version_cannot_be_written_as_a_page(tmp_path):
    (tmp_path / "record.jsonl").write_text('{"kind":"start","schema_version":99,"layers":[]}\n')
    result = call(tmp_path, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "schema version 99" in words(result)
    assert not (tmp_path / "page.html").exists()


def test_a_log_that_cannot_be_read_is_told(folder, tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("batchnorm.live.log_feed._file_identity", refuses)
    result = call(folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "cannot read the log in" in words(result)
    assert "Permission denied. Make its files readable" in words(result)
    assert "cannot write" not in words(result)
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_cannot_be_written_is_told(folder, tmp_path):
    result = call(folder, "-o", tmp_path / "no" / "page.html")
    assert result.exit_code == 2
    assert "cannot write" in words(result)


@pytest.mark.slow
def test_neither_help_nor_the_live_page_loads_torch():
    check = "import batchnorm.cli.watch_command, batchnorm.live, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
