"""adapt and adapted: statistics moved to data and back, by formulas in NumPy, with everything else left alone."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from fingerprint import Net
from torch import nn

import batchnorm as bn
from batchnorm.adaptation.layer_statistics import adaptable
from batchnorm.population.stored_statistics import Statistics

KINDS = [
    (nn.BatchNorm1d, (5,)),
    (nn.BatchNorm1d, (5, 7)),
    (nn.BatchNorm2d, (5, 3, 4)),
    (nn.BatchNorm3d, (5, 2, 3, 2)),
    (nn.SyncBatchNorm, (5, 3, 4)),
    (bn.BatchNorm1d, (5,)),
    (bn.BatchNorm2d, (5, 3, 4)),
    (bn.BatchNorm3d, (5, 2, 3, 2)),
]

pytestmark = pytest.mark.usefixtures("forwards")


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def stale(layer: nn.Module) -> nn.Module:
    """A layer with stored statistics of its own."""
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer.num_batches_tracked.fill_(7)
    return layer.eval()


def two_layers(**options) -> nn.Sequential:
    layers = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(3, **options)
    first, second = (stale(layer) for layer in layers)
    return nn.Sequential(nn.Conv2d(2, 4, 3), first, nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 3, 2), second).eval()


def images(*counts: int) -> list[torch.Tensor]:
    return [3 * torch.randn(n, 2, 6, 6) + 2 for n in counts]


def values(batches: list[torch.Tensor]) -> np.ndarray:
    """(values, C) in float64."""
    return torch.cat(batches).double().movedim(1, -1).flatten(0, -2).numpy()


def mixture(layer: nn.Module, x: np.ndarray, w: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of stored statistics with weight w and of values with 1 - w."""
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    of_x, spread = x.mean(0), x.var(0, ddof=1)
    return w * mean + (1 - w) * of_x, w * var + (1 - w) * spread + w * (1 - w) * (mean - of_x) ** 2


def assert_stored(layer: nn.Module, mean: np.ndarray, var: np.ndarray) -> None:
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=2e-6)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_without_options_it_is_the_exact_re_estimation(kind, shape):
    layer = stale(kind(5))
    batches = [torch.randn(n, *shape) * 2 + 1 for n in (6, 1, 9)]
    measured = bn.adapt(layer, batches)
    x = values(batches)
    assert_stored(layer, x.mean(0), x.var(0, ddof=1))
    assert measured[""].count.unique().tolist() == [len(x)]


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("prior", [0.5, 16, 300.0])
def test_a_prior_mixes_by_examples_and_counts_the_spread_between_means(kind, shape, prior):
    layer = stale(kind(5))
    batches = [torch.randn(n, *shape) * 2 + 4 for n in (6, 2)]
    expected = mixture(layer, values(batches), prior / (prior + 8))
    bn.adapt(layer, batches, prior=prior)
    assert_stored(layer, *expected)


def test_the_spread_between_means_is_what_makes_the_mixture_one_of_all_examples():
    a, b = torch.randn(20, 3), torch.randn(12, 3) + 5
    layer = nn.BatchNorm1d(3).eval()
    bn.adapt(layer, [a])
    bn.adapt(layer, [b], prior=20)
    both = torch.cat([a, b]).double()
    torch.testing.assert_close(layer.running_mean, both.mean(0).float())
    # each side's unbiased variance counts with its examples: between var of all by 31 and by 32 less one a side
    within = (20 * a.double().var(0) + 12 * b.double().var(0)) / 32
    between = 20 * 12 / 32**2 * (a.double().mean(0) - b.double().mean(0)).square()
    torch.testing.assert_close(layer.running_var, (within + between).float())


@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_ema_moves_by_each_batch_in_turn(weight):
    layer = stale(nn.BatchNorm2d(5))
    oracle = copy.deepcopy(layer).double()
    batches = [torch.randn(n, 5, 2, 3) + 3 for n in (4, 1, 8)]
    for batch in batches:
        mean, var = mixture(oracle, values([batch]), 1 - weight)
        oracle.running_mean, oracle.running_var = torch.as_tensor(mean), torch.as_tensor(var)
    bn.adapt(layer, batches, ema=weight)
    assert_stored(layer, oracle.running_mean.numpy(), oracle.running_var.numpy())


def test_ema_counts_the_one_value_of_a_batch_without_spread():
    layer = nn.BatchNorm1d(1).eval()
    bn.adapt(layer, [torch.full((1, 1), 4.0)], ema=0.25)
    assert layer.running_mean.item() == 1.0
    assert layer.running_var.item() == pytest.approx(0.75 * 1 + 0.25 * 0.75 * 16)


def test_ema_layers_normalize_a_batch_by_statistics_that_include_it():
    model, batches = two_layers(), images(4)
    by_hand = copy.deepcopy(model)
    bn.adapt(by_hand[1], [by_hand[0](batches[0])], ema=0.3)
    hidden = by_hand[:5](batches[0])
    bn.adapt(by_hand[5], [hidden], ema=0.3)
    bn.adapt(model, batches, ema=0.3)
    for index in (1, 5):
        torch.testing.assert_close(model[index].running_mean, by_hand[index].running_mean)
        torch.testing.assert_close(model[index].running_var, by_hand[index].running_var)


@pytest.mark.parametrize("prior", [None, 0, 0.0])
def test_prior_0_is_what_recalibrate_measures(prior):
    model, batches = two_layers(), images(3, 5)
    other = copy.deepcopy(model)
    bn.recalibrate(other, batches)
    bn.adapt(model, batches, prior=prior)
    for index in (1, 5):
        assert torch.equal(model[index].running_mean, other[index].running_mean)
        assert torch.equal(model[index].running_var, other[index].running_var)


def test_an_infinite_prior_keeps_what_is_stored():
    model = two_layers()
    before = bits(model)
    measured = bn.adapt(model, images(3), prior=math.inf)
    assert bits(model) == before
    assert set(measured) == {"1", "5"}


def test_layers_behind_a_mixture_are_measured_behind_the_mixture():
    model, (batch,) = two_layers(), images(8)
    by_hand = copy.deepcopy(model)
    bn.adapt(by_hand[1], [by_hand[0](batch)], prior=16)
    bn.adapt(by_hand[5], [by_hand[:5](batch)], prior=16)
    bn.adapt(model, [batch], prior=16)
    torch.testing.assert_close(model[5].running_var, by_hand[5].running_var)


def test_two_half_loaders_pooled_equal_one():
    model, batches = two_layers()[:2].eval(), images(4, 3, 6, 2)
    halves = [bn.adapt(copy.deepcopy(model), part)["1"] for part in (batches[:2], batches[2:])]
    whole = bn.adapt(model, batches)["1"]
    both = halves[0] + halves[1]
    torch.testing.assert_close(both.mean, whole.mean)
    torch.testing.assert_close(both.m2, whole.m2)


def test_batch_sizes_do_not_matter():
    model, (x,) = two_layers(), images(12)
    other = copy.deepcopy(model)
    bn.adapt(model, [x], prior=4)
    bn.adapt(other, list(x.split(1)), prior=4)
    for index in (1, 5):
        torch.testing.assert_close(model[index].running_var, other[index].running_var)


@pytest.mark.parametrize("options", [{}, {"prior": 16}, {"ema": 0.1}])
@pytest.mark.parametrize("mode", [True, False])
def test_nothing_but_running_mean_and_var_changes(options, mode):
    model = Net().train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    bn.adapt(model, [torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 4], **options)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{layer}.{name}" for layer in ("theirs", "ours") for name in ("running_mean", "running_var")}
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize("options", [{}, {"prior": 16}, {"ema": 0.1}])
def test_an_exception_on_the_way_leaves_the_model_as_it_was(options):
    class Stumbles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = two_layers(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("stumbled")
            return self.inner(x)

    model = Stumbles().eval()
    before = bits(model)
    with pytest.raises(RuntimeError, match="stumbled"):
        bn.adapt(model, images(4, 4, 4), **options)
    assert bits(model) == before


def test_frozen_layers_keep_their_statistics():
    model = two_layers()
    bn.freeze(model[1])
    before = model[1].running_mean.clone(), model[5].running_mean.clone()
    assert set(bn.adapt(model, images(6))) == {"5"}
    assert torch.equal(model[1].running_mean, before[0])
    assert not torch.equal(model[5].running_mean, before[1])


def test_layers_in_eval_mode_inside_a_model_in_train_mode_keep_theirs():
    model = two_layers().train()
    model[5].eval()
    assert set(bn.adapt(model, images(6))) == {"1"}


def test_half_precision_buffers_get_what_fits_them():
    layer = nn.BatchNorm1d(2).half().eval()
    bn.adapt(layer, [torch.randn(64, 2).half() * 8])
    assert layer.running_var.dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"adapt needs statistics that fit the layer's buffers, got 2e.06 for torch.float16"
    ):
        bn.adapt(layer, [torch.tensor([[1e3, 0], [-1e3, 1]]).half()])


def test_a_layer_that_is_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = stale(nn.BatchNorm1d(3))

        def forward(self, x):
            return self.norm(self.norm(x))

    model, batches = Twice().eval(), [torch.randn(16, 3)]
    other = copy.deepcopy(model)
    bn.recalibrate(other, batches)
    assert bn.adapt(model, batches)["norm"].count.unique().item() == 32
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)


def test_batches_that_are_not_finite_are_left_out_with_a_warning():
    layer, good = nn.BatchNorm1d(2).eval(), torch.randn(8, 2)
    bad = torch.tensor([[math.nan, 1.0]])
    with pytest.warns(RuntimeWarning, match="NaN or infinity in the input of ''"):
        bn.adapt(layer, [good, bad])
    torch.testing.assert_close(layer.running_mean[0], good[:, 0].mean())
    torch.testing.assert_close(layer.running_mean[1], torch.cat([good[:, 1], bad[:, 1]]).mean())


def test_a_channel_that_was_left_out_of_a_batch_counts_the_examples_that_it_saw():
    layer = stale(nn.BatchNorm2d(2))
    good, bad = torch.randn(4, 2, 3, 3) + 2, torch.randn(6, 2, 3, 3) - 1
    bad[1, 0, 2, 2] = math.nan
    seen = values([good]), values([good, bad])
    expected = [mixture(layer, x, 5 / (5 + n)) for x, n in zip(seen, (4, 10), strict=True)]
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        bn.adapt(layer, [good, bad], prior=5)
    assert_stored(layer, *([expected[channel][kind][channel] for channel in (0, 1)] for kind in (0, 1)))


def test_layers_that_no_forward_reaches_are_named():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    model.idle = nn.BatchNorm1d(2)
    model.forward = lambda x: model[0](x)
    with pytest.warns(RuntimeWarning, match="no forward reached 'idle'"):
        bn.adapt(model, [torch.randn(8, 2)])


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        ([], {}, ValueError, "adapt needs at least one batch, got an empty loader"),
        (torch.zeros(3), {}, TypeError, "adapt needs an iterable of batches, got Tensor"),
        (images(2), {"prior": -1}, ValueError, "prior must be a number of examples, 0 or more, got -1"),
        (images(2), {"prior": math.nan}, ValueError, "0 or more, got nan"),
        (images(2), {"ema": 0}, ValueError, "ema must be above 0 and at most 1, got 0"),
        (images(2), {"ema": 1.5}, ValueError, "ema must be above 0 and at most 1, got 1.5"),
        (images(2), {"ema": 0.1, "prior": 2}, ValueError, "adapt needs prior or ema, got both"),
        (images(2), {"max_examples": 0}, ValueError, "adapt needs max_examples of 1 or more, got 0"),
    ],
)
def test_errors_say_what_was_expected(loader, options, error, message):
    model = two_layers()
    before = bits(model)
    with pytest.raises(error, match=message):
        bn.adapt(model, loader, **options)
    assert bits(model) == before


def test_too_few_values_and_models_without_layers_are_errors():
    with pytest.raises(ValueError, match="at least 2 finite values per channel, got 1 in channel 0 of layer ''"):
        bn.adapt(nn.BatchNorm1d(2).eval(), [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="adapt needs batch norm layers that store statistics and are not frozen"):
        bn.adapt(nn.Linear(2, 2), [torch.zeros(1, 2)])


def test_max_examples_cuts_the_last_batch():
    measured = bn.adapt(nn.BatchNorm1d(2).eval(), [torch.randn(8, 2)] * 3, max_examples=11)
    assert measured[""].count.unique().item() == 11


@pytest.mark.parametrize("options", [{}, {"prior": 16}, {"ema": 0.1}])
def test_adapted_puts_statistics_back_bit_for_bit(options):
    model = two_layers()
    model[1].running_mean[0] = -0.0  # equal to 0, but other bits
    before = bits(model)
    with bn.adapted(model, images(5), **options) as inside:
        assert inside is model
        assert not torch.equal(model[5].running_var, Statistics.of(adaptable(two_layers(), "a test")).var["5"])
    assert bits(model) == before
    assert math.copysign(1, model[1].running_mean[0]) == -1


def test_adapted_puts_statistics_back_when_the_block_or_the_loader_raises():
    model = two_layers()
    before = bits(model)
    with pytest.raises(KeyError), bn.adapted(model, images(5)):
        raise KeyError
    with pytest.raises(ValueError, match="at least one batch"), bn.adapted(model, []):
        pass
    assert bits(model) == before


def test_adapted_keeps_what_else_the_block_does():
    model = two_layers()
    with bn.adapted(model, images(5)):
        model[1].weight.data.fill_(3)
    assert model[1].weight.unique().item() == 3


def test_statistics_are_put_all_or_none():
    model = two_layers()
    layers = adaptable(model, "a test")
    wrong = Statistics.of(layers)
    wrong.mean["1"] += 1
    wrong.var["5"] = torch.zeros(99)
    before = bits(model)
    with pytest.raises(RuntimeError):
        wrong.put(layers)
    assert bits(model) == before


def test_a_model_made_in_inference_mode_is_adapted_too():
    with torch.inference_mode():
        layer = nn.BatchNorm1d(2).eval()
    bn.adapt(layer, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    assert layer.running_mean.tolist() == [2, 3]


class Skips(nn.Module):
    """Three layers in a row; batches with a negative first number leave the second out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm1d(2) for _ in range(3))
        self.mix = nn.Linear(2, 2)

    def forward(self, x):
        y = self.mix(self.a(x))
        return self.c(self.b(y.relu()) if x[0, 0] >= 0 else y)


def skipping_batches() -> list[torch.Tensor]:
    batches = [3 * torch.randn(20, 2) + 1 for _ in range(6)]
    for i, batch in enumerate(batches):
        batch[0, 0] = batch[0, 0].abs() * (-1 if i % 2 == 0 else 1)
    return batches  # the first one skips


def by_hand(model: Skips, batches: list[torch.Tensor], prior: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer after layer in float64, each behind the mixtures of those before it."""
    weight, bias = (p.detach().double().numpy() for p in (model.mix.weight, model.mix.bias))
    xs, found = [batch.double().numpy() for batch in batches], {}
    count = sum(len(x) for x in xs)

    def mixture(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate(rows)
        seen = count * 1.0  # examples that count beside the prior: all that passed
        mean, var = x.mean(0), x.var(0, ddof=1)
        w = prior / (prior + seen)
        return (1 - w) * mean, w * 1.0 + (1 - w) * var + w * (1 - w) * mean**2  # stored mean 0 and variance 1

    def normalized(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        return (x - mean) / np.sqrt(var + 1e-5)

    found["a"] = mixture(xs)
    ys = [normalized(x, *found["a"]) @ weight.T + bias for x in xs]
    goes = [x[0, 0] >= 0 for x in xs]
    found["b"] = mixture([np.maximum(y, 0) for y, on in zip(ys, goes, strict=True) if on])
    zs = [normalized(np.maximum(y, 0), *found["b"]) if on else y for y, on in zip(ys, goes, strict=True)]
    return {**found, "c": mixture(zs)}


@pytest.mark.parametrize("prior", [None, 16.0])
def test_a_layer_that_some_forwards_skip_is_measured_before_those_behind_it(prior):
    torch.manual_seed(0)
    model, batches = Skips(), skipping_batches()
    model.mix.weight.data.mul_(4)
    with torch.no_grad():
        expected = by_hand(model, batches, prior or 0.0)
    bn.adapt(model, batches, prior=prior)
    for path, (mean, var) in expected.items():
        layer = getattr(model, path)
        # the passes are in float32
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-4)


def test_adapt_measures_what_recalibrate_measures_where_forwards_skip_layers():
    torch.manual_seed(0)
    model, batches = Skips(), skipping_batches()
    twin = copy.deepcopy(model)
    adapted, recalibrated = bn.adapt(model, batches), bn.recalibrate(twin, batches)
    assert list(adapted) == list(recalibrated) == ["a", "b", "c"]
    for path, moments in adapted.items():
        assert torch.equal(moments.mean, recalibrated[path].mean)
        assert torch.equal(moments.var, recalibrated[path].var)


class OfAnother(nn.Module):
    """Four buffers, as in the frozen layers of detection libraries."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def test_frozen_layers_of_other_libraries_are_adapted_observed_and_kept_in_a_bank():
    torch.manual_seed(0)
    model = nn.Sequential(OfAnother(3), nn.Conv2d(3, 4, 1), OfAnother(4)).eval()
    batches = [2 * torch.randn(16, 3, 5, 5) - 1 for _ in range(4)]
    bank = bn.DomainBank(model)
    rows = torch.cat(batches).double().transpose(0, 1).flatten(1)
    bn.adapt(model, batches)
    torch.testing.assert_close(model[0].running_mean.double(), rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), rows.var(1), rtol=1e-6, atol=0)
    monitor = bn.ShiftMonitor(model, budget=None)
    with monitor, torch.no_grad():
        for batch in batches * 10:
            model(batch - 4)
    assert monitor.alarm is not None
    assert monitor.alarm.first == "0"
    bank.use("stored")
    assert model[0].running_mean.tolist() == [0.5] * 3
