"""recalibrate: exact population statistics, whatever the batches; nothing else of the model is touched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from tensor_kinds import freed
from torch import nn

import batchnorm as bn
from batchnorm import Moments, freeze, recalibrate

U = 2.0**-53  # unit roundoff of float64
# Every statistic below is a sum of at most 300 values, each the result of three layers of sums of at most 27
# products; errors relative to the spread of a channel grow by less than 100 from layer to layer.
ROUNDING = 300 * 27 * 100**2 * U

pytestmark = pytest.mark.usefixtures("forwards")


def conv_net(make: type = nn.BatchNorm2d) -> nn.Sequential:
    """Two batch norm layers that see convolutions, one that sees features, and dropout, in float64."""
    flat = nn.BatchNorm1d if make is nn.BatchNorm2d else bn.BatchNorm1d
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), make(3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 4, 3), make(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 5), flat(5), nn.Linear(5, 1),
    )  # fmt: skip
    for layer in (net[1], net[5], net[9]):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    return net.double()


def images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64) * 3 + 2


def by_hand(net: nn.Sequential, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and unbiased variance of what each batch norm layer gets, the whole data set in one batch."""
    found = []
    for layer in net:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            rows = x.movedim(1, 0).flatten(1)
            mean, var = rows.mean(1), rows.var(1, correction=1)
            found.append((mean, var))
            x = F.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)
        elif not isinstance(layer, nn.Dropout):
            x = layer(x)
    return found


def assert_statistics(net: nn.Module, paths: list[str], expected: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for path, (mean, var) in zip(paths, expected, strict=True):
        layer = net.get_submodule(path)
        torch.testing.assert_close(layer.running_mean, mean, rtol=ROUNDING, atol=ROUNDING * var.max().sqrt().item())
        torch.testing.assert_close(layer.running_var, var, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_every_layer_stores_the_statistics_of_the_whole_data_set_behind_finished_layers(make):
    net, x = conv_net(make), images()
    with torch.no_grad():
        expected = by_hand(net, x)
    measured = recalibrate(net, x.split(5))
    assert list(measured) == ["1", "5", "9"]
    assert_statistics(net, ["1", "5", "9"], expected)
    assert [int(net[i].num_batches_tracked) for i in (1, 5, 9)] == [3, 3, 3]
    assert [m.count.unique().tolist() for m in measured.values()] == [[12 * 16], [12 * 4], [12]]
    for path, moments in measured.items():
        assert net.get_submodule(path).running_var.equal(moments.unbiased_var)


@pytest.mark.slow
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), order=st.randoms(use_true_random=False))
def test_neither_the_batch_sizes_nor_the_order_of_examples_matter(sizes, order):
    torch.manual_seed(0)
    net, x = conv_net(), images(sum(sizes) + 2)
    with torch.no_grad():
        expected = by_hand(net, x)
    rows = list(range(len(x)))
    order.shuffle(rows)
    recalibrate(net, x[rows].split([*sizes, 1, 1]))  # the last batches hold one example each
    assert_statistics(net, ["1", "5", "9"], expected)


def test_the_result_does_not_depend_on_what_was_stored_before():
    net, x = conv_net(), images()
    twin = copy.deepcopy(net)
    for layer in (twin[1], twin[5], twin[9]):
        layer.running_mean.fill_(1e3)
        layer.running_var.fill_(torch.nan)
    recalibrate(net, x.split(5))
    recalibrate(twin, x.split(5))
    assert all(a.equal(b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def test_only_statistics_change_and_only_of_open_layers():
    net = conv_net()
    freeze(net[1])
    net[5].eval()
    net[9].momentum = 0.7
    net[8].weight.grad = torch.ones_like(net[8].weight)
    net.append(nn.BatchNorm1d(1, track_running_stats=False)).double()
    memory = net[9].running_mean.data_ptr()
    twin = copy.deepcopy(net)
    x = images()
    before = fingerprint(net)
    measured = recalibrate(net, x.split(4))
    assert list(measured) == ["9"]
    assert net[9].running_mean.data_ptr() == memory
    assert not net[9].running_mean.equal(twin[9].running_mean)
    for now, then in zip(net[9].buffers(), twin[9].buffers(), strict=True):
        now.copy_(then)
    assert fingerprint(net) == before


def test_in_a_model_in_eval_mode_all_layers_are_measured_and_stay_in_eval_mode():
    net = conv_net().eval()
    assert list(recalibrate(net, [images()])) == ["1", "5", "9"]
    assert not any(module.training for module in net.modules())


class Named(nn.Module):
    """One layer, with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


X = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 9.0]])


class Interrupted:
    """Batches of which one, in a given pass, is an exception."""

    def __init__(self, in_pass: int, error: type[BaseException]) -> None:
        self.passes, self.in_pass, self.error, self.x = 0, in_pass, error, images()

    def __iter__(self):
        self.passes += 1
        yield self.x
        if self.passes == self.in_pass:
            raise self.error
        yield self.x


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("in_pass", [1, 2, 4])
def test_an_interrupt_in_any_pass_leaves_the_model_bit_identical(in_pass, error):
    net = conv_net()
    loader = Interrupted(in_pass, error)
    before = fingerprint(net)
    with pytest.raises(error):
        recalibrate(net, loader, memory=0)
    assert fingerprint(net) == before


def test_an_interrupt_while_statistics_are_stored_leaves_the_model_bit_identical():
    net = conv_net()

    class Stubborn(torch.Tensor):
        """A counter that is interrupted when a new count is written outside of the shield."""

        def copy_(self, value):  # called by recalibrate for the last layer, after others were stored
            if not net[9]._forward_pre_hooks and net.training and int(value) == 1:
                raise KeyboardInterrupt
            return super().copy_(value)

    assert int(net[9].num_batches_tracked) != 1
    net[9].num_batches_tracked = net[9].num_batches_tracked.as_subclass(Stubborn)
    x = images()
    before = fingerprint(net)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(net, [x])
    assert fingerprint(net) == before


def test_the_cost_is_one_pass_and_then_one_for_each_layer_up_to_that_layer():
    net = conv_net()
    calls = dict.fromkeys(range(len(net)), 0)
    for i, layer in enumerate(net):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    recalibrate(net, [images()], memory=0)
    # in pass k the k-th batch norm layer is reached (its hooks run, the layer does not), nothing behind it
    assert [calls[i] for i in (0, 1, 4, 5, 8, 9, 10)] == [4, 4, 3, 3, 2, 2, 1]
    calls.update(dict.fromkeys(calls, 0))
    recalibrate(net, [images()], exact=False)
    assert set(calls.values()) == {1}


class Siamese(nn.Module):
    """One encoder over two inputs, with two layers, and a third behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.second = nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.last = nn.BatchNorm1d(2)

    def encode(self, x):
        return self.second(self.linear(self.first(x)).relu())

    def forward(self, pair):
        return self.last(self.encode(pair["a"]) * self.encode(pair["b"]))


def test_a_layer_called_several_times_in_a_forward_pools_over_its_calls():
    net = Siamese().double()
    a, b = torch.randn(2, 20, 2, dtype=torch.float64)
    with torch.no_grad():
        both = torch.cat([a * 2, b + 5])
        first = both.mean(0), both.var(0)
        hidden = net.linear(F.batch_norm(both, *first)).relu()
        second = hidden.mean(0), hidden.var(0)
        codes = F.batch_norm(hidden, *second)
        product = codes[:20] * codes[20:]
    batches = [{"a": a * 2, "b": b + 5} for a, b in zip(a.split(7), b.split(7), strict=True)]
    measured = recalibrate(net, batches)
    assert [m.count.unique().tolist() for m in measured.values()] == [[40], [40], [20]]
    assert_statistics(net, ["first", "second", "last"], [first, second, (product.mean(0), product.var(0))])


class Recurrent(nn.Module):
    """A layer that feeds itself, through another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        for _ in range(3):
            x = self.b(torch.tanh(self.a(x)) + x).relu()
        return x


def test_a_recurrent_layer_gets_one_answer_whatever_was_stored_and_however_it_is_batched():
    x = torch.randn(20, 2, dtype=torch.float64)
    nets = [Recurrent().double() for _ in range(2)]
    nets[1].a.running_var.fill_(50.0)
    for net, size in zip(nets, (20, 1), strict=True):
        assert {int(m.count.max()) for m in recalibrate(net, x.split(size)).values()} == {60}
    assert_statistics(nets[0], ["a", "b"], [(m.running_mean, m.running_var) for m in (nets[1].a, nets[1].b)])


class Domains(nn.Module):
    """A stem of its own for each domain, declared last first, and a shared trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.BatchNorm1d(2)
        self.stems = nn.ModuleDict({"b": nn.BatchNorm1d(2), "a": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})

    def forward(self, batch):
        return self.trunk(self.stems[batch["domain"]](batch["x"]).relu())


def test_layers_before_a_shared_one_are_measured_first_although_batches_take_different_ways():
    net = Domains().double()
    a, b = torch.randn(10, 2, dtype=torch.float64) + 5, torch.randn(6, 2, dtype=torch.float64) * 9
    batches = [{"domain": "a", "x": x} for x in a.split(4)] + [{"domain": "b", "x": x} for x in b.split(4)]
    stems = [(x.mean(0), x.var(0)) for x in (a, b)]
    hidden = torch.cat([F.batch_norm(x, *stem).relu() for x, stem in zip((a, b), stems, strict=True)])
    message = r"^no forward reached 'stems.unused': they keep their statistics. Give batches, or"
    with pytest.warns(RuntimeWarning, match=message):
        measured = recalibrate(net, batches)
    assert list(measured)[-1] == "trunk"
    assert_statistics(net, ["stems.a", "stems.b", "trunk"], [*stems, (hidden.mean(0), hidden.var(0))])
    assert [int(m.num_batches_tracked) for m in (net.trunk, *net.stems.values())] == [5, 2, 3, 0]
    assert net.stems["unused"].running_var.tolist() == [1, 1]


def test_forwards_that_contradict_each_other_in_their_order_still_end():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x):
            return self.b(self.a(x)) if x[0] > 0 else self.a(self.b(x))

    net = Either()
    assert list(recalibrate(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[-5.0], [-3.0]])])) == ["a", "b"]
    assert int(net.a.num_batches_tracked) == int(net.b.num_batches_tracked) == 2


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_with_nan_or_infinity_is_left_out_for_its_channels_and_named(poison, exact):
    net = nn.Sequential(nn.Identity(), nn.BatchNorm1d(2))
    bad = X.clone()
    bad[1, 0] = poison
    message = r"^NaN or infinity in the input of '1' \(inputs: 1, channels: 1 of 2\): these batches were excluded"
    with pytest.warns(RuntimeWarning, match=message):
        measured = recalibrate(net, [X, bad], exact=exact)["1"]
    assert measured.count.tolist() == [3, 6]
    assert net[1].running_mean.tolist() == [3, 3]
    torch.testing.assert_close(net[1].running_var, torch.tensor([7.0, 108 / 5]), rtol=1e-7, atol=0)


def test_an_example_with_nan_does_not_poison_deeper_layers():
    net, x = conv_net(), images()
    bad = x[:2].clone()
    bad[0, 0, 0, 0] = torch.nan
    twin = copy.deepcopy(net)
    with pytest.warns(
        RuntimeWarning, match=r"'1' \(inputs: 1, channels: 3 of 3\), '5' .*, '9' \(inputs: 1, channels: 5 of 5\)"
    ):
        recalibrate(net, [bad, x])
    recalibrate(twin, [x])
    assert all(a.equal(b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def test_one_pass_normalizes_by_batch_statistics_and_pools_by_count():
    net, x = conv_net(), images(11)
    means, variances, hidden = [], [], []
    with torch.no_grad():
        for part in x.split(4):
            y = net[0](part)
            rows = y.movedim(1, 0).flatten(1)
            y = F.batch_norm(y, None, None, net[1].weight, net[1].bias, training=True)
            hidden.append(net[4](y.relu()).movedim(1, 0).flatten(1))
            means.append(rows)
        variances = [torch.cat(rows, 1) for rows in (means, hidden)]
    measured = recalibrate(net, x.split(4), exact=False)
    assert list(measured) == ["1", "5", "9"]
    assert_statistics(net, ["1", "5"], [(rows.mean(1), rows.var(1)) for rows in variances])


def test_the_one_pass_estimate_takes_a_batch_of_one():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    recalibrate(net, X.split(2), exact=False)
    assert net[0].running_mean.tolist() == [3, 3]


@pytest.mark.slow
def test_a_model_that_was_compiled_before_is_measured_too():
    net, x = conv_net(), images()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for mode in (False, True):  # code for both modes, neither of which has hooks
        compiled.train(mode)(x)
    recalibrate(twin, [x])
    assert list(recalibrate(compiled, [x])) == ["_orig_mod.1", "_orig_mod.5", "_orig_mod.9"]
    assert_statistics(net, ["1", "5", "9"], [(m.running_mean, m.running_var) for m in (twin[1], twin[5], twin[9])])


def test_a_model_that_catches_every_exception_and_tries_again_is_measured_once():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(3))

        def forward(self, x):
            for norm in self.norms:
                try:
                    x = norm(x) + 1
                except Exception:  # noqa: BLE001 - what users write
                    x = norm(x)
            return x

    net = Careful()
    assert {int(m.count[0]) for m in recalibrate(net, [X, X]).values()} == {6}


def test_mean_far_from_zero_keeps_its_digits():
    """Relative error of the variance of float64 values: eps * (mean / std)^2 for E[x^2]-E[x]^2, here 1e-16 * 1e18."""
    rows = torch.randn(1000, 2, dtype=torch.float64) * 1e-3 + 1e6
    net = nn.Sequential(nn.BatchNorm1d(2)).double()
    recalibrate(net, rows.split(98))
    centred = (rows - 1e6).numpy()  # exact: the values have a common exponent
    truth = torch.from_numpy(centred).var(0)
    # a mean near 1e6 is rounded to 1e6 u, which shifts a deviation of 1e-3 by 1e9 u; squared sums by (1e9 u)^2
    torch.testing.assert_close(net[0].running_var, truth, rtol=1e9 * U, atol=0)


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Identity())
    before = fingerprint(net)
    with pytest.raises(RuntimeWarning, match="NaN or infinity"):
        recalibrate(net, [X, X * math.nan])
    assert fingerprint(net) == before


def test_moments_of_two_data_sets_add_up_to_those_of_both():
    """For the first layer, whose input no statistic touches."""
    net = Named()
    parts = [recalibrate(net, [x])["norm"] for x in (X, X + 3)]
    both = recalibrate(net, [X, X + 3])["norm"]
    whole: Moments = parts[0] + parts[1]
    assert whole.mean.equal(both.mean)
    torch.testing.assert_close(whole.m2, both.m2, rtol=8 * U, atol=0)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 2), nn.BatchNorm1d(3, track_running_stats=False), freeze(nn.BatchNorm1d(3))],
    ids=["no layer", "no statistics", "frozen"],
)
def test_a_model_with_nothing_to_measure_is_told_of(model):
    with pytest.warns(RuntimeWarning, match="recalibrate measured nothing"):
        assert recalibrate(model, [torch.randn(8, 3)]) == {}


def test_a_layer_whose_own_forward_names_its_input_otherwise_is_measured() -> None:
    class Named(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Named(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x=x)

    model, x = Model(), torch.randn(16, 3) + 2
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    assert bn.probe(model, x)["mean_square"]["norm"] is not None
    with bn.ShiftMonitor(model.eval(), examples=None, budget=None) as monitor:
        model(x)
    assert monitor.stream.evidence.observations == 16


@pytest.mark.parametrize("kind", ["freed", "meta"])
@pytest.mark.parametrize("entrance", [recalibrate, bn.adapt, lambda model, _: bn.ShiftMonitor(model)])
def test_statistics_that_cannot_be_read_are_refused(kind, entrance):
    model = nn.Sequential(nn.BatchNorm1d(3))
    if kind == "meta":
        model.to("meta")
    else:
        freed(model[0].running_var)
    with pytest.raises(ValueError, match=r"needs the numbers of '0.running_(mean|var)', got a tensor that "):
        entrance(model, [torch.randn(8, 3)])


def test_batch_norm_that_is_no_layer_is_named_beside_layers_that_were_measured():
    class Function(nn.Module):
        def forward(self, x):
            return nn.functional.batch_norm(x, None, None, training=True)

    model = nn.Sequential(nn.BatchNorm1d(3), Function())
    with pytest.warns(RuntimeWarning, match=r"^recalibrate did not reach all batch norm: '1' calls torch's batch_norm"):
        assert list(recalibrate(model, [torch.randn(8, 3)])) == ["0"]
