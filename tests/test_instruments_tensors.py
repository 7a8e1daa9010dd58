"""Models whose tensors cannot be read: what can be measured is, the rest is missing or refused, and nothing crashes."""

import math

import forked
import pytest
import torch
from tensor_kinds import freed, made
from torch import nn

import batchnorm as bn
from batchnorm.instruments import Angles, gradient_shift, landscape
from batchnorm.instruments.gamma_and_beta import census
from batchnorm.instruments.snapshots import Layers, Snapshot

ABSENT = ("freed", "freed parameter", "meta", "fake", "functional", "pair", "flat pair")
READABLE = ("plain", "parameter", "strided view", "expanded", "of inference", "with functions", "with dispatch", "coo")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def looked_at(place: str, value: torch.Tensor) -> dict[str, float]:
    layer = nn.BatchNorm1d(value.shape[0])
    (layer._buffers if place in layer._buffers else layer._parameters)[place] = value
    layers = Layers({"bn": layer})
    return {name: float(row) for name, row in census(layers, Snapshot.of(layers)).items()}


@pytest.mark.parametrize("place", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("kind", ABSENT)
def test_a_look_at_a_tensor_without_numbers_leaves_them_out(kind: str, place: str) -> None:
    found = looked_at(place, made(kind))
    absent = {"weight": {"gamma", "active", "dead"}, "bias": {"beta", "active"}}.get(place, set())
    assert {name for name, value in found.items() if math.isnan(value)} == absent


@pytest.mark.parametrize("place", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("kind", READABLE)
def test_a_look_at_an_unusual_tensor_reads_it(kind: str, place: str) -> None:
    value = made(kind)
    if value.ndim > 1:
        value = torch.ones(3).to_sparse()
    assert not any(math.isnan(number) for number in looked_at(place, value).values())


def test_a_probe_whose_pass_fails_for_memory_that_was_given_back_says_which() -> None:
    net = model()
    freed(net[1].running_mean)
    with pytest.raises(ValueError, match=r"probe needs the numbers of '1\.running_mean', got .* given its memory back"):
        bn.probe(net, torch.randn(8, 4))


def test_memory_that_is_given_back_in_mid_training_costs_its_numbers_only() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with bn.watch(net, every=10, budget=1e9, probe=False) as run:
        for _ in range(20):
            optimizer.zero_grad()
            net(torch.randn(16, 4)).sum().backward()
            optimizer.step()
        freed(net[1].running_var)
        freed(net[1].weight)
        for _ in range(20):
            run.step()
    assert run.steps == 40
    assert (run.latest["noise"]["1"], run.latest["gamma"]["1"], run.latest["beta"]["1"] is None) == (None, None, False)


def test_measurements_that_need_a_weights_numbers_refuse_one_without() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    freed(net[0].weight)
    x = torch.randn(8, 4)
    message = r"needs the numbers of '0\.weight', got a tensor that has given its memory back"
    with pytest.raises(ValueError, match=f"Angles {message}"):
        Angles(net, optimizer)
    with pytest.raises(ValueError, match=f"landscape {message}"):
        landscape(net, x, lambda output, _: output.sum(), optimizer)
    with pytest.raises(ValueError, match=f"gradient_shift {message}"):
        gradient_shift(net, x, lambda output, _: output.sum(), optimizer)


FSDP = """
import tempfile, torch, torch.distributed as d, batchnorm as bn
from torch import nn
from torch.distributed.fsdp import fully_shard
d.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
fully_shard(model)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
with bn.watch(model, every=10, budget=1e9, log=tempfile.mkdtemp()) as run:
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).square().mean().backward()
        optimizer.step()
gamma = model[1].weight.full_tensor().abs().median().item()
assert abs(run.latest["gamma"]["1"] - gamma) < 0.05, run.latest["gamma"]
assert run.latest["noise"]["1"] > 0
assert 0.5 < bn.probe(model, torch.randn(8, 3, 8, 8))["gamma"]["1"] < 2
print("survived", run.steps)
d.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_that_fsdp2_shards_is_watched_and_probed() -> None:
    [done] = forked.run_world(FSDP, world=1)
    assert done.stdout.split() == ["survived", "20"], done.stderr[-2000:]
