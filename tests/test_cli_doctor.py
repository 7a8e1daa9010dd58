"""batchnorm doctor, explain, rules and completion, as their users type them."""

import json
import os
import pickle
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from click import unstyle
from command_line import call
from planted import FAULTS, changed, trained

from batchnorm.cli.coloring import colored
from batchnorm.reporting.formats import FORMATS
from batchnorm.rules import RULES

MODEL = """
import torch
from planted import Net, batches, changed, images, loader as make_loader, trained

def healthy(updates=100):
    return trained(updates=updates)

def sick():
    return changed(running_var=-1.0)

def model():
    return Net()

def broken():
    raise KeyError("no config")

def number():
    return 3

def loader():
    return make_loader(images(), 32, shuffle=True)

def nothing():
    return None

def empty():
    return []

stem = trained()
"""


FOLDER = {"net.py": MODEL}


@pytest.fixture
def folder(folder):
    """A user's folder with a sick checkpoint and a module of models."""
    torch.save(changed(running_var=-1.0).state_dict(), folder / "sick.pt")
    torch.save(trained().state_dict(), folder / "healthy.pt")
    return folder


def test_a_sick_file_gives_findings_and_exit_code_1(folder):
    result = call("doctor", "sick.pt")
    assert result.exit_code == 1, result.output
    assert "✗ error BN103 negative-variance  stem.1" in result.output
    assert "1 error" in result.output
    command = "batchnorm fix model.py:make_model --weights sick.pt --data data.py:train_loader"
    assert f"next: {command} --diff" in result.output
    # a command stays in one piece, to be copied
    assert max(len(line) for line in result.output.splitlines() if not line.startswith("next: ")) <= 80


def test_a_healthy_file_takes_three_lines_and_exit_code_0(folder):
    result = call("doctor", "healthy.pt")
    assert result.exit_code == 0
    assert len([line for line in result.output.splitlines() if line.strip()]) == 3


@pytest.mark.parametrize("page", ["README.md", "docs/doctor.md"])
def test_the_documentation_shows_what_is_printed(folder, page):
    (folder / "sick.pt").rename("checkpoint.pt")
    printed = re.sub(r"\d+\.\d s$", "0.0 s", call("doctor", "checkpoint.pt").output, flags=re.MULTILINE)
    assert printed in Path(__file__).parents[1].joinpath(page).read_text(encoding="utf-8")


def test_a_model_with_weights_and_data(folder):
    result = call(
        "doctor", "net.py:model", "--weights", "sick.pt", "--data", "net.py:loader", "--output-format", "json"
    )
    assert result.exit_code == 1, result.output
    told = json.loads(result.output)
    assert told["data"] == "256 examples in 8 batches"
    assert "BN103" in {finding["code"] for finding in told["findings"]}


def test_settings_are_given_to_the_factory(folder):
    result = call(
        "doctor", "net.py:healthy", "--set", "updates=5", "--data", "net.py:loader", "--output-format", "concise"
    )
    assert "BN114 warning few-updates: 5 updates" in result.output


def test_a_reference_is_compared_with(folder):
    result = call("doctor", "net.py:healthy", "--reference", "sick.pt", "--output-format", "concise")
    assert "BN508" in result.output


@pytest.mark.parametrize(("fail_on", "code"), [("error", 0), ("warning", 1), ("never", 0), ("info", 1)])
def test_the_exit_code_follows_fail_on(folder, fail_on, code):
    few = ("net.py:healthy", "--set", "updates=5", "--data", "net.py:loader")
    assert call("doctor", *few, "--fail-on", fail_on).exit_code == code


@pytest.mark.parametrize("chosen", ["BN103", "negative-variance", "bn1"])
def test_rules_are_selected_by_code_family_and_name(folder, chosen):
    assert call("doctor", "sick.pt", "--select", chosen).exit_code == 1
    assert call("doctor", "sick.pt", "--ignore", chosen).exit_code == 0


def test_the_project_s_settings_hold_and_options_win(folder):
    (folder / "pyproject.toml").write_text('[tool.batchnorm.per-layer-ignores]\n"stem.*" = ["BN103"]\n')
    silenced = call("doctor", "sick.pt")
    assert silenced.exit_code == 0
    assert "1 silenced" in silenced.output
    (folder / "pyproject.toml").write_text('[tool.batchnorm]\nfail-on = "never"\noutput-format = "concise"\n')
    result = call("doctor", "sick.pt")
    assert result.exit_code == 0
    assert result.output.startswith("sick.pt: stem.1: BN103 error")
    assert call("doctor", "sick.pt", "--fail-on", "error").exit_code == 1
    assert call("doctor", "sick.pt", env={"BATCHNORM_FAIL_ON": "error"}).exit_code == 1


def test_a_baseline_silences_what_is_known(folder):
    assert call("doctor", "sick.pt", "--write-baseline", "known.json").exit_code == 1
    result = call("doctor", "sick.pt", "--baseline", "known.json")
    assert result.exit_code == 0
    assert "1 silenced" in result.output


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_the_finding(folder, name):
    result = call("doctor", "sick.pt", "--output-format", name)
    assert result.exit_code == 1
    assert "BN103" in result.output
    assert "stem.1" in result.output


def test_the_file_s_suffix_tells_the_format_and_nothing_is_printed(folder):
    result = call("doctor", "sick.pt", "-o", "out.sarif")
    assert (result.exit_code, result.output) == (1, "")
    assert json.loads((folder / "out.sarif").read_text())["version"] == "2.1.0"
    assert {path.name for path in folder.iterdir()} == {"net.py", "sick.pt", "healthy.pt", "out.sarif"}


def test_github_s_format_is_chosen_in_its_workflows(folder):
    result = call("doctor", "sick.pt", env={"GITHUB_ACTIONS": "true"})
    assert result.output.startswith("::error title=BN103 negative-variance::sick.pt: stem.1: ")


def test_json_fits_its_schema(folder):
    schema = json.loads(files("batchnorm.doctor").joinpath("diagnosis.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in ("BN101", "BN102", "BN115", "BN116"):
        from batchnorm.doctor import examine

        told = json.loads(examine(**FAULTS[name](folder)).to_json())
        jsonschema.validate(told, schema)
    del told["findings"][0]["code"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(told, schema)


HOSTILE = '<script>alert(1)</script>\x1b[31m\n::error::"|`&\x00'


def test_names_in_a_file_are_text_in_every_format(folder):
    layer = changed(running_var=-1.0).stem[1].state_dict()
    torch.save({f"{HOSTILE}.{key}": value for key, value in layer.items()}, "hostile.pt")
    for name in FORMATS:
        output = call("doctor", "hostile.pt", "--output-format", name).output
        assert "BN103" in output, name
        assert "\x1b" not in output, name
        assert "\x00" not in output, name
        assert "\n::error::" not in output, name
        if name in {"html", "md", "junit"}:
            assert "<script" not in output, name


def test_a_file_is_examined_without_heavy_imports(folder):
    code = (
        "import sys\nfrom batchnorm.cli import main\n"
        "try: main(['doctor', 'sick.pt', '-q'])\nexcept SystemExit as e: code = e.code\n"
        "print(code, {'torch', 'numpy', 'jinja2', 'rich', 'altair', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 set()"


def run(*args, **env):
    # a process of its own: pipes, locales and terminals are not those of the test
    command = [sys.executable, "-m", "batchnorm", *args]
    return subprocess.run(command, capture_output=True, check=False, env=os.environ | env)


def test_a_terminal_of_ascii_shows_the_words(folder):
    done = run("doctor", "sick.pt", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert b"[x error] Stored statistics" in done.stdout
    assert b"x error BN103 negative-variance" in done.stdout
    assert b"[+ ok] Deployment" in done.stdout
    assert b"[- not checked] Shift: needs data" in done.stdout


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "true"}, True),
        ({"FORCE_COLOR": "0"}, False),
        ({"FORCE_COLOR": "False"}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_colour_is_shown_by_the_conventions(folder, env, shown):
    clean = dict.fromkeys(("NO_COLOR", "FORCE_COLOR"), "")
    assert (b"\x1b[" in run("doctor", "sick.pt", **(clean | env)).stdout) is shown


@pytest.mark.parametrize(("value", "shown"), [("0", False), ("false", False), ("", True), ("1", True)])
def test_a_terminal_shows_no_colour_where_it_is_forced_off(monkeypatch, value, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ("\x1b[" in colored("[✓ ok] Shift")) is shown


def test_statuses_and_findings_are_coloured_and_other_lines_are_not(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = "[✗ error] Shift\n  ! warning BN401\n      ✗ error in a sentence\n[– not checked] Distributed"
    assert [("\x1b[" in line) for line in colored(text).splitlines()] == [True, True, False, False]
    assert unstyle(colored(text)) == text


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_error(folder):
    code = f"{sys.executable} -m batchnorm rules | head -1; {sys.executable} -m batchnorm doctor sick.pt | true"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("BN001")
    assert "Traceback" not in done.stderr


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def _hostile():
    torch.save({"model": Payload()}, "payload.pt")
    return "payload.pt"


def _file(name, content=b""):
    Path(name).write_bytes(content)
    return name


def _truncated():
    return _file("short.pt", Path("healthy.pt").read_bytes()[:5000])


WRONG = {
    "no such file": (lambda: ["doctor", "nothing.pt"], "nothing.pt"),
    "a folder": (lambda: ["doctor", "."], "."),
    "text": (lambda: ["doctor", "net.py"], "net.py"),
    "empty file": (lambda: ["doctor", _file("empty.pt")], "empty.pt"),
    "cut off": (lambda: ["doctor", _truncated()], "short.pt"),
    "hostile pickle": (lambda: ["doctor", _hostile()], "system"),
    "a pickle of a list": (lambda: ["doctor", _file("list.pkl", pickle.dumps([1, 2]))], "list.pkl"),
    "unknown rule": (lambda: ["doctor", "sick.pt", "--select", "BN777"], "BN777"),
    "misspelt rule": (lambda: ["doctor", "sick.pt", "--ignore", "negative-varience"], "negative-variance"),
    "bad fail-on": (lambda: ["doctor", "sick.pt", "--fail-on", "often"], "often"),
    "bad format": (lambda: ["doctor", "sick.pt", "--output-format", "pdf"], "pdf"),
    "bad setting": (lambda: ["doctor", "net.py:healthy", "--set", "updates"], "key=value"),
    "unknown setting": (lambda: ["doctor", "net.py:healthy", "--set", "width=3"], "width"),
    "misspelt function": (lambda: ["doctor", "net.py:helthy"], "healthy"),
    "no such module file": (lambda: ["doctor", "nets.py:healthy"], "nets.py"),
    "no such module": (lambda: ["doctor", "no_such_package.models:make"], "no_such_package"),
    "a factory that raises": (lambda: ["doctor", "net.py:broken"], "no config"),
    "a factory that gives a number": (lambda: ["doctor", "net.py:number"], "int"),
    "data for a file": (lambda: ["doctor", "sick.pt", "--data", "net.py:loader"], "--data"),
    "data that are nothing": (lambda: ["doctor", "net.py:healthy", "--data", "net.py:nothing"], "NoneType"),
    "no data": (lambda: ["doctor", "net.py:healthy", "--data", "net.py:empty"], "batch"),
    "weights that do not fit": (lambda: ["doctor", "net.py:model", "--weights", _misfit()], "misfit.pt"),
    "output in no folder": (lambda: ["doctor", "sick.pt", "-o", "no/such/out.json"], "no/such/out.json"),
    "output onto a folder": (lambda: ["doctor", "sick.pt", "-o", "."], "folder"),
    "unknown project key": (lambda: _with_project("[tool.batchnorm]\nselekt = []\n"), "'select'"),
    "broken project file": (lambda: _with_project("[tool.batchnorm\n"), "TOML"),
    "wrong project value": (lambda: _with_project('[tool.batchnorm]\nselect = "BN1"\n'), "list of codes"),
    "no baseline": (lambda: ["doctor", "sick.pt", "--baseline", "known.json"], "--write-baseline"),
    "broken baseline": (lambda: ["doctor", "sick.pt", "--baseline", _file("known.json", b"{}")], "--write-baseline"),
    "unknown rule to explain": (lambda: ["explain", "BN99999"], "BN99999"),
    "nothing to explain": (lambda: ["explain"], "BN101"),
    "two targets": (lambda: ["doctor", "sick.pt", "healthy.pt"], "healthy.pt"),
    "no target": (lambda: ["doctor"], "TARGET"),
    "misspelt command": (lambda: ["doctr", "sick.pt"], "doctor"),
    "no examples": (lambda: ["doctor", "net.py:healthy", "--max-examples", "0"], "x>=1"),
}


def _misfit():
    torch.save({"other.weight": torch.ones(3)}, "misfit.pt")
    return "misfit.pt"


def _with_project(text):
    Path("pyproject.toml").write_text(text)
    return ["doctor", "sick.pt"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_ends_with_cause_and_remedy_in_six_lines(folder, name):
    make, word = WRONG[name]
    result = call(*make())
    assert result.exit_code == 2, result.output
    assert word in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) <= 6, result.output
    assert not (folder / "executed").exists()


def test_there_are_twenty_wrong_inputs():
    assert len(WRONG) >= 20


def test_the_payload_of_the_hostile_pickle_works_where_it_is_run(folder):
    with Path(_hostile()).open("rb"):
        torch.load("payload.pt", weights_only=False)
    assert (folder / "executed").exists()


@pytest.mark.parametrize("args", [("BN101",), ("never-updated-statistics",), ("bn101", "--output-format", "md")])
def test_explain_shows_a_page(args):
    result = call("explain", *args)
    assert result.exit_code == 0
    for word in ("BN101", "never-updated-statistics", "Why", "How", "Example", "Fix"):
        assert word in result.output


@pytest.mark.parametrize("width", [80, 100])
def test_rules_and_pages_fit_the_terminal(width):
    rules = call("rules", env={"COLUMNS": str(width)}).output
    assert max(map(len, rules.splitlines())) <= width
    assert re.findall(r"^BN\d+", rules, re.MULTILINE) == list(RULES)
    titles = " ".join(rules.split())
    assert all(word in titles for rule in RULES.values() for word in rule.title.split())
    for rule in RULES.values():
        page = call("explain", rule.code, env={"COLUMNS": str(width)}).output
        code = dict(rule.sections)["Example"]
        assert code in "\n".join(line.removeprefix("    ") for line in page.splitlines())
        words = [line for line in page.splitlines() if line.strip() not in code]
        assert max(map(len, words)) <= width
        assert page.split() == [rule.code, rule.slug, f"({rule.severity})", *rule.page.split()]


@pytest.mark.slow
def test_explain_and_rules_as_json_have_every_rule():
    pages = json.loads(call("explain", "--all", "--output-format", "json").output)
    assert [page["code"] for page in pages] == list(RULES)
    assert all(page["why"] and page["how"] and page["fix"] for page in pages)
    assert json.loads(call("rules", "--output-format", "json").output) == pages
    assert all(code in call("rules").output for code in RULES)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("BN13", "Did you mean BN103, BN113?"),  # and not BN213, of another family
        ("bn15", "Did you mean BN105, BN115?"),
        ("BN1011", "Did you mean BN101?"),
        ("BN118", "Did you mean BN110, BN111, BN112 and 4 more?"),
        ("BN99", "Did you mean BN901, BN902?"),
        ("BN101, BN1O9", "no rule 'BN1O9'. Did you mean BN109?"),
        ("negative-varience", "Did you mean 'negative-variance'?"),
        ("xyz", "batchnorm rules lists all."),
    ],
)
def test_explain_suggests_the_code_that_begins_alike(name, suggestion):
    result = call("explain", name)
    assert result.exit_code == 2
    assert suggestion in " ".join(result.output.split())


def test_the_documentation_has_the_pages_as_they_are():
    written = Path(__file__).parents[1].joinpath("docs/rules.md").read_text()
    assert written == call("explain", "--all", "--output-format", "md").output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell):
    result = call("completion", shell)
    assert result.exit_code == 0
    assert "_BATCHNORM_COMPLETE" in result.output


def test_rules_are_completed(folder):
    done = run("x", _BATCHNORM_COMPLETE="bash_complete", COMP_WORDS="batchnorm explain BN10", COMP_CWORD="2")
    assert b"BN101" in done.stdout
