"""``recalibrate`` over the ranks of a group: the checks of ``rank_recalibration``, and ranks that end or hang."""

from __future__ import annotations

import json

import forked
import pytest
import rank_recalibration
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn

RUN = "import rank_recalibration; rank_recalibration.main()"
PAIRS = [(world, name) for name, (_, worlds) in rank_recalibration.CHECKS.items() for world in worlds]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), PAIRS)
def test_on_every_rank(world: int, name: str) -> None:
    outcomes = forked.checked(RUN, world, name)
    assert [each[0] for each in outcomes] == ["ok"] * world, [each[1] for each in outcomes]


FAULTY = """
    import json, os, signal, sys, time, torch, torch.distributed as dist
    from datetime import timedelta
    import batchnorm as bn
    from rank_recalibration import data, network, shards

    kind, faulty, call, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    model, calls, began = network(), 0, time.monotonic()
    before = [tensor.clone() for tensor in model.state_dict().values()]

    def forward(model, batch):
        global calls
        calls += 1
        if calls == call and dist.get_rank() == faulty:
            if kind == "hang":
                time.sleep(8)
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    try:
        bn.recalibrate(model, shards(data())[dist.get_rank()], forward=forward, memory=memory, group="all")
    except RuntimeError as error:
        same = all(a.equal(b) for a, b in zip(before, model.state_dict().values(), strict=True)) and model.training
        print(json.dumps([time.monotonic() - began, same, str(error)]), flush=True)
    os._exit(0)
"""
FAULTS = [("kill", 0, 3, None), ("kill", 2, 1, None), ("kill", 1, 12, 0), ("hang", 1, 2, None), ("hang", 2, 7, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "faulty", "call", "memory"), FAULTS)
def test_if_a_rank_ends_or_hangs_all_others_raise_an_error_and_keep_their_model(
    kind: str, faulty: int, call: int, memory: int | None
) -> None:
    ranks = forked.run_world(FAULTY, kind, str(faulty), str(call), json.dumps(memory), world=3)
    for rank, process in enumerate(ranks):
        if rank == faulty:
            assert not process.stdout
            continue
        assert process.stdout, process.stderr
        seconds, same, text = json.loads(process.stdout)
        assert same
        assert text.startswith("recalibrate needs ")
        assert f"of ranks 0, 1, 2, and on rank {rank} the exchange failed" in text
        if (kind, faulty) == ("kill", 0):  # it had the store
            assert "The store of the process group cannot be reached" in text
        else:
            assert f"Rank {faulty} did not report a failure" in text
        assert seconds < 2 * 4 + 3  # a gloo wait that another rank's failure ended, the timeout, and reports


SHARDED = """
    import json, os, sys, time, torch, torch.distributed as dist, warnings
    from datetime import timedelta
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    import batchnorm as bn
    from rank_checks import message
    from rank_recalibration import alone, data, joined, network, shards

    warnings.simplefilter("ignore")  # of FSDP1: that it is old
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    rank, results = dist.get_rank(), {}

    def sharded():
        model = network(torch.float32)
        if sys.argv[1] == "FSDP1":
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        if sys.argv[1] == "nested":
            fully_shard(model[0])
        return fully_shard(model)

    def statistics(model):
        return [buffer.tolist() for name, buffer in model.named_buffers() if "running" in name]

    parts = shards(data(dtype=torch.float32))  # rank 1 has more batches
    for name, options in {"exact": {}, "one pass": {"exact": False}}.items():
        model, batches = sharded(), [tensor.clone() for tensor in parts[rank]]
        bn.recalibrate(model, batches, group="all", **options)
        results[name] = [statistics(model), statistics(alone(network(torch.float32), joined(parts), **options)[0])]

    def loader():
        yield from parts[rank][:2]
        if rank == 1:
            raise OSError("gone")
        yield from parts[rank][2:]

    class Loader:
        def __iter__(self):
            return loader()

    def forward(model, batch, calls=[]):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise OSError("bad batch")
        return model(batch)

    model = sharded()
    before = statistics(model)
    kind = OSError if rank == 1 else RuntimeError
    results["empty"] = message(ValueError, bn.recalibrate, model, parts[rank] if rank else [], group="all")
    results["loader"] = message(kind, bn.recalibrate, model, Loader(), group="all")
    began = time.monotonic()
    results["forward"] = message(kind, bn.recalibrate, model, parts[rank], group="all", forward=forward)
    results["seconds"], results["same"] = time.monotonic() - began, statistics(model) == before
    print(json.dumps(results), flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP2", "nested", "FSDP1"])
def test_ranks_of_a_sharded_model_run_equally_many_forwards(kind: str) -> None:
    ranks = forked.run_world(SHARDED, kind)
    assert all(rank.stdout for rank in ranks), [rank.stderr[-2000:] for rank in ranks]
    first, second = (json.loads(rank.stdout) for rank in ranks)
    for name in ("exact", "one pass"):
        assert first[name][0] == second[name][0]
        for a, b in zip(*first[name], strict=True):
            # the same batches: roundings differ where gathered weights are multiplied in another layout
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)
    assert first["empty"] == second["empty"]
    assert "needs a batch on every rank if the model is sharded" in first["empty"]
    assert first["empty"].endswith("got none on rank 0. Give every rank a batch.")
    assert (second["loader"], second["forward"]) == ("gone", "bad batch")
    assert "got an error on rank 1" in first["loader"]
    assert "OSError: gone" in first["loader"]
    assert first["seconds"] < 2 * 4 + 3  # it notices the end of the other, or the timeout
    assert first["same"]
    assert second["same"]


@pytest.fixture
def one_process():
    """A process group of one process."""
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_process_is_that_process(one_process: None) -> None:
    x = torch.randn(20, 3)
    models = [nn.Sequential(nn.BatchNorm1d(3)) for _ in range(3)]
    for model, group in zip(models, [None, "all", dist.group.WORLD], strict=True):
        bn.recalibrate(model, [x[:9], x[9:]], group=group)
    assert all(model[0].running_var.equal(models[0][0].running_var) for model in models)


def test_all_ranks_without_a_process_group_are_this_process() -> None:
    layer = nn.BatchNorm1d(3)
    bn.recalibrate(layer, [torch.randn(20, 3)], group="all")
    assert layer.num_batches_tracked == 1
    with pytest.raises(ValueError, match="needs at least one batch, got an empty loader"):
        bn.recalibrate(layer, [], group="all")


def test_what_is_no_group_is_refused() -> None:
    layer, batches = nn.BatchNorm1d(3), [torch.randn(20, 3)]
    with pytest.raises(ValueError, match="group must be \"all\", a ProcessGroup or None, got 'world'"):
        bn.recalibrate(layer, batches, group="world")
    for wrong in (0, [0, 1], True):
        with pytest.raises(TypeError, match=r"must be a ProcessGroup of torch\.distributed or None, got"):
            bn.recalibrate(layer, batches, group=wrong)
    with pytest.raises(ValueError, match="must contain this process"):
        bn.recalibrate(layer, batches, group=dist.GroupMember.NON_GROUP_MEMBER)
    assert layer.num_batches_tracked == 0


def test_a_group_after_its_end_is_refused() -> None:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", world_size=1, rank=0)
    group = dist.group.WORLD
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="group needs an initialized process group"):
        bn.recalibrate(nn.BatchNorm1d(3), [torch.randn(20, 3)], group=group)
