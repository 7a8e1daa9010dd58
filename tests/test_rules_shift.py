"""BN4: moved data and unscaled inputs."""

from dataclasses import replace

import pytest
from test_rules_batches import HEALTHY, MEASURED, STORED, findings, values

from batchnorm.rules import RULES, Fix
from batchnorm.rules.rule_evidence import Run


def moved(deviations, ratios, **changes):
    found = replace(MEASURED, mean=values(*deviations), mean_deviation=values(*deviations), var_ratio=values(*ratios),
                    shown=tuple(range(len(ratios))))  # fmt: skip
    return replace(HEALTHY, measured={"bn": replace(found, **changes)})


def scaled(scales, means):
    return replace(HEALTHY, run=Run(input_scales=values(*scales), input_means=values(*means)))


SHIFT = ((1.9, -0.2, 0.1, 0.0), (1.0, 1.2, 0.9, 1.0))


@pytest.mark.parametrize(
    ("deviations", "ratios", "fires"),
    [
        (*SHIFT, True),
        ((0.9, -0.9, 0.9, 0.9), (3.9, 0.26, 1.0, 1.0), False),
        ((0.0, 0.0, 0.0, 0.0), (1.0, 4.5, 1.0, 1.0), True),
        ((0.0, 0.0, 0.0, 0.0), (1.0, 0.2, 1.0, 1.0), True),
        ((-3.0, 0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0, 1.0), False),  # a fifth of the channels
        ((float("nan"),) * 4, (float("nan"),) * 4, False),
    ],
)
def test_a_quarter_of_the_channels_beyond_a_limit_is_a_shift(deviations, ratios, fires):
    assert bool(findings("BN401", moved(deviations, ratios))) is fires


@pytest.mark.parametrize("shown", [(), (1, 2, 3)])
def test_a_shift_that_rare_examples_may_explain_is_not_checked(shown):
    found, unknown = RULES["BN401"].look(moved(*SHIFT, shown=shown))
    assert found == []
    assert "1 of 4 channels moved, but examples too rare to be among these 256 may explain it" in str(unknown)


def test_a_shift_names_the_first_moved_layer_and_counts_the_others():
    sick = moved(*SHIFT).measured["bn"]
    stored = dict.fromkeys("abc", STORED)
    (finding,) = findings("BN401", replace(HEALTHY, stored=stored, measured={"a": MEASURED, "b": sick, "c": sick}))
    assert finding.layer == "b"
    assert finding.channels == (0,)
    assert finding.measured == "1 of 4 channels moved: by 1.9 sd, variance 1 times; 2 layers in all"
    assert finding.fixable is Fix.DATA


def test_a_shift_needs_statistics_of_data_and_channels_that_vary():
    never = replace(STORED, running_mean=values(0, 0, 0, 0), running_var=values(1, 1, 1, 1))
    assert findings("BN401", replace(moved(*SHIFT), stored={"bn": never})) == []
    converted = replace(STORED, num_batches_tracked=0)
    assert findings("BN401", replace(moved(*SHIFT), stored={"bn": converted}))
    assert findings("BN401", moved(*SHIFT, constant=(0,))) == []


@pytest.mark.parametrize(
    ("scales", "means", "fires"),
    [
        ((1.0, 1000.0), (0.0, 0.0), True),
        ((0.23, 0.22, 0.22), (0.48, 0.46, 0.41), False),  # photographs in 0..1
        ((60.0, 60.0, 60.0), (120.0, 115.0, 105.0), False),  # photographs in 0..255
        ((1.0, 1.0), (0.0, -11.0), True),
        ((1.0, 0.0), (0.5, 3.0), False),  # a constant
        ((1.0, 1e-8), (0.5, 3.0), False),  # what rounding leaves of one
        ((0.0,), (3.0,), False),
    ],
)
def test_features_of_other_scales_or_far_means_are_unscaled(scales, means, fires):
    found = findings("BN402", scaled(scales, means))
    assert bool(found) is fires
    assert not fires or "InputNorm.fit" in found[0].remedy


def test_inputs_that_were_not_measured_are_not_judged():
    assert findings("BN402", replace(HEALTHY, run=Run())) == []
