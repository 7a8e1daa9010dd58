"""probe: one look at a model, with figures that have a known answer, and no trace of it."""

import math

import numpy as np
import pytest
import torch
from fingerprint import fingerprint
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.probe_tier import gap
from batchnorm.instruments.signal_propagation import UNITS, resemblance, sample
from batchnorm.moments import Moments


def deep(depth: int, width: int, norm: bool, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / width))
        layers += [linear, nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers)


def test_resemblance_of_known_matrices() -> None:
    same = torch.ones(8, 16, dtype=torch.float64)
    found = resemblance(same)
    assert found["stable_rank"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    assert found["orthogonality"] == pytest.approx(math.sqrt(1 - 1 / 8))  # ||J / n - I / n||_F
    apart = torch.eye(8, 16, dtype=torch.float64)
    assert resemblance(apart) == pytest.approx({"stable_rank": 8, "cosine": 0, "orthogonality": 0}, abs=1e-12)


def test_resemblance_is_what_the_formulas_say() -> None:
    h = np.random.default_rng(0).normal(size=(12, 40)) + 1
    found = resemblance(torch.from_numpy(h))
    singular = np.linalg.svd(h, compute_uv=False)
    assert found["stable_rank"] == pytest.approx((singular**2).sum() / singular[0] ** 2)
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    assert found["cosine"] == pytest.approx((unit @ unit.T)[~np.eye(12, dtype=bool)].mean())
    assert found["orthogonality"] == pytest.approx(np.linalg.norm(h @ h.T / (h**2).sum() - np.eye(12) / 12))


def test_batch_norm_keeps_examples_apart_in_a_deep_net() -> None:
    """Daneshmand et al. 2020: without it all examples look alike after 48 layers."""
    model = deep(48, 256, norm=True)
    x = torch.randn(64, 256)
    model.train()
    with torch.no_grad():
        for layer in model:  # statistics of this batch, so that eval mode shows what training does
            if isinstance(layer, nn.BatchNorm1d):
                layer.momentum = 1.0
        model(x)
    record = bn.probe(model, x)
    without = x
    with torch.no_grad():
        for layer in deep(48, 256, norm=False):
            without = layer(without)
    collapsed = resemblance(without.double())
    assert collapsed["stable_rank"] < 1.05
    assert collapsed["cosine"] > 0.95
    assert record.values["stable_rank"][-1] > 1.5
    assert record.values["cosine"][-1] < 0.7
    # eval mode normalizes by unbiased variances: outputs are smaller by 1 / 128 of themselves, in every layer
    assert record.values["gap"][0] == pytest.approx(math.sqrt(64 / 63) - 1, rel=0.02)


def test_mean_square_and_variance_are_those_of_the_channels() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(16, 3, 5, 5) * 2 + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    record = bn.probe(model, x)
    channels = x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    assert record["mean_square"]["0"] == pytest.approx((channels.mean(1) ** 2).mean())
    assert record["channel_var"]["0"] == pytest.approx(channels.var(1).mean())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), bn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)])
def test_gap_is_the_difference_of_the_layers_outputs(layer: nn.BatchNorm1d) -> None:
    layer = layer.double()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        if layer.affine:
            layer.weight.uniform_(0.5, 2)
    x = torch.randn(50, 6).double() * 3
    expected_gap = gap(layer, Moments.of(x))
    evaluated = layer.eval()(x).detach()
    difference = layer.train()(x).detach() - evaluated
    expected = float((difference.square().mean() / evaluated.var(0, correction=0).mean()).sqrt())
    assert expected_gap == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_as_it_was(raises: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), bn.BatchNorm1d(8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model(torch.randn(8, 4)).sum().backward()
    model[1].eval()
    before, random = fingerprint(model), torch.get_rng_state()

    def loss(output: Tensor, batch: object) -> Tensor:
        if raises:
            raise ZeroDivisionError
        return output.sum()

    if raises:
        with pytest.raises(ZeroDivisionError):
            bn.probe(model, torch.randn(8, 4, generator=torch.Generator()), loss)
    else:
        bn.probe(model, torch.randn(8, 4, generator=torch.Generator()), loss)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_losses_are_those_of_the_usual_kinds() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(16, 4)
    classes, values = torch.randint(3, (16,)), torch.randn(16, 3)
    with torch.no_grad():
        output = model.eval()(x)
    assert bn.probe(model, (x, classes)).model["loss_eval"] == pytest.approx(
        float(nn.functional.cross_entropy(output, classes))
    )
    assert bn.probe(model, (x, values)).model["loss_eval"] == pytest.approx(
        float(nn.functional.mse_loss(output, values))
    )
    assert bn.probe(model, (x, ["a"] * 16)).model["loss_eval"] is None


def test_dropout_is_off_in_both_modes() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4, momentum=1.0))
    x = torch.randn(256, 4)
    model[1].train()(x)
    # the stored statistics are the batch's, but for the unbiased variance
    assert bn.probe(model, x).model["output_gap"] == pytest.approx(math.sqrt(256 / 255) - 1, rel=0.02)


def test_a_layer_that_did_not_run_or_met_nan_has_no_numbers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    record = bn.probe(Two(), torch.randn(8, 3))
    assert record["cosine"]["unused"] is None
    assert record["cosine"]["used"] is not None
    x = torch.randn(8, 3)
    x[0, 0] = torch.nan
    assert bn.probe(Two(), x)["cosine"]["used"] is None


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probe needs a model with batch norm layers that have a shape, got Linear"):
        bn.probe(nn.Linear(2, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"a probe needs a batch of 2 examples or more, got 1"):
        bn.probe(nn.Sequential(nn.BatchNorm1d(2)), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"a model must be an nn\.Module, got str"):
        bn.probe("model", torch.ones(4, 2))


def test_the_same_units_are_sampled_every_time() -> None:
    x = torch.randn(5, 16, 9, 9)
    random = torch.get_rng_state()
    values, channels = sample(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert values.shape == (5, UNITS)
    assert torch.equal(sample(x)[0], values)
    assert channels.bincount(minlength=16).min() > 0
    few, of = sample(torch.arange(6.0).reshape(1, 2, 3))
    assert few.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert of.tolist() == [0, 0, 0, 1, 1, 1]
