"""treat: what each remedy does to a model, what it leaves alone, and that a second treatment changes nothing."""

import copy
from array import array
from dataclasses import replace

import pytest
import torch
from fingerprint import fingerprint
from planted import FAULTS, Net, batches, changed, diagnosis_of, images, layer_of, loader, trained
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint import Stored
from batchnorm.doctor import examine
from batchnorm.doctor.examination import Selection
from batchnorm.doctor.mending.remedies import REMEDIES, ROUNDING, effect, typical_statistics, zero_variance
from batchnorm.doctor.mending.treatment import treat
from batchnorm.population.freezing import Frozen
from batchnorm.rules import RULES, Fix

NAN, INFINITY = float("nan"), float("inf")
SAFE = ["BN002", "BN004", "BN007", "BN008", "BN103 rounding", "BN104"]
MEASURED = ["BN101", "BN102", "BN102 infinite", "BN103", "BN114", "BN116", "BN209"]
UNSAFE = ["BN102", "BN102 infinite", "BN103", "BN107"]


def sick(name, tmp_path):
    return FAULTS[name](tmp_path)["target"]


def codes(model, data=None):
    return {finding.code for finding in examine(model, data).findings}


def eval_output(model):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images(8))


def bits(model):
    return {
        name: tensor.detach().clone().flatten().contiguous().view(torch.uint8)
        for name, tensor in model.state_dict().items()
    }


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def look(model):
    """Everything that treat may change, and the weights: comparable between copies."""
    settings = [
        (
            path,
            type(module).__name__,
            module.training,
            getattr(module, "momentum", 0),
            getattr(module, "track_running_stats", 0),
        )
        for path, module in model.named_modules()
    ]
    numbers = {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in bits(model).items()}
    return settings, numbers, [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAFE)
def test_a_safe_remedy_mends_its_finding_and_keeps_eval_outputs(name, tmp_path):
    model, code = sick(name, tmp_path), name.split()[0]
    assert code in codes(model)
    treated = treat(model)
    assert code not in codes(treated)
    before, after = eval_output(model), eval_output(treated)
    torch.testing.assert_close(after, before, rtol=0, atol=8 * torch.finfo(torch.float32).eps * before.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_data_mend_a_finding(name, tmp_path):
    model, code = sick(name, tmp_path), name.split()[0]
    assert code in codes(model, batches())
    treated = treat(model, data=batches())
    assert codes(treated, batches()).isdisjoint({code, "BN102", "BN103", "BN114", "BN116", "BN209"})


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSAFE)
def test_what_is_unsafe_is_done_only_when_asked_for(name, tmp_path):
    model, code = sick(name, tmp_path), name.split()[0]
    assert same_bits(bits(treat(model)), bits(model))
    treated = treat(model, unsafe=True)
    assert code not in codes(treated)
    assert eval_output(treated).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*SAFE, *MEASURED, *UNSAFE}))
@pytest.mark.parametrize("with_data", [False, True])
def test_the_original_is_not_changed_and_a_second_treatment_changes_nothing(name, with_data, tmp_path):
    model, data = sick(name, tmp_path), batches() if with_data else None
    before = fingerprint(model)
    once = treat(model, data=data, unsafe=True)
    assert fingerprint(model) == before
    assert look(treat(once, data=data, unsafe=True)) == look(once)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*SAFE, *MEASURED, *UNSAFE}))
def test_weights_outside_of_batch_norm_are_never_touched(name, tmp_path):
    model = sick(name, tmp_path)
    treated = bits(treat(model, data=batches(), unsafe=True))
    layers = tuple(f"{path}." for path in bn.find(model))
    others = {key: value for key, value in bits(model).items() if not key.startswith(layers)}
    assert others
    assert same_bits(others, {key: treated[key] for key in others})


def test_a_healthy_model_stays_as_it_is():
    model = trained().train()
    assert look(treat(model, data=batches(), unsafe=True)) == look(model)


def test_statistics_measured_anew_are_the_exact_ones_of_the_data():
    model = changed(running_var=NAN)
    treated = treat(model, data=loader(images(), 32, shuffle=True))
    exact = copy.deepcopy(model)
    bn.freeze(exact.body)
    bn.recalibrate(exact, batches())
    torch.testing.assert_close(treated.stem[1].running_mean, exact.stem[1].running_mean)
    torch.testing.assert_close(treated.stem[1].running_var, exact.stem[1].running_var)


def test_a_healthy_layer_behind_a_repaired_one_keeps_its_statistics():
    model = trained()
    layer_of(model).reset_running_stats()
    treated = bits(treat(model, data=batches()))
    before = bits(model)
    assert not torch.equal(treated["stem.1.running_mean"], before["stem.1.running_mean"])
    for key in ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"):
        assert torch.equal(treated[key], before[key])


@pytest.mark.slow
def test_averaged_weights_get_statistics_of_their_own_in_every_layer(tmp_path):
    model = sick("BN115 averaged model", tmp_path)
    treated, exact = treat(model, examine(model), batches()), copy.deepcopy(model)
    bn.recalibrate(exact, batches())
    for path, layer in bn.find(exact).items():
        torch.testing.assert_close(treated.get_submodule(path).running_mean, layer.running_mean)
        torch.testing.assert_close(treated.get_submodule(path).running_var, layer.running_var)


@pytest.mark.slow
def test_a_layer_that_falls_sick_by_a_repair_is_measured_too():
    # shifted data: the rule names the first layer alone, its repair moves what the second one gets
    model, data = trained(), batches(images(mean=4.0))
    treated = treat(model, data=data)
    assert codes(treated, data).isdisjoint({"BN401", "BN116", "BN209"})


def test_a_sick_frozen_layer_is_measured_and_stays_frozen():
    model = bn.freeze(changed(running_mean=NAN), affine=True).train()
    treated = treat(model, data=batches())
    assert layer_of(treated).running_mean.isfinite().all()
    assert isinstance(layer_of(treated), Frozen)
    assert not layer_of(treated).weight.requires_grad
    assert treated.training
    assert treated.stem.training


@pytest.mark.slow
def test_the_count_after_a_measurement_does_not_read_as_few_updates():
    kept = treat(changed(running_var=NAN), data=batches())
    assert int(layer_of(kept).num_batches_tracked) == 100  # of the training: 8 batches would leave 43 %
    assert int(layer_of(treat(trained(updates=5), data=batches())).num_batches_tracked) == 0


@pytest.mark.slow
def test_a_one_shot_iterator_is_read_once_and_used_several_times():
    treated = treat(changed(running_var=NAN), data=iter(batches()))
    assert layer_of(treated).running_var.isfinite().all()


@pytest.mark.slow
def test_what_a_layer_in_front_breaks_is_measured_once_unsafe_mends_it():
    model = changed(weight=NAN)
    model.body[1].running_var[0] = NAN
    with pytest.raises(ValueError, match="2 finite values"):
        treat(model, data=batches())
    assert codes(treat(model, data=batches(), unsafe=True)).isdisjoint({"BN102", "BN107"})


@pytest.mark.slow
def test_a_layer_that_no_forward_reaches_gets_typical_statistics_if_that_is_allowed():
    model = changed(running_var=NAN)
    model.spare = nn.BatchNorm2d(2)
    model.spare.running_var[0] = NAN
    with pytest.warns(RuntimeWarning, match="no forward reached 'spare'"):
        treated = treat(model, data=batches(), unsafe=True)
    assert treated.spare.running_var.tolist() == [1.0, 1.0]
    fresh = examine(treated, batches()).findings
    assert not [finding for finding in fresh if finding.layer == "stem.1" and finding.fixable is not Fix.NO]


def test_settings_of_training():
    model = trained()
    model.stem[1].momentum, model.body[1].momentum = 0.99, 1.0
    treated = treat(model)
    assert treated.stem[1].momentum == pytest.approx(0.01)
    assert treated.body[1].momentum == 0.1  # 1 - 1 would store nothing


def test_what_may_be_meant_is_left_alone(tmp_path):
    for name in ("BN001", "BN003", "BN005", "BN006"):
        model = sick(name, tmp_path)
        assert look(treat(model, unsafe=True)) == look(model)


def test_only_findings_of_the_given_diagnosis_are_treated():
    model = changed(running_var=-0.5)
    model.stem[1].momentum = 0.99
    diagnosis = examine(model, selection=Selection(select=("BN008",)))
    treated = treat(model, diagnosis, batches(), unsafe=True)
    assert treated.stem[1].momentum == pytest.approx(0.01)
    assert torch.equal(treated.stem[1].running_var, model.stem[1].running_var)


def test_a_diagnosis_of_another_model_is_refused():
    with pytest.raises(
        ValueError,
        match=r"diagnosis of this model, got BN103 of 'stem.1', a layer that the model lacks. Examine this model",
    ):
        treat(nn.Sequential(nn.BatchNorm1d(2)), examine(changed(running_var=-1.0)))


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TypeError, match=r"path or an nn\.Module|nn\.Module, got int"):
        treat(3)  # pyrefly: ignore


@pytest.mark.slow
def test_half_precision_statistics_are_widened_where_the_layer_runs_with_them():
    plain = trained(Net(lambda c: nn.BatchNorm2d(c, affine=False)))
    for name in ("running_mean", "running_var"):
        setattr(plain.stem[1], name, getattr(plain.stem[1], name).half())
    assert "BN108" in codes(plain)
    treated = treat(plain)
    x = images(4).half()
    for model in (treated, treat(trained().half())):  # torch.nn on a CPU refuses half gamma with float32 statistics
        model.half() if model is treated else None
        assert model.eval()(x).isfinite().all()
    widened = treat(plain).stem[1].running_var
    assert widened.dtype in {torch.float32, torch.float16}
    assert torch.equal(widened.float(), plain.stem[1].running_var.float())


def test_a_model_that_cannot_be_copied_says_what_to_use():
    model = changed(running_var=-1.0)
    model.lock = (step for step in ())
    with pytest.raises(RuntimeError, match=r"treat needs a model that copy.deepcopy can copy.*batchnorm.recalibrate"):
        treat(model)


# -- the remedies by themselves ----------------------------------------------------------------------------------


def stored(**values):
    tensors = {key: array("d", value) for key, value in values.items()}
    return Stored("bn", **tensors, dtypes=dict.fromkeys(tensors, "float32"), eps=1e-5)


def test_a_variance_is_set_to_0_only_where_that_is_rounding():
    layer = stored(running_var=[-1e-14, -1e-6, 1e-40, 0.0, 1e-30, 2.0, NAN, -INFINITY])
    after = zero_variance(layer, 1e-5).running_var
    assert [repr(v) for v in after] == ["0.0", "-1e-06", "0.0", "0.0", "1e-30", "2.0", "nan", "-inf"]
    assert effect(stored(running_var=[-1e-14]), stored(running_var=[0.0]), 1e-5) <= ROUNDING
    half = replace(stored(running_var=[3e-5]), dtypes={"running_var": "float16"})
    assert zero_variance(half, 1e-5) == half  # a denormal of float16 is more than eps


def test_typical_statistics_are_those_of_a_good_channel():
    layer = stored(running_mean=[1.0, NAN, 3.0, 7.0], running_var=[4.0, 5.0, -1.0, INFINITY])
    after = typical_statistics(layer, 1e-5)
    assert list(after.running_mean) == [1.0, 3.0, 3.0, 7.0]
    assert list(after.running_var) == [4.0, 5.0, 4.0, 4.0]
    hopeless = typical_statistics(stored(running_mean=[NAN], running_var=[NAN]), 1e-5)
    assert (list(hopeless.running_mean), list(hopeless.running_var)) == ([0.0], [1.0])


def test_the_effect_is_what_an_eval_output_moves_by():
    before = stored(running_mean=[1.0, 0.0], running_var=[4.0, 1.0])
    after = stored(running_mean=[1.5, 0.0], running_var=[1.0, 1.0])
    x, eps = torch.tensor([[1.0 + 2.0, 0.0]], dtype=torch.float64), 1e-5  # one sd above the mean, as it was
    y = [
        torch.nn.functional.batch_norm(
            x, *(torch.tensor(v, dtype=torch.float64) for v in (s.running_mean, s.running_var)), eps=eps
        )
        for s in (before, after)
    ]
    moved = abs(y[1] - y[0]).max().item()
    assert moved <= effect(before, after, eps) == pytest.approx(1.5, rel=1e-4)
    assert effect(before, before, eps) == 0
    assert effect(stored(running_var=[NAN]), stored(running_var=[1.0]), eps) == INFINITY


@pytest.mark.slow
def test_every_remedy_is_of_a_rule_and_every_fixable_finding_has_one():
    assert set(REMEDIES) <= set(RULES)
    for name in FAULTS:
        for finding in diagnosis_of(name).findings:
            kinds = {remedy.fix for remedy in REMEDIES.get(finding.code, ())}
            if finding.fixable is not Fix.NO and finding.code != "BN503":  # eps is told by its owner
                assert finding.fixable in kinds, (name, finding.code, finding.fixable)
