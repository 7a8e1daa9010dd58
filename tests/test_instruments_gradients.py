"""Gradients by depth against values known from theory, and against sums written out by hand."""

import math

import pytest
import torch
from fingerprint import data, fingerprint, trained_net
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.gradients import gradient_depth

U = 2.0**-53


def deep(activation: type, width: int, depth: int, norm: bool = True) -> nn.Sequential:
    """Linear layers of one width, Gaussian, that keep the second moment of what the activation lets through."""
    modules: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt((2 if activation is nn.ReLU else 1) / width))
        modules += [linear, nn.BatchNorm1d(width), activation()] if norm else [linear, activation()]
    return nn.Sequential(*modules)


def against(direction: Tensor):
    """A loss whose gradient at the output is a given direction."""
    return lambda output, _: (output * direction).sum()


# The factor of a net is known up to the randomness of its weights. Each step of log S scatters by about 0.5 / width^.5
# (0.02 at width 512, measured over seeds, an average over 1 / width independent sums), so over depth - 1 steps five
# standard errors are 5 * 0.5 / sqrt(width (depth - 1)). Beside that the theory leaves out terms of relative size
# 1 / batch and depth / width.
def tolerance(width: int, depth: int, batch: float = math.inf) -> float:
    return 2.5 / math.sqrt(width * (depth - 1)) + 1.2 / batch + depth / (4 * width)


def test_batch_norm_with_relu_multiplies_squared_gradients_by_pi_over_pi_minus_1_a_layer():
    width, depth, batch = 512, 12, 256
    net, w = deep(nn.ReLU, width, depth), torch.randn(batch, width)
    found = gradient_depth(net, torch.randn(batch, width), against(w))
    assert math.log(found.factor) == pytest.approx(
        math.log(math.pi / (math.pi - 1)), abs=tolerance(width, depth, batch)
    )
    assert found.error < tolerance(width, depth)
    assert [layer.name for layer in found.layers] == [str(i) for i in range(1, 3 * depth, 3)]


@pytest.mark.parametrize("batch", [8, 16, 64])
def test_batch_norm_without_activation_multiplies_them_by_batch_minus_2_over_batch_minus_3(batch: int):
    width, depth = 256, 20
    net, w = deep(nn.Identity, width, depth), torch.randn(batch, width)
    found = gradient_depth(net, torch.randn(batch, width), against(w))
    assert math.log(found.factor) == pytest.approx(math.log((batch - 2) / (batch - 3)), abs=tolerance(width, depth))


def test_without_batch_norm_they_stay_as_they_are():
    width, depth = 256, 20
    net, w = deep(nn.ReLU, width, depth, norm=False), torch.randn(256, width)
    activations = [str(i) for i in range(1, 2 * depth, 2)]
    found = gradient_depth(net, torch.randn(256, width), against(w), activations)
    assert math.log(found.factor) == pytest.approx(0, abs=tolerance(width, depth))
    assert "x 1" in str(found) or "x 0.9" in str(found)


class Branches(nn.Module):
    """Batch norm whose input goes past it too, over which a ReLU writes, and a layer that is called twice."""

    def __init__(self, norm: type) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="circular")
        self.norm = norm(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=1, padding=1)
        self.twice = nn.Linear(4, 4)
        self.last = norm(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        self.z = z
        y = torch.relu_(self.norm(z)) + z
        y = self.up(y)
        y = self.last(y).mean((2, 3))
        return self.twice(torch.tanh(self.twice(y)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_sums_are_those_of_the_whole_gradient_at_a_layers_entrance(norm: type):
    net, x = Branches(norm).double(), torch.randn(6, 2, 5, 5, dtype=torch.float64)
    found = gradient_depth(net, x, lambda y, _: y.pow(3).sum())
    loss = net(x).pow(3).sum()
    (slope,) = torch.autograd.grad(loss, net.z)
    assert [layer.name for layer in found.layers] == ["norm", "last"]
    assert found.layers[0].squared == pytest.approx(float(slope.square().sum()), rel=1e4 * U)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e4 * U)


def test_cancellation_is_that_of_every_examples_and_positions_term():
    net = Branches(nn.BatchNorm2d).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found = {each.name: each.ratio for each in gradient_depth(net, x, lambda y, _: y.pow(3).sum()).cancellations}
    assert list(found) == ["conv", "up", "twice"]

    outputs = {}
    for name in ("conv", "up"):
        getattr(net, name).register_forward_hook(lambda m, args, y, name=name: outputs.update({name: (args[0], y)}))
    calls = []
    net.twice.register_forward_hook(lambda m, args, y: calls.append((args[0], y)))
    loss = net(x).pow(3).sum()
    for name, (received, y) in outputs.items():
        (slope,) = torch.autograd.grad(loss, y, retain_graph=True)
        weight = getattr(net, name).weight
        absolute = torch.zeros_like(weight)
        signed = torch.zeros_like(weight)
        for n in range(len(received)):
            for position in range(received[0, 0].numel()):
                one = torch.zeros_like(received)
                one[n].flatten(1)[:, position] = received.detach()[n].flatten(1)[:, position]
                for place in range(slope[0, 0].numel()):
                    at = torch.zeros_like(slope)
                    at[n].flatten(1)[:, place] = slope[n].flatten(1)[:, place]
                    layer = getattr(net, name)
                    (term,) = torch.autograd.grad(type(layer).forward(layer, one), weight, at)
                    absolute += term.abs()
                    signed += term
        assert found[name] == pytest.approx(float(signed.abs().sum() / absolute.sum()), rel=1e6 * U)
    slopes = torch.autograd.grad(loss, [y for _, y in calls])
    terms = torch.cat([
        torch.einsum("no,ni->noi", slope, received.detach()) for slope, (received, _) in zip(slopes, calls, strict=True)
    ])  # fmt: skip
    expected = terms.sum(0).abs().sum() / terms.abs().sum()
    assert found["twice"] == pytest.approx(float(expected), rel=1e6 * U)


def test_terms_that_agree_do_not_cancel():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    net[1].eval()  # as a fine-tuner does; a model in train mode keeps its modules' modes
    found = gradient_depth(net, torch.rand(5, 3), lambda y, _: y.sum())
    assert found.cancellations[0].ratio == pytest.approx(1)


def test_a_layer_at_the_entrance_and_a_single_layer_are_measured():
    net = nn.Sequential(nn.BatchNorm1d(3))
    found = gradient_depth(net, torch.randn(8, 3), lambda y, _: y.pow(3).sum())
    assert found.layers[0].squared > 0
    assert math.isnan(found.factor)
    assert math.isnan(found.error)
    assert found.cancellations == ()
    assert str(found)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool):
    net = trained_net()
    net = net if training else net.eval()
    before = fingerprint(net)
    first = gradient_depth(net, data_of(0), lambda y, _: y.pow(2).mean())
    assert fingerprint(net) == before
    assert first == gradient_depth(net, data_of(0), lambda y, _: y.pow(2).mean())


def data_of(seed: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_the_model_is_left_as_it_was_when_loss_or_forward_raises():
    net = trained_net()
    before = fingerprint(net)
    with pytest.raises(ZeroDivisionError):
        gradient_depth(net, data_of(0), lambda y, _: 1 / 0)
    assert fingerprint(net) == before
    net.last.register_forward_hook(lambda *_: 1 / 0)
    before = fingerprint(net)
    with pytest.raises(ZeroDivisionError):
        gradient_depth(net, data_of(0), lambda y, _: y.sum())
    assert fingerprint(net) == before


def test_a_compiled_model_is_measured_like_its_original():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)), data()
    plain = gradient_depth(net, x, lambda y, _: y.pow(3).sum())
    assert gradient_depth(torch.compile(net, backend="eager"), x, lambda y, _: y.pow(3).sum()) == plain


def errors() -> list[tuple]:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU())
    x, mean = torch.randn(4, 3), lambda y, _: y.mean()
    return [
        (nn.Linear(3, 2), x, mean, None, ValueError, "batch norm layers that have a shape"),
        (net, x, lambda y, _: y, None, ValueError, r"one number, got shape \(4, 2\). Return its mean"),
        (net, x, lambda y, _: y.mean() * math.inf, None, ValueError, "needs a finite loss, got"),
        (
            net,
            x,
            lambda y, _: float(y.detach().mean()),
            None,
            TypeError,
            r"returns a tensor, got float. Leave out .item",
        ),
        (net, x, lambda y, _: y.detach().mean(), None, ValueError, "needs a loss with a gradient"),
        (net, x[:1], mean, None, ValueError, r"2 or more values per channel in train mode, got \(1, 2\) in layer '1'"),
        (net, x, mean, ["5"], ValueError, "needs names of modules, got '5'"),
        (net, x, mean, [], ValueError, "needs names of modules, got none"),
        (net, x, mean, ["2", "9"], ValueError, "got '9'"),
        ("net", x, mean, None, TypeError, "must be an nn.Module, got str"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_errors_say_what_to_do(case: int):
    model, x, loss, layers, kind, message = errors()[case]
    with pytest.raises(kind, match=message):
        gradient_depth(model, x, loss, layers)


def test_a_layer_that_does_not_run_is_named():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    with pytest.raises(ValueError, match="none of 'norm' ran"):
        gradient_depth(Unused(), data(), lambda y, _: y.mean())
