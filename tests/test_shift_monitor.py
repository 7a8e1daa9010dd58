"""ShiftMonitor: what it promises on clean streams, how soon it rings on shifted ones, and that nobody notices it."""

import copy
import itertools
import logging
import math
import statistics
import threading
import warnings
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import forked
import pytest
import torch
from fingerprint import fingerprint
from small_networks import Written
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.shift import Reference, ShiftMonitor, alarm_reference, stream_state
from batchnorm.shift.alarm import e_bh, first_moved, hint
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.fleet import combined
from batchnorm.shift.fleet_states import Replica
from batchnorm.shift.observation_units import Autocorrelation, Grouping
from batchnorm.shift.principal_components import halves
from batchnorm.shift.stream import Stream

CHANNELS, LAYERS = 32, 3


class Net(nn.Module):
    """Three convolutions with batch norm, whose stored statistics are exact for ``images``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 16)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, bias=False) for a, b in itertools.pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.bns, strict=True):
            x = torch.relu(norm(conv(x)))
        return x.mean((2, 3))


def images(n: int, seed: int | None = None) -> Tensor:
    """Smooth colours, brightness of their own, and some noise."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    colours = torch.randn(n, 3, 4, 4, generator=generator).repeat_interleave(5, 2).repeat_interleave(5, 3)
    return (
        colours
        + 0.5 * torch.randn(n, 1, 1, 1, generator=generator)
        + 0.3 * torch.randn(n, 3, 20, 20, generator=generator)
    )


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    bn.recalibrate(model, [images(256, seed) for seed in range(8)])
    return model.eval()


def ran(monitor: ShiftMonitor, model: nn.Module, batches: list[Tensor]) -> ShiftMonitor:
    with monitor, torch.no_grad():
        for batch in batches:
            model(batch)
    return monitor


def watching(model: nn.Module, **more: object) -> ShiftMonitor:
    """A monitor that looks at everything, whatever that costs."""
    return ShiftMonitor(model, **{"examples": None, "budget": None, **more})


# -- the promise --------------------------------------------------------------------------------------------------


def reference(kappa: float = 0.2) -> Reference:
    n = CHANNELS * LAYERS
    ones, layers = torch.ones(n, dtype=torch.float64), torch.ones(LAYERS, dtype=torch.float64)
    return Reference(
        tuple(f"bn{i}" for i in range(LAYERS)), (CHANNELS,) * LAYERS, 0 * ones, ones, 0.1 * ones, kappa * ones,
        0.1 * layers, 0.2 * layers, None, "example", 0, "none",
    )  # fmt: skip


def heavy(n: int, *, mean: float = 0.0, energy: float = 1.0) -> tuple[Tensor, Tensor]:
    """Observations at the edge of the null: skewed means of the largest mean and variance, skewed energies."""
    z = math.sqrt(0.2) * (torch.distributions.Exponential(1.0).sample((n, CHANNELS * LAYERS)).double() - 1) + mean
    of_layer = energy * torch.distributions.Gamma(5.0, 5.0).sample((n, LAYERS)).double()  # variance 1 / 5
    return z, of_layer.repeat_interleave(CHANNELS, 1)


def rings(observe, *, streams: int, rounds: int, **promise: object) -> int:
    count = 0
    for _ in range(streams):
        stream = Stream(reference(), "example", **{"alpha": 0.05, "arl": None, **promise})
        for _ in range(rounds):
            stream.observe(*observe(8))
            if stream.alarm is not None:
                count += 1
                break
    return count


@pytest.mark.slow
def test_false_alarms_are_rarer_than_alpha_at_the_edge_of_the_null(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    streams = 120
    found = rings(lambda n: heavy(n, mean=0.1, energy=1.1), streams=streams, rounds=50)
    # Binomial(120, .05): at most 13 with 99.6 %
    assert found <= 13


def test_a_moved_mean_beyond_the_null_rings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    assert rings(lambda n: heavy(n, mean=0.6), streams=10, rounds=60) == 10


@pytest.mark.slow
def test_the_average_run_length_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """20 streams of 2,000 observations ring 40 times at the worst rate for arl 1,000; these are far off it."""
    caplog.set_level(logging.CRITICAL)
    assert rings(lambda n: heavy(n), streams=20, rounds=250, arl=1000.0) <= 20
    assert rings(lambda n: heavy(n, mean=0.6), streams=5, rounds=60, arl=1000.0) == 5


# -- on a model ---------------------------------------------------------------------------------------------------

SHIFTS = {
    "brightness": lambda x: x - 1.0,
    "contrast": lambda x: x * 0.4,
    "noise": lambda x: x + torch.randn_like(x),
}


def test_a_clean_stream_does_not_ring(net: Net) -> None:
    monitor = ran(watching(net), net, [images(16) for _ in range(40)])
    assert monitor.alarm is None
    assert monitor.stream.evidence.observations == 640
    assert monitor.log_evidence < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_shifted_stream_rings(net: Net, name: str, calibrated: bool, caplog: pytest.LogCaptureFixture) -> None:
    heard = []
    monitor = watching(net, on_alarm=heard.append)
    if calibrated:
        monitor.calibrate([images(100) for _ in range(4)])
    ran(monitor, net, [images(16) for _ in range(10)])
    assert monitor.alarm is None
    before = monitor.stream.evidence.observations
    ran(monitor, net, [SHIFTS[name](images(16)) for _ in range(40)])
    assert monitor.alarm is not None
    # who was told at once was told what was known then; a hint may come later
    assert [replace(alarm, hint=monitor.alarm.hint) for alarm in heard] == [monitor.alarm]
    assert heard[0].hint in {"", monitor.alarm.hint}
    assert "the inputs' distribution moved" in caplog.text
    assert monitor.alarm.observations - before <= (48 if calibrated else 480)
    assert monitor.alarm.examples >= monitor.alarm.observations
    assert monitor.alarm.first in {"bns.0", "bns.1", None}
    monitor.reset()
    assert monitor.alarm is None


def test_an_alarm_names_the_channels_that_moved(net: Net) -> None:
    monitor = watching(net)
    monitor.calibrate([images(100) for _ in range(4)])
    ran(monitor, net, [images(16) - 1.0 for _ in range(10)])
    first = monitor.table()[0]
    weights = net.convs[0].weight.detach().sum((1, 2, 3)).abs()  # what a channel makes of a change of brightness
    assert int(weights.argmax()) in first.channels
    assert first.w2 > 0.3
    assert first.kl > 0.05


def test_the_model_is_as_it_was_and_answers_the_same(net: Net) -> None:
    before, x = fingerprint(net), images(8, seed=3)
    random = torch.get_rng_state()
    with torch.no_grad():
        expected = net(x)
        with watching(net):
            assert torch.equal(net(x), expected)
    assert torch.equal(torch.get_rng_state(), random)
    monitor = watching(net)
    monitor.calibrate([images(256, seed=5)])
    assert fingerprint(net)[0] == before[0]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


@pytest.mark.slow
def test_a_compiled_model_is_observed(net: Net) -> None:
    compiled = torch.compile(net, backend="aot_eager")
    monitor = ran(watching(compiled), compiled, [images(16) - 1.0 for _ in range(10)])
    assert monitor.alarm is not None
    eager = ran(watching(net), net, [images(16, seed) for seed in range(3)])
    again = ran(watching(compiled), compiled, [images(16, seed) for seed in range(3)])
    assert again.log_evidence == pytest.approx(eager.log_evidence, rel=1e-4)


def test_few_examples_are_looked_at_by_default(net: Net) -> None:
    monitor = ran(ShiftMonitor(net, budget=None), net, [images(16) for _ in range(5)])
    assert (monitor.stream.evidence.observations, monitor.stream.passed) == (20, 80)


def test_the_first_256_examples_are_looked_at_and_then_whole_batches_are_left_out_to_keep_the_budget(net: Net) -> None:
    monitor = ran(ShiftMonitor(net, budget=1e-9), net, [images(8) for _ in range(70)])
    # four of each batch; no look that follows is affordable within a billionth of the time
    assert (monitor.stream.looked, monitor.stream.passed) == (256, 560)
    assert monitor.stream.evidence.observations == 256


def test_a_gross_shift_rings_under_the_smallest_budget(net: Net) -> None:
    monitor = ran(ShiftMonitor(net, budget=1e-9), net, [images(16) - 1.0 for _ in range(40)])
    assert monitor.alarm is not None


@pytest.mark.slow
def test_a_budget_that_leaves_next_to_nothing_is_told_once(net: Net) -> None:
    monitor = ran(ShiftMonitor(net, budget=1e-9), net, [images(32) for _ in range(64 + 31)])
    more = [images(32) for _ in range(30)]
    with pytest.warns(RuntimeWarning, match=r"budget=1e-09 leaves 0 of 1024 examples .* budget=None\.$") as told:
        ran(monitor, net, more * 2)
    assert len(told) == 1


@pytest.mark.parametrize("more", [{"budget": None}, {"budget": 1e9}, {"budget": 1e9, "examples": 1}])
def test_a_budget_that_leaves_no_batch_out_is_not_blamed(net: Net, more: dict) -> None:
    ran(ShiftMonitor(net, **more), net, [images(64) for _ in range(40)])


def test_a_monitor_shows_how_many_examples_it_looked_at(net: Net) -> None:
    monitor = ran(ShiftMonitor(net, budget=None), net, [images(16) for _ in range(5)])
    assert repr(monitor) == f"ShiftMonitor(Net, layers={len(monitor.layers)}, observed 20 of 80 examples, no alarm)"
    ran(monitor, net, [images(16) - 2.0 for _ in range(20)])
    assert f"observed 100 of 400 examples, alarm at {monitor.alarm.first}" in repr(monitor)


def test_a_saved_monitor_still_knows_how_many_it_looked_at(net: Net, tmp_path) -> None:
    first = ran(ShiftMonitor(net, budget=1e-9), net, [images(8) for _ in range(70)])
    first.save(tmp_path / "a.bnshift.safetensors")
    second = ShiftMonitor(net, budget=1e-9).load(tmp_path / "a.bnshift.safetensors")
    assert (second.stream.looked, second.stream.passed) == (256, 560)
    ran(second, net, [images(8) for _ in range(5)])
    assert second.stream.looked <= 256 + 4  # no second start of 256


def test_train_mode_and_partial_passes_are_told(net: Net) -> None:
    monitor = watching(net)
    net.train()
    try:
        with pytest.warns(RuntimeWarning, match=r"the model is in train mode"):
            ran(monitor, net, [images(8)])
    finally:
        net.eval()
    assert monitor.stream.evidence.observations == 0


def test_an_example_with_nan_is_left_out(net: Net) -> None:
    x = images(8)
    x[3] = torch.nan
    monitor = watching(net)
    with pytest.warns(RuntimeWarning, match=r"NaN or infinite activations"):
        ran(monitor, net, [x])
    assert monitor.stream.evidence.observations == 7


def test_a_callback_that_raises_does_not_stop_inference(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    def broken(alarm: object) -> None:
        raise ZeroDivisionError

    ran(watching(net, on_alarm=broken), net, [images(16) - 2.0 for _ in range(10)])
    assert "on_alarm raised" in caplog.text


# -- units --------------------------------------------------------------------------------------------------------


def test_observations_are_examples_batches_or_runs_of_keys() -> None:
    z = torch.arange(12.0).reshape(6, 2).double()
    assert torch.equal(Grouping("example").of(z, z, None)[0], z)
    assert torch.equal(Grouping("batch").of(z, z, None)[0], z.mean(0, keepdim=True))
    runs = Grouping(lambda keys: keys)
    first, _ = runs.of(z[:4], z[:4], ["a", "a", "b", "b"])
    assert torch.equal(first, z[:2].mean(0, keepdim=True))
    second, _ = runs.of(z[4:], z[4:], ["b", "c"])
    assert torch.allclose(second, z[2:5].mean(0, keepdim=True))
    with pytest.raises(ValueError, match=r"must return a key for each example, 6 or more, got 2"):
        Grouping(lambda _: ["a", "b"]).of(z, z, None)


@pytest.mark.slow
def test_neighbours_that_are_alike_are_told(net: Net) -> None:
    sorted_by_class = [images(1).expand(10, -1, -1, -1) + 0.05 * torch.randn(10, 3, 20, 20) for _ in range(40)]
    with pytest.warns(RuntimeWarning, match=r"neighbouring observations are alike .* Use a larger unit"):
        ran(watching(net), net, sorted_by_class)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran(watching(net, unit="batch"), net, sorted_by_class)
        ran(watching(net), net, [images(10) for _ in range(40)])


def test_the_correlation_of_neighbours_is_that_of_an_autoregression() -> None:
    found, row = Autocorrelation(), torch.zeros(400).double()
    for _ in range(200):
        rows = []
        for _ in range(4):
            row = 0.6 * row + 0.8 * torch.randn(400).double()
            rows.append(row)
        found.add(torch.stack(rows), torch.zeros(400).double(), torch.ones(400).double())
    # a window's own mean takes 1 / 64 (1 + 0.6) / (1 - 0.6) = 0.06 of the variance, of products as of squares: r falls
    # by about 0.4 x 0.06, and rises by 1 / 64; the standard error over 12 windows of 400 channels is 0.002
    assert found.r == pytest.approx(0.6 - 0.4 * 0.0625 + 1 / 64, abs=0.02)
    assert found.is_wrong


def test_a_shift_in_the_middle_of_a_stream_is_not_blamed_on_the_unit(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = ran(watching(net), net, [images(10) for _ in range(22)] + [images(10) - 1.0 for _ in range(40)])
    assert monitor.alarm is not None


def test_passes_of_several_threads_are_kept_apart(net: Net) -> None:
    class Slow(nn.Module):
        """Two layers, and a wait between them for another thread's pass to be in the middle too."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.both = threading.Barrier(2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) * 1.0
            self.both.wait(10)
            return self.second(x)

    model = Slow().eval()
    monitor = watching(model)
    seen = []
    monitor.stream.observe = lambda z, q, inputs: seen.append(z)
    with monitor:
        threads = [threading.Thread(target=model, args=(torch.full((3, 2), value),)) for value in (1.0, 9.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert monitor.stream.passed == 6
    assert sorted(round(float(z[0, 0])) for z in seen) == [1, 9]
    assert all(torch.allclose(z[:, :2], z[:, 2:], rtol=1e-4) for z in seen)


def test_no_observation_of_eight_threads_is_lost(net: Net) -> None:
    monitor = watching(net, unit="example")
    x = images(5, seed=1)

    def serve() -> None:
        with torch.no_grad():
            for i in range(20):
                net(x[: 1 + i % 5])

    with monitor:
        threads = [threading.Thread(target=serve) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (monitor.stream.passed, monitor.stream.evidence.observations) == (480, 480)


# -- the reference ------------------------------------------------------------------------------------------------


def test_a_reference_is_saved_and_a_stale_one_is_refused(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "net.bncal.safetensors"
    made = watching(net).calibrate([images(100) for _ in range(3)])
    made.save(path)
    again = Reference.load(path)
    for name in ("mean", "std", "delta", "kappa", "d", "center", "spread", "power"):
        assert torch.equal(getattr(again, name), getattr(made, name)), name
    assert again.v is None
    assert again.digest_of_bounds() == made.digest_of_bounds()
    assert (again.layers, again.sizes, again.observations) == (("bns.0", "bns.1", "bns.2"), (8, 16, 16), 300)
    assert watching(net, reference=path).reference.source == "calibrated"
    with pytest.raises(ValueError, match=r"calibrated with unit 'example', got unit 'batch'"):
        watching(net, reference=path, unit="batch")
    changed = Net()
    changed.load_state_dict(net.state_dict())
    with torch.no_grad():
        changed.bns[1].running_mean[0] += 1e-6
    with pytest.raises(ValueError, match=r"the reference is stale: weights or statistics of the model changed"):
        watching(changed, reference=path)
    with pytest.raises(ValueError, match=r"the reference has 3 layers .* Give the reference of this model"):
        watching(nn.Sequential(nn.BatchNorm1d(3)), reference=path)


@pytest.mark.parametrize("name", ["kappa", "delta", "d", "v"])
@pytest.mark.parametrize("damage", ["nan", "negative", "short"])
def test_a_damaged_reference_is_refused(net: Net, tmp_path: Path, name: str, damage: str) -> None:
    made = Reference.from_checkpoint(net, watching(net).layers, unit="example", kurtosis=4.0)
    value = getattr(made, name).clone()
    value = {"nan": value * torch.nan, "negative": -value, "short": value[:1]}[damage]
    replace(made, **{name: value}).save(tmp_path / "x.bncal.safetensors")
    with pytest.raises(ValueError, match=r"is a damaged reference: .* Calibrate again"):
        Reference.load(tmp_path / "x.bncal.safetensors")


@pytest.mark.parametrize("name", ["bag.above", "scores.spread", "scores.middle", "marks.upper", "components.axes"])
@pytest.mark.parametrize("damage", ["nan", "short", "missing"])
def test_a_damaged_calibration_is_refused(net: Net, tmp_path: Path, name: str, damage: str) -> None:
    made, path = watching(net).calibrate([images(100, seed) for seed in range(2)]), tmp_path / "x.bncal.safetensors"
    made.save(path)
    about, tensors = alarm_reference.FILE.read(path)
    broken = {"nan": tensors[name] * torch.nan, "short": tensors[name][:1].clone(), "missing": None}[damage]
    rest = {key: value for key, value in tensors.items() if key != name}
    alarm_reference.FILE.write(path, about, rest if broken is None else rest | {name: broken})
    with pytest.raises(ValueError, match=r"is a damaged reference: .* Calibrate again"):
        Reference.load(path)


def test_counts_that_no_observations_make_are_refused(net: Net, tmp_path: Path) -> None:
    made, path = watching(net).calibrate([images(100, seed) for seed in range(2)]), tmp_path / "x.bncal.safetensors"
    made.save(path)
    about, tensors = alarm_reference.FILE.read(path)
    for broken in (-tensors["bag.above"], tensors["bag.above"].flip(1), 0 * tensors["bag.above"]):
        alarm_reference.FILE.write(path, about, tensors | {"bag.above": broken.contiguous()})
        with pytest.raises(ValueError, match=r"is a damaged reference: .* Calibrate again"):
            Reference.load(path)


@pytest.mark.parametrize("version", [2, 4, None])
def test_a_reference_of_another_version_is_refused(net: Net, tmp_path: Path, version: int | None) -> None:
    path = tmp_path / "x.bncal.safetensors"
    watching(net).calibrate([images(100, seed) for seed in range(2)]).save(path)
    about, tensors = alarm_reference.FILE.read(path)
    alarm_reference.FILE.write(path, about | {"version": version}, tensors)
    with pytest.raises(
        ValueError, match=rf"is not a reference of version 3, got {version}\. Make one with monitor\.calibrate"
    ):
        Reference.load(path)


@pytest.mark.parametrize("version", [2, 4, None])
def test_a_state_of_another_version_is_refused(net: Net, tmp_path: Path, version: int | None) -> None:
    path = tmp_path / "x.bnshift.safetensors"
    watching(net).save(path)
    about, tensors = stream_state.FILE.read(path)
    stream_state.FILE.write(path, about | {"version": version}, tensors)
    with pytest.raises(
        ValueError, match=rf"is not a monitor's state of version 3, got {version}\. Write it with monitor\.save"
    ):
        watching(net).load(path)


def test_calibration_that_ends_early_leaves_the_model_and_later_calibrations_alone(net: Net) -> None:
    def broken(_: object) -> list[int]:
        raise LookupError

    net.train()
    monitor = watching(net, unit=broken)
    with pytest.raises(LookupError) as raised:
        monitor.calibrate([images(100) for _ in range(3)])
    assert net.training, raised  # while the exception is still there
    net.eval()
    whole = watching(net)
    with pytest.raises(ValueError, match="expected 3 channels"):
        whole.calibrate([images(100)[:, :2]])  # too few channels: raises in the first layer
    again = whole.calibrate([images(100, seed=9) for _ in range(3)])
    assert torch.equal(again.center, watching(net).calibrate([images(100, seed=9) for _ in range(3)]).center)


def test_calibration_measures_by_statistics_as_they_are_now(net: Net) -> None:
    moved = copy.deepcopy(net)
    monitor = watching(moved)
    with torch.no_grad():
        moved.bns[0].running_mean += 5
    made = monitor.calibrate([images(100, seed=s) for s in range(3)])
    assert torch.equal(made.center, watching(moved).calibrate([images(100, seed=s) for s in range(3)]).center)


def test_layers_that_see_several_rows_of_an_example_are_calibrated_as_they_are_observed() -> None:
    model = Written(lambda net, x: net.bn(x.flatten(0, 1)), bn=nn.BatchNorm1d(3)).eval()
    monitor = watching(model, unit="batch")
    assert monitor.calibrate([torch.randn(4, 5, 3) for _ in range(200)]).observations == 200


def test_a_damaged_state_is_refused(net: Net, tmp_path: Path) -> None:
    state = ran(watching(net), net, [images(8)]).stream.state()
    del state.tensors["sums"]
    state.save(tmp_path / "x.bnshift.safetensors")
    with pytest.raises(ValueError, match=r"the state is damaged: .* Start a new stream"):
        watching(net).load(tmp_path / "x.bnshift.safetensors")


@pytest.mark.parametrize(("momentum", "batch"), [(0.1, 64), (0.1, 8), (0.5, 32), (0.01, 256)])
@pytest.mark.parametrize("kurtosis", [None, 10.0])
def test_a_checkpoint_promises_what_its_average_is_worth(momentum: float, batch: int, kurtosis: float | None) -> None:
    """kappa has d, and less energy is bet on under a declared kurtosis only."""
    layer = nn.BatchNorm1d(3, momentum=momentum).eval()
    known = ShiftMonitor(layer, batch=batch, kurtosis=kurtosis).reference
    worth = batch * (2 - momentum) / momentum
    d = max(0.1, 3 * math.sqrt(((kurtosis or 3.0) - 1) / worth))
    assert known.d.tolist() == pytest.approx([d])
    assert known.kappa.tolist() == pytest.approx([1 + d] * 3)
    assert known.delta.tolist() == pytest.approx([max(0.1, 3 / math.sqrt(worth))] * 3)
    if kurtosis is None:
        assert known.v is None
        assert ShiftEvidence.start(known).down is None
        assert ShiftEvidence.start(known).kinds == ("mean", "energy up")
    else:
        assert known.v is not None
        assert known.v.tolist() == pytest.approx([kurtosis - max(0.0, 1 - d) ** 2])
        assert ShiftEvidence.start(known).down is not None


def test_calibration_is_what_was_measured(net: Net) -> None:
    made = watching(net).calibrate([images(256, seed=9)])
    x = net.convs[0](images(256, seed=9)).detach().double()
    layer, (teach, rest) = net.bns[0], halves(256)
    mean, std = layer.running_mean.double(), (layer.running_var.double() + layer.eps).sqrt()
    z = ((x.mean((2, 3)) - mean) / std)[teach]
    q = (((x - mean[:, None, None]) / std[:, None, None]) ** 2).mean((2, 3))[teach]
    middle = z.sort(0).values[63]  # the 64th of 128
    torch.testing.assert_close(made.center[:8], middle, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.spread[:8], (z - middle).abs().mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.power[:8], q.sort(0).values[63], atol=1e-5, rtol=1e-5)
    assert made.clean is not None
    assert made.clean.bag.observations == len(rest) == 128


def test_what_cannot_calibrate_is_refused(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calibrate needs 200 clean observations or more, got 64"):
        watching(net).calibrate([images(64)])
    with pytest.raises(ValueError, match=r"calibrate needs finite activations, got NaN"):
        watching(net).calibrate([images(256) * torch.nan])
    with watching(net) as monitor, pytest.raises(RuntimeError, match=r"before observation starts"):
        monitor.calibrate([images(256)])
    (tmp_path / "x.bncal.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not a reference"):
        Reference.load(tmp_path / "x.bncal.safetensors")
    with pytest.raises(ValueError, match=r"needs a file that ends in \.bncal\.safetensors, got 'x\.pt'"):
        watching(net).reference.save(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha must be between 0 and 1, got 0.0"),
        ({"arl": 1.0}, "arl must be more than 1 observation, got 1.0"),
        ({"examples": 0}, "examples must be 1 or more, got 0"),
        ({"budget": 0.0}, "budget must be above 0, got 0.0"),
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"batch": -3}, "batch must be 1 or more, got -3"),
        ({"kurtosis": float("inf")}, "kurtosis must be finite and 1 or more, got inf"),
        ({"kurtosis": float("nan")}, "kurtosis must be finite and 1 or more, got nan"),
        ({"unit": "frame"}, "unit must be 'example', 'batch' or a function .* got 'frame'"),
    ],
)
def test_arguments_out_of_range_are_refused(net: Net, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftMonitor(net, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"batch": None}, {"batch": float("nan")}, {"batch": 64.5}, {"examples": 1.5}, {"examples": True}]
)
def test_counts_that_are_no_whole_numbers_are_refused(net: Net, arguments: dict) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be a whole number, got"):
        ShiftMonitor(net, **arguments)


def test_a_model_without_stored_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers that store statistics, got Sequential without such layers"):
        ShiftMonitor(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))


# -- files and replicas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "batch", lambda x: [int(i) // 3 for i in range(len(x))]])
@pytest.mark.parametrize("arl", [None, 1e4])
def test_a_stream_goes_on_from_a_file_bit_for_bit(net: Net, tmp_path: Path, unit: object, arl: float | None) -> None:
    batches = [images(10, seed) for seed in range(12)]
    whole = ran(watching(net, unit=unit, arl=arl), net, [])
    part, path = watching(net, unit=unit, arl=arl), tmp_path / "a.bnshift.safetensors"
    with torch.no_grad():
        with whole:
            for batch in batches:
                net(batch)
            part.start()
            part.stream.passed = 0
        with part:
            for batch in batches[:5]:
                net(batch)
            part.save(path)  # with observations waiting
    again = watching(net, unit=unit, arl=arl).load(path)
    with again, torch.no_grad():
        for batch in batches[5:]:
            net(batch)
    a, b = whole.stream.state(), again.stream.state()
    assert a.about == b.about
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("arl", [None, 1e4])
def test_a_calibrated_stream_goes_on_with_its_bag_bit_for_bit(net: Net, tmp_path: Path, arl: float | None) -> None:
    known = watching(net).calibrate([images(100, seed) for seed in range(2)])
    batches, path = [images(8, seed) for seed in range(40, 50)], tmp_path / "a.bnshift.safetensors"
    whole = ran(watching(net, reference=known, arl=arl), net, batches)
    part = ran(watching(net, reference=known, arl=arl), net, batches[:4])
    part.save(path)
    again = ran(watching(net, reference=known, arl=arl).load(path), net, batches[4:])
    a, b = whole.stream.state(), again.stream.state()
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    assert a.about["bets"] == b.about["bets"]
    assert int(a.tensors["bag"][0, 0]) == 100 + 80
    assert whole.log_evidence == again.log_evidence


def test_an_alarm_freezes_the_bag(net: Net, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    monitor = watching(net)
    monitor.calibrate([images(100, seed) for seed in range(4)])
    while monitor.alarm is None:
        ran(monitor, net, [images(8) - 2.0])
    assert monitor.stream.evidence.bag is not None
    frozen = monitor.stream.evidence.bag.counts.clone()
    assert int(frozen[0, 0]) == 200 + monitor.alarm.observations
    ran(monitor, net, [images(8) for _ in range(4)])
    assert torch.equal(monitor.stream.evidence.bag.counts, frozen)
    monitor.save(tmp_path / "a.bnshift.safetensors")
    again = watching(net, reference=monitor.reference).load(tmp_path / "a.bnshift.safetensors")
    ran(again, net, [images(8) for _ in range(4)])
    assert again.stream.evidence.bag is not None
    assert torch.equal(again.stream.evidence.bag.counts, frozen)


def test_a_state_whose_bag_no_observations_make_is_refused(net: Net) -> None:
    monitor = watching(net)
    monitor.calibrate([images(100, seed) for seed in range(2)])
    state = monitor.stream.state()
    state.tensors["bag"] = state.tensors["bag"].flip(1).contiguous()
    with pytest.raises(ValueError, match=r"the state is damaged"):
        monitor.stream.put(state)


@pytest.mark.parametrize("arl", [None, 1e4])
def test_replicas_of_one_calibration_are_judged_together(net: Net, arl: float | None, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    known = watching(net).calibrate([images(100, seed) for seed in range(4)])
    clean = [ran(watching(net, reference=known, arl=arl), net, [images(8) for _ in range(10)]) for _ in range(3)]
    assert clean[0].pooled(*clean[1:]) is None
    moved = ran(watching(net, reference=known, arl=arl), net, [images(8) - 2.0 for _ in range(10)])
    together = clean[0].pooled(moved)
    assert together is not None
    # of two: log 2 less, and nothing less for an average run length
    assert moved.log_evidence - together.log_evidence == pytest.approx(math.log(2) if arl is None else 0, abs=1e-6)


def test_an_alarm_survives_a_file(net: Net, tmp_path: Path) -> None:
    monitor = ran(watching(net), net, [images(16) - 2.0 for _ in range(10)])
    monitor.save(tmp_path / "a.bnshift.safetensors")
    assert watching(net).load(tmp_path / "a.bnshift.safetensors").alarm == monitor.alarm


def test_a_state_of_another_monitor_is_refused(net: Net, tmp_path: Path) -> None:
    watching(net).save(tmp_path / "a.bnshift.safetensors")
    with pytest.raises(ValueError, match=r"the state must be of a monitor like this one, got alpha 0\.01"):
        watching(net, alpha=0.1).load(tmp_path / "a.bnshift.safetensors")
    with pytest.raises(FileNotFoundError):
        watching(net).load(tmp_path / "b.bnshift.safetensors")


@pytest.mark.parametrize("independent", [True, False])
def test_replicas_ring_together_before_each_alone(net: Net, tmp_path: Path, independent: bool) -> None:
    """Independent ones do. Of others the evidence is the mean, which the largest evidence reaches sooner."""
    shifted = [(0.75 if independent else 0.4) * images(8) for _ in range(60)]
    monitors = [watching(net) for _ in range(3)]
    for step in range(0, 60, 3):
        for i, monitor in enumerate(monitors):
            ran(monitor, net, [shifted[step + i]])
        if (together := monitors[0].pooled(*monitors[1:], independent=independent)) is not None:
            break
    assert together is not None
    if independent:
        assert all(monitor.alarm is None for monitor in monitors)
    else:
        mean = math.log(statistics.fmean(math.exp(monitor.log_evidence) for monitor in monitors))
        assert together.log_evidence == pytest.approx(mean, abs=1e-9)
    assert together.observations == sum(monitor.stream.evidence.observations for monitor in monitors)
    paths = [tmp_path / f"{i}.bnshift.safetensors" for i in (1, 2)]
    for monitor, path in zip(monitors[1:], paths, strict=True):
        monitor.save(path)
    from_files = monitors[0].pooled(*paths, independent=independent)
    assert from_files is not None
    assert from_files.log_evidence == together.log_evidence


RANK = """
    import torch, torch.distributed as dist
    from test_shift_monitor import Net, images, ran, watching
    import batchnorm as bn
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = Net()
    bn.recalibrate(net, [images(256, seed) for seed in range(4)])
    net.eval()
    monitor = ran(watching(net), net, [images(8, 100 * dist.get_rank() + i) - 0.5 for i in range(24)])
    alarm = monitor.pooled_over_ranks()
    print(alarm.observations, alarm.log_evidence, flush=True)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_agree_on_their_evidence() -> None:
    first, second = forked.run_world(RANK)
    assert first.stdout == second.stdout
    assert first.stdout.startswith("384 "), first.stderr[-2000:]


# -- where --------------------------------------------------------------------------------------------------------


def stream_with(moved: dict[int, float], observations: int = 200) -> Stream:
    """A stream in which the mean of the first four channels of some layers moved."""
    stream = Stream(reference(kappa=0.04), "example", alpha=0.01, arl=None)
    for _ in range(observations // 8):
        z, q = 0.2 * torch.randn(8, CHANNELS * LAYERS).double(), torch.ones(8, CHANNELS * LAYERS).double()
        for layer, by in moved.items():
            z[:, layer * CHANNELS : layer * CHANNELS + 4] += by
        stream.observe(z, q)
    return stream


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_first_moved_layer_and_its_channels_are_named(layer: int) -> None:
    stream = stream_with(dict.fromkeys(range(layer, LAYERS), 0.4))
    table = stream.table()
    assert first_moved(table, stream.limit) == f"bn{layer}"
    assert set(table[layer].channels) == {0, 1, 2, 3}
    assert all(table[i].channels == () for i in range(layer))
    expected = {0: "inputs", 1: "", 2: "late layers only"}
    assert hint(table, stream.limit) == expected[layer]


@pytest.mark.slow
@pytest.mark.parametrize("promise", [{"alpha": 0.01, "arl": None}, {"alpha": 0.01, "arl": 1e4}])
def test_what_moved_is_told_by_observations_since_the_change(
    caplog: pytest.LogCaptureFixture, promise: dict[str, float | None]
) -> None:
    caplog.set_level(logging.CRITICAL)
    stream = Stream(reference(kappa=0.04), "example", **promise)
    random = torch.Generator().manual_seed(3)
    for step in range(400):
        z = 0.2 * torch.randn(8, CHANNELS * LAYERS, generator=random).double()
        stream.observe(z + (0.5 if step >= 380 else 0.0), torch.ones_like(z))
        assert (stream.alarm is None) or step >= 380
    # of all 3,200 observations the mean is 0.025; some clean ones from just before the change are in this one
    assert stream.means[0].mean() == pytest.approx(0.5, abs=0.06)
    assert all(layer.w2 == pytest.approx(0.5, abs=0.15) for layer in stream.table())


@pytest.mark.slow
@pytest.mark.parametrize("arl", [None, 1e5])
def test_after_a_long_clean_past_too(caplog: pytest.LogCaptureFixture, arl: float | None) -> None:
    """Recent observations stay recent: the least of the evidence is met again and again, or forgotten."""
    caplog.set_level(logging.CRITICAL)
    stream = Stream(reference(kappa=0.04), "example", alpha=0.01, arl=arl)
    random = torch.Generator().manual_seed(4)
    counts = []
    for _ in range(2500):
        z = 0.2 * torch.randn(8, CHANNELS * LAYERS, generator=random).double()
        stream.observe(z, torch.ones_like(z))
        counts.append(int(stream.state().about["recent"]["count"]))
    assert statistics.median(counts[1500:]) <= 200
    while stream.alarm is None:
        z = 0.5 + 0.2 * torch.randn(8, CHANNELS * LAYERS, generator=random).double()
        stream.observe(z, torch.ones_like(z))
    for _ in range(30):
        stream.observe(0.5 + z - z.mean(), torch.ones_like(z))
    assert stream.means[0].mean() > 0.25  # of all 20,000 it would be 0.01 at most


def test_how_far_components_moved_is_of_recent_observations(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    random = torch.Generator().manual_seed(2)
    monitor = Stream(reference().calibrated(*mix_of(1.0, 1000, random)), "example", alpha=0.01, arl=None)
    assert monitor.furthest() is None
    for _ in range(40):
        monitor.observe(*mix_of(1.0, 8, random))
    for _ in range(5):
        z, q = mix_of(1.0, 8, random)
        monitor.observe(z + 1.0, q)
    far, error = monitor.furthest() or (0.0, 0.0)
    # eight channels of sd 0.32 that move by 1 together: sqrt(8) / 0.32 in a component, at most
    assert 2 < far < 9
    assert 0.3 < error < 0.8  # sqrt(2 log 96 / 40) = 0.48
    monitor.look_anew()
    assert monitor.furthest() is None
    pooled = combined([Replica("here", monitor.state())], furthest=monitor.reference.furthest).alarm
    assert pooled is not None  # means of all observations, as there are no recent ones
    assert pooled.layers[0].w2 == pytest.approx(monitor.table()[0].w2)
    assert Stream(reference(), "example", alpha=0.01, arl=None).furthest() is None


def test_a_state_of_another_calibration_is_refused() -> None:
    random = torch.Generator().manual_seed(2)
    one, other = (
        Stream(reference().calibrated(*mix_of(1.0, 300, random)), "example", alpha=0.01, arl=None) for _ in range(2)
    )
    with pytest.raises(ValueError, match=r"the state must be of a monitor like this one, got bounds"):
        one.put(other.state())
    damaged = one.state()
    del damaged.about["bets"]["ranks"]
    with pytest.raises(ValueError, match=r"the state is damaged"):
        one.put(damaged)


def mix_of(kept: float, n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations of two groups; so many of the first group are kept."""
    group = (torch.rand(n, 1, generator=random) > 1 / (1 + kept)).double()
    z = 0.5 * group + 0.2 * torch.randn(n, CHANNELS * LAYERS, generator=random).double()
    return z, 1 + 0.1 * torch.randn(z.shape, generator=random).double()


@pytest.mark.parametrize("is_mix", [True, False])
def test_another_mix_of_the_same_examples_is_told_from_other_inputs(
    caplog: pytest.LogCaptureFixture, *, is_mix: bool
) -> None:
    caplog.set_level(logging.CRITICAL)
    random = torch.Generator().manual_seed(1)
    known = replace(reference().calibrated(*mix_of(1.0, 1000, random)), unit="example")
    stream = Stream(known, "example", alpha=0.01, arl=None)
    for _ in range(50):
        stream.observe(*mix_of(1.0, 8, random))
    said = []
    while stream.alarm is None or len(said) < 20:
        z, q = mix_of(0.0 if is_mix else 1.0, 8, random)
        stream.observe(z if is_mix else z + 0.7, q)
        said += [stream.alarm.hint] if stream.alarm else []
    # few observations do not tell a mix from other inputs, and say nothing
    assert [hint for hint, _ in groupby(said) if hint] == ["another mix" if is_mix else "inputs"]
    if is_mix:
        assert said[0] == ""
        again = Stream(known, "example", alpha=0.01, arl=None)
        again.put(stream.state())
        assert again.alarm == stream.alarm


def test_channels_are_named_at_the_promised_false_discovery_rate() -> None:
    assert e_bh(torch.tensor([1.0, 9.0, 0.5, 8.5]).double(), 0.05) == (1, 3)
    assert e_bh(torch.zeros(8).double(), 0.05) == ()
    # the second needs n / (2 alpha) only because the first is there
    needed = math.log(4 / (2 * 0.05))
    assert e_bh(torch.tensor([9.0, needed + 0.01, 0.0, 0.0]).double(), 0.05) == (0, 1)
    assert e_bh(torch.tensor([needed + 0.01, 0.0, 0.0, 0.0]).double(), 0.05) == ()
