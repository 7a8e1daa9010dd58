"""The gap between train and eval mode, against models whose three losses are known."""

import math

import pytest
import torch
from fingerprint import fingerprint, trained_net
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.train_eval_gaps import train_eval_gap

U32 = 2.0**-24


def network(norm: type = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Linear(16, 16), norm(16), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(16, 16), norm(16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


def batches(count: int = 10, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 6) * 2 + 1, torch.randn(size, 3)) for _ in range(count)]


def square(y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (y - batch[1]).square().mean()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_stored_statistics_that_are_the_exact_ones_leave_no_stale_part(norm: type):
    net, data = network(norm), batches()
    bn.recalibrate(net, data)
    found = train_eval_gap(net, data, square)
    assert found.stale.value == 0
    assert found.stale.error == 0
    assert found.together == 0
    for layer in found.layers:
        assert (layer.share.value, layer.t_mean, layer.t_var) == (0, 0, 0)
    assert found.noise.value != 0
    assert found.noise.value == pytest.approx(found.population.value - found.batch.value)


@pytest.mark.parametrize("victim", ["1", "4", "8"])
def test_one_wrong_layer_is_named_and_explains_the_stale_part(victim: str):
    net, data = network(), batches()
    bn.recalibrate(net, data)
    layer = net.get_submodule(victim)
    layer.running_mean += 2 * layer.running_var.sqrt()
    layer.running_var *= 9
    found = train_eval_gap(net, data, square)
    assert [each.name for each in found.layers] == ["1", "4", "8"]
    assert found.worst.name == victim
    assert found.stale.value != 0
    # the others store what is exact behind exact layers, so mending the victim mends all but float32's rounding
    assert found.worst.share.value == pytest.approx(found.stale.value, rel=1e4 * U32)
    assert found.worst.t_mean > 4
    assert found.worst.t_var > 4
    assert f"in {victim}" in str(found)


def test_the_losses_are_those_of_the_three_modes():
    net, data = network().double(), [(x.double(), y.double()) for x, y in batches(4)]
    for layer in (net[1], net[4], net[8]):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    found = train_eval_gap(net, data, square)

    def losses(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.stack([square(model(x), (x, y)) for x, y in data])

    near = {"rel": 1e-12}
    stored = losses(net.eval())
    assert found.eval.value == pytest.approx(float(stored.mean()), **near)
    assert found.eval.error == pytest.approx(float(stored.std() / 2), **near)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    bn.recalibrate(net, data)
    exact = losses(net)
    assert found.population.value == pytest.approx(float(exact.mean()), **near)
    assert found.stale.value == pytest.approx(float((stored - exact).mean()), **near)
    assert found.stale.error == pytest.approx(float((stored - exact).std() / 2), **near)
    mended = {name: value.clone() for name, value in net.state_dict().items()}
    for each in found.layers:
        own = {n: v for n, v in mended.items() if n.startswith(f"{each.name}.")}
        net.load_state_dict(state | own)
        assert each.share.value == pytest.approx(float((stored - losses(net)).mean()), **near)
    net.train()[6].eval()
    trained = losses(net)
    assert found.batch.value == pytest.approx(float(trained.mean()), **near)
    assert found.noise.value == pytest.approx(float((exact - trained).mean()), **near)
    assert (found.batches, found.examples) == (4, 128)


@pytest.mark.slow
def test_in_batches_of_2_all_outputs_are_1_in_train_mode_and_eval_mode_knows_it_not():
    net = nn.BatchNorm1d(512, eps=1e-12, affine=False, momentum=None).double()
    data = [torch.randn(2, 512).double() for _ in range(400)]
    for x in data:
        net(x)
    found = train_eval_gap(net, data, lambda y, _: y.abs().mean())
    # |d| / sqrt(d^2 + eps) of half differences d, whose density is 0.56 at 0: 1 - 1.1 sqrt(eps) on average
    assert found.batch.value == pytest.approx(1, abs=1e-5)
    # E|z| = sqrt(2 / pi) of a normal z, over 800 x 512 values: the noise part is all of the difference, for torch
    # stores unbiased variances, whose average is right at M = 2 as well. The spread of |z| is 0.6.
    sampling = 5 * 0.6 / math.sqrt(800 * 512)
    assert found.noise.value == pytest.approx(math.sqrt(2 / math.pi) - 1, abs=sampling)
    # The average of 400 unbiased variances of 2 values is off by sqrt(2 / 400) in each channel: 1 / sd by half of it,
    # and by 3 / 8 of its square on average
    assert abs(found.stale.value) < 2 / 400 + 5 * math.sqrt(2 / 400) / math.sqrt(512)


def test_a_running_average_of_the_same_batches_is_a_few_standard_errors_from_the_exact_mean():
    net, data = nn.BatchNorm1d(256, momentum=0.1), [torch.randn(32, 256) * 3 + 5 for _ in range(100)]
    for x in data:
        net(x)
    (layer,) = train_eval_gap(net, data, lambda y, _: y.square().mean()).layers
    # an rms over 256 channels of a normal number of variance about 1 (the average has 100 of its batches in common with
    # the exact mean: a / (2 - a) - 1 / 100 in the place of a / (2 - a) + 1 / 100, 17 % less), known to 1 / sqrt(512)
    assert layer.t_mean == pytest.approx(0.83, abs=5 / math.sqrt(512))
    assert layer.t_var == pytest.approx(0.83, abs=5 / math.sqrt(512))
    for x in data[:1]:
        net(x + 30)
    (layer,) = train_eval_gap(net, data, lambda y, _: y.square().mean()).layers
    assert layer.t_mean > 4


def test_one_batch_has_no_standard_error():
    found = train_eval_gap(network(), batches(1), square)
    assert math.isnan(found.noise.error)
    assert math.isnan(found.layers[0].t_mean)


def test_batches_count_by_their_examples():
    net = network().eval()
    x, y = torch.randn(48, 6), torch.randn(48, 3)
    even = train_eval_gap(net, [(x[:24], y[:24]), (x[24:], y[24:])], square)
    uneven = train_eval_gap(net, [(x[:40], y[:40]), (x[40:], y[40:])], square)
    assert even.eval.value == pytest.approx(uneven.eval.value, rel=1e3 * U32)
    assert even.population.value == pytest.approx(uneven.population.value, rel=1e3 * U32)
    assert train_eval_gap(net, [(x, y)], square, max_examples=10).examples == 10


def test_loaders_that_shuffle_and_generators_are_read_once_a_pass():
    net = network()
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    first = train_eval_gap(net, loader, square)
    assert first == train_eval_gap(net, loader, square)
    assert train_eval_gap(net, iter(batches(3)), square).batches == 3


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(x) * scale.view(-1, 1)


def test_batches_by_name_and_frozen_layers():
    data = [{"x": torch.randn(8, 3), "scale": torch.rand(8)} for _ in range(3)]
    assert train_eval_gap(Named(), data, lambda y, _: y.square().mean()).examples == 24
    net = network()
    bn.freeze(net[1])
    net[4].eval()
    assert [layer.name for layer in train_eval_gap(net, batches(2), square).layers] == ["8"]
    assert [layer.name for layer in train_eval_gap(net.eval(), batches(2), square).layers] == ["4", "8"]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool):
    net = trained_net()
    net = net if training else net.eval()
    before = fingerprint(net)
    data = list(torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0)))
    train_eval_gap(net, data, lambda y, _: y.square().mean())
    assert fingerprint(net) == before


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6, 7, 8, 9])
def test_the_model_is_left_as_it_was_when_loss_or_forward_raises(at: int):
    net, evaluations = trained_net(), iter(range(1, 100))
    net.first.register_forward_hook(lambda *_: 1 / 0 if next(evaluations) == at else None)
    before = fingerprint(net)
    data = list(torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ZeroDivisionError):
        train_eval_gap(net, data, lambda y, _: y.square().mean())
    assert fingerprint(net) == before
    with pytest.raises(ZeroDivisionError):
        train_eval_gap(net, data, lambda y, _: 1 / 0)
    assert fingerprint(net) == before


def errors() -> list[tuple]:
    net, data = network(), batches(2)
    x, y = data[0]
    stateless = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False))
    return [
        (nn.Linear(6, 3), data, square, ValueError, "batch norm layers that have a shape"),
        (stateless, data, square, ValueError, "layers with stored statistics, got none"),
        (net, [], square, ValueError, "at least one batch"),
        (net, x, square, TypeError, "an iterable of batches, got Tensor"),
        (
            net,
            [(x, y), (x[:1], y[:1])],
            square,
            ValueError,
            r"2 or more values per channel .* got \(1, 16\) in layer '1'",
        ),
        (net, data, lambda y, _: y, ValueError, "needs a loss of one number"),
        (net, data, lambda y, _: y.mean() / 0, ValueError, "needs a finite loss"),
        (net, data, lambda y, _: 0.5, TypeError, "returns a tensor, got float"),
        (None, data, square, TypeError, "must be an nn.Module, got NoneType"),
    ]


@pytest.mark.parametrize("case", range(9))
def test_errors_say_what_to_do(case: int):
    *arguments, kind, message = errors()[case]
    with pytest.raises(kind, match=message):
        train_eval_gap(*arguments)


@pytest.mark.filterwarnings("ignore:recalibrate measured nothing")
def test_a_model_whose_layers_are_all_frozen_has_no_gap_to_take_apart():
    with pytest.raises(ValueError, match="all layers are frozen, or none ran"):
        train_eval_gap(bn.freeze(network()), batches(2), square)
