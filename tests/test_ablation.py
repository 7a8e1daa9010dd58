"""Asking a user's model: its data, the arms, training, and what is read off a grid of runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from batchnorm import layers
from batchnorm.ablation.arm_training import train
from batchnorm.ablation.arms import ONCE, SCALED, WITH, WITHOUT, fix, make_arm, strip
from batchnorm.ablation.effort import plan
from batchnorm.ablation.grid import Grid
from batchnorm.ablation.user_data import Data, joined, regrouped, take
from batchnorm.ablation.user_model import Subject, first_tensor, kept_buffers, received
from batchnorm.ablation.usual_losses import accuracy, default_loss
from batchnorm.ablation.watched_runs import watch
from batchnorm.population import freeze


def blobs(count=96, features=6, size=16, seed=0):
    """Two classes of normal values, in batches."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    x = torch.randn(count, features, generator=random) + 1.5 * y[:, None]
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]


def small(norm=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), layers.BatchNorm2d(4, act="relu"), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def images(count=32):
    return [(torch.randn(16, 1, 8, 8) * 3 + 2, torch.arange(16) % 5) for _ in range(count // 16)]


def subject(make=small, batches=None, loss=None):
    return Subject("net.py:make", make, Data.of(blobs() if batches is None else batches), loss)


@pytest.mark.parametrize("at", [0, 3])
def test_a_batch_without_a_finite_loss_is_refused_before_any_training(at):
    batches = blobs()
    batches[at][0][2, 1] = math.nan
    with pytest.raises(ValueError, match=r"must have a finite loss before training.*it has NaN or infinite values"):
        subject(batches=batches).to_device()


def test_a_loss_that_is_infinite_from_the_start_is_not_blamed_on_the_data():
    with pytest.raises(
        ValueError, match=r"its values are finite\. Mend the data, the model's first weights or the loss"
    ):
        subject(loss=lambda output, _: output.sum() / 0).to_device()


def test_missing_values_that_the_model_fills_in_are_no_fault():
    class Filled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.nan_to_num())

    batches = blobs()
    batches[0][0][2, 1] = math.nan
    subject(make=lambda: Filled(*small()), batches=batches).to_device()


# -- data -----------------------------------------------------------------------------------------------------


def test_every_fifth_batch_is_held_out_and_the_rest_is_dealt_anew_each_epoch():
    data = Data.of(blobs(160))
    assert data.counts == (128, 32)
    assert data.size == 16
    dealt = data.deal(3)
    first = torch.cat([next(dealt)[0] for _ in range(8)])
    second = torch.cat([next(dealt)[0] for _ in range(8)])
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_the_same_seed_deals_the_same_batches_and_another_does_not():
    data = Data.of(blobs())
    assert torch.equal(next(data.deal(1))[0], next(data.deal(1))[0])
    assert not torch.equal(next(data.deal(1))[0], next(data.deal(2))[0])


def test_what_a_model_does_to_a_batch_does_not_reach_the_data():
    for batches in (blobs(), [(torch.ones(4, n), torch.zeros(4)) for n in (2, 3, 4)]):
        data = Data.of(batches)
        before = [x.clone() for x, _ in batches]
        dealt = data.deal(0)
        for _ in range(20):
            next(dealt)[0].zero_()
        assert all(torch.equal(x, old) for (x, _), old in zip(batches, before, strict=True))


def test_a_loader_sorted_by_class_is_mixed():
    x = torch.randn(96, 6)
    y = torch.arange(96) // 48
    data = Data.of([(x[i : i + 16], y[i : i + 16]) for i in range(0, 96, 16)])
    assert 0 < int(next(data.deal(0))[1].sum()) < 16


def test_batches_that_cannot_be_joined_come_as_they_are():
    batches = [(torch.randn(4, length), torch.zeros(4)) for length in (5, 6, 7)]
    data = Data.of(batches)
    assert data.pool is None
    assert regrouped(batches, 2, 0) is None
    assert {next(data.deal(0))[0].shape for _ in range(5)} <= {(4, 5), (4, 6)}


def test_mappings_named_tuples_and_constants_are_joined_and_taken_apart():
    batches = [{"x": torch.arange(2.0) + n, "kind": "a", "more": (torch.ones(2, 3), None)} for n in range(3)]
    whole = joined(batches)
    assert whole["x"].tolist() == [0, 1, 1, 2, 2, 3]
    assert whole["kind"] == "a"
    part = take(whole, torch.tensor([5, 0]))
    assert part["x"].tolist() == [3, 0]
    assert part["more"][0].shape == (2, 3)
    assert joined([{"x": torch.ones(2)}, {"y": torch.ones(2)}]) is None
    assert joined([[torch.ones(2), "a"], [torch.ones(2), "b"]]) is None


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "needs batches, got none"),
        ([(torch.ones(1, 2), torch.ones(1))] * 5, "batches of 1"),
        ([(torch.ones(8, 2), torch.ones(8))], "2 batches or more"),
        ([("a", "b")], "must hold tensors"),
    ],
)
def test_data_of_no_use_are_refused(batches, words):
    with pytest.raises(ValueError, match=words):
        Data.of(batches)


def test_a_tensor_is_no_loader():
    with pytest.raises(TypeError, match="needs batches, got one tensor"):
        Data.of(torch.ones(3, 4))


def test_single_examples_are_left_out_and_counted():
    data = Data.of([*blobs(), (torch.ones(1, 6), torch.ones(1).long())])
    assert data.dropped == 1


def test_a_pass_is_read_up_to_the_limit_also_of_a_loader_without_end():
    def endless():
        while True:
            yield torch.ones(10, 2), torch.ones(10)

    assert sum(Data.of(endless(), examples=45).counts) == 50


def test_held_out_batches_may_be_given():
    data = Data.of(blobs(), blobs(32, seed=1))
    assert data.counts == (96, 32)


# -- losses ---------------------------------------------------------------------------------------------------


def test_integers_are_classes_and_numbers_are_numbers():
    logits, classes = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert default_loss(logits, (None, classes)) == nn.functional.cross_entropy(logits, classes)
    assert default_loss(logits, {"labels": classes.int()}) == nn.functional.cross_entropy(logits, classes)
    maps, pixels = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4).long()
    assert default_loss(maps, (None, pixels)) == nn.functional.cross_entropy(maps, pixels)
    assert default_loss(torch.ones(4, 1), (None, torch.zeros(4))) == 1
    assert accuracy(logits, (None, logits.argmax(1))) == 1
    assert accuracy(torch.ones(4, 1), (None, torch.zeros(4))) is None


@pytest.mark.parametrize(
    ("output", "batch", "words"),
    [
        ((torch.ones(2), torch.ones(2)), (None, torch.ones(2)), "one tensor, got tuple"),
        (torch.ones(2, 3), (None, torch.ones(2, 4)), r"targets \(2, 4\)"),
        (torch.ones(2, 3), (None, torch.ones(2, 3).bool()), "torch.bool"),
        (torch.ones(2, 3), torch.ones(2, 3), "needs targets"),
        (torch.ones(2, 3), {"x": torch.ones(2)}, "needs targets"),
    ],
)
def test_anything_else_asks_for_a_loss(output, batch, words):
    with pytest.raises(ValueError, match=words) as raised:
        default_loss(output, batch)
    assert "--loss" in str(raised.value)


# -- arms -----------------------------------------------------------------------------------------------------


def test_normalized_once_starts_where_batch_norm_does():
    about = subject(convolutional, images())
    batch = next(about.data.deal(4))
    plain, once = make_arm(about, WITH, 4), make_arm(about, ONCE, 4)
    expected, got = plain(batch[0]), once(batch[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    again = once(batch[0] * 2 + 1)  # and does not follow its input
    assert not torch.allclose(again, got, atol=0.1)


def test_without_is_gamma_x_plus_beta_with_the_same_parameters_and_weights():
    about = subject(convolutional, images())
    plain, bare = make_arm(about, WITH, 0), make_arm(about, WITHOUT, 0)
    assert [(n, p.shape) for n, p in plain.named_parameters()] == [(n, p.shape) for n, p in bare.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), bare.parameters(), strict=True))
    layer = bare[3]
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(-1.0)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer(x), 2 * x - 1)
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(bare[1](x), x.relu())  # a fused activation goes on


def test_parameters_are_trained_in_every_arm():
    about = subject()
    for arm in (WITH, WITHOUT, ONCE):
        model = make_arm(about, arm, 0)
        about.value(model, next(about.data.deal(0))).backward()
        assert all(p.grad is not None for p in model.parameters()), arm


@pytest.mark.parametrize("change", [strip, lambda model: fix(model, blobs()[0])])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d, layers.BatchNorm1d, nn.SyncBatchNorm,
        lambda n: nn.BatchNorm1d(n, track_running_stats=False), lambda n: nn.BatchNorm1d(n, affine=False),
        lambda n: freeze(nn.Sequential(nn.BatchNorm1d(n))),
    ],
)  # fmt: skip
def test_every_kind_of_layer_stops_following_its_batch(change, norm):
    model = small(norm).train()
    change(model)
    model.train()
    x = torch.randn(8, 6)
    torch.testing.assert_close(model(x)[:4], model(x[:4]))


def test_a_layer_that_is_called_twice_is_measured_over_both_calls():
    norm = nn.BatchNorm1d(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) + self.norm(x + 4)

    model = Twice().train()
    fix(model, torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    assert norm.running_mean.tolist() == [3, 3]


def test_normalized_inputs_undo_the_scale():
    batches = [(x * 100 + 7, y) for x, y in blobs()]
    about = subject(small, batches)
    model = make_arm(about, SCALED, 0)
    seen = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.cat([x for x, _ in about.data.train]))
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)


def test_lazy_layers_get_their_shape_and_every_arm_the_same_weights():
    def lazy():
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))

    about = subject(lazy)
    plain, bare = make_arm(about, WITH, 1), make_arm(about, WITHOUT, 1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), bare.parameters(), strict=True))
    assert int(plain[1].num_batches_tracked) == 0


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match=r"net\.py:make has no batch norm layer"):
        subject(lambda: nn.Linear(6, 2)).fresh(0)


def test_what_layers_receive_is_read_in_order_and_nothing_stays():
    model = convolutional().train()
    with kept_buffers(model):
        seen = received(model, images()[0])
    assert list(seen) == ["1", "3", "7"]
    assert int(model[1].num_batches_tracked) == 0
    assert not model[1]._forward_pre_hooks


def test_the_first_tensor_of_an_output_is_found():
    x = torch.ones(2)
    assert first_tensor({"loss": None, "logits": [x]}) is x
    assert first_tensor("nothing") is None


# -- training -------------------------------------------------------------------------------------------------


class Dict(nn.Module):
    """Takes a mapping's parts by name, and gives a mapping."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))

    def forward(self, x, y=None):
        return {"value": self.net(x)[:, 0]}


def test_mappings_and_a_loss_of_ones_own():
    batches = [{"x": x, "y": y.float()} for x, y in blobs()]
    about = subject(Dict, batches, lambda output, batch: (output["value"] - batch["y"]).square().mean())
    losses, _ = train(about, WITH, 0, 0.1, 30)
    assert losses[-5:].mean() < losses[0]
    assert about.accuracy(Dict(), batches[0]) is None


def test_the_same_seed_gives_the_same_losses_and_looking_does_not_change_them():
    batches = [{"x": x, "y": y.float()} for x, y in blobs()]
    about = subject(Dict, batches, lambda output, batch: (output["value"] - batch["y"]).square().mean())
    first, model = train(about, WITH, 3, 0.1, 12)
    watched = watch(about, WITH, 3, 0.1, 12)
    assert torch.equal(first, train(about, WITH, 3, 0.1, 12)[0])
    for a, b in zip(model.state_dict().values(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_divergence_is_an_outcome():
    losses, _ = train(subject(), WITHOUT, 0, 1e18, 10)
    assert losses[0].isfinite()
    assert losses[-1] == torch.inf


def test_a_loss_that_is_no_number_or_has_no_gradient_is_refused():
    with pytest.raises(ValueError, match=r"must be one number, got \(16,\)"):
        train(subject(loss=lambda output, batch: output[:, 0]), WITH, 0, 0.1, 2)
    with pytest.raises(ValueError, match="must be one number, got float"):
        train(subject(loss=lambda output, batch: 1.0), WITH, 0, 0.1, 2)
    with pytest.raises(ValueError, match="without gradient"):
        train(subject(loss=lambda output, batch: output.detach().sum()), WITH, 0, 0.1, 2)
    with pytest.raises(ValueError, match="without gradient"):
        plan(subject(loss=lambda output, batch: output.detach().sum()))


@pytest.mark.slow
def test_a_plan_fits_the_time_and_takes_what_is_given():
    about = subject()
    short, long = plan(about, seconds=1e-9), plan(about, seconds=1e9)
    assert (short.seeds, short.steps) == (3, 40)
    assert (long.seeds, long.steps) == (5, 300)
    given = plan(about, seeds=2, steps=17, rates=(0.1, 1.0))
    assert (given.seeds, given.steps, given.rates) == (2, 17, (0.1, 1.0))
    assert given.runs == len(given.arms) * 2 * 2


def test_inputs_that_are_normalized_already_are_no_arm():
    x = torch.randn(96, 6)
    x = (x - x.mean(0)) / x.std(0)
    batches = [(x[i : i + 16], torch.zeros(16).long()) for i in range(0, 96, 16)]
    chosen = plan(subject(small, batches), steps=10, seeds=2)
    assert SCALED not in chosen.arms
    assert dict(chosen.left_out) == {"normalizing the inputs": "the inputs are normalized already"}


# -- the grid -------------------------------------------------------------------------------------------------


def falling(rate, start=2.0, end=0.0, steps=100):
    """A loss that goes from start to end in ``rate`` steps and stays there."""
    return torch.tensor([max(end, start - (start - end) * n / rate) for n in range(steps)])


def grid(with_, without):
    """Two seeds with one curve for each rate."""
    return Grid(
        (0.1, 1.0), {WITH: torch.stack([torch.stack(with_)] * 2), WITHOUT: torch.stack([torch.stack(without)] * 2)}
    )


def test_levels_steps_and_rates_of_known_curves():
    found = grid([falling(20), falling(10)], [falling(80, end=0.1), torch.full((100,), torch.inf)])
    assert (found.start, found.end) == (2.0, 0.0)
    assert found.target == pytest.approx(0.4)
    assert found.usable == pytest.approx(1.0)
    assert (found.best(WITH), found.best(WITHOUT)) == (1, 0)
    assert found.better == WITH
    # the loss is at 0.4 after 80% of the fall, and its average over a window two steps later
    assert found.arrival(WITH).steps.tolist() == pytest.approx([8, 8], abs=3)
    assert found.arrival(WITHOUT).steps.tolist() == pytest.approx([67, 67], abs=5)
    assert found.unlearned(WITH, 1) == ""
    assert "diverged" in found.unlearned(WITHOUT, 1)
    assert found.shared() == 0
    assert found.edge(WITHOUT) == "the grid's smallest"


def test_an_arm_that_does_not_learn_is_told_with_its_loss():
    flat = torch.full((100,), 2.0)
    found = grid([flat, flat], [flat, flat])
    assert "ended at a training loss of 2" in found.unlearned(WITH, 0)
    assert math.isfinite(found.target)


def test_a_loss_below_0_is_learned_when_it_falls_by_a_quarter_of_its_size():
    """A log-likelihood of densities may begin below 0: from -2 on a quarter down is -2.5, and -1.5 is worse."""
    found = grid([falling(10, -2.0, -2.6), falling(10, -2.0, -2.4)], [falling(10, -2.0, -2.1)] * 2)
    assert found.unlearned(WITH, 0) == ""
    assert "ended at a training loss of -2.4, from -2" in found.unlearned(WITH, 1)


class Sample(NamedTuple):
    label: Tensor
    right: Tensor
    left: Tensor


class Sides(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, left, right):
        return self.last(self.norm(left + right))


def test_the_target_of_a_named_tuple_is_what_the_model_is_not_given():
    batches = [Sample(torch.randint(0, 2, (8,)), torch.randn(8, 6), torch.randn(8, 6)) for _ in range(4)]
    about = subject(Sides, batches)
    model = about.fresh(0)
    label, right, left = batches[0]
    expected = nn.functional.cross_entropy(model(left, right), label)
    assert torch.equal(about.value(model, batches[0]), expected)
