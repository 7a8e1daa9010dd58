"""Fleets: the rules of combination, that the promise needs each of their conditions, and which states count."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.shift import Reference, ShiftMonitor, fleet_verdict, stream_state
from batchnorm.shift.e_processes import EProcesses, multiplied, weighted_sum
from batchnorm.shift.fleet import combined, of_one_time
from batchnorm.shift.fleet_states import Replica, one_state_each, schema_hash
from batchnorm.shift.stream import Stream
from batchnorm.shift.stream_state import StreamState

SIZES = (4, 6)
FOLDER = Path(__file__).parents[1] / "benchmarks" / "shift"


def reference(**fields: object) -> Reference:
    n = sum(SIZES)
    ones, layers = torch.ones(n, dtype=torch.float64), torch.ones(len(SIZES), dtype=torch.float64)
    made = Reference(
        ("a", "b"), SIZES, 0 * ones, ones, 0.1 * ones, 0.04 * ones, 0.1 * layers, None, None, "example", 0, "none",
    )  # fmt: skip
    return replace(made, **fields)


def observations(n: int, seed: int, by: float = 0.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    z = by + 0.2 * torch.randn(n, sum(SIZES), generator=random, dtype=torch.float64)
    return z, torch.rand(n, sum(SIZES), generator=random, dtype=torch.float64) + 0.5


def calibrated(seed: int = 0) -> Reference:
    return reference().calibrated(*observations(400, seed))


def stream(n: int, seed: int, by: float = 0.0, known: Reference | None = None, **promise: object) -> Stream:
    made = Stream(known or reference(), "example", **{"alpha": 0.01, "arl": None, **promise})
    return fed(made, n, seed, by)


def fed(made: Stream, n: int, seed: int, by: float = 0.0) -> Stream:
    made.passed += n
    made.observe(*observations(n, seed, by))
    made.update()
    return made


def replica(made: Stream | StreamState, name: str = "", saved: float | None = None) -> Replica:
    state = made.state() if isinstance(made, Stream) else made
    assert state.origin is not None
    return Replica(name, replace(state, origin=replace(state.origin, saved=saved or state.origin.saved)))


def reread(made: Stream) -> StreamState:
    """A state as a file has it."""
    state = made.state()
    return replace(state, about=json.loads(json.dumps(state.about)))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "batchnorm.shift")


# -- rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 20])
def test_from_a_checkpoint_e_values_are_averaged_in_every_layer(size: int) -> None:
    made = [stream(64, 0), stream(64, 1, by=0.3), stream(40, 2, by=0.25)]
    found = combined([replica(each) for each in made], fleet=size)
    e_values = np.exp([each.evidence.log for each in made])
    assert found.rule == "average"
    assert found.evidence.log == pytest.approx(math.log(e_values.sum() / size), abs=1e-9)
    of_layers = np.exp(np.stack([each.evidence.log_layers.numpy() for each in made]))
    np.testing.assert_allclose(found.evidence.log_layers.numpy(), np.log(of_layers.sum(0) / size), atol=1e-9)
    assert found.evidence.observations == found.examples == 168
    assert [layer.log_evidence for layer in found.layers] == found.evidence.log_layers.tolist()


def test_calibrated_the_largest_e_value_of_a_score_counts_divided_by_the_number() -> None:
    known = calibrated()
    made = [stream(64, 1, known=known), stream(24, 2, by=0.3, known=known), stream(24, 3, by=0.2, known=known)]
    found = combined([replica(each) for each in made], fleet=20)
    assert found.rule == "largest"
    assert found.evidence.log == pytest.approx(max(each.evidence.log for each in made) - math.log(20), abs=1e-3)
    of_layers = torch.stack([each.evidence.log_layers for each in made]).amax(0) - math.log(20)
    torch.testing.assert_close(found.evidence.log_layers, of_layers, rtol=0, atol=1e-3)


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_with_an_average_run_length_the_sum_or_the_largest_counts_undivided(is_calibrated: bool) -> None:
    known = calibrated() if is_calibrated else reference()
    made = [stream(64, 1, known=known, arl=1e4), stream(32, 2, by=0.3, known=known, arl=1e4)]
    found = combined([replica(each) for each in made], fleet=20)
    logs = [each.evidence.log for each in made]
    expected = max(logs) if is_calibrated else float(np.logaddexp(*logs))
    assert found.rule == ("largest" if is_calibrated else "sum")
    assert found.evidence.log == pytest.approx(expected, abs=1e-9)
    assert found.limit == math.log(1e4)


def test_independent_replicas_are_multiplied_bet_by_bet() -> None:
    made = [stream(48, seed, by=0.2) for seed in range(3)]
    found = combined([replica(each) for each in made], independent=True)
    products = sum(each.evidence.mean.product.numpy() for each in made)
    sums = np.logaddexp.reduce([each.evidence.mean.restarted.numpy() for each in made]) - math.log(3)
    np.testing.assert_allclose(found.evidence.mean.product.numpy(), products, atol=1e-9)
    np.testing.assert_allclose(found.evidence.mean.restarted.numpy(), sums, atol=1e-9)
    assert found.evidence.log > max(each.evidence.log for each in made)


def test_the_alarm_names_the_layer_and_channels_of_the_replica_that_moved() -> None:
    z, q = observations(128, 5)
    z[:, 4:6] += 0.6  # the first two channels of layer b
    moved = Stream(reference(), "example", alpha=0.01, arl=None)
    moved.observe(z, q)
    alarm = combined([replica(moved), *(replica(stream(128, seed)) for seed in range(3))]).alarm
    assert alarm is not None
    assert alarm.first == "b"
    assert set(alarm.layers[1].channels) == {0, 1}


def test_a_replica_alone_is_its_own_fleet() -> None:
    made = stream(64, 1, by=0.3)
    alone = combined([replica(made)])
    assert alone.evidence.log == pytest.approx(made.evidence.log, abs=1e-12)
    assert alone.alarm is not None
    assert combined([replica(made)], fleet=1000).alarm is None or made.evidence.log > math.log(100 * 1000)


# -- common times -------------------------------------------------------------------------------------------------

LOGS = st.lists(st.tuples(st.floats(-20, 20), st.integers(0, 8)), min_size=1, max_size=6)


@given(LOGS, st.integers(0, 4))
def test_the_largest_sum_of_one_time_is_that_of_its_definition(rows: list[tuple[float, int]], within: int) -> None:
    e, t = np.exp([log for log, _ in rows]), np.array([at for _, at in rows])
    expected = max(e[(t >= begin) & (t <= begin + within)].sum() for begin in t)
    log, counted = of_one_time(torch.tensor(np.log(e)), torch.tensor(t, dtype=torch.float64), within)
    assert float(log) == pytest.approx(math.log(expected), abs=1e-9)
    assert e[counted.numpy()].sum() == pytest.approx(expected)
    assert np.ptp(t[counted.numpy()]) <= within


def test_e_values_of_different_times_may_not_be_added() -> None:
    """Fair bets on one coin, one for heads and one for tails: at one time the mean is 1, at two times always 1.5."""
    before, after = torch.zeros(2, dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64).log()
    for heads in (after, after.flip(0)):  # both outcomes
        readings = [(torch.stack([heads[0], before[1]]), (1, 0)), (torch.stack([before[0], heads[1]]), (0, 1))]
        added = max(float(logs.exp().mean()) for logs, _ in readings)
        assert added == 1.5  # with certainty, although it may be at most in two of three
        for logs, times in readings:
            log, _ = of_one_time(logs - math.log(2), torch.tensor(times, dtype=torch.float64), 0.5)
            assert float(log.exp()) <= 1
        assert float(of_one_time(heads - math.log(2), torch.zeros(2, dtype=torch.float64), 0.5)[0].exp()) == 1


def test_an_old_file_counts_in_its_own_time_only() -> None:
    late, now = stream(64, 1, by=0.3), stream(64, 2, by=0.25)
    files = [replica(late, saved=1e9), replica(now, saved=1e9 + 601), replica(stream(8, 3), saved=1e9 + 700)]
    found = combined(files)
    assert found.counted.tolist() == [True, False, False]  # the largest sum is of the old file alone
    assert found.evidence.log == pytest.approx(late.evidence.log - math.log(3), abs=1e-9)
    assert combined(files, within=700).counted.all()
    with pytest.raises(ValueError, match=r"within must be 0 seconds or more, got -1"):
        combined(files, within=-1)
    with pytest.raises(TypeError, match=r"within must be a number"):
        combined(files, within="600")


def test_calibrated_and_independent_replicas_count_at_any_time() -> None:
    known = calibrated()
    made = [stream(24, seed, by=0.2, known=known) for seed in (1, 2)]
    files = [replica(each, saved=1e9 + 1e6 * i) for i, each in enumerate(made)]
    assert combined(files).counted.all()
    assert combined([replica(stream(24, s), saved=1e9 * (s + 1)) for s in (0, 1)], independent=True).counted.all()


# -- what the promise needs, by exact means over fair coins ------------------------------------------------------------


def coins(*counts: int) -> list[list[EProcesses]]:
    """Streams of so many fair bets, with factors 1/2 and 3/2, in all their equally likely outcomes."""
    outcomes = []
    for factors in itertools.product((0.5, 1.5), repeat=sum(counts)):
        logs = iter(np.log(factors))
        wealth = [EProcesses.start((), is_spread=True) for _ in counts]
        for i, count in enumerate(counts):
            for _ in range(count):
                wealth[i] = wealth[i].bet(torch.tensor(next(logs), dtype=torch.float64), 1)
        outcomes.append(wealth)
    return outcomes


def mean_of(combine, outcomes: list[list[EProcesses]]) -> float:
    return float(np.mean([float(combine(streams).log.exp()) for streams in outcomes]))


def test_a_stream_that_is_counted_twice_breaks_the_product() -> None:
    assert mean_of(partial(multiplied, fleet=2), coins(2, 2)) == pytest.approx(1)
    assert mean_of(lambda streams: multiplied([streams[0]] * 2, 2), coins(2)) > 1.2
    made = stream(48, 1, by=0.2)
    once = combined([replica(made, "x"), replica(stream(8, 2), "y")], independent=True)
    twice = combined([replica(made, "x"), replica(made, "copy of x"), replica(stream(8, 2), "y")], independent=True)
    assert twice.left_out == ("x is an earlier state, or a copy, of the stream in copy of x: it is left out",) or (
        twice.left_out == ("copy of x is an earlier state, or a copy, of the stream in x: it is left out",)
    )
    assert twice.size == 2
    assert len(once.replicas) == len(twice.replicas) == 2
    doubled = multiplied([made.evidence.mean, made.evidence.mean], 2).log_mean.max()
    assert float(doubled) > float(twice.evidence.mean.log_mean.max())


def test_weights_that_are_chosen_after_looking_break_the_average() -> None:
    average = partial(weighted_sum, log_weight=-math.log(2))
    assert mean_of(average, coins(2, 2)) == pytest.approx(1)
    assert mean_of(lambda streams: max(streams, key=lambda each: float(each.log)), coins(2, 2)) > 1.1
    files = [replica(stream(24, seed)) for seed in range(3)]
    with pytest.raises(ValueError, match=r"at most 2 streams, got 3\. The number must be fixed beforehand"):
        combined(files, fleet=2)


def test_a_product_needs_a_calibration_for_each_replica() -> None:
    known = calibrated()
    files = [replica(stream(24, seed, known=known), f"file {seed}") for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"a calibration each, got file 1 and file 2 with the same clean observations"):
        combined(files, independent=True)
    own = [replica(stream(24, seed, by=0.2, known=calibrated(seed)), f"file {seed}") for seed in (1, 2)]
    assert combined(own, independent=True).rule == "product"
    with pytest.raises(ValueError, match=r"file 2 is no replica of file 1: the reference differs\. Merge the files"):
        combined(own)
    with pytest.raises(ValueError, match=r"independence is of use with alpha, got monitors with arl"):
        combined([replica(stream(24, 1, arl=1e4))], independent=True)


# -- each stream and step once -----------------------------------------------------------------------------------------


def test_the_later_state_of_a_stream_counts_and_the_earlier_is_named() -> None:
    made = stream(24, 1)
    early = replica(made, "monday")
    late = replica(fed(made, 16, 2), "tuesday")
    for files in ([early, late], [late, early], [early, late, early]):
        kept, left_out = one_state_each(files)
        assert [each.name for each in kept] == ["tuesday"]
        assert left_out[0] == "monday is an earlier state, or a copy, of the stream in tuesday: it is left out"


def test_a_stream_keeps_its_id_through_a_file_and_reset_gives_another() -> None:
    made = stream(24, 1)
    first = replica(made, "first")
    again = Stream(reference(), "example", alpha=0.01, arl=None)
    again.put(first.state)
    second = replica(fed(again, 8, 2), "second")
    assert second.origin.id == first.origin.id
    assert [each.name for each in one_state_each([second, first])[0]] == ["second"]
    assert replica(stream(24, 1)).origin.id != first.origin.id


def test_two_continuations_of_one_file_are_refused() -> None:
    start = stream(24, 1)
    file, ends = start.state(), []
    for seed in (2, 3):
        server = Stream(reference(), "example", alpha=0.01, arl=None)
        server.put(file)
        ends.append(replica(fed(server, 8, seed), f"server {seed}"))
    for files in (ends, [replica(start, "start"), *ends], [*ends, replica(start, "start")]):
        with pytest.raises(ValueError, match=r"two continuations of one stream.* monitor\.reset\(\)"):
            combined(files)
    went_on = replica(fed(start, 8, 4), "went on")
    with pytest.raises(ValueError, match=r"went on and server 2 are two continuations"):
        combined([went_on, ends[0]])


def test_copies_of_an_empty_file_are_different_streams_and_the_empty_file_is_left_out() -> None:
    empty = Stream(reference(), "example", alpha=0.01, arl=None)
    servers = []
    for seed in (2, 3):
        server = Stream(reference(), "example", alpha=0.01, arl=None)
        server.put(empty.state())
        servers.append(replica(fed(server, 8, seed), f"server {seed}"))
    found = combined([replica(empty, "empty"), *servers])
    assert [each.name for each in found.replicas] == ["server 2", "server 3"]


@pytest.mark.parametrize("before", [0, 16])
def test_processes_that_were_forked_are_told_apart(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As os.fork leaves them: the same object in another process."""
    made = stream(before, 1) if before else Stream(reference(), "example", alpha=0.01, arl=None)
    origin, files = made.state().origin, []
    assert origin is not None
    for process in (1, 2):
        child = Stream(reference(), "example", alpha=0.01, arl=None)
        child.put(made.state())
        child._origin._id, child._origin._legs, child._origin._process = origin.id, origin.legs, os.getpid()
        monkeypatch.setattr(os, "getpid", lambda process=process: -process)
        files.append(replica(fed(child, 8, process), f"process {process}"))
        monkeypatch.undo()
    if before:
        with pytest.raises(ValueError, match="two continuations"):
            combined(files)
    else:
        assert len(combined(files).replicas) == 2


def test_copies_of_a_running_process_are_recognized_by_their_sums() -> None:
    made, files = stream(24, 1), []
    for seed in (2, 3):
        copy = Stream(reference(), "example", alpha=0.01, arl=None)
        copy.put(made.state())
        copy._origin._legs = made._origin._legs
        files.append(replica(fed(copy, 8, seed), f"copy {seed}"))
    with pytest.raises(ValueError, match="two continuations"):
        combined(files)


def test_a_file_without_a_stream_id_can_be_loaded_but_not_merged(tmp_path: Path) -> None:
    state = replace(stream(24, 1).state(), origin=None)
    with pytest.raises(ValueError, match=r"old has no stream id.*monitor\.load\(path\)\.save\(path\)"):
        combined([Replica("old", state)])
    state.save(tmp_path / "old.bnshift.safetensors")
    made = Stream(reference(), "example", alpha=0.01, arl=None)
    made.put(StreamState.load(tmp_path / "old.bnshift.safetensors"))
    assert combined([replica(made)]).evidence.observations == 24


# -- schemas and damage ------------------------------------------------------------------------------------------------

OTHERS = {
    "alpha: expected 0.01, got 0.05": partial(stream, alpha=0.05),
    "arl: expected null, got 1000.0": partial(stream, arl=1e3),
    "the model's weights or statistics differ": partial(stream, known=reference(digest="other")),
    'unit: expected "example", got "batch"': partial(stream, known=reference(unit="batch")),
    "the reference differs": partial(stream, known=reference(delta=0.2 * torch.ones(10, dtype=torch.float64))),
    'the layers\' names: expected ["a", "b"], got ["a", "c"]': partial(stream, known=reference(layers=("a", "c"))),
    "the layers' numbers of channels: expected [4, 6], got [6, 4]": partial(stream, known=reference(sizes=(6, 4))),
    'the source of the reference: expected "checkpoint", got "calibrated"': partial(stream, known=calibrated()),
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_differs_is_named(words: str) -> None:
    other = OTHERS[words](24, 2)
    with pytest.raises(ValueError, match=r"second is no replica of first: .* Merge the files of one model") as raised:
        combined([replica(stream(24, 1), "first"), replica(other, "second")])
    assert words in str(raised.value)


def _without(name: str, state: StreamState) -> None:
    del state.about[name]


def _set(name: str, value: object, state: StreamState) -> None:
    state.about[name] = value
    state.about["schema"] = schema_hash(state.about)


DAMAGES = {
    "no bets": partial(_without, "bets"),
    "no layers": partial(_without, "layers"),
    "no alpha": partial(_without, "alpha"),
    "no counts": partial(_without, "looked"),
    "sizes of text": partial(_set, "sizes", "ab"),
    "sizes of fractions": partial(_set, "sizes", [4.0, 6.0]),
    "no channels": partial(_set, "sizes", [0, 10]),
    "layers of numbers": partial(_set, "layers", [1, 2]),
    "alpha of 2": partial(_set, "alpha", 2.0),
    "alpha of text": partial(_set, "alpha", "0.01"),
    "unit of nothing": partial(_set, "unit", None),
    "a count below 0": partial(_set, "looked", -1),
    "e-values of nan": lambda state: state.tensors["mean.product"].fill_(torch.nan),
    "e-values without end": lambda state: state.tensors["up.restarted"].fill_(torch.inf),
    "tensors of other sizes": lambda state: state.tensors.update(sums=state.tensors["sums"][:, :3]),
    "settings that were changed": lambda state: state.about.update(alpha=0.5),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused_by_name(name: str) -> None:
    state = reread(stream(24, 1))
    DAMAGES[name](state)
    with pytest.raises(ValueError, match=r"^broken (is damaged|cannot be merged: the state is damaged)"):
        combined([replica(stream(24, 2), "whole"), Replica("broken", state)])


@pytest.mark.parametrize(
    "stream_", [{}, {"id": "x", "legs": [], "saved": 0}, {"id": "x", "legs": [["a", 5]], "saved": 0},
                {"id": "x", "legs": [["a", 0]], "saved": 1e300}, {"id": "x", "legs": [["a", 0]], "saved": "now"}, [1]],
)  # fmt: skip
def test_a_damaged_origin_is_refused(tmp_path: Path, stream_: object) -> None:
    path = tmp_path / "a.bnshift.safetensors"
    state = stream(24, 1).state()
    stream_state.FILE.write(path, state.about | {"stream": stream_}, state.tensors)
    with pytest.raises(ValueError, match=r"the state is damaged: its stream's id, legs or time"):
        StreamState.load(path)


@pytest.mark.parametrize("arl", [None, 1e4])
def test_streams_without_observations_are_no_evidence(arl: float | None) -> None:
    empty = [replica(Stream(reference(), "example", alpha=0.01, arl=arl)) for _ in range(2)]
    found = combined(empty, fleet=4)
    assert found.evidence.log == (pytest.approx(math.log(0.5)) if arl is None else -math.inf)
    assert found.alarm is None
    moved = stream(64, 1, by=0.5, alpha=0.01, arl=arl)
    assert combined([*empty, replica(moved)]).alarm is not None


def test_no_replicas_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the state of one replica or more, got none"):
        combined([])
    with pytest.raises(ValueError, match=r"fleet must be 1 or more, got 0"):
        combined([replica(stream(8, 1))], fleet=0)
    with pytest.raises(TypeError, match=r"fleet must be a whole number"):
        combined([replica(stream(8, 1))], fleet=2.5)


# -- files ---------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    bn.recalibrate(net, [torch.randn(1000, 4) for _ in range(4)])
    return net.eval()


def served(net: nn.Module, seed: int, by: float = 0.0, **more: object) -> ShiftMonitor:
    monitor, random = ShiftMonitor(net, budget=None, examples=None, **more), torch.Generator().manual_seed(seed)
    with monitor, torch.no_grad():
        for _ in range(12):
            net(torch.randn(8, 4, generator=random) + by)
    return monitor


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_files_give_what_the_monitors_give_without_the_model(tmp_path: Path, is_calibrated: bool) -> None:
    net = network()
    known = ShiftMonitor(net).calibrate([torch.randn(100, 4) for _ in range(4)]) if is_calibrated else None
    monitors = [served(net, seed, by=2.0 * (seed == 1), reference=known) for seed in range(3)]
    for i, monitor in enumerate(monitors):
        monitor.save(tmp_path / f"{i}.bnshift.safetensors")
    alarm, verdict = monitors[0].pooled(*monitors[1:]), fleet_verdict.judge([str(tmp_path)])
    assert alarm is not None
    assert verdict.shift
    assert verdict.log_evidence == alarm.log_evidence
    assert verdict.first == alarm.first
    assert [layer.log_evidence for layer in verdict.layers] == [layer.log_evidence for layer in alarm.layers]
    paths = [tmp_path / f"{i}.bnshift.safetensors" for i in (1, 2)]
    again = monitors[0].pooled(*paths, fleet=3)
    assert again is not None
    assert again.log_evidence == alarm.log_evidence


def test_a_monitor_is_counted_once_however_often_it_is_given() -> None:
    net = network()
    one, other = served(net, 1, by=1.0), served(net, 2)
    expected = one.pooled(other, fleet=2)
    again = one.pooled(other, one, other, fleet=2)
    assert expected is not None
    assert again is not None
    assert again.log_evidence == expected.log_evidence


def test_states_are_written_to_and_read_from_addresses_of_fsspec() -> None:
    fsspec = pytest.importorskip("fsspec")
    net, prefix = network(), "memory://monitors/of-the-model"
    monitors = [served(net, seed, by=2.0) for seed in range(2)]
    for i, monitor in enumerate(monitors):
        monitor.save(f"{prefix}/{i}.bnshift.safetensors")
    with fsspec.open(f"{prefix}/readme.txt", "wb") as file:
        file.write(b"states of servers")
    found = fleet_verdict.judge([f"{prefix}/"])
    assert len(found.replicas) == 2
    assert found.other_files == 1
    alarm = monitors[0].pooled(monitors[1])
    assert alarm is not None
    assert found.log_evidence == alarm.log_evidence
    pattern = fleet_verdict.judge([f"{prefix}/*.bnshift.safetensors", f"{prefix}/0.bnshift.safetensors"])
    assert pattern.log_evidence == found.log_evidence
    assert not pattern.left_out  # one file, although two addresses name it
    again = ShiftMonitor(net, budget=None, examples=None).load(f"{prefix}/0.bnshift.safetensors")
    assert again.log_evidence == monitors[0].log_evidence
    with pytest.raises(FileNotFoundError, match=r"memory://monitors/none"):
        again.load("memory://monitors/none.bnshift.safetensors")
    with pytest.raises(ValueError, match="needs a file that ends in"):
        again.save("memory://monitors/a.pt")
    with pytest.raises(ValueError, match="expected a path, or an address of a protocol of fsspec"):
        again.save("nonsense://monitors/a.bnshift.safetensors")


def test_an_address_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    monitor, path = served(network(), 1), tmp_path / "none" / "a.bnshift.safetensors"
    with pytest.raises(OSError, match=r"a\.bnshift\.safetensors cannot be written: .*Check the address"):
        monitor.save(path.as_uri())
    monitor.save((tmp_path / "b.bnshift.safetensors").as_uri())
    assert len(fleet_verdict.judge([(tmp_path / "b.bnshift.safetensors").as_uri()]).replicas) == 1


def test_files_are_merged_while_servers_write_them(tmp_path: Path) -> None:
    """Every reading finds whole states, whose observations never decrease; a monitor observes while it is saved."""
    net, done, errors = network(), threading.Event(), []
    monitors = [ShiftMonitor(net, budget=None, examples=None) for _ in range(2)]
    for i, monitor in enumerate(monitors):
        monitor.save(tmp_path / f"{i}.bnshift.safetensors")

    def save_often(i: int) -> None:
        try:
            while not done.is_set():
                monitors[i].save(tmp_path / f"{i}.bnshift.safetensors")
        except (OSError, ValueError, RuntimeError) as error:  # of a thread: told by the test
            errors.append(error)

    def observe(monitor: ShiftMonitor) -> None:
        while not done.is_set():
            monitor.stream.observe(torch.zeros(8, 16).double(), torch.ones(8, 16).double())

    threads = [threading.Thread(target=save_often, args=(i,)) for i in range(2)]
    threads += [threading.Thread(target=observe, args=(monitor,)) for monitor in monitors]
    for thread in threads:
        thread.start()
    try:
        counts = [fleet_verdict.judge([str(tmp_path)]).observations for _ in range(30)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


# -- the promise ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        import bench_fleet
    finally:
        sys.path.remove(str(FOLDER))
    return bench_fleet


@pytest.mark.slow
def test_clean_fleets_keep_the_promise_and_a_product_of_one_calibration_does_not(bench) -> None:
    """60 fleets of 20 replicas: of an alarm in 1 of 100 fleets, 5 or more have a probability of 4e-4."""
    pool = bench.Pool.of("student-2.5", 4000)
    found = bench.alarms(pool, "calibrated", 60, torch.Generator().manual_seed(3), last=48)
    count = {rule: int(at.isfinite().sum()) for rule, at in found.items()}
    assert count["fleet: largest"] < 5
    assert count["fleet: files of different times"] < 5
    assert count["product (not allowed)"] > 5


@pytest.mark.slow
def test_clean_fleets_that_get_the_same_requests_keep_the_promise_and_their_product_does_not(bench) -> None:
    pool = bench.Pool.of("normal", 4000)
    found = bench.alarms(pool, "checkpoint", 60, torch.Generator().manual_seed(3), last=80, mirrored=True)
    count = {rule: int(at.isfinite().sum()) for rule, at in found.items()}
    assert count["fleet: average"] < 5
    assert count["fleet: files of different times"] < 5
    assert count["independent, and before: product"] > 5
