"""BN0: every rule fires on a layer in a bad state, and is silent on one that is as it should be."""

from dataclasses import replace

import pytest
import torch
from planted import Net, trained
from test_rules_batches import HEALTHY as WITHOUT_STRUCTURE
from test_rules_batches import MODULE, STORED, findings, the_finding
from torch import nn

import batchnorm as bn
from batchnorm.doctor import examine
from batchnorm.rules import RULES, Fix
from batchnorm.rules.rule_evidence import Structure

CODES = [code for code in RULES if code.startswith("BN0")]
HEALTHY = replace(WITHOUT_STRUCTURE, structure=Structure(training=True))


def module(**settings):
    return replace(HEALTHY, modules={"bn": replace(MODULE, **settings)})


def in_eval(evidence):
    return replace(evidence, structure=Structure(training=False))


def without_statistics(evidence):
    return replace(evidence, stored={"bn": replace(STORED, running_mean=None, running_var=None)})


SICK = {
    "BN001": (module(training=False), "eval mode, in a model in train mode"),
    "BN002": (module(trainable=False), "train mode, gamma and beta fixed"),
    "BN003": (module(training=False, frozen=True, held=True), "frozen, with a gradient"),
    "BN004": (module(tracks=False), "track_running_stats=False with stored statistics"),
    "BN005": (without_statistics(module(tracks=False)), "no running_mean, no running_var"),
    "BN006": (module(momentum=None), "momentum = None"),
    "BN007": (module(momentum=0.0), "momentum = 0"),
    "BN008": (module(momentum=0.5), "momentum = 0.5"),
    "BN009": (module(skipped_updates=3), "3 batches with NaN or infinity"),
    "BN010": (without_statistics(module(is_lazy=True)), "no size yet"),
}
WELL = {
    "BN001": [in_eval(module(training=False)), module(training=False, frozen=True),
              module(training=False, trainable=False)],
    "BN002": [in_eval(module(trainable=False)), module(trainable=False, training=False),
              module(trainable=False, training=False, frozen=True), module(trainable=False, momentum=0.0),
              module(trainable=False, affine=False), module(trainable=False, tracks=False)],
    # frozen and fixed, and a class or a traced module that always uses what it stores
    "BN003": [module(training=False, frozen=True, held=True, trainable=False), module(training=False, frozen=True)],
    "BN004": [without_statistics(module(tracks=False)), module(tracks=False, frozen=True)],
    "BN005": [without_statistics(module(is_lazy=True)), without_statistics(module(device="meta"))],
    "BN006": [module(momentum=None, tracks=False), module(momentum=None, frozen=True)],
    "BN007": [module(momentum=0.0, tracks=False), module(momentum=0.0, frozen=True), module(momentum=None)],
    "BN008": [module(momentum=0.49), module(momentum=None), module(momentum=0.9, tracks=False),
              module(momentum=0.9, frozen=True)],
    "BN009": [], "BN010": [],
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_a_sick_layer_is_named_with_what_was_measured(code):
    evidence, measured = SICK[code]
    the_finding(code, evidence, "bn", measured)


@pytest.mark.parametrize("code", CODES)
def test_a_healthy_layer_is_not_named(code):
    for evidence in [HEALTHY, in_eval(HEALTHY), *WELL[code]]:
        assert findings(code, evidence) == []


@pytest.mark.parametrize(
    ("momentum", "remedy"), [(0.99, "0.01"), (0.9, "0.1"), (0.999, "0.001"), (0.5, "0.1"), (1.0, "0.1")]
)
def test_the_other_convention_s_momentum_is_turned_into_torch_s(momentum, remedy):
    (finding,) = findings("BN008", module(momentum=momentum))
    assert finding.remedy == f"layer.momentum = {remedy}"


@pytest.mark.parametrize("code", ["BN002", "BN004", "BN007", "BN008"])
def test_what_leaves_eval_outputs_as_they_are_is_safe_to_fix(code):
    (finding,) = findings(code, SICK[code][0])
    assert finding.fixable is Fix.SAFE


# -- the claims of the pages, on real models ---------------------------------------------------------------------


def codes(model):
    return {finding.code for finding in examine(model).findings if finding.code in CODES}


def test_fixed_gamma_and_beta_do_not_stop_the_statistics_and_freeze_does():
    model = trained().train().requires_grad_(False)
    assert codes(model) == {"BN002"}
    before = model.stem[1].running_mean.clone()
    model(torch.randn(8, 3, 10, 10) + 5)
    assert not torch.equal(model.stem[1].running_mean, before)
    bn.freeze(model)
    assert codes(model) == set()
    before = model.stem[1].running_mean.clone()
    model(torch.randn(8, 3, 10, 10) + 5)
    assert torch.equal(model.stem[1].running_mean, before)


def test_without_tracking_train_and_eval_answer_differently_and_tracking_mends_it():
    layer = trained(nn.BatchNorm1d(3), data=[torch.randn(64, 3) + 5])
    assert codes(layer) == set()
    layer.track_running_stats = False
    assert codes(layer) == {"BN004"}
    x = torch.randn(64, 3)
    before = layer.running_mean.clone()
    train, evaluated = layer.train()(x), layer.eval()(x)
    assert torch.equal(layer.running_mean, before)
    assert (train - evaluated).abs().max() > 1


def test_a_layer_frozen_by_hand_and_one_in_the_wrong_mode_are_told_apart():
    model = trained().train()
    model.stem[1].eval()
    assert codes(model) == {"BN001"}
    model.stem[1].requires_grad_(False)
    assert codes(model) == set()


def test_a_frozen_layer_is_named_until_gamma_and_beta_are_fixed_too():
    model = bn.freeze(trained()).train()
    assert codes(model) == {"BN003"}
    assert codes(bn.freeze(model, affine=True)) == set()


def test_layers_without_values_are_not_taken_for_layers_without_statistics():
    assert codes(Net().to("meta").eval()) == set()
    assert codes(nn.LazyBatchNorm2d()) == {"BN010"}
    assert codes(nn.BatchNorm2d(3, track_running_stats=False)) == {"BN005"}
