"""watch under torch.distributed: one rank measures, nobody waits for it, and the weights are the same."""

import json
from pathlib import Path

import forked
import pytest

from batchnorm.record import Log

WORKER = """
    import hashlib, json, sys, torch, torch.distributed as dist
    from contextlib import nullcontext
    from torch import nn
    import batchnorm as bn

    dist.init_process_group("gloo")
    rank, kind, log = dist.get_rank(), sys.argv[1], sys.argv[2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(10 + rank)
    watched = bn.watch(wrapped, log=log, every=10, budget=1e9) if log else nullcontext()
    with watched as run:
        for _ in range(30):
            optimizer.zero_grad()
            wrapped(torch.randn(8, 3, 8, 8)).square().mean().backward()
            optimizer.step()
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes())
    print(json.dumps([rank, digest.hexdigest(), sorted({r.tier for r in run.records}) if log else []]), flush=True)
    dist.destroy_process_group()
"""


def trained(kind: str, log: Path | str) -> dict[int, tuple[str, list[str]]]:
    """The weights' digest and the tiers that were measured, by rank."""
    ranks = forked.run_world(WORKER, kind, str(log))
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr[-2000:] for rank in ranks]
    lines = [json.loads(rank.stdout) for rank in ranks]
    return {rank: (digest, tiers) for rank, digest, tiers in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tiers"), [("ddp", ["free", "probe"]), ("fsdp", ["free"])])
def test_the_first_rank_measures_and_all_train_to_the_same_weights(kind: str, tiers: list[str], tmp_path: Path) -> None:
    alone, watched = trained(kind, ""), trained(kind, tmp_path / "run")
    assert {rank: digest for rank, (digest, _) in watched.items()} == {
        rank: digest for rank, (digest, _) in alone.items()
    }
    assert (watched[0][1], watched[1][1]) == (tiers, [])
    log = Log(tmp_path / "run")
    assert log.is_finished
    row = log.rows("free")[-1]["values"]
    assert row["noise"][0] is not None
    assert (row["gamma"][0] is None) == (kind == "fsdp")
