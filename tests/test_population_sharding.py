"""Sharded models: looks work on every rank, agree with those at the whole model, and leave training as it was."""

from __future__ import annotations

import json
import warnings

import forked
import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import batchnorm as bn

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")


def net() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))
    return nn.Sequential(block, head, nn.Flatten(), nn.Linear(64, 2))


def sharded(kind: str) -> nn.Module:
    model = net()
    if kind.startswith("FSDP1"):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=kind.endswith("kept"))
    if kind == "FSDP2, nested":
        fully_shard(model[0])
        fully_shard(model[1])
    return fully_shard(model)


def images(seed: int, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[float]:
    model.train()
    losses = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = model(images(seed)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def begin(model: nn.Module, moment: str) -> None:
    if moment != "made":
        loss = model(images(9)).sum()
        if moment == "after a backward":
            loss.backward()
            model.zero_grad()


def looks(model: nn.Module) -> dict[str, object]:
    """What every look says of a model."""
    batches = [images(seed) for seed in range(4)]
    with bn.preserve_state(model), torch.no_grad():
        model.eval()(batches[0])
    recalibrated = bn.recalibrate(model, batches)
    adapted = bn.adapt(model, batches, prior=8)
    found = {
        "recalibrated": [moments.mean.tolist() for moments in recalibrated.values()],
        "adapted": [moments.var.tolist() for moments in adapted.values()],
        "examined": [finding.code for finding in bn.examine(model, batches).findings],
        "probed": len(bn.probe(model, batches[0]).layers),
    }
    monitor = bn.ShiftMonitor(model.eval(), budget=None)
    found["calibrated"] = monitor.calibrate([images(seed, 64) for seed in range(4)]).observations
    with monitor, torch.no_grad():
        for batch in batches:
            model(batch + 5)
    return {**found, "rang": monitor.alarm is not None}


def run(rank: int, world: int, kind: str, moment: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of FSDP: that it is old, and that there are few ranks
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    model = sharded(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made here: a pass leaves FSDP2 with other parameters
    begin(model, moment)
    found = {**looks(model), "losses": train(model, optimizer)}
    if rank == 0:
        with open(f"{folder}/found.json", "w") as file:  # noqa: PTH123 - a process of its own
            json.dump(found, file)
    distributed.destroy_process_group()


CASES = [
    ("FSDP2", "after a forward", 1),
    ("FSDP2", "after a backward", 2),
    ("FSDP2, nested", "made", 1),
    ("FSDP2, nested", "after a forward", 2),
    ("FSDP1", "after a forward", 2),
    ("FSDP1, parameters kept", "made", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moment", "world"), CASES)
def test_looks_at_a_sharded_model_say_what_they_say_of_the_whole_one(kind, moment, world, tmp_path):
    check(kind, moment, world, tmp_path)


def check(kind: str, moment: str, world: int, folder) -> None:
    forked.ranks(run, (world, kind, moment, str(folder)), world)
    found = json.loads((folder / "found.json").read_text())
    whole = net()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    begin(whole, moment)
    expected = {**looks(whole), "losses": train(whole, optimizer)}
    assert found.keys() == expected.keys()
    for name in ("recalibrated", "adapted"):  # sums over a batch that was cut the same way: only rounding differs
        pairs = zip(found.pop(name), expected.pop(name), strict=True)
        assert all(torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6) for a, b in pairs), name
    losses = [torch.tensor(each.pop("losses")) for each in (found, expected)]
    assert torch.allclose(*losses, rtol=1e-4)  # gradients are summed over ranks in another order
    assert found == expected
