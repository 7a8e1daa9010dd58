"""watch under torch.distributed: one log, the ranks compared, nobody waits, and the weights are the same."""

import json
from pathlib import Path

import forked
import numpy as np
import pytest
from torch import nn

import batchnorm as bn
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
@pytest.mark.parametrize(("kind", "tiers"), [("ddp", ["free", "lab", "probe"]), ("fsdp", ["free", "lab"])])
def test_the_first_rank_measures_and_all_train_to_the_same_weights(kind: str, tiers: list[str], tmp_path: Path) -> None:
    alone, watched = trained(kind, ""), trained(kind, tmp_path / "run")
    assert {rank: digest for rank, (digest, _) in watched.items()} == {
        rank: digest for rank, (digest, _) in alone.items()
    }
    assert (watched[0][1], watched[1][1]) == (tiers, [])
    log = Log(tmp_path / "run")
    assert log.is_finished
    assert (log.start["rank"], log.start["ranks"], log.start["synchronized"]) == (0, [0, 1], 0)
    assert [(row["step"], row["model"]["ranks_compared"]) for row in log.rows("lab")] == [(10, 2), (20, 2), (30, 2)]
    row = log.rows("free")[-1]["values"]
    assert row["noise"][0] is not None
    assert (row["gamma"][0] is None) == (kind == "fsdp")


APART = """
    import json, sys, torch, torch.distributed as dist
    from torch import nn
    import batchnorm as bn
    from batchnorm.integrations.watch_session import Session

    dist.init_process_group("gloo")
    rank, logs = dist.get_rank(), sys.argv[1]
    sub = dist.new_group([1, 2])
    told, stored = {}, []

    def net(eps=1e-5):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, eps=eps), nn.ReLU(), nn.Linear(6, 1)).double()

    def train(model, run, steps, keep=False, group=None, own=100):
        together = (lambda: None) if group is False else (lambda: dist.barrier(group=group))
        together()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(rank)
        for step in range(1, steps + 1):
            together()  # as in a training whose ranks exchange gradients
            if step > own:
                continue
            optimizer.zero_grad()
            model(rank + torch.randn(16, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            if keep and step % 10 == 0:
                stored.append([step, model[1].running_mean.tolist(), model[1].running_var.tolist()])

    model = net(eps=0.01)
    with bn.watch(model, log=logs + "/all", every=10, budget=1e9) as run:
        train(model, run, 30, keep=True)
        dist.barrier()  # of the test: all copies are there before the first rank stops
    try:
        run.latest
    except RuntimeError as error:
        told["latest"] = str(error)

    if rank == 0:
        model = net()
        with bn.watch(model, log=logs + "/first", every=10, budget=1e9) as run:
            train(model, run, 30, group=False)
    if rank:
        model = net()
        with bn.watch(model, log=logs + "/sub", every=10, budget=1e9, group=sub) as run:
            train(model, run, 20, group=sub)
            dist.barrier(group=sub)
    with bn.watch(net(), log=logs + f"/own{rank}", every=10, budget=1e9, group=None) as run:
        train(run._model, run, 20, group=False)
    told["own"] = run.steps
    model = net()
    session = Session(log=logs + "/session", every=10, budget=1e9)
    for _ in range(2):
        session.begin(model)
        train(model, session.run, 30, own=10 if rank == 1 else 30)  # a rank that ends earlier
        dist.barrier()
        session.end()
    other = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double() if rank == 2 else net()
    with bn.watch(other, log=logs + "/other", every=10, budget=1e9) as run:
        if rank == 1:
            other[1].running_var[2] = torch.nan
        train(other, run, 10)
        dist.barrier()
    print(json.dumps([rank, stored, told]), flush=True)
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Three ranks that train models of their own: their results, and the folder of their logs."""
    folder = tmp_path_factory.mktemp("apart")
    ranks = forked.run_world(APART, str(folder), world=3)
    assert [rank.returncode for rank in ranks] == [0, 0, 0], [rank.stderr[-2000:] for rank in ranks]
    return [json.loads(rank.stdout) for rank in ranks], folder


def difference(values: np.ndarray, variances: np.ndarray, eps: float) -> float:
    """(ranks, C): the rms over channels of the largest minus the smallest value, in sd."""
    unit = np.sqrt(variances.mean(0) + eps)
    return float(np.sqrt((((values.max(0) - values.min(0)) / unit) ** 2).mean()))


@pytest.mark.slow
def test_one_log_records_how_far_the_ranks_differ(apart):
    (_, *_), folder = apart
    of_ranks = [stored for _, stored, _ in apart[0]]
    log = Log(folder / "all")
    rows = log.rows("lab")
    assert [row["step"] for row in rows] == [10, 20, 30]
    for i, row in enumerate(rows):
        means, variances = (np.array([stored[i][j] for stored in of_ranks]) for j in (1, 2))
        expected = difference(means, variances, 0.01), difference(np.sqrt(variances), variances, 0.01)
        assert row["values"]["rank_means"] == [pytest.approx(expected[0], rel=5e-3)]  # three digits
        assert row["values"]["rank_sds"] == [pytest.approx(expected[1], rel=5e-3)]
        assert row["model"] == {"ranks_compared": 3}
    assert rows[-1]["values"]["rank_means"][0] > 1  # the data of the ranks differ
    assert sorted(path.name for path in (folder / "all").iterdir()) == ["arrays", "record.jsonl"]
    assert not log.rows("event")


@pytest.mark.slow
def test_ranks_without_records_say_which_rank_has_them(apart):
    told = [each.get("latest", "") for _, _, each in apart[0]]
    assert told[0] == ""
    assert told[2].startswith("rank 2 has no records: of ranks 0, 1, 2, rank 0 measures and writes the log.")


@pytest.mark.slow
def test_only_one_rank_that_watches_waits_for_nobody_and_says_so(apart):
    log = Log(apart[1] / "first")
    assert log.is_finished
    assert not log.rows("lab")
    assert [row["message"].partition(",")[0] for row in log.rows("event")] == [
        "the stored statistics are not compared with those of ranks 1"
    ]


@pytest.mark.slow
def test_a_group_has_a_log_of_its_first_rank(apart):
    log = Log(apart[1] / "sub")
    assert (log.start["rank"], log.start["ranks"]) == (1, [1, 2])
    assert [(row["step"], row["model"]["ranks_compared"]) for row in log.rows("lab")] == [(10, 2), (20, 2)]


@pytest.mark.slow
def test_two_trainings_continue_one_log_and_a_rank_that_ends_is_missing(apart):
    log = Log(apart[1] / "session")
    rows = [(row["step"], row["model"]["ranks_compared"]) for row in log.rows("lab")]
    assert rows == [(10, 3), (20, 2), (30, 2), (40, 3), (50, 2), (60, 2)]
    assert log.count("start") == 2
    events = [(row["step"], row["message"].partition(" of the")[0]) for row in log.rows("event")]
    stopped = "rank 1 left no stored statistics to compare after step 20"
    assert [each for each in events if "left no" in each[1]] == [(30, stopped), (60, stopped)]


@pytest.mark.slow
def test_other_layers_and_nan_on_another_rank_are_events(apart):
    events = [(row["message"], row["layer"], row["code"]) for row in Log(apart[1] / "other").rows("event")]
    assert ("a stored mean or variance is NaN or infinite on rank 1", "1", "BN102") in events
    assert any("not compared with those of rank 2, which did not watch these layers" in each[0] for each in events)
    (row,) = Log(apart[1] / "other").rows("lab")
    assert row["values"] == {"rank_means": [None], "rank_sds": [None]}


@pytest.mark.slow
def test_processes_that_train_models_of_their_own_have_logs_of_their_own(apart):
    assert [each["own"] for _, _, each in apart[0]] == [20, 20, 20]
    starts = [Log(apart[1] / f"own{rank}").start for rank in range(3)]
    assert not any("rank" in start or "ranks" in start for start in starts)
    assert len({start["id"] for start in starts}) == 3


def test_a_group_that_is_none_is_an_error_before_the_training():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        bn.watch(model, group=3)
    with pytest.raises(ValueError, match="group must be \"all\", a ProcessGroup or None, got 'some'"):
        bn.watch(model, group="some")
