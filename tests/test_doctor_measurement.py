"""Measurement: figures against float64 numpy, sick and healthy data, and a model that is left as it was."""

import copy
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fingerprint import data, fingerprint, trained_net
from planted import batches, trained
from small_networks import Written
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import batchnorm as bn
from batchnorm.doctor.measuring.batch_clustering import f_tail
from batchnorm.doctor.measuring.measurement import loop_of, measure
from batchnorm.doctor.measuring.other_version import reference_of
from batchnorm.rules import RULES, Evidence
from batchnorm.rules.rule_evidence import Loop


def used(layer, mean=0.3, var=0.5):
    """The layer with affine parameters and statistics that are not the initial ones."""
    layer.running_mean += mean * torch.randn(layer.num_features)
    layer.running_var += var * torch.rand(layer.num_features)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


def measured(model, batches, max_examples=None):
    return measure(model, batches, max_examples=max_examples)[0]


def run_of(model, batches):
    return measure(model, batches, max_examples=None)[1]


def channels_first(x):
    return x.double().transpose(0, 1).flatten(1).numpy()


# -- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_fresh_statistics_are_those_of_all_values_whatever_the_batches(make):
    layer, x = used(make(3)), torch.randn(50, 3, 4, 5) * 2 + 7
    found = measured(nn.Sequential(layer), list(x.split(16)))["0"]
    rows, stored = channels_first(x), layer.running_var.double().numpy() + layer.eps
    assert (found.examples, found.batches, found.values_per_example) == (50, 4, 20)
    np.testing.assert_allclose(found.mean, rows.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.var, rows.var(1), rtol=1e-10)
    distance = (rows.mean(1) - layer.running_mean.double().numpy()) / np.sqrt(stored)
    np.testing.assert_allclose(found.mean_deviation, distance, rtol=1e-6)
    np.testing.assert_allclose(found.var_ratio, (rows.var(1) + layer.eps) / stored, rtol=1e-6)


def test_deep_layers_are_measured_on_what_eval_mode_makes():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), used(nn.BatchNorm1d(4)), nn.ReLU(), nn.Dropout(), used(nn.BatchNorm1d(4)))
    x = torch.randn(40, 2, 9)
    found = measured(model.train(), list(x.split(8)))
    assert list(found) == ["1", "4"]
    with torch.no_grad():
        rows = channels_first(model.eval()[:4](x))
    np.testing.assert_allclose(found["4"].mean, rows.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found["4"].var, rows.var(1), rtol=1e-5)


def test_the_gap_and_its_parts_are_the_differences_of_real_outputs():
    layer = used(nn.BatchNorm2d(5)).double()
    x = torch.randn(64, 5, 3, 3, dtype=torch.float64) * 1.5 + 0.4
    batches = list(x.split(8))
    found = measured(layer, batches)[""]
    fresh = copy.deepcopy(layer)
    fresh.running_mean[:], fresh.running_var[:] = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    with torch.no_grad():
        stored, population = layer.eval()(x), fresh.eval()(x)
        by_batch = torch.cat([copy.deepcopy(layer).train()(batch) for batch in batches])
    scale = (stored - stored.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
    gaps = [(a - b).square().mean().sqrt() / scale for a, b in
            [(by_batch, stored), (by_batch, population), (population, stored)]]  # fmt: skip
    np.testing.assert_allclose([found.gap, found.gap_noise, found.gap_stale], gaps, rtol=1e-9)


def test_layers_whose_modes_agree_or_that_store_nothing_have_no_gap():
    x = list(torch.randn(32, 3).split(8))
    frozen = measured(bn.freeze(nn.Sequential(used(nn.BatchNorm1d(3)))), x)["0"]
    assert frozen.gap is frozen.gap_stale is frozen.t_mean is None
    untracked = measured(nn.BatchNorm1d(3, track_running_stats=False), x)[""]
    assert untracked.gap is untracked.t_mean is None
    assert all(math.isnan(value) for value in [*untracked.mean_deviation, *untracked.var_ratio])


@pytest.mark.parametrize("positions", [(), (6,)])
def test_t_of_healthy_averages_scatters_by_one(positions):
    """Positions of one example are nearly alike, so counting each value as independent would be far off."""
    layer = nn.BatchNorm1d(300)

    def draw(count):
        shared = torch.randn(count, 300, *[1] * len(positions))
        return shared + 0.1 * torch.randn(count, 300, *positions)

    with torch.no_grad():
        for _ in range(80):
            layer(draw(24))
    found = measured(layer, list(draw(480).split(24)))[""]
    for t in (found.t_mean, found.t_var):
        assert 0.8 < np.sqrt(np.mean(np.square(t))) < 1.25
        assert np.abs(t).max() < 5
    layer.running_mean[7] += 1
    layer.running_var[8] *= 2.5
    found = measured(layer, list(draw(480).split(24)))[""]
    assert found.t_mean[7] > 8
    assert found.t_var[8] > 5


def test_t_needs_a_momentum_and_four_batches():
    layer, x = used(nn.BatchNorm1d(3)), torch.randn(48, 3)
    assert measured(layer, list(x.split(12)))[""].t_mean is not None
    assert measured(layer, list(x.split(16)))[""].t_mean is None
    layer.momentum = None
    assert measured(layer, list(x.split(12)))[""].t_mean is None


# -- what batches hold ----------------------------------------------------------------------------------------------


def test_sorted_batches_count_for_few_examples_and_shuffled_ones_for_all():
    layer, x = used(nn.BatchNorm2d(4)), torch.randn(256, 4, 3, 3)
    x = x + torch.randint(0, 3, (256,)).sort().values[:, None, None, None] * 2.0
    by_class, mixed = (measured(layer, list(y.split(32)))[""] for y in (x, x[torch.randperm(256)]))
    assert by_class.clustering_p < 1e-12
    assert by_class.effective_examples < 3
    assert mixed.clustering_p > 1e-3
    assert mixed.effective_examples > 16
    assert by_class.batch_examples == mixed.batch_examples == 32


def test_the_f_test_of_one_channel_is_the_textbooks():
    stats = pytest.importorskip("scipy.stats")
    x = torch.randn(46, 1) + torch.arange(46)[:, None] / 40
    batches = list(x.split(10))
    found = measured(used(nn.BatchNorm1d(1)), batches)[""]
    expected = stats.f_oneway(*(batch[:, 0].numpy() for batch in batches))
    assert found.clustering_p == pytest.approx(expected.pvalue, rel=1e-5)


def test_the_chance_of_clustering_is_counted_over_the_channels_that_vary():
    x = torch.randn(64, 5) + torch.arange(64)[:, None] / 100
    x[:, 4] = 7
    each = [measured(nn.BatchNorm1d(1), list(x[:, [c]].split(8)))[""].clustering_p for c in range(4)]
    assert measured(nn.BatchNorm1d(5), list(x.split(8)))[""].clustering_p == pytest.approx(min(1, 4 * min(each)))


def test_a_layer_that_is_used_twice_is_not_tested_for_clustering():
    layer = used(nn.BatchNorm1d(3))
    found = measured(nn.Sequential(layer, nn.Tanh(), layer), list(torch.randn(64, 3).split(8)))["0"]
    assert (found.batches, found.clustering_p) == (16, None)


@pytest.mark.parametrize("f", [0.01, 0.5, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("spare", [3, 40, 4000])
def test_the_tail_of_f_is_exact_where_it_has_a_closed_form(f, spare):
    assert f_tail(f, 2, spare) == pytest.approx((1 + 2 * f / spare) ** (-spare / 2), rel=1e-10)
    assert f_tail(f, 7, spare) == pytest.approx(1 - f_tail(1 / f, spare, 7), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("layer", [nn.Flatten(0, 1), nn.Identity()])
def test_rows_that_are_not_examples_are_not_tested_for_clustering(layer):
    """Rows of one example are alike, which is no fault of the loader."""
    x = torch.randn(64, 8, 3) + 3 * torch.randn(64, 1, 3)
    x = x if isinstance(layer, nn.Flatten) else x[:, 0]
    found = measured(nn.Sequential(layer, used(nn.BatchNorm1d(3))), list(x.split(8)))["1"]
    assert (found.clustering_p is None) is isinstance(layer, nn.Flatten)


def test_poisoned_examples_are_counted_and_left_out():
    layer, x = used(nn.BatchNorm2d(3)), torch.randn(40, 3, 4, 4)
    x[5, 1, 2, 2], x[6, 1, 0, 0], x[17, 2, 0, 1] = math.nan, math.inf, -math.inf
    found = measured(layer, list(x.split(8)))[""]
    assert found.non_finite == 3
    good = [x[:, 0], x[[n for n in range(40) if n not in {5, 6}], 1], x[[n for n in range(40) if n != 17], 2]]
    np.testing.assert_allclose(found.mean, [v.double().mean() for v in good], rtol=1e-9)
    np.testing.assert_allclose(found.var, [v.double().var(correction=0) for v in good], rtol=1e-9)
    assert np.isfinite([found.gap, *found.t_mean, *found.t_var]).all()


def test_channels_of_one_value_are_constant():
    x = torch.randn(32, 4, 5)
    x[:, 0] = 100 + 1e-3 * x[:, 0]
    x[:, 1], x[:, 3] = 0.1, 0.0
    assert measured(used(nn.BatchNorm1d(4)), list(x.split(8)))[""].constant == (1, 3)
    x[31, 3, 4] = 1e-3
    assert measured(used(nn.BatchNorm1d(4)), list(x.split(8)))[""].constant == (1,)


def test_padding_is_the_end_that_differs_between_examples():
    x, lengths = torch.randn(32, 3, 20) + 3, torch.randint(5, 19, (32,))
    layer = used(nn.BatchNorm1d(3))
    assert measured(layer, list(x.split(8)))[""].padded_share == 0
    for row, length in enumerate(lengths):
        x[row, :, length:] = 0
    share = measured(layer, list(x.split(8)))[""].padded_share
    assert share == pytest.approx(float((20 - lengths).sum()) / (32 * 20))
    x[:, :, 5:] = 0  # one length for all: silence, or a window
    assert measured(layer, list(x.split(8)))[""].padded_share == 0


# -- the model as a whole -------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    def __init__(self, *, twice=True):
        super().__init__()
        self.twice = twice
        self.block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.plain = nn.BatchNorm1d(4)

    def forward(self, x):
        y = checkpoint(self.block, x, use_reentrant=False) if self.twice else self.block(x)
        return self.plain(y)


def test_checkpointing_updates_statistics_again_in_the_backward_pass():
    batches = list(torch.randn(32, 3).split(8))
    run = run_of(Recomputed().eval(), batches)
    assert run.updates_forward == {"block.1": 1, "plain": 1}
    assert run.updates_backward == {"block.1": 1, "plain": 0}
    assert run_of(Recomputed(twice=False), batches).updates_backward == {"block.1": 0, "plain": 0}


def test_the_training_step_trains_hand_set_eval_layers_but_no_frozen_ones():
    model = Recomputed(twice=False)
    bn.freeze(model.block)
    model.plain.eval()
    assert run_of(model, list(torch.randn(32, 3).split(8))).updates_forward == {"block.1": 0, "plain": 1}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x, self.training)


FUNCTIONS = {
    "F": (lambda x, _: F.batch_norm(x, None, None, training=True), True),
    "positional": (lambda x, _: F.batch_norm(x, torch.zeros(3), torch.ones(3), None, None, True), True),
    "torch": (lambda x, _: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False), True),
    "by mode": (lambda x, mode: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=mode), False),
    "instance norm": (lambda x, _: F.instance_norm(x[:, :, None].expand(-1, -1, 2))[:, :, 0], False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_calls_on_the_batch_are_found_where_they_are_made(name):
    function, is_sick = FUNCTIONS[name]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), Calls(function)))
    assert run_of(model, list(torch.randn(32, 3).split(8))).functional == (("1.1",) if is_sick else ())
    assert run_of(nn.BatchNorm1d(3, track_running_stats=False), [torch.randn(8, 3)]).functional == ()


@pytest.mark.parametrize("tracks", [True, False])
def test_companions_change_answers_where_no_statistics_are_stored(tracks):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=tracks), nn.Flatten())
    run = run_of(model, [torch.randn(8, 3, 6, 6)])
    assert (run.companions <= run.companions_tolerance) is tracks
    assert run.companions_tolerance == pytest.approx(1.2e-4, rel=0.1)


@pytest.mark.parametrize("function", [lambda x, _: x.sum(), lambda x, _: x.mean(0), lambda x, _: x[1:]])
def test_outputs_that_are_not_one_for_each_example_have_no_companions(function):
    assert run_of(nn.Sequential(nn.BatchNorm1d(3), Calls(function)), [torch.randn(8, 3)]).companions is None


def test_a_model_that_takes_no_single_example_has_no_companions():
    def refuses(x, training):
        if len(x) < 2:
            raise ValueError("too few")
        return x

    run = run_of(nn.Sequential(nn.BatchNorm1d(3), Calls(refuses)), [torch.randn(8, 3)])
    assert (run.companions, run.train_error) == (None, "")


def test_what_a_training_step_raises_is_kept():
    def fails(x, training):
        if training:
            raise KeyError("labels")
        return x

    model = nn.Sequential(nn.BatchNorm1d(3), Calls(fails))
    assert run_of(model, [torch.randn(8, 3)]).train_error == "KeyError: 'labels'"
    assert run_of(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(8, 3)]).train_error == ""


def test_errors_of_the_backward_pass_are_kept_too():
    def overwrites(x, training):
        y = x.exp()
        z = y * 2
        return z + (y.zero_() if training else y)

    model = nn.Sequential(nn.BatchNorm1d(3), Calls(overwrites))
    assert "modified by an inplace operation" in run_of(model, [torch.randn(8, 3)]).train_error


class NeedsLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, labels=None):
        if self.training and labels is None:
            raise ValueError("labels are needed in train mode")
        return self.norm(x)


def test_a_model_that_needs_labels_to_train_gets_them_from_the_batch():
    x, y = torch.randn(8, 3), torch.arange(8)
    run = run_of(NeedsLabels(), [(x, y)])
    assert (run.train_error, run.updates_forward) == ("", {"norm": 1})
    unfed = run_of(NeedsLabels(), [x])
    assert unfed.train_error == ""
    assert unfed.unknown["step"].startswith(
        "a training step fails outside of batch norm layers, perhaps because it lacks"
    )
    assert "labels: ValueError: labels are needed" in unfed.unknown["step"]
    assert run_of(NeedsLabels(), [{"x": x, "labels": y}]).train_error == ""


def test_one_example_is_too_few_for_a_training_step():
    run = run_of(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(1, 3)])
    assert (run.train_error, run.companions) == ("", None)


def test_layers_that_never_ran_are_named():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "spare": nn.BatchNorm1d(3)})
    model.forward = lambda x: model["used"](x)
    found, run, *_ = measure(model, [torch.randn(8, 3)], max_examples=None)
    assert list(found) == ["used"]
    assert run.never_ran == ("spare",)


def test_inputs_are_measured_by_feature_unless_the_model_normalizes_them():
    x = torch.randn(40, 3) * torch.tensor([1.0, 50.0, 0.1]) + 4
    plain = run_of(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), list(x.split(8)))
    np.testing.assert_allclose(plain.input_scales, x.double().numpy().std(0), rtol=1e-10)
    np.testing.assert_allclose(plain.input_means, x.double().numpy().mean(0), rtol=1e-10)
    for first in (bn.InputNorm.fit(x), nn.BatchNorm1d(3)):
        assert run_of(nn.Sequential(first, nn.Linear(3, 3)), list(x.split(8))).input_scales is None
    words = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.BatchNorm1d(6))
    assert run_of(words, [torch.randint(0, 9, (8, 2))]).input_scales is None


# -- nothing is left behind -----------------------------------------------------------------------------------------

MODES = {
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "mixed": lambda model: model,
    "frozen": lambda model: bn.freeze(model.train(), affine=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_as_before_bit_for_bit(mode):
    model = MODES[mode](trained_net())
    loader = DataLoader(TensorDataset(data()), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    before = fingerprint(model), loader.generator.get_state().tolist()
    run = run_of(model, loader)
    assert run.train_error == ""
    assert (fingerprint(model), loader.generator.get_state().tolist()) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["first", "later", "training"])
def test_the_model_is_as_before_when_it_raises_in_the_middle(mode, place):
    model = MODES[mode](trained_net())
    fails_at = {"first": 1, "later": 2, "training": None}[place]
    calls, batches = [], list(data().split(4))

    def fail(module, args):
        calls.append(1)
        if len(calls) == fails_at or (place == "training" and model.training):
            raise RuntimeError("in the middle")

    model.tied.register_forward_pre_hook(fail)
    before = fingerprint(model)
    if place == "training":
        assert "in the middle" in measure(model, batches, max_examples=None)[1].train_error
    else:
        with pytest.raises(RuntimeError, match="in the middle"):
            measure(model, batches, max_examples=None)
    assert fingerprint(model) == before


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel])
def test_wrapped_models_are_measured_as_they_run(wrap):
    model, x = wrap(nn.Sequential(nn.Linear(3, 4), used(nn.BatchNorm1d(4)))), torch.randn(32, 3)
    model(x)
    found, run, *_ = measure(model, list(x.split(8)), max_examples=None)
    (name,) = found
    assert (run.updates_forward, run.train_error) == ({name: 1}, "")


def test_scripted_parts_do_not_hinder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(3, 4))
    model = nn.Sequential(scripted, used(nn.BatchNorm1d(4)))
    assert run_of(model, [torch.randn(8, 3)]).train_error == ""
    assert run_of(scripted, [torch.randn(8, 3)]).input_scales is None


def test_equal_batches_have_means_that_do_not_scatter():
    found = measured(used(nn.BatchNorm1d(3)), [torch.randn(8, 3)] * 4)[""]
    assert (found.clustering_p, found.effective_examples) == (1, math.inf)


def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    found, run, *_ = measure(model, [torch.randn(8, 3)], max_examples=None)
    assert (found, run.never_ran, type(model[1])) == ({}, (), nn.LazyBatchNorm1d)


def test_random_layers_give_the_same_figures_twice():
    model, loader = (
        nn.Sequential(nn.Linear(3, 4), used(nn.BatchNorm1d(4))),
        DataLoader(torch.randn(64, 3), 8, shuffle=True),
    )
    first, second = (measure(model, loader, max_examples=None) for _ in range(2))
    assert [asdict(first[0]["1"]), asdict(first[1])] == [asdict(second[0]["1"]), asdict(second[1])]


# -- data of any kind -------------------------------------------------------------------------------------------------


def test_examples_are_cut_to_the_most_wanted_and_counted_in_words():
    model, x = nn.Sequential(used(nn.BatchNorm1d(3))), torch.randn(100, 3)
    found, _, words, _ = measure(model, DataLoader(TensorDataset(x), 32), max_examples=50)
    assert (found["0"].examples, words) == (50, "50 examples in 2 batches")
    np.testing.assert_allclose(found["0"].mean, x[:50].double().mean(0), rtol=1e-9)
    assert measure(model, [{"input": x[:1]}], max_examples=None)[2] == "1 example in 1 batch"


def test_an_iterator_is_read_once_and_no_farther_than_needed():
    drawn = []

    def stream():
        for index in range(100):
            drawn.append(index)
            yield torch.randn(8, 3), torch.zeros(8)

    assert measure(nn.BatchNorm1d(3), stream(), max_examples=20)[2] == "20 examples in 3 batches"
    assert len(drawn) == 3


def test_data_that_hold_no_batches_are_refused_in_the_doctors_name():
    for empty in ([], iter([]), DataLoader(TensorDataset(torch.zeros(0, 3)))):
        with pytest.raises(ValueError, match=r"^examine needs at least one batch, got an empty loader"):
            measure(nn.BatchNorm1d(3), empty, max_examples=8)
    with pytest.raises(TypeError, match=r"^examine needs an iterable of batches, got Tensor"):
        measure(nn.BatchNorm1d(3), torch.zeros(8, 3), max_examples=8)


def test_errors_of_the_data_set_come_through_as_they_are():
    def broken():
        yield torch.randn(8, 3)
        raise ValueError("file 7 is damaged")

    with pytest.raises(ValueError, match=r"^file 7 is damaged"):
        measure(nn.BatchNorm1d(3), broken(), max_examples=None)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(8, 3))


ROWS = TensorDataset(torch.zeros(65, 3))
LOOPS = {
    "loader": (DataLoader(ROWS, 32), {}, Loop(32, 1)),
    "dropped": (DataLoader(ROWS, 32, drop_last=True), {}, Loop(32, 32)),
    "even": (DataLoader(ROWS, 13), {}, Loop(13, 13)),
    "batch sampler": (
        DataLoader(
            ROWS, batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(ROWS), 16, False)
        ),
        {},
        Loop(16, 1),
    ),
    "a batch size given": (DataLoader(ROWS, 32), {"batch_size": 8}, Loop(8, 1)),
    "streamed": (DataLoader(Streamed(), 4), {}, Loop(4, None)),
    "batches of the data set's own": (DataLoader(ROWS, batch_size=None), {}, None),
    "list": ([torch.zeros(32, 3), torch.zeros(32, 3), torch.zeros(5, 3)], {}, Loop(32, 5)),
    "pairs": ([(torch.zeros(4, 3), torch.zeros(4))] * 2, {"accumulation": 2}, Loop(4, 4, 2)),
    "one batch": ([torch.zeros(1, 3)], {}, None),
    "nothing": (None, {}, None),
    "settings": (None, {"batch_size": 4, "world_size": 8}, Loop(4, None, 1, 8)),
    "accumulation alone": (None, {"accumulation": 4}, Loop(None, None, 4)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_told_from_loaders_lists_and_settings(name):
    source, settings, expected = LOOPS[name]
    assert loop_of(source, **settings) == expected


# -- references -------------------------------------------------------------------------------------------------------


def _pair():
    original = nn.Sequential(nn.Linear(3, 4), used(nn.BatchNorm1d(4, eps=1e-3))).eval()
    return original, copy.deepcopy(original)


def test_outputs_are_compared_with_those_of_a_reference_and_both_stay_as_they_are():
    original, model = _pair()
    model[0].weight.data *= 1.05
    x = torch.randn(8, 3)
    before = fingerprint(model.train()), fingerprint(original.train())
    found = reference_of(model, original, (x, None))
    assert (fingerprint(model), fingerprint(original)) == before
    with torch.no_grad():
        ours, theirs = model.eval()(x), original.eval()(x)
    assert found.difference == pytest.approx(float((ours - theirs).abs().max() / theirs.abs().max()), rel=1e-6)
    assert found.difference > found.tolerance == pytest.approx(1.2e-4, rel=0.1)
    assert found.eps == {"1": 1e-3}
    np.testing.assert_array_equal(found.stored["1"].running_var, original[1].running_var)


def test_a_fold_agrees_with_its_original():
    original, _ = _pair()
    x = torch.randn(8, 3)
    found = reference_of(bn.fold(original, x), original, x)
    assert found.difference <= found.tolerance


def test_without_an_example_or_with_other_shapes_no_outputs_are_compared():
    original, model = _pair()
    assert reference_of(model, original, None).difference is None
    assert reference_of(nn.Sequential(model, nn.Linear(4, 2)), original, torch.randn(8, 3)).difference is None


def test_a_reference_may_be_a_file(tmp_path):
    original, model = _pair()
    torch.save(original.state_dict(), tmp_path / "original.pt")
    found = reference_of(model, tmp_path / "original.pt", torch.randn(8, 3))
    assert found.path == str(tmp_path / "original.pt")
    np.testing.assert_array_equal(found.stored["1"].running_mean, original[1].running_mean)
    with pytest.raises(TypeError, match="a reference must be a model or the path of a checkpoint, got int"):
        reference_of(model, 3, None)


# -- rules on real measurements ---------------------------------------------------------------------------------------


def _net(kind):
    if kind == "rows":
        layers = [nn.Linear(10, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))
    layers = [nn.Conv1d(1, 8, 3, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, bias=False)]
    return nn.Sequential(
        nn.Unflatten(1, (1, 10)), *layers, nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    )


def _learned(kind, batch, seed):
    torch.manual_seed(seed)
    model, x = _net(kind), torch.randn(1024, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(150):
        rows = x[torch.randint(0, 1024, (batch,))]
        optimizer.zero_grad()
        F.cross_entropy(model(rows), (rows[:, 0] * rows[:, 1] > 0).long()).backward()
        optimizer.step()
    return model, list(x.split(batch))


def _codes(model, batches):
    found, run, *_ = measure(model, batches, max_examples=512)
    stored = dict(reference_of(model, model, None).stored)
    evidence = Evidence("net", stored, measured=found, run=run, loop=loop_of(batches))
    rules = [RULES[code] for code in RULES if code.startswith(("BN2", "BN4", "BN5"))]
    return {f.code for rule in rules if not rule.missing(evidence) for f in rule.findings(evidence)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("kind", ["rows", "signals"])
def test_a_model_that_has_just_learned_is_healthy(kind, batch, seed):
    assert _codes(*_learned(kind, batch, seed)) == set()


def test_stale_statistics_and_moved_data_are_told():
    model, batches = _learned("rows", 32, 0)
    model[1].running_mean += 0.5 * model[1].running_var.sqrt()
    assert _codes(model, batches) == {"BN209"}
    model, batches = _learned("rows", 32, 0)
    assert "BN401" in _codes(model, [x + 2 for x in batches])


def test_the_training_step_is_quiet_about_poisoned_batches():
    x = torch.randn(32, 3)
    x[0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = run_of(nn.Sequential(bn.BatchNorm1d(3)), [x])
    assert run.train_error == ""


# -- models and batches of any kind ------------------------------------------------------------------------------


class Writes(nn.Module):
    """Normalizes its input in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.net(x.sub_(5.0).div_(3.0))


def writing():
    torch.manual_seed(0)
    model = Writes().train()
    with torch.no_grad():
        for _ in range(80):
            model(torch.randn(16, 3, 8, 8) * 3 + 5)
    return model.eval(), [torch.randn(16, 3, 8, 8) * 3 + 5 for _ in range(4)]


def test_a_model_that_writes_to_its_input_is_healthy_and_the_batches_stay():
    model, batches = writing()
    before = [x.clone() for x in batches]
    reference = copy.deepcopy(model)
    assert {f.code for f in bn.examine(model, batches, reference=reference).findings} <= {"BN501"}
    assert all(map(torch.equal, batches, before))
    model.net[1].running_var[1] = float("nan")
    treated = bn.treat(model, data=batches)
    torch.testing.assert_close(treated.net[1].running_var, reference.net[1].running_var, rtol=0.1, atol=0)
    assert all(map(torch.equal, batches, before))


class Named(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x)


class Masked(nn.BatchNorm1d):
    def forward(self, pair):
        return super().forward(pair[1])


class Bare(nn.BatchNorm1d):
    def forward(self):
        return self.weight


class Calling(nn.Module):
    """Calls its layer in its own way."""

    def __init__(self, layer, use):
        super().__init__()
        self.bn, self.use = layer, use

    def forward(self, x):
        return self.use(self.bn, x)


@pytest.mark.parametrize(
    ("layer", "use", "is_measured"),
    [
        (Named, lambda bn, x: bn(x=x), True),
        (Masked, lambda bn, x: bn((x > 0, x)), True),
        (Bare, lambda bn, x: x * bn(), False),
    ],
)
def test_layers_of_a_users_own_class_are_measured_where_they_get_a_tensor(layer, use, is_measured):
    found = measured(Calling(layer(3), use), [torch.randn(8, 3)] * 2)
    assert [figures.examples for figures in found.values()] == [16] * is_measured


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_inputs_are_not_measured():
    x = torch.quantize_per_tensor(torch.randn(4, 3, 2, 2), 0.1, 0, torch.quint8)
    assert measured(nn.Sequential(nn.quantized.BatchNorm2d(3)).eval(), [x]) == {}


@pytest.mark.parametrize(
    "make", [lambda x: x.to_sparse(), lambda x: x.to(torch.float8_e4m3fn), lambda x: {"scale": torch.ones(()), "x": x}]
)
def test_batches_of_other_types_are_given_to_the_model(make):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x, scale=1.0):
            return self.bn((x.to_dense() if x.is_sparse else x.float()) * scale)

    found = bn.examine(Dense(), [make(torch.randn(16, 3)) for _ in range(2)])
    assert found.data == "32 examples in 2 batches"


def test_a_first_batch_without_examples_says_nothing_of_the_batch_size():
    model = nn.Sequential(nn.BatchNorm1d(3))
    assert "BN201" not in {f.code for f in bn.examine(model, [torch.randn(0, 3), torch.randn(16, 3)]).findings}


def test_a_momentum_of_two_is_told_with_data_too():
    model = trained_net()
    for layer in bn.layers.batch_norms(model).values():
        layer.momentum = 2.0
    assert "BN008" in {f.code for f in bn.examine(model, [data()] * 4).findings}


def test_batches_without_tensors_are_told_as_what_they_are():
    for batch in (np.zeros((4, 3)), None, "text", [[1.0]]):
        with pytest.raises(ValueError, match=r"examine needs batches that hold tensors, got .* Make the loader yield"):
            bn.examine(nn.BatchNorm1d(3), [batch])


def test_a_model_that_asks_for_gradients_is_told_how():
    def slope(net, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net.bn(x).sum(), x)[0]

    with pytest.raises(ValueError, match=r"without gradients, .* Put torch.enable_grad\(\) around"):
        bn.examine(Written(slope, bn=nn.BatchNorm1d(3)), [torch.randn(8, 3)])


def test_what_gives_one_iterator_is_measured_from_its_first_batch():
    class Once:
        def __init__(self):
            self.batches = iter([torch.randn(8, 3) for _ in range(3)])

        def __iter__(self):
            return self.batches

    assert bn.examine(nn.Sequential(nn.BatchNorm1d(3)), Once()).data == "24 examples in 3 batches"


def test_rows_that_are_seen_beside_others_are_no_examples_that_raise_alone():
    """One point has no neighbours: that is the cut. One example that a model squeezes away is the model."""

    def cloud(net, x):
        near = torch.cdist(x, x).topk(3, largest=False).indices
        return net.norm(x[near].mean(1))

    def examined(run):
        return bn.examine(Written(run, norm=nn.BatchNorm1d(4)).eval(), data)

    torch.manual_seed(0)
    data = [torch.randn(16, 4) for _ in range(4)]
    beside = examined(cloud)
    assert "BN506" not in {finding.code for finding in beside.findings}
    assert "differ from those within the whole" in beside.not_checked["BN506"]
    squeezed = examined(lambda net, x: net.norm(x[:, None].squeeze()))
    (found,) = [each for each in squeezed.findings if each.code == "BN506"]
    assert found.measured.startswith("one example alone raises")


def test_an_exported_program_is_measured_in_the_mode_that_it_has():
    model = trained().eval()
    x = next(iter(batches()))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)).module()
    diagnosis = bn.examine(program, [x, x])
    assert "no train mode" in diagnosis.not_checked["BN212"]
    assert "BN212" not in diagnosis.checked


def test_counters_without_values_are_no_counters_of_a_step():
    """Offloaded models keep them on the meta device between calls."""
    model = trained()
    for layer in bn.find(model).values():
        layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device="meta")
    diagnosis = bn.examine(model, example=next(iter(batches())))
    assert "BN103" in diagnosis.checked
    step = bn.examine(model, batches())
    assert "num_batches_tracked" in step.not_checked["BN205"]
