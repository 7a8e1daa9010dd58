"""Companions: the variance of a logit is that of theory, and 0 where nothing looks across the batch."""

import math

import pytest
import torch
from fingerprint import fingerprint, trained_net
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.companion_examples import companion_flips

CHANNELS, REPEATS, SIZE = 1024, 100, 64


def drawn(law: str, *shape: int) -> Tensor:
    """Values of mean 0 and variance 1."""
    if law == "normal":
        return torch.randn(*shape).double()
    return torch.distributions.Exponential(1.0).sample(torch.Size(shape)).double() - 1


# Skewness and kurtosis: 0 and 3 of a normal law, 2 and 9 of an exponential one.
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize(("law", "skewness", "kurtosis"), [("normal", 0, 3), ("exponential", 2, 9)])
@pytest.mark.parametrize("z", [0.0, 1.0, 2.0])
def test_the_variance_of_one_batch_norm_layer_is_that_of_theory(norm, law, skewness, kurtosis, z: float):
    layer = norm(CHANNELS).double()
    layer.weight.data.fill_(2.0)
    pool = drawn(law, 2000, CHANNELS)
    found = companion_flips(layer, torch.full((1, CHANNELS), z).double(), pool, batch=SIZE, repeats=REPEATS)
    expected = 4 * (1 + skewness * z + (kurtosis - 1) * z**2 / 4) / SIZE * (1 - SIZE / 2000)
    # Every channel is a draw of its own: a relative error of sqrt((k - 1) / (REPEATS CHANNELS)) with the kurtosis k of
    # the output, below 10. The delta method leaves out terms of relative order 1 / SIZE, for the example is in its own
    # batch (- 2 / SIZE) and by higher moments (up to about kurtosis / SIZE).
    assert found.variance == pytest.approx(expected, rel=5 * 3 / math.sqrt(REPEATS * CHANNELS) + (kurtosis + 2) / SIZE)
    assert found.variances == (found.variance,)
    assert math.isnan(found.relative)


def test_a_linear_readout_of_independent_channels_adds_their_variances():
    net = nn.Sequential(nn.BatchNorm1d(256), nn.Linear(256, 64)).double()
    pool = torch.randn(2000, 256).double()
    found = companion_flips(net, pool[:1] * 0, pool[1:], batch=SIZE, repeats=400)
    # at z = 0 every channel has variance 1 / M; 64 logits of 400 draws share 256 channels
    expected = float(net[1].weight.detach().square().sum(1).mean()) / SIZE * (1 - SIZE / 2000)
    assert found.variance == pytest.approx(expected, rel=5 * math.sqrt(2 / (400 * 64)) + 5 / SIZE)


class Flipper(nn.Module):
    """Two classes whose logits differ by a normalized value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return torch.cat([z, -z], 1)


def test_an_example_at_the_edge_flips_half_of_the_time_and_one_far_away_never():
    pool = torch.randn(2000, 1)
    found = companion_flips(Flipper(), torch.tensor([[0.0], [5.0]]), pool, batch=32, repeats=400)
    # 400 draws of a fair coin: pairs differ with probability 2 p q = 1/2, less 2 (p - 1/2)^2 of order 1 / 400
    assert found.flips[0] == pytest.approx(0.5, abs=0.05)
    assert found.flips[1] == 0
    assert found.flip_rate == pytest.approx(found.flips[0] / 2)
    assert 0.1 < found.from_eval < 0.4
    assert "32" in str(found)


def test_it_falls_with_the_batch_as_1_over_its_size():
    pool = torch.randn(4000, 512)
    layer, x = nn.BatchNorm1d(512), torch.zeros(1, 512)
    small, large = (companion_flips(layer, x, pool, batch=size, repeats=60).variance for size in (16, 256))
    # the pool is finite, and terms of relative order 1 / 16 are left out
    assert small / large == pytest.approx(16 / (1 - 256 / 4000), rel=4 / 16)


def frozen_net() -> nn.Module:
    return bn.freeze(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))


@pytest.mark.parametrize(
    ("make", "train"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)), True),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)), False),
        (frozen_net, True),
    ],
)
def test_nothing_depends_on_companions_in_eval_mode_and_without_batch_norm(make, train: bool):
    found = companion_flips(make(), torch.randn(3, 4), torch.randn(40, 4), batch=8, repeats=20, train=train)
    assert found.flip_rate == 0
    assert found.variance == 0
    assert found.variances == (0, 0, 0)
    assert found.from_eval == 0
    assert found.relative == 0


class Leak(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_leak_across_the_batch_shows_in_eval_mode():
    assert companion_flips(Leak(), torch.zeros(1, 4), torch.randn(40, 4), batch=8, train=False).variance > 0.01


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, scale: Tensor, mode: str) -> dict[str, Tensor]:
        return {"out": self.norm(x) * scale.view(-1, 1, 1, 1), mode: x}


def test_batches_of_any_kind_and_outputs_with_positions_are_read():
    pool = {"x": torch.randn(9, 3, 2, 2), "scale": torch.rand(9), "mode": "m"}
    one = {"x": torch.randn(2, 3, 2, 2), "scale": torch.rand(2), "mode": "m"}
    found = companion_flips(Named(), one, pool, batch=4, repeats=3, read=lambda out: out["out"])
    assert found.variance > 0
    assert found.relative > 0
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    pairs = [torch.randn(5, 3), torch.arange(5)], [torch.randn(9, 3), torch.arange(9)]
    assert companion_flips(net, *pairs, batch=4).variance > 0
    flat = nn.Sequential(net, nn.Flatten(0))
    assert companion_flips(flat, *pairs, batch=4) == companion_flips(net, *pairs, batch=4)


def test_companions_depend_on_the_seed_alone():
    net, x, pool = nn.BatchNorm1d(2), torch.randn(2, 2), torch.randn(50, 2)
    first = companion_flips(net, x, pool, batch=8)
    torch.rand(3)
    assert companion_flips(net, x, pool, batch=8) == first
    assert companion_flips(net, x, pool, batch=8, seed=1) != first


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool):
    net = trained_net()
    net = net if training else net.eval()
    x = torch.randn(30, 3)
    before = fingerprint(net)
    companion_flips(net, x[:3], x[3:], batch=8, repeats=4)
    assert fingerprint(net) == before


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_the_model_is_left_as_it_was_when_forward_or_read_raises(at: int):
    net, evaluations, x = trained_net(), iter(range(1, 100)), torch.randn(30, 3)
    net.last.register_forward_hook(lambda *_: 1 / 0 if next(evaluations) == at else None)
    before = fingerprint(net)
    with pytest.raises(ZeroDivisionError):
        companion_flips(net, x[:2], x[2:], batch=8, repeats=4)
    assert fingerprint(net) == before
    with pytest.raises(ZeroDivisionError):
        companion_flips(net, x[:2], x[2:], batch=8, repeats=4, read=lambda _: 1 / 0)
    assert fingerprint(net) == before


def errors() -> list[tuple]:
    net, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(20, 3)
    return [
        (net, x[:1], x, {"batch": 1}, ValueError, "batch of 2 or more, got 1"),
        (net, x[:1], x, {"repeats": 1}, ValueError, "repeats of 2 or more, got 1"),
        (net, x[:1], x, {"batch": 32}, ValueError, "a pool of 31 examples or more, got 20"),
        (net, x[:0], x, {"batch": 4}, ValueError, "one example or more, got none"),
        (net, [x[:1]], x, {"batch": 4}, ValueError, "of one type, got list and Tensor"),
        (net, x[:1], x[:, :2], {"batch": 4}, ValueError, r"got examples of shape \(3,\) and examples of shape \(2,\)"),
        (net, {"x": x[:1], "y": x[:1]}, {"x": x}, {"batch": 4}, ValueError, "of one form, got keys x, y and keys x"),
        (net, [x[:1], x[:1]], [x], {"batch": 4}, ValueError, "of one form, got 2 parts and 1 parts"),
        (net, x[:1] * math.nan, x, {"batch": 4}, ValueError, "finite outputs, got"),
        (nn.Sequential(net, nn.Flatten(0)), x[:1], x, {"batch": 4}, ValueError, r"each of 4 examples, got \(8,\)"),
        (net, x[:1], x, {"batch": 4, "read": lambda y: 3}, ValueError, "each of 4 examples, got int"),
        (nn.LSTM(3, 2), x[:1], x, {"batch": 4}, TypeError, "a tensor of logits, got tuple. Pass read="),
        (7, x[:1], x, {"batch": 4}, TypeError, "must be an nn.Module, got int"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_errors_say_what_to_do(case: int):
    net, one, pool, options, kind, message = errors()[case]
    with pytest.raises(kind, match=message):
        companion_flips(net, one, pool, **options)


def test_a_layer_behind_which_there_is_one_value_is_named():
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[:1]).expand_as(x)

    with pytest.raises(ValueError, match=r"companion_flips needs 2 or more values per channel .* in layer 'norm'"):
        companion_flips(First(), torch.randn(1, 3), torch.randn(9, 3), batch=4)
