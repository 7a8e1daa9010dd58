"""What the alarm assumes, measured on clean data: each condition holds, is doubtful, or is broken, and what to do."""

from __future__ import annotations

import json
from functools import partial
from xml.etree import ElementTree as ET

import command_line
import pytest
import torch
from fingerprint import fingerprint
from test_cli_shift import MODEL
from test_shift_tails import bursts, network, normal
from torch import Tensor, nn

from batchnorm.reporting.formats import FORMATS
from batchnorm.shift import ShiftMonitor
from batchnorm.shift.assumptions import Assumptions, check, concise, full

MEANS, VARIANCES, TAILS, NEIGHBOURS, ORDER = (
    "stored means are exact", "stored variances are exact", "no few examples carry most of the energy",
    "neighbouring observations are no more alike than others", "later observations are like earlier ones",
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network(normal)


def batches(n: int, seed: int = 1) -> list[Tensor]:
    return list(normal(n, torch.Generator().manual_seed(seed)).split(64))


def states(found: Assumptions) -> dict[str, str]:
    return {condition.name: condition.state for condition in found.conditions}


@pytest.mark.slow
def test_all_hold_on_clean_normal_data(net: nn.Module) -> None:
    before = fingerprint(net)
    found = check(ShiftMonitor(net), batches(8192))
    assert states(found) == dict.fromkeys((MEANS, VARIANCES, TAILS, NEIGHBOURS, ORDER), "holds")
    assert found.hold
    assert all(condition.remedy == "" for condition in found.conditions)
    assert "can be relied on" in full(found)
    assert fingerprint(net) == before


def test_stored_means_that_are_off_are_broken(net: nn.Module) -> None:
    moved = network(normal)
    with torch.no_grad():
        moved[1].running_mean[3] += 0.4 * moved[1].running_var[3].sqrt()
    found = check(ShiftMonitor(moved), batches(2048))
    assert states(found)[MEANS] == "broken"
    told = found.conditions[0]
    assert told.measured.startswith("channel 3 of layer '1' is off by 0.")
    assert told.remedy.startswith("Recalibrate on clean data")


def test_what_is_off_by_how_much_is_what_numpy_measures(net: nn.Module) -> None:
    x = torch.cat(batches(2048))
    layer = net[1]
    z = ((net[0](x) - layer.running_mean) / (layer.running_var + layer.eps).sqrt()).detach().double().numpy()
    told = check(ShiftMonitor(nn.Sequential(net[0], net[1])), batches(2048)).conditions[0].measured
    # the channel that is nearest to its bound of 0.12 = 3 / sqrt(64 x 19) x ..., in standard errors
    delta = max(0.1, 3 * (0.1 / (1.9 * 64)) ** 0.5)
    error = z.std(0, ddof=1) / len(z) ** 0.5
    at = int(((abs(z.mean(0)) - delta) / error).argmax())
    assert told.startswith(f"channel {at} of layer '1' is off by {abs(z.mean(0)[at]):.2g} sd")
    assert f"standard error {error[at]:.2g};" in told


@pytest.mark.slow
def test_stored_variances_that_are_short_are_broken_and_larger_ones_are_not() -> None:
    for factor, state in ((0.6, "broken"), (1.5, "holds")):
        other = network(normal)
        with torch.no_grad():
            other[1].running_var *= factor
            other[4].running_var *= factor
        assert states(check(ShiftMonitor(other), batches(2048)))[VARIANCES] == state


@pytest.mark.slow
def test_tails_are_doubtful_and_no_condition_of_a_calibrated_reference() -> None:
    model, random = network(bursts), torch.Generator().manual_seed(4)
    data = list(bursts(2048, random).split(64))
    found = check(ShiftMonitor(model), data)
    assert states(found)[TAILS] == "doubtful"
    assert not found.hold
    assert "kurtosis" in full(found)
    monitor = ShiftMonitor(model)
    monitor.calibrate(list(bursts(1000, random).split(100)))
    told = check(monitor, data)
    assert states(told) == {NEIGHBOURS: "holds", ORDER: "holds"}
    assert "what an alarm against a calibrated reference assumes" in full(told)


def test_neighbours_that_are_alike_break_the_unit(net: nn.Module) -> None:
    runs = [row.expand(16, -1) + 0.1 * torch.randn(16, 16) for row in torch.cat(batches(64)).split(1)]
    found = check(ShiftMonitor(net), runs)
    assert states(found)[NEIGHBOURS] == "broken"
    assert "--unit batch" in full(found)
    assert states(check(ShiftMonitor(net, unit="batch"), runs * 3))[NEIGHBOURS] == "holds"


@pytest.mark.slow
def test_a_second_half_unlike_the_first_is_broken(net: nn.Module) -> None:
    drifts = batches(1024) + [batch + 0.7 for batch in batches(1024, 2)]
    assert states(check(ShiftMonitor(net), drifts))[ORDER] == "broken"
    monitor = ShiftMonitor(net)
    monitor.calibrate(batches(400, 5))
    assert states(check(monitor, [batch + 0.7 for batch in batches(256, 2)]))[ORDER] == "broken"


def test_what_could_not_be_measured_is_doubtful(net: nn.Module) -> None:
    found = check(ShiftMonitor(net), batches(64))
    assert states(found)[TAILS] == states(found)[NEIGHBOURS] == states(found)[ORDER] == "doubtful"
    assert states(found)[MEANS] == "doubtful"
    assert "Give more clean examples" in found.conditions[0].remedy
    assert "not judged: 64 observations" in full(found).replace("\n  ", " ")
    assert not found.hold


def test_what_cannot_be_measured_at_all_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"check needs 2 observations of clean data or more, got 1\. Give more"):
        check(ShiftMonitor(net), batches(1))
    with pytest.raises(ValueError, match=r"check needs finite activations, got NaN or infinity"):
        check(ShiftMonitor(net), [torch.full((64, 16), torch.nan)])
    with ShiftMonitor(net) as monitor, pytest.raises(RuntimeError, match=r"check needs a monitor that is not observ"):
        check(monitor, batches(64))


def test_text_fits_its_columns_and_json_says_the_same(net: nn.Module) -> None:
    found = check(ShiftMonitor(net), batches(512), target="net.py:model", data="net.py:clean")
    assert max(map(len, full(found, width=80).splitlines())) <= 80
    told = json.loads(found.to_json())
    assert [c["state"] for c in told["conditions"]] == [c.state for c in found.conditions]
    assert (told["hold"], told["observations"], told["schema_version"]) == (found.hold, 512, 1)
    assert len(concise(found)) == 5


# -- as users type it ---------------------------------------------------------------------------------------------


FOLDER = {"assumed.py": MODEL + "\ndef plenty(): return batches(40, 7)\n"}
call = partial(command_line.call, "shift")


@pytest.mark.slow
def test_exit_codes_and_text(folder) -> None:
    good = call("assumed.py:model", "--check-assumptions", "assumed.py:plenty")
    assert (good.exit_code, "made" in good.stdout) == (0, False), good.output
    assert good.stdout.count("[✓ holds]") == 5
    bad = call("assumed.py:model", "--check-assumptions", "assumed.py:dark")
    assert bad.exit_code == 1
    assert "[✗ broken] stored means are exact" in bad.stdout
    told = call("assumed.py:model", "--check-assumptions", "assumed.py:dark", "-o", "a.json")
    assert (told.exit_code, told.stdout) == (1, "")
    assert json.loads((folder / "a.json").read_text())["conditions"][0]["state"] == "broken"
    assert call("assumed.py:model", "--check-assumptions", "assumed.py:plenty", "-q").stdout == ""


def test_a_calibrated_reference_has_its_own_conditions(folder) -> None:
    result = call(
        "assumed.py:model", "--check-assumptions", "assumed.py:plenty", "--calibrate", "assumed.py:calibration"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("[✓ holds]") == 2


@pytest.mark.parametrize("form", FORMATS)
def test_assumptions_are_told_in_every_format(folder, form) -> None:
    place = "-o", f"a.{form}"
    result = call("assumed.py:model", "--check-assumptions", "assumed.py:dark", "--output-format", form, *place)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "stored" in (folder / f"a.{form}").read_text()
    if form == "junit":
        suite = ET.parse(folder / f"a.{form}").getroot()[0]
        assert suite.get("failures") == str(len(suite.findall("testcase/failure"))) == "4"


def test_a_workflow_gets_text(folder) -> None:
    result = call("assumed.py:model", "--check-assumptions", "assumed.py:dark", env={"GITHUB_ACTIONS": "true"})
    assert "[✗ broken]" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "shift needs data to judge. Give --data data.py:loader, or --check-assumptions clean.py:loader."),
        (("--data", "a.py:b", "--check-assumptions", "a.py:b"), "--check-assumptions takes the place of --data"),
        (("--check-assumptions", ""), "--check-assumptions"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, args: tuple[str, ...], message: str) -> None:
    result = call("assumed.py:model", *args)
    assert result.exit_code == 2 or isinstance(result.exception, ValueError)
    assert message in result.output + str(result.exception)
