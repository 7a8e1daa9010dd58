"""BN2: every rule fires on sick evidence, says what was measured, and is silent on healthy evidence."""

import re
from array import array
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.checkpoint.stored import Stored
from batchnorm.rules import RULES, Evidence, Fix
from batchnorm.rules.rule_evidence import Loop, MeasuredLayer, Module, Optimizer, Run

CODES = [code for code in RULES if code.startswith("BN2")]
SECTIONS = ["Why:", "How:", "Example:", "Fix:", "References:"]


def values(*numbers):
    return array("d", numbers)


STORED = Stored(
    "bn", values(0.5, -1.0), values(1.0, 2.0), values(1.0, 1.0), values(0.0, 0.0), num_batches_tracked=500, momentum=0.1
)
MEASURED = MeasuredLayer(
    examples=256,
    batches=8,
    values_per_example=64.0,
    mean=values(0.5, -1.0),
    var=values(1.0, 2.0),
    mean_deviation=values(0.0, 0.1),
    var_ratio=values(1.0, 0.95),
    effective_examples=30.0,
    batch_examples=32.0,
    clustering_p=0.3,
    gap=0.05,
    gap_noise=0.04,
    gap_stale=0.02,
    gap_shown=0.02,
    shown=(0, 1),
)
MODULE = Module("BatchNorm2d", 1e-5, 0.1, True, True, False, True, True, "cpu")
HEALTHY = Evidence(
    "net",
    {"bn": STORED},
    modules={"bn": MODULE},
    measured={"bn": MEASURED},
    run=Run(updates_forward={"bn": 1}, updates_backward={"bn": 0}, order_p=5e-4),
    loop=Loop(batch_size=32, last_batch=32),
    optimizer=Optimizer("SGD", {"bn": 0.0}),
)


def findings(code, evidence):
    return RULES[code].findings(evidence)


def the_finding(code, evidence, layer, words):
    """The only finding: of this layer, with what was measured, its limit, what follows and what to do."""
    (finding,) = findings(code, evidence)
    assert (finding.code, finding.layer) == (code, layer)
    assert words in finding.measured
    assert all((finding.limit, finding.consequence, finding.remedy))
    return finding


def measured(**changes):
    return replace(HEALTHY, measured={"bn": replace(MEASURED, **changes)})


def looped(**settings):
    return replace(HEALTHY, loop=Loop(**settings))


CLUSTERED = {"effective_examples": 1.3, "clustering_p": 1e-20}

SICK = {
    "BN201": (looped(batch_size=2), "", "2 examples per batch: noise of the mean 71%"),
    "BN202": (looped(batch_size=32, last_batch=1), "", "1 example in the last batch, 32 in the others"),
    "BN203": (looped(batch_size=8, accumulation=4), "", "batch norm sees 8 examples, not 32"),
    "BN204": (measured(**CLUSTERED), "", "a batch of 32 counts for 1.3 random examples in 'bn' (p = 0.0005"),
    "BN205": (replace(HEALTHY, run=Run(updates_backward={"bn": 1})), "bn", "1 more update in the backward pass"),
    "BN206": (replace(HEALTHY, optimizer=Optimizer("AdamW", {"bn": 0.05})), "", "weight decay 0.05 on gamma or beta"),
    "BN207": (measured(padded_share=0.44), "bn", "44% of the positions are padding"),
    "BN208": (measured(non_finite=3), "bn", "3 NaN or infinite inputs in 256 examples"),
    "BN209": (
        measured(gap_stale=0.8, gap_shown=0.8),
        "bn",
        "stored statistics move the output by 0.8 sd, the batch's noise by 0.04",
    ),
    "BN210": (replace(HEALTHY, run=Run(never_ran=("bn",))), "bn", "0 calls on the data"),
    "BN211": (measured(constant=(1,)), "bn", "1 of 2 channels do not vary in 256 examples"),
    "BN212": (replace(HEALTHY, run=Run(train_error="ValueError: no labels")), "", "ValueError: no labels"),
    "BN213": (replace(HEALTHY, optimizer=Optimizer("SGD", unlisted=("bn",))), "bn", "in no group of SGD"),
}


@pytest.mark.parametrize("code", CODES)
def test_a_rule_fires_on_sick_evidence_and_says_what_was_measured(code):
    the_finding(code, *SICK[code])


@pytest.mark.parametrize("code", CODES)
def test_a_rule_is_silent_on_healthy_evidence(code):
    assert not RULES[code].missing(HEALTHY)
    assert findings(code, HEALTHY) == []


@pytest.mark.parametrize("code", [code for code in RULES if code.startswith(("BN2", "BN4", "BN5"))])
def test_a_page_has_a_title_and_its_sections_in_order(code):
    rule = RULES[code]
    assert rule.title.endswith(".")
    assert re.findall(r"^\w+:$", rule.page, re.MULTILINE) == SECTIONS


# -- limits and exceptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "fires"), [(1, True), (7, True), (8, False), (None, False)])
def test_eight_examples_are_enough(size, fires):
    assert bool(findings("BN201", looped(batch_size=size))) is fires


def test_synchronized_layers_pool_the_examples_of_all_processes():
    loop = Loop(batch_size=2, world_size=8)
    synced = replace(HEALTHY, loop=loop, modules={"bn": replace(MODULE, is_sync=True)})
    assert findings("BN201", replace(HEALTHY, loop=loop))
    assert findings("BN201", synced) == []


@pytest.mark.parametrize("code", ["BN201", "BN202", "BN203"])
def test_frozen_layers_do_not_depend_on_batches(code):
    frozen = replace(SICK[code][0], modules={"bn": replace(MODULE, frozen=True)})
    assert findings(code, frozen) == []


def test_a_last_batch_of_one_names_the_layers_that_raise():
    tabular = replace(measured(values_per_example=1.0), loop=Loop(32, 1))
    assert "bn will raise ValueError" in findings("BN202", tabular)[0].consequence
    assert findings("BN202", looped(batch_size=1, last_batch=1)) == []


@pytest.mark.parametrize(("size", "fires"), [(31, True), (32, False), (None, True)])
def test_accumulating_large_batches_is_fine(size, fires):
    assert bool(findings("BN203", looped(batch_size=size, accumulation=2))) is fires


@pytest.mark.parametrize(
    "changes",
    [{"clustering_p": 2e-3}, {"effective_examples": 17.0}, {"clustering_p": None}, {"effective_examples": None}],
)
def test_batches_are_correlated_only_if_both_chance_and_size_say_so(changes):
    assert findings("BN204", measured(**CLUSTERED | changes)) == []


def test_the_chance_of_correlated_batches_is_counted_over_all_layers():
    one = replace(MEASURED, effective_examples=1.3, clustering_p=4e-4)
    assert findings("BN204", replace(HEALTHY, measured={"a": one}))
    assert findings("BN204", replace(HEALTHY, measured={"a": one, "b": MEASURED, "c": MEASURED})) == []


def test_the_momentum_offered_makes_two_updates_weigh_as_one():
    (finding,) = findings("BN205", SICK["BN205"][0])
    momentum = float(finding.remedy.rpartition("= ")[2])
    assert (1 - momentum) ** 2 == pytest.approx(0.9, abs=1e-3)


def test_only_the_first_layer_with_nan_is_named_and_none_behind_a_broken_layer():
    poisoned = replace(MEASURED, non_finite=5)
    both = replace(HEALTHY, measured={"a": poisoned, "b": poisoned})
    assert [finding.layer for finding in findings("BN208", both)] == ["a"]
    broken = {"a": replace(STORED, running_var=values(-0.5, 1.0))}
    behind = replace(HEALTHY, measured={"a": MEASURED, "b": poisoned}, stored=broken, modules={})
    assert findings("BN208", behind) == []
    assert findings("BN208", replace(behind, stored={"a": STORED}))


@pytest.mark.parametrize(
    "changes",
    [{"gap_stale": 0.24}, {"gap_stale": 0.5, "gap_noise": 0.5}, {"gap_stale": 0.8, "batches": 3}, {"gap_stale": None}],
)
def test_a_gap_that_is_small_or_explained_by_noise_is_fine(changes):
    assert findings("BN209", measured(**{"gap_shown": changes["gap_stale"]} | changes)) == []


def test_a_gap_that_rare_examples_may_explain_is_not_checked():
    found, unknown = RULES["BN209"].look(measured(gap_stale=0.8, gap_shown=0.1))
    assert found == []
    assert "but examples too rare to be among these 256 may explain it" in str(unknown)


@pytest.mark.parametrize("order_p", [1e-3, 1.0, None])
def test_batches_are_correlated_only_if_orders_of_the_examples_say_so(order_p):
    evidence = measured(**CLUSTERED)
    assert findings("BN204", evidence)
    assert findings("BN204", replace(evidence, run=replace(evidence.run, order_p=order_p))) == []


def gap(stored, **changes):
    return findings(
        "BN209", replace(measured(gap_stale=0.8, gap_shown=0.8, **changes), stored={"bn": replace(STORED, **stored)})
    )[0]


def test_a_gap_says_what_makes_it_where_the_numbers_show_it():
    kept = 0.9**5
    begun = {"running_mean": values(0.5 * (1 - kept), kept - 1), "running_var": values(1, kept + 2 * (1 - kept))}
    found = gap({**begun, "num_batches_tracked": 5})
    assert "59% of the stored statistics are still the initial ones" in found.consequence
    assert found.fixable is Fix.DATA
    # no counter, one that was written by others, and statistics that no such start explains
    for stored in ({**begun, "num_batches_tracked": 0}, {**begun, "num_batches_tracked": None}, {},
                   {"running_var": values(9, 9), "num_batches_tracked": 5}):  # fmt: skip
        assert "comes from other weights or other data" in gap(stored).consequence


def test_tiny_batches_of_single_values_are_told_where_variances_are_unbiased():
    pairs = {"gap_noise": 0.5, "examples": 32, "batches": 16, "values_per_example": 1.0}
    unbiased = gap({"running_var": values(2, 4)}, **pairs)
    assert "unbiased, which alone shrinks outputs by 29% at 2 values" in unbiased.consequence
    assert "other weights or other data" in gap({"running_mean": values(5, 5)}, **pairs).consequence


def test_a_layer_that_was_never_updated_is_left_to_its_own_rule():
    fresh = replace(STORED, running_mean=values(0, 0), running_var=values(1, 1))
    assert findings("BN209", replace(measured(gap_stale=0.8, gap_shown=0.8), stored={"bn": fresh})) == []


def test_a_counter_at_zero_says_nothing_about_statistics():
    converted = replace(STORED, num_batches_tracked=0)
    assert findings("BN209", replace(measured(gap_stale=0.8, gap_shown=0.8), stored={"bn": converted}))


def test_a_step_over_all_micro_batches_cures_accumulation():
    model = batchnorm.convert(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))

    def found():
        return [
            each for each in batchnorm.examine(model, batch_size=8, accumulation=4).findings if each.code == "BN203"
        ]

    (finding,) = found()
    assert finding.measured == "accumulation 4: batch norm sees 8 examples, not 32"
    assert "batchnorm.step_backward(model, micros, loss)" in finding.remedy
    for micros, cured in ((2, False), (4, True)):
        batchnorm.step_backward(model, list(torch.randn(32, 3).chunk(micros)), lambda output, _: output.square().mean())
        assert bool(found()) is not cured
    model(torch.randn(8, 3))  # a later step is again on a micro-batch
    assert found()
    batchnorm.step_backward(model, list(torch.randn(32, 3).chunk(4)), lambda output, _: output.square().mean())
    assert not found()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(checkpoint(lambda h: self.norm(self.first(h)), x, use_reentrant=False))


def test_converting_cures_updates_in_the_backward_pass():
    model, data = Checkpointed(), list(torch.randn(4, 16, 3))
    (finding,) = [each for each in batchnorm.examine(model, data).findings if each.code == "BN205"]
    assert "batchnorm.convert(model), whose layers count a repeated forward once" in finding.remedy
    assert not [each for each in batchnorm.examine(batchnorm.convert(model), data).findings if each.code == "BN205"]
