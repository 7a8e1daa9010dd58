import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call

from batchnorm.cli import main


@pytest.mark.parametrize(
    "code",
    [
        "import batchnorm",
        "import batchnorm.cli",
        "from batchnorm.cli import main; main(['--help'], standalone_mode=False)",
    ],
)
def test_start_up_loads_no_heavy_package(code):
    heavy = ["torch", "altair", "numpy", "sklearn", "scipy", "jinja2"]
    check = f"{code}\nimport sys\nprint('LOADED', sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.slow
def test_the_start_up_test_can_fail():
    check = "from batchnorm import Moments\nimport sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("args", [("--help",), ("why", "--help"), ("--version",)])
def test_help_and_version_succeed(args):
    result = call(*args)
    assert result.exit_code == 0
    assert "batchnorm" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--claim", "nonsense"], ["'nonsense' is not one of", "scale"]),
        (["--seeds", "1"], ["--seeds", "x>=2"]),
        (["--seed", "-1"], ["--seed", "0<=x"]),
        (["--seed", str(2**64)], ["--seed", "2147483647"]),
        (["-o", "why.pdf"], [".html, .json, .jsonl, .md", "why.pdf", "Write why.html"]),
        (["-o", "why.md", "--interactive"], ["--interactive needs an .html report"]),
        (["model.py:make"], ["needs data", "--data data.py:loader"]),
        (["-o", "/proc/why.html"], ["cannot write /proc/why.html", "-o FILE"]),
        (["-o", "no/such/folder/why.html"], ["cannot write no/such/folder/why.html", "No such file"]),
    ],
)
def test_a_wrong_argument_ends_with_its_remedy_and_code_2(args, words):
    result = call("why", *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for word in words:
        assert word in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("hidden", "extra", "output"), [("altair", "report", "why.html"), ("sklearn", "torch,lecture", "why.json")]
)
def test_a_missing_extra_names_the_command_that_installs_it(monkeypatch, tmp_path, hidden, extra, output):
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.setattr(
        "batchnorm.cli.preconditions.find_spec", lambda name: None if sys.modules.get(name, ...) is None else ...
    )
    result = call("why", "-o", str(tmp_path / output))
    assert result.exit_code == 2
    assert f"pip install 'batchnorm[{extra}]'" in result.output
    assert hidden in result.output


def test_debug_shows_the_traceback(tmp_path):
    result = call("--debug", "why", "-o", "why.pdf")
    assert isinstance(result.exception, ValueError)


@pytest.fixture
def quick(monkeypatch):
    """Little training: the machinery without its minutes."""
    from batchnorm.experiment import run_settings

    class Quick(run_settings.RunSettings):
        def steps(self, full):
            return 20

    monkeypatch.setattr(run_settings, "RunSettings", Quick)


@pytest.mark.slow
def test_why_prints_criteria_then_verdicts_then_the_report(quick, tmp_path):
    target = tmp_path / "why.html"
    result = call("why", "--claim", "hidden", "--seeds", "2", "-o", str(target))
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    question = text.index("Does batch norm on hidden units reach")
    assert question < text.index("INVALID") < text.index("held in these experiments")
    assert target.exists()


@pytest.mark.slow
def test_json_output_is_alone_on_standard_output_and_repeats_exactly(quick, tmp_path):
    from batchnorm.lecture.rate_sweep import sweep

    outputs = []
    for name in ("a.json", "b.json"):
        sweep.cache_clear()
        result = call("why", "--claim", "hidden", "--seeds", "2", "-o", str(tmp_path / name), "--output-format", "json")
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    assert "Infinity" not in outputs[0]
    assert "NaN" not in outputs[0]
    assert json.loads(outputs[0])["claims"]["hidden"]["verdicts"][0]["status"] == "INVALID"
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(outputs[0])


@pytest.mark.slow
def test_markdown_output_is_a_table(quick, tmp_path):
    result = call("why", "--claim", "hidden", "--seeds", "2", "-o", str(tmp_path / "a.md"), "--output-format", "md")
    assert "| hidden-speed-relu | INVALID |" in result.stdout
    assert (tmp_path / "a.md").read_text().strip() == result.stdout.strip()


SCALE = "from batchnorm.cli import main; main(['why', '--claim', 'scale', '--seeds', '2', '-o', {target!r}])"


def scale(target, **kwargs):
    return subprocess.run([sys.executable, "-c", SCALE.format(target=str(target))], check=False, timeout=300, **kwargs)


@pytest.mark.slow
def test_a_terminal_without_unicode_does_not_cost_the_report(tmp_path):
    target = tmp_path / "why.md"
    done = scale(target, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"+ SUPPORTED" in done.stdout
    assert target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["closed pipe", "full disk"])
def test_a_stream_that_takes_nothing_does_not_cost_the_report(tmp_path, stream):
    target = tmp_path / "why.md"
    if stream == "full disk":
        with Path("/dev/full").open("w") as full:
            done = scale(target, stdout=full, stderr=subprocess.PIPE)
    else:
        read, write = os.pipe()
        os.close(read)
        done = scale(target, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
    assert target.exists()
    assert b"Traceback" not in done.stderr


def test_the_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "batchnorm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("batchnorm 0.1.0 (CPU kernels: ")


@pytest.mark.parametrize("name", main.list_commands(None))
def test_debug_may_stand_behind_every_command(name):
    result = call(name, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.output


@pytest.mark.parametrize("words", ["doctor none.pt --debug", "doctor --debug none.pt", "--debug doctor none.pt"])
def test_debug_shows_the_error_itself_wherever_it_stands(words):
    assert isinstance(call(*words.split()).exception, FileNotFoundError)
    plain = call(*words.replace("--debug", "").split())
    assert plain.exit_code == 2
    assert isinstance(plain.exception, SystemExit)
