"""BN5: export, folding and what a model answers when it is deployed."""

from dataclasses import replace

import pytest
from test_rules_batches import HEALTHY, MODULE, STORED, findings, values

from batchnorm.checkpoint.stored import Checkpoint
from batchnorm.rules import Evidence, Fix
from batchnorm.rules.rule_evidence import Graph, OtherVersion, Run, Structure

NAN = float("nan")


def compared(difference=None, tolerance=1e-4, **parts):
    return replace(HEALTHY, reference=OtherVersion("original", difference=difference, tolerance=tolerance, **parts))


def filed(form="onnx", **parts):
    file = Checkpoint(f"model.{form}", form, {"bn": STORED}, {}, **parts)
    return Evidence(f"model.{form}", {"bn": STORED}, file=file)


def with_eps(*each, **parts):
    names = [f"layer{index}" for index in range(len(each))]
    layer = replace(STORED, running_var=values(0.1, 0.2))
    stored = {name: replace(layer, name=name, eps=eps) for name, eps in zip(names, each, strict=True)}
    return Evidence("net", stored, **parts)


def test_layers_that_can_be_folded_are_one_finding_and_only_in_eval_mode():
    graph = Graph(foldable={f"bn{i}": f"conv{i}" for i in range(5)})
    (finding,) = findings("BN501", replace(HEALTHY, graph=graph, structure=Structure(training=False)))
    assert finding.layer == ""
    assert "bn0 into conv0, bn1 into conv1, bn2 into conv2 and 2 more" in finding.measured
    assert findings("BN501", replace(HEALTHY, graph=graph, structure=Structure(training=True))) == []
    assert findings("BN501", replace(HEALTHY, graph=Graph(), structure=Structure(training=False))) == []


@pytest.mark.parametrize(("difference", "fires"), [(0.05, True), (NAN, True), (9e-5, False), (None, False)])
def test_outputs_beyond_rounding_are_a_wrong_fold(difference, fires):
    assert bool(findings("BN502", compared(difference))) is fires


def test_other_statistics_are_named_beside_other_outputs():
    moved = replace(STORED, running_mean=values(0.5, 2.0))
    sick = compared(0.05, stored={"bn": moved})
    assert findings("BN502", sick)
    (finding,) = findings("BN508", sick)
    assert (finding.layer, finding.channels) == ("bn", (1,))


def test_the_remedy_for_other_statistics_fits_a_folded_model_and_a_layer_of_another_width():
    other = replace(STORED, running_mean=values(9.0, 9.0))
    (folded,) = findings("BN508", compared(stored={"bn": other, "folded": other}))
    assert folded.remedy == "copy the reference's running_mean and running_var into the layer of the same name"
    wide = replace(STORED, running_mean=values(9.0, 9.0, 9.0), running_var=values(1.0, 1.0, 1.0))
    (narrow,) = findings("BN508", compared(stored={"bn": wide}))
    assert "pass the version that the model was made from" in narrow.remedy
    assert "2 channels, not 3" in narrow.remedy


@pytest.mark.parametrize(
    ("mean", "var", "fires"),
    [
        ((0.5, -1.0), (1.0, 2.0), False),
        ((0.509, -1.0), (1.0, 2.01), False),
        ((0.52, -1.0), (1.0, 2.0), True),
        ((0.5, -1.0), (1.0, 2.1), True),
        ((0.5, NAN), (1.0, 2.0), True),
    ],
)
def test_statistics_differ_beyond_a_hundredth(mean, var, fires):
    theirs = replace(STORED, running_mean=values(*mean), running_var=values(*var))
    assert bool(findings("BN508", compared(stored={"bn": theirs, "folded": theirs}))) is fires


def test_what_has_the_place_of_an_activated_layer_is_named():
    sick = replace(HEALTHY, structure=Structure(training=False, dropped={"body.1": "relu", "head.2": "silu"}))
    first, second = findings("BN509", sick)
    assert (first.layer, second.layer) == ("body.1", "head.2")
    assert "act='relu'" in first.measured
    assert "for_export" in first.remedy
    assert findings("BN509", replace(HEALTHY, structure=Structure(training=False))) == []


def test_the_layer_that_has_another_eps_than_most_is_named():
    (finding,) = findings("BN503", with_eps(1e-5, 1e-5, 1e-3))
    assert finding.layer == "layer2"
    assert "eps 0.001, most layers have 1e-05" in finding.measured
    assert finding.fixable is Fix.UNSAFE
    assert findings("BN503", with_eps(1e-3, 1e-3)) == []
    assert findings("BN503", with_eps(None, 1e-3)) == []  # a file that does not say
    assert findings("BN503", with_eps(1e-5, 1e-5, 2e-5)) == []  # half precision rounds this away


@pytest.mark.parametrize("each", [(1e-5, 1e-3), (1e-5, 1e-5, 1e-3, 1e-3), (1e-5, 1e-5, 1e-3, 1e-2), ()])
def test_without_a_majority_no_layer_has_another_eps_than_most(each):
    assert findings("BN503", with_eps(*each)) == []


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (["head.0", "head.1"], False),  # a head of its own
        (["head.0"], True),
        (["head.0", "body.9"], True),
        (["body.8", "body.9"], True),
    ],
)
def test_a_part_of_the_model_may_have_an_eps_of_its_own(odd, named):
    others = {f"body.{i}": 1e-5 for i in range(10)}
    layer = replace(STORED, running_var=values(0.1, 0.2))
    every = {name: replace(layer, name=name, eps=eps) for name, eps in (others | dict.fromkeys(odd, 1e-3)).items()}
    assert [finding.layer for finding in findings("BN503", Evidence("net", every))] == (sorted(odd) if named else [])


def test_eps_of_a_reference_counts_more_than_that_of_most_layers():
    reference = OtherVersion("keras.onnx", eps={"layer0": 1e-3, "layer1": 1e-3})
    found = findings("BN503", with_eps(1e-5, 1e-5, reference=reference))
    assert [finding.layer for finding in found] == ["layer0", "layer1"]
    assert found[0].measured == "eps 1e-05 where keras.onnx has 0.001"


def test_an_eps_of_zero_is_known():
    tiny = {
        name: replace(STORED, eps=eps, running_var=values(1e-6, 1e-6))
        for name, eps in [("a", 1e-5), ("c", 1e-5), ("b", 0.0)]
    }
    assert [finding.layer for finding in findings("BN503", Evidence("net", tiny))] == ["b"]


def test_exported_layers_in_train_mode_are_named():
    assert [f.layer for f in findings("BN504", filed(in_train_mode=("bn", "bn2")))] == ["bn", "bn2"]
    assert findings("BN504", filed()) == []


def test_functional_calls_are_named_by_the_module_that_makes_them():
    found = findings("BN505", replace(HEALTHY, run=Run(functional=("", "head"))))
    assert [finding.layer for finding in found] == ["", "head"]
    assert "head.forward" in found[1].measured
    assert findings("BN505", HEALTHY) == []


@pytest.mark.parametrize(("change", "fires"), [(0.3, True), (NAN, True), (1e-6, False), (None, False)])
def test_an_answer_that_changes_with_its_companions_is_an_error(change, fires):
    run = Run(companions=change, companions_tolerance=1e-4)
    assert bool(findings("BN506", replace(HEALTHY, run=run))) is fires
    assert findings("BN506", replace(HEALTHY, run=replace(run, functional=("head",)))) == []


def test_layers_without_statistics_are_named_as_the_cause():
    run = Run(companions=0.3, companions_tolerance=1e-4)
    untracked = replace(
        HEALTHY,
        run=run,
        modules={"bn": replace(MODULE, tracks=False)},
        stored={"bn": replace(STORED, running_mean=None, running_var=None)},
    )
    assert "no statistics are stored by bn" in findings("BN506", untracked)[0].consequence


@pytest.mark.parametrize("prefix", ["", "state_dict.", "model.", "state_dict.net."])
def test_what_is_around_a_state_is_no_wrapper(prefix):
    assert findings("BN507", filed(prefix=prefix)) == []


@pytest.mark.parametrize("prefix", ["_orig_mod.", "state_dict.module.", "module._orig_mod."])
def test_wrappers_are_told_from_what_is_around_them(prefix):
    (finding,) = findings("BN507", filed(prefix=prefix))
    assert repr(prefix.removeprefix("state_dict.")) in finding.measured


def test_a_wrapper_prefix_has_a_safe_fix():
    (finding,) = findings("BN507", filed("pt", prefix="module."))
    assert "'module.'" in finding.measured
    assert finding.fixable is Fix.SAFE
    assert findings("BN507", filed()) == []


@pytest.mark.parametrize("value", [-1.0, NAN, float("inf"), -float("inf")])
def test_statistics_that_are_broken_alike_do_not_differ(value):
    layer = replace(STORED, running_mean=values(value, 0.0), running_var=values(value, 1.0))
    evidence = replace(compared(stored={"bn": layer}), stored={"bn": layer})
    assert findings("BN508", evidence) == []
    other = replace(layer, running_var=values(value, 2.0))
    assert findings("BN508", replace(evidence, stored={"bn": other}))[0].channels == (1,)
    healthy = replace(layer, running_var=values(1.0, 1.0))
    assert findings("BN508", replace(evidence, stored={"bn": healthy}))[0].channels == (0,)
