"""BN1: every rule fires on sick statistics, says what was measured, and is silent on healthy ones."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import test_rules_state
import torch
from planted import Net, batches, changed, layer_of, trained
from test_rules_batches import HEALTHY as WITH_MODEL
from test_rules_batches import MEASURED, MODULE, STORED, findings, the_finding, values
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint.stored import Checkpoint, Stored
from batchnorm.doctor import examine
from batchnorm.rules import RULES, Evidence, Fix, Severity
from batchnorm.rules.rule_evidence import Optimizer, Structure

CODES = [code for code in RULES if code.startswith("BN1")]
NAN, INF = float("nan"), float("inf")
FLOAT32 = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), "float32")
PLAIN = replace(STORED, dtypes=FLOAT32, eps=1e-5)
INITIAL = Stored("bn", values(0, 0), values(1, 1), values(1, 1), values(0, 0), num_batches_tracked=0)
OTHER = replace(PLAIN, name="other")


def stored(*layers, form="pt", **changes):
    """What a file gives."""
    every = {layer.name: layer for layer in layers or (replace(PLAIN, **changes),)}
    return Evidence("net.pt", every, file=Checkpoint("net.pt", form, every, {"": every}))


def behind(norms, *numbers, **changes):
    """What an ONNX file gives where weights with rows of these norms are before the layer; None for no weights."""
    evidence = stored(form="onnx", running_var=values(*numbers), **changes)
    return replace(evidence, file=replace(evidence.file, filters={"bn": norms and values(*norms)}))


def versioned(**changes):
    """What a file of torch.save gives whose state has the versions of its modules."""
    evidence = stored(**changes)
    return replace(evidence, file=replace(evidence.file, versions={"bn": 2}))


def measured(**changes):
    calm = {"t_mean": values(0, 1), "t_var": values(-1, 0)}
    return replace(WITH_MODEL, measured={"bn": replace(MEASURED, **(calm | changes))})


def copies(name="ema", weight="f4 (2, 2):b", **other):
    """Two copies with one layer each, behind the weight a and another one."""
    own, copy = {"bn": replace(PLAIN, fed_by="f4 (2, 2):a")}, {"bn": replace(PLAIN, fed_by=weight, **other)}
    file = Checkpoint("net.pt", "pt", own, {"model": own, name: copy})
    return Evidence("net.pt", file.every, file=file)


def var(*numbers, **changes):
    return stored(running_var=values(*numbers), **changes)


SICK = {
    "BN101": (stored(INITIAL, OTHER), "running_mean = 0 and running_var = 1"),
    "BN102": (stored(running_mean=values(0, NAN)), "running_mean[1] = nan, 1 of 2 channels"),
    "BN103": (var(1, -0.3), "running_var down to -0.3, 1 of 2 channels"),
    "BN104": (var(1, 1e-40), "running_var down to 1e-40, 1 of 2 channels"),
    "BN105": (behind(None, 1, 0), "gain up to 316, 1 of 2 channels"),
    "BN106": (stored(weight=values(1, 1e-5), bias=values(0, -1e-4)), "1 of 2 channels: 1 hardly vary"),
    "BN107": (stored(bias=values(0, INF)), "beta is NaN or infinite, 1 of 2 channels"),
    "BN108": (stored(dtypes=FLOAT32 | {"running_var": "float16"}), "statistics in float16"),
    "BN109": (stored(running_var=None), "no running_var"),
    "BN110": (stored(running_mean=values(0, 1e6)), "mean up to 7.1e+05 sd from zero, 1 of 2 channels"),
    "BN111": (stored(weight=values(0, 0)), "gamma = 0 in all 2 channels"),
    "BN112": (versioned(num_batches_tracked=None), "no num_batches_tracked in a state of version 2"),
    "BN113": (stored(INITIAL), "initial statistics, gamma and beta"),
    "BN114": (var(0.9**10, 0.9**10, num_batches_tracked=10), "10 updates: 35% of the initial statistics left"),
    "BN115": (copies(), "'ema' has other weights than 'model' and the same statistics, bit for bit"),
    "BN116": (measured(t_mean=values(9, 1), mean_deviation=values(0.4, 0)), "|t| up to 9, 1 of 2 channels"),
}
HALF_SIZED = stored(weight=values(1), num_batches_tracked=None)
WELL = {
    "BN101": [stored(INITIAL), stored(replace(INITIAL, running_mean=values(0, 1e-30)), OTHER)],
    "BN102": [var(1e38, 1e-38)],
    "BN103": [var(0, 1), var(NAN, 1), var(-INF, 1)],
    # a float16 of 6e-5 is denormal, and no zero beside eps; beside eps = 0 nothing is zero
    "BN104": [var(0, 1.2e-38), var(1e-40, 1, dtypes={"running_var": "float64"}),
              var(6e-5, 1, dtypes={"running_var": "float16"}, eps=1e-3), var(1e-40, 1, eps=0.0)],
    # a small gamma, a small variance that still varies, eps of TensorFlow, an eps that nobody knows
    "BN105": [behind(None, 1, 0, weight=values(1, 0.01)), behind(None, 1, 1e-6), behind(None, 1, 0, eps=1e-3),
              var(1, 0, eps=None), var(1, 0), behind((1, 1e-9), 1, 0), behind((9, 0.1), 1, 0)],
    "BN106": [stored(weight=values(1, 1e-5), bias=values(0, 1)),
              stored(weight=values(1, 1e-5), bias=values(0, -1)), stored(weight=values(1, 0.1), bias=values(0, -9)),
              stored(weight=values(0, 0)), var(1, 0)],
    "BN107": [stored(weight=None, bias=None)],
    "BN108": [stored(dtypes=FLOAT32 | {"weight": "float16"})],
    "BN109": [stored(weight=None, bias=None), stored(Stored("bn")), stored(running_mean=None, running_var=None)],
    "BN110": [stored(running_mean=values(0, 9e3)), stored(running_mean=values(0, INF)), var(1, NAN)],
    "BN111": [stored(weight=values(0, 1e-9)), stored(weight=None), stored(replace(INITIAL, weight=values(0, 0)))],
    "BN112": [stored(num_batches_tracked=None), stored(num_batches_tracked=None, form="onnx"),
              stored(Stored("bn", weight=values(1, 1)))],
    "BN113": [stored(INITIAL, OTHER), stored(replace(INITIAL, weight=values(1, 1.1))),
              stored(replace(INITIAL, bias=values(0, 0.1)))],
    "BN114": [stored(num_batches_tracked=0), stored(num_batches_tracked=44), stored(num_batches_tracked=None),
              stored(replace(INITIAL, num_batches_tracked=3)), stored(num_batches_tracked=1, momentum=1.0),
              stored(num_batches_tracked=10), var(0.34, 9, num_batches_tracked=10), stored(num_batches_tracked=-5),
              stored(num_batches_tracked=2**62), stored(num_batches_tracked=9999, momentum=3.0)],
    # the same weight, one of another type, none that is known; another statistic, initial ones, frozen layers
    "BN115": [copies(weight="f4 (2, 2):a"), copies(weight="f2 (2, 2):b"), copies(weight=""),
              copies(running_mean=values(0.5, -1.0000001)),
              copies(running_mean=values(0, 0), running_var=values(1, 1))],
    # noise that is large, effects that are small, layers that were never updated
    "BN116": [measured(t_mean=values(3.9, 1), mean_deviation=values(0.4, 0)),
              measured(t_mean=values(9, 1), mean_deviation=values(0.09, 0)), measured(t_mean=None, t_var=None),
              measured(t_var=values(9, 1), var_ratio=values(1.2, 1))],
}  # fmt: skip


def test_each_rule_of_states_and_of_statistics_has_sick_and_healthy_evidence():
    for codes, *tables in ((CODES, SICK, WELL), (test_rules_state.CODES, test_rules_state.SICK, test_rules_state.WELL)):
        assert [list(table) for table in tables] == [codes, codes]


@pytest.mark.parametrize("code", CODES)
def test_sick_statistics_are_named_with_what_was_measured(code):
    evidence, told = SICK[code]
    finding = the_finding(code, evidence, {"BN113": "", "BN115": "ema"}.get(code, "bn"), told)
    assert finding.channels == (() if "of 2 channels" not in told else (0,) if code == "BN116" else (1,))


@pytest.mark.parametrize("code", CODES)
def test_healthy_statistics_are_not_named(code):
    for evidence in [stored(), measured(), *WELL[code]]:
        assert findings(code, evidence) == []


@pytest.mark.parametrize("code", [code for code in CODES if code != "BN116"])
def test_a_layer_of_unequal_sizes_is_named_by_one_rule_and_upsets_none(code):
    for sizes in ({"weight": values(1)}, {"running_var": values(1)}, {"bias": values(0, 0, 0)}):
        assert len(findings(code, stored(**sizes))) == (code == "BN109")


@pytest.mark.parametrize("code", CODES)
def test_layers_that_store_nothing_are_not_named(code):
    assert findings(code, replace(measured(), stored={"bn": Stored("bn")}, measured={})) == []


def test_the_fix_is_what_the_fault_needs():
    fix = {code: findings(code, evidence)[0].fixable for code, (evidence, _) in SICK.items()}
    assert {code for code, kind in fix.items() if kind is Fix.SAFE} == {"BN104", "BN108", "BN112"}
    assert {code for code, kind in fix.items() if kind is Fix.DATA} == {
        "BN101", "BN102", "BN103", "BN114", "BN115", "BN116"}  # fmt: skip
    assert findings("BN103", var(1, -1e-13))[0].fixable is Fix.SAFE
    assert findings("BN103", var(1, -1e-11))[0].fixable is Fix.DATA


def test_a_command_is_given_for_what_the_command_line_knows():
    command = "batchnorm fix model.py:make_model --weights net.pt --data data.py:train_loader"
    assert findings("BN101", SICK["BN101"][0])[0].remedy == command
    model = Evidence("Net", SICK["BN101"][0].stored, modules={"bn": MODULE, "other": MODULE})
    assert findings("BN101", model)[0].remedy == "batchnorm.recalibrate(model, loader)"


def test_few_updates_say_when_momentum_is_only_assumed():
    begun = {"running_var": values(0.9**10, 0.9**10), "num_batches_tracked": 10}
    (assumed,) = findings("BN114", stored(**begun, momentum=None))
    assert assumed.measured.endswith("left, if momentum is 0.1")
    slow = var(0.99**100, 0.99**100, num_batches_tracked=100)
    known = {"bn": replace(MODULE, momentum=0.01)}
    assert findings("BN114", replace(slow, modules=known))[0].measured.startswith("100 updates: 37%")
    assert findings("BN114", replace(stored(**begun), modules={"bn": replace(MODULE, frozen=True)})) == []


def test_a_name_that_says_nothing_makes_foreign_statistics_a_warning():
    (error,), (warning,) = findings("BN115", copies()), findings("BN115", copies("target"))
    assert (error.severity, warning.severity) == (Severity.ERROR, Severity.WARNING)
    assert warning.layer == "target"
    assert "only if these layers were frozen" in warning.consequence


@pytest.mark.parametrize(
    ("parts", "fires"),
    [
        ({"structure": Structure(False, ("AveragedModel",), averages_buffers=False)}, True),
        ({"structure": Structure(False, ("AveragedModel",), averages_buffers=True)}, False),
        ({"optimizer": Optimizer("AdamWScheduleFree", is_schedule_free=True)}, True),
        ({"optimizer": Optimizer("AdamW")}, False),
    ],
)
def test_averaged_weights_are_found_by_their_wrapper_or_optimizer(parts, fires):
    assert bool(findings("BN115", replace(WITH_MODEL, measured=None, **parts))) is fires


def test_staleness_needs_a_tenth_of_the_channels():
    def layer(count):
        many = replace(STORED, running_mean=values(*[0.5] * 100), running_var=values(*[2.0] * 100))
        t, by = values(*[9.0] * count, *[0.0] * (100 - count)), values(*[0.4] * count, *[0.0] * (100 - count))
        calm = values(*[1.0] * 100)
        found = replace(MEASURED, mean=by, var=calm, mean_deviation=by, var_ratio=calm, t_mean=t, t_var=calm,
                        shown=tuple(range(count)))  # fmt: skip
        return replace(WITH_MODEL, stored={"bn": many}, measured={"bn": found})

    assert findings("BN116", layer(9)) == []
    assert len(findings("BN116", layer(10))[0].channels) == 10


@pytest.mark.parametrize("shown", [(), (1,)])
def test_staleness_that_rare_examples_may_explain_is_not_checked(shown):
    found, unknown = RULES["BN116"].look(measured(t_mean=values(9, 1), mean_deviation=values(0.4, 0), shown=shown))
    assert found == []
    assert "1 of 2 channels differ, but examples too rare to be among these" in str(unknown)


# -- the claims of the pages, on real models ---------------------------------------------------------------------


def codes(target, *data):
    return {finding.code for finding in examine(target, *data).findings if finding.code in CODES}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_statistics_that_only_one_layer_lacks_are_told_from_a_new_model(norm):
    assert codes(Net(norm)) == {"BN113"}
    model = trained(Net(norm))
    assert codes(model) == set()
    model.stem[1].num_batches_tracked.zero_()  # as in converted models
    assert codes(model) == set()
    model.stem[1].reset_running_stats()
    assert codes(model) == {"BN101"}


def test_a_new_residual_net_with_zeroed_gammas_is_a_new_model():
    model = Net()
    nn.init.zeros_(model.body[1].weight)
    assert codes(model) == {"BN113"}


@pytest.mark.parametrize(("value", "is_safe"), [(-5e-13, True), (-1e-6, False)])
def test_a_safe_fix_of_a_negative_variance_moves_no_output(value, is_safe):
    model = changed(running_var=value)
    assert [f.fixable for f in examine(model).findings if f.code == "BN103"] == [Fix.SAFE if is_safe else Fix.DATA]
    mended = copy.deepcopy(model)
    layer_of(mended).running_var.clamp_(min=0)
    x = torch.randn(4, 8, 3, 3)
    before, after = layer_of(model)(x)[:, 3], layer_of(mended)(x)[:, 3]
    scale = after.abs().max()
    assert bool((before - after).abs().max() <= 2**-23 * scale) is is_safe


def test_a_denormal_variance_is_zero_beside_eps():
    model = changed(running_var=1e-40, bias=1)
    assert "BN104" in codes(model)
    x = torch.randn(4, 8, 3, 3)
    before = layer_of(model)(x)
    layer_of(model).running_var[3] = 0
    assert torch.equal(layer_of(model)(x), before)


@pytest.mark.slow
def test_half_precision_statistics_are_torch_s_and_not_ours():
    assert codes(trained(Net()).half()) == {"BN108"}
    assert codes(trained(Net(bn.BatchNorm2d)).half()) == set()


def test_stale_statistics_of_a_model_are_gone_after_recalibration():
    model = trained()
    assert codes(model, batches()) == set()
    with torch.no_grad():
        model.stem[0].weight.mul_(2)
    assert "BN116" in codes(model, batches())
    bn.recalibrate(model, batches())
    assert "BN116" not in codes(model, batches())


def test_statistics_are_examined_without_torch():
    code = "import batchnorm.rules.bn1_stored_statistics, sys; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
