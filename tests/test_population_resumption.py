"""``recalibrate(..., resume=FILE)``: an interrupted measurement goes on to the same bits; other files are refused."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from rank_recalibration import Routes, Twice, data, network
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.population import finished_layers

MODELS = {
    "in a row": network,
    "called twice": lambda: Twice().double(),
    "of two routes": lambda: Routes(both=True).double(),
    "of one route each": lambda: Routes(both=False).double(),
}


def batches() -> list[Tensor]:
    return list((data() - 4).split(9))


def bits(model: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


def interrupted(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Go on with the measurement, each time until one layer is written; returns the number of interruptions."""
    write = finished_layers.FinishedLayers._write

    def stop(self: finished_layers.FinishedLayers) -> None:
        write(self)
        raise KeyboardInterrupt

    before = bits(model)
    for number in itertools.count():
        with monkeypatch.context() as patched:
            patched.setattr(finished_layers.FinishedLayers, "_write", stop)
            try:
                bn.recalibrate(model, batches(), resume=path, **options)
            except KeyboardInterrupt:
                assert bits(model) == before
            else:
                return number
    raise AssertionError


@pytest.mark.parametrize("memory", [None, 0, 4000])
@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_measurement_has_the_same_bits(kind, memory, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    plain, resumed = copy.deepcopy(model), copy.deepcopy(model)
    expected = bn.recalibrate(plain, batches(), memory=memory)
    assert interrupted(resumed, tmp_path / "a.safetensors", monkeypatch, memory=memory) >= len(expected)
    assert bits(resumed) == bits(plain)
    again = copy.deepcopy(model)
    found = bn.recalibrate(again, batches(), memory=memory, resume=tmp_path / "a.safetensors")
    assert bits(again) == bits(plain)
    assert (list(found), found.restarted) == (list(expected), expected.restarted)
    assert all(found[path].m2.equal(expected[path].m2) for path in found)


def test_finished_layers_are_not_measured_again(tmp_path) -> None:
    model, path, entered = network(), tmp_path / "a.safetensors", []
    bn.recalibrate(copy.deepcopy(model), batches(), resume=path)
    for layer in model:
        layer.register_forward_hook(lambda *_: entered.append(1))
    bn.recalibrate(model, batches(), resume=path, memory=0)
    assert len(entered) == len(batches()) * len(model)  # the pass that finds the order, and none for a layer


def test_excluded_batches_are_reported_after_a_resumption_too(tmp_path) -> None:
    xs = batches()
    xs[2][0, 1] = torch.nan
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"NaN or infinity in the input of '0' \(inputs: 1, channels: 1 of 5\)"):
            found = bn.recalibrate(nn.Sequential(nn.BatchNorm1d(5)).double(), xs, resume=tmp_path / "a.safetensors")
        assert found["0"].count.tolist() == [90, 81, 90, 90, 90]


def other_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-9
    return model


def other_eps(model: nn.Module) -> nn.Module:
    model[1].eps = 0.1
    return model


def other_activation(index: int, activation: nn.Module) -> nn.Module:
    model = network()
    assert isinstance(model[index], nn.ReLU)
    model[index] = activation
    return model


REFUSED = {
    "module '2'": lambda path: bn.recalibrate(other_activation(2, nn.Tanh()), batches(), resume=path),
    "another module '6'": lambda path: bn.recalibrate(other_activation(6, nn.LeakyReLU(0.5)), batches(), resume=path),
    "'0.weight'": lambda path: bn.recalibrate(other_weight(network()), batches(), resume=path),
    "layer '1'": lambda path: bn.recalibrate(other_eps(network()), batches(), resume=path),
    "max_examples": lambda path: bn.recalibrate(network(), batches(), 20, resume=path),
    "first batch of rank 0": lambda path: bn.recalibrate(network(), [x + 1 for x in batches()], resume=path),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_of_another_measurement_is_refused(what, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    bn.recalibrate(network(), batches(), resume=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="needs a file of finished layers of this measurement, got ") as error:
        REFUSED[what](path)
    assert what in str(error.value)
    assert str(error.value).endswith("Delete it to measure all layers, or give another resume=.")
    assert path.read_bytes() == content


def test_another_number_of_batches_is_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    bn.recalibrate(network(), batches(), resume=path)
    model = network()
    before = bits(model)
    for memory in (None, 0):
        with pytest.raises(ValueError, match=r"needs the batches for which .* was written, 10, got 9\. Delete it"):
            bn.recalibrate(model, batches()[:-1], resume=path, memory=memory)
    assert bits(model) == before


def test_files_that_are_none_and_calls_that_cannot_be_resumed_are_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no file")
    with pytest.raises(ValueError, match="is not a file of finished layers"):
        bn.recalibrate(network(), batches(), resume=path)
    with pytest.raises(ValueError, match=r"needs a file that ends in \.safetensors, got 'a\.bin'"):
        bn.recalibrate(network(), batches(), resume=tmp_path / "a.bin")
    with pytest.raises(OSError, match="nowhere"):
        bn.recalibrate(network(), batches(), resume=tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(ValueError, match="needs exact=True to be resumed, got exact=False"):
        bn.recalibrate(network(), batches(), resume=tmp_path / "c.safetensors", exact=False)
    with pytest.raises(TypeError, match="resume must be the path of a file, got bool"):
        bn.recalibrate(network(), batches(), resume=True)


KILLED = """
    import os, sys, time, torch, torch.distributed as dist
    import batchnorm as bn
    from rank_recalibration import data, network

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", "file://" + sys.argv[1] + ".meeting", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model = network()
    batches = list((data() - 4).split(9))[rank::world]

    def forward(model, batch):
        time.sleep(0.005)  # so that a moment falls into a measurement
        return model(batch)

    print("begun", flush=True)
    bn.recalibrate(model, batches, forward=forward, group="all", resume=sys.argv[1], memory=int(sys.argv[2]))
    torch.save(model.state_dict(), f"{sys.argv[1]}.{rank}")
    print("done", flush=True)
    os._exit(0)
"""


def started(path: Path, memory: int, world: int) -> list[subprocess.Popen]:
    Path(f"{path}.meeting").unlink(missing_ok=True)
    environment = os.environ | {
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(path), str(memory)]
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(world)
    ]


def killed_until_done(path: Path, memory: int, world: int, seconds: list[float]) -> int:
    """Kill all ranks at these times after the start of a measurement, then let it end; the number that were killed."""
    kills = 0
    for wait in [*seconds, None]:
        ranks = started(path, memory, world)
        for rank in ranks:
            assert rank.stdout.readline() == b"begun\n", rank.stderr.read()
        try:
            ranks[0].wait(wait)
        except subprocess.TimeoutExpired:
            kills += 1
            for rank in ranks:
                rank.send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.communicate(timeout=60)
        if path.exists():
            finished_layers._FILE.read(path)  # whole at any moment
    return kills


@pytest.mark.slow
@pytest.mark.parametrize(("world", "memory"), [(1, 0), (2, 10**9)])
def test_a_measurement_that_was_killed_goes_on_to_the_same_bits(world, memory, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    assert killed_until_done(path, memory, world, [0.05, 0.1, 0.15]) >= 1
    assert killed_until_done(tmp_path / "b.safetensors", memory, world, []) == 0
    for rank in range(world):
        found, expected = (torch.load(f"{tmp_path / name}.safetensors.{rank}") for name in "ab")
        assert all(found[name].equal(expected[name]) for name in expected)


RANK = """
    import os, sys, torch, torch.distributed as dist
    import batchnorm as bn
    from rank_checks import message, on_every_rank
    from rank_recalibration import data, network, require_same_on_all, shards

    dist.init_process_group("gloo")
    folder, rank = sys.argv[1], dist.get_rank()
    own = f"{folder}/{rank}"  # a file system of its own
    os.makedirs(own)
    parts, model = shards(data()), network()
    found = bn.recalibrate(model, parts[rank], group="all", resume=f"{own}/a.safetensors")
    assert os.path.exists(f"{own}/a.safetensors") is (rank == 0)
    again = network()
    found = bn.recalibrate(again, parts[rank], group="all", resume=f"{own}/a.safetensors")
    require_same_on_all(again, found)
    assert all(a.equal(b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
    kind = ValueError if rank == 0 else RuntimeError
    text = message(kind, bn.recalibrate, network(), parts[rank][rank:], group="all", resume=f"{own}/a.safetensors")
    assert "which was written for another first batch of rank 1" in text, text
    fewer = parts[rank][:-1] if rank else parts[rank]
    text = message(ValueError, bn.recalibrate, network(), fewer, group="all", resume=f"{own}/a.safetensors")
    assert "on its ranks, got" in text, text
    print("ok", flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_the_first_rank_keeps_the_layers_for_all(tmp_path) -> None:
    ranks = forked.run_world(RANK, str(tmp_path))
    assert [rank.stdout for rank in ranks] == ["ok\n", "ok\n"], [rank.stderr[-2000:] for rank in ranks]
