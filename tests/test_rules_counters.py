"""What num_batches_tracked proves: by arithmetic, by data, and never by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import Net, batches, images, trained
from test_rules_batches import HEALTHY, MEASURED, MODULE, STORED, values
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint.stored import Stored
from batchnorm.doctor import examine
from batchnorm.rules import RULES, Evidence
from batchnorm.rules.update_counts import RESIDUE, StartResidue, claims, is_nearer, misfit

NAN, INF = float("nan"), float("inf")
KEPT = 0.9**8


def layer(name, *var, count=8, **changes):
    return replace(
        Stored(name, values(*[0.1] * len(var)), values(*var), num_batches_tracked=count, momentum=0.1), **changes
    )


def claim(*layers, **parts):
    evidence = Evidence("net", {stored.name: stored for stored in layers}, **parts)
    return [found for found, _ in claims(evidence).values()]


SHARED = [(KEPT * (1 + 0.02 * i), 5.0) for i in range(4)]
ARITHMETIC = {
    "a variance below what any update leaves": ([layer("a", KEPT * 0.999, 9)], StartResidue.GONE),
    "all above it": ([layer("a", 0.5, 9)], StartResidue.OPEN),
    "one exactly there": ([layer("a", KEPT, 9)], StartResidue.OPEN),
    "two exactly there": ([layer("a", KEPT, KEPT, 9)], StartResidue.SHOWN),
    "two in two layers": ([layer("a", KEPT, 9), layer("b", KEPT, 9)], StartResidue.SHOWN),
    "begins there in four layers": ([layer(str(i), *var) for i, var in enumerate(SHARED)], StartResidue.SHOWN),
    "begins there in three layers": ([layer(str(i), *var) for i, var in enumerate(SHARED[:3])], StartResidue.OPEN),
    "all alike": ([layer(str(i), KEPT * 1.05, KEPT * 1.06) for i in range(9)], StartResidue.OPEN),
    "another layer of that count is below": ([layer("a", KEPT, KEPT), layer("b", 0.1)], StartResidue.GONE),
    "zero": ([layer("a", KEPT, KEPT, count=0)], StartResidue.GONE),
    "missing": ([layer("a", KEPT, KEPT, count=None)], StartResidue.GONE),
    "negative": ([layer("a", KEPT, KEPT, count=-8)], StartResidue.GONE),
    "huge": ([layer("a", KEPT, KEPT, count=2**63 - 1)], StartResidue.GONE),
    "equal weights": ([layer("a", KEPT, KEPT, momentum=None)], StartResidue.SHOWN),  # a file: 0.1 is taken
    "momentum 0": ([layer("a", KEPT, KEPT, momentum=0.0)], StartResidue.GONE),
    "momentum 1": ([layer("a", KEPT, KEPT, momentum=1.0)], StartResidue.GONE),
    "a momentum that diverges": ([layer("a", KEPT, KEPT, momentum=2.5, count=10**6)], StartResidue.GONE),
    "no number": ([layer("a", NAN, INF)], StartResidue.GONE),
    "initial": ([layer("a", 1, 1, running_mean=values(0, 0))], StartResidue.GONE),
    "nothing stored": ([Stored("a", num_batches_tracked=8)], StartResidue.GONE),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_shows_refutes_or_leaves_open(name):
    layers, expected = ARITHMETIC[name]
    assert claim(*layers) == [expected] * len(layers)


def test_counts_that_differ_are_judged_apart():
    assert claim(layer("a", KEPT, KEPT), layer("b", 0.01, count=900), layer("c", 0.01, count=5)) == [
        StartResidue.SHOWN,
        StartResidue.GONE,
        StartResidue.GONE,
    ]


def test_equal_weights_of_a_live_layer_have_no_start():
    modules = {"a": replace(MODULE, momentum=None)}
    assert claim(layer("a", KEPT, KEPT), modules=modules) == [StartResidue.GONE]


@pytest.mark.parametrize("updates", [1, 5, 20, 43])
@pytest.mark.parametrize("momentum", [0.1, 0.03])
def test_torchs_own_averages_leave_that_share_and_no_less(updates, momentum):
    torch.manual_seed(updates)
    norm = nn.BatchNorm1d(64, momentum=momentum)
    scale = torch.logspace(-4, 1, 64)
    scale[:2] = 0
    for _ in range(updates):
        norm(torch.randn(32, 64) * scale + 1)
    var = norm.running_var.double().numpy()
    share = (1 - momentum) ** updates
    np.testing.assert_allclose(var[:2], share, rtol=updates * 2.0**-24)
    assert var.min() >= share * (1 - updates * 2.0**-24)
    stored = layer("a", *var, count=updates, momentum=momentum)
    assert claim(stored) == [StartResidue.SHOWN if share > RESIDUE else StartResidue.GONE]


def measured(mean, var):
    return {"a": replace(MEASURED, mean=values(*mean), var=values(*var))}


@pytest.mark.parametrize(
    ("mean", "var", "expected"),
    [
        ((1, 2), (0.2, 5), StartResidue.SHOWN),  # exactly the mixture
        (
            (1 - KEPT, 2 - 2 * KEPT),
            (KEPT + (1 - KEPT) * 0.2, KEPT + (1 - KEPT) * 5),
            StartResidue.GONE,
        ),  # exactly fresh
        ((9, 9), (1, 1), StartResidue.GONE),  # neither
        # data of another scale: one factor in all channels
        ((1, 2), ((KEPT + (1 - KEPT) * 0.2) * 2, (KEPT + (1 - KEPT) * 5) * 2), StartResidue.GONE),
    ],
)
def test_data_overrule_a_counter(mean, var, expected):
    of_eight = layer("a", KEPT + (1 - KEPT) * 0.2, KEPT + (1 - KEPT) * 5, running_mean=values(1 - KEPT, 2 - 2 * KEPT))
    assert claim(of_eight, measured=measured(mean, var)) == [expected]
    assert claim(of_eight) == [StartResidue.OPEN]


def test_the_distance_is_the_root_mean_square_in_sd():
    stored = Stored("a", values(1, 0), values(4 - 1e-5, 1 - 1e-5))
    evidence = Evidence("net", {"a": stored}, measured=measured((0, 0), (4 - 1e-5, 1 - 1e-5)))
    assert misfit(evidence, "a") == pytest.approx(np.sqrt((0.25 + 0) / 2))
    wider = Evidence("net", {"a": stored}, measured=measured((1, 0), (16 - 1e-5, 1 - 1e-5)))
    assert misfit(wider, "a") == pytest.approx(np.sqrt(np.log(2) ** 2 / 2))
    assert misfit(replace(evidence, measured=None), "a") is None
    assert misfit(replace(evidence, measured=measured((NAN, NAN), (1, 1))), "a") is None
    assert not is_nearer(Stored("a"), (0, 0), (1, 1), MEASURED, 1e-5)


# -- models: what was measured at once is never called half trained, and what is half trained is found with data ---


def mlp(steps=99, scale=1.0, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, **settings), nn.ReLU(), nn.Linear(8, 1))
    for _ in range(steps):
        model(scale * torch.randn(32, 4) + 3)
    return model


def codes(target, data=None):
    return {finding.code for finding in examine(target, data).findings}


def updated(loader):
    model = mlp()
    torch.optim.swa_utils.update_bn(loader, model)
    return model


def by_hand(count):
    def write(loader):
        model = mlp()
        bn.recalibrate(model, loader)
        model[1].num_batches_tracked.fill_(count)
        return model

    return write


def equal_weights(loader):
    model = mlp(0, momentum=None)
    for x in loader:
        model(x)
    return model


def through_recalibrate(loader):
    model = mlp()
    bn.recalibrate(model, loader)
    return model


MEASURED_AT_ONCE = {
    "recalibrate": through_recalibrate,
    "update_bn": updated,
    "momentum None": equal_weights,
    "an import that counts nothing": by_hand(0),
    "an import that counts one": by_hand(1),
    "a negative count": by_hand(-3),
}


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 6.0])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", MEASURED_AT_ONCE)
def test_statistics_that_were_measured_at_once_are_not_called_half_trained(name, count, scale, tmp_path):
    generator = torch.Generator().manual_seed(1)
    loader = [scale * torch.randn(64, 4, generator=generator) for _ in range(count)]
    model = MEASURED_AT_ONCE[name](loader).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for target, data in ((tmp_path / "model.pt", None), (model, None), (model, loader)):
        assert not {"BN101", "BN112", "BN113", "BN114"} & codes(target, data)
    # other data than those do not make it half trained either
    for other in ([x * 1.5 + 1 for x in loader], [x * 0.5 for x in loader], [x - 2 for x in loader]):
        diagnosis = examine(model, other)
        assert "BN114" not in {finding.code for finding in diagnosis.findings}
        assert not any("initial" in finding.consequence for finding in diagnosis.findings)


def test_a_small_count_is_not_checked_without_data_and_says_so(tmp_path):
    model = mlp(8)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert "data would show" in examine(tmp_path / "model.pt").not_checked["BN114"]
    assert "data would show" in examine(model.eval()).not_checked["BN114"]


@pytest.mark.parametrize("updates", [1, 3, 8, 15])
def test_few_updates_are_found_with_data(updates):
    generator = torch.Generator().manual_seed(updates)
    loader = [torch.randn(32, 4, generator=generator) + 3 for _ in range(8)]
    found = [finding for finding in examine(mlp(updates).eval(), loader).findings if finding.code == "BN114"]
    assert [finding.measured for finding in found] == [
        f"{updates} updates: {0.9**updates:.0%} of the initial statistics left"
    ]


def test_few_updates_of_a_large_model_are_found_in_its_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        *[part for _ in range(5) for part in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    )
    for index in range(0, 15, 3):
        model[index].weight.data *= torch.logspace(-2, 1, 16)[:, None, None, None]
    for _ in range(10):
        model(torch.randn(8, 16, 6, 6))
    torch.save(model.state_dict(), tmp_path / "young.pt")
    assert "BN114" in codes(tmp_path / "young.pt")
    bn.recalibrate(model, [torch.randn(8, 16, 6, 6) for _ in range(10)])
    torch.save(model.state_dict(), tmp_path / "measured.pt")
    assert "BN114" not in codes(tmp_path / "measured.pt")


def test_a_count_shows_that_a_layer_without_statistics_was_trained():
    model = mlp(9, momentum=0.0)
    assert "BN101" in codes(model.eval())
    assert "BN113" not in codes(model)
    model[1].num_batches_tracked.zero_()
    assert "BN113" in codes(model)


def test_initial_statistics_are_right_where_data_have_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 2))
    model[0].weight.data *= 2
    model[0].num_batches_tracked.fill_(100)
    x = torch.randn(512, 4)
    standard = list(((x - x.mean(0)) / x.std(0)).split(128))
    assert "BN101" not in codes(model.eval(), standard)
    assert "BN101" in codes(model, [x * 2 + 1 for x in standard])


@pytest.mark.parametrize("counter", [torch.tensor(NAN), torch.tensor(0.5), torch.tensor(INF), torch.tensor([3, 4])])
def test_counters_that_are_no_counts_prove_nothing_and_break_nothing(counter):
    model = trained(Net(), updates=100)
    model.stem[1].num_batches_tracked = counter
    diagnosis = examine(model, batches(images(seed=2)))
    assert not {"BN101", "BN113", "BN114"} & {finding.code for finding in diagnosis.findings}


@pytest.mark.parametrize("count", [None, 0, 3, -1, 10**9])
def test_a_gap_on_data_is_told_whatever_the_counter_says(count):
    stored = replace(STORED, num_batches_tracked=count)
    sick = replace(HEALTHY, stored={"bn": stored}, measured={"bn": replace(MEASURED, t_mean=values(9, 9),
                   t_var=values(0, 0), mean_deviation=values(1, 1), gap_stale=0.8, gap_shown=0.8)})  # fmt: skip
    assert RULES["BN116"].findings(sick)
    assert RULES["BN209"].findings(sick)
