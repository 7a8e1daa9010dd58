"""Layers with ``sync``: the ranks of torch.distributed, which run ``rank_checks``, and what one process can tell."""

from __future__ import annotations

import pickle

import forked
import pytest
import rank_checks
import torch
import torch.distributed as dist

import batchnorm as bn

RUN = "import rank_checks; rank_checks.main()"
PAIRS = [(world, name) for name, (_, worlds) in rank_checks.CHECKS.items() for world in worlds]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), PAIRS)
def test_on_every_rank(world: int, name: str) -> None:
    outcomes = forked.checked(RUN, world, name)
    assert [each[0] for each in outcomes] == ["ok"] * world, [each[1] for each in outcomes]


FAULTY = """
    import os, signal, sys, time, torch, torch.distributed as dist
    from datetime import timedelta
    from torch import nn
    import batchnorm as bn

    kind, faulty = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(bn.BatchNorm1d(3, sync=True)))
    for step in range(3):
        y = model(torch.randn(4, 3))
        began = time.monotonic()
        if step == 2 and dist.get_rank() == faulty:
            if kind == "hang":
                time.sleep(8)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            y.sum().backward()
        except RuntimeError as error:
            print(f"{time.monotonic() - began:.2f} {error}", flush=True)
            os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "faulty"), [("kill", 0), ("kill", 2), ("hang", 1)])
def test_a_rank_that_ends_or_hangs_is_told_with_the_layer_on_all_others(kind: str, faulty: int) -> None:
    ranks = forked.run_world(FAULTY, kind, str(faulty), world=3)
    for rank, process in enumerate(ranks):
        if rank == faulty:
            assert not process.stdout
            continue
        seconds, text = process.stdout.split(" ", 1)
        assert text.startswith("'1.0', a BatchNorm1d(3), needs the moments of ranks 0, 1, 2 in its backward pass")
        if (kind, faulty) == ("kill", 0):  # it had the store
            assert "The store of the process group cannot be reached" in text
        else:
            assert f"Rank {faulty} did not report a failure" in text
        assert float(seconds) < 4 + 3  # the timeout, and some seconds for reports on a busy machine
        assert "The backend says: " in text


@pytest.fixture
def alone():
    """A process group of one process."""
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def test_without_other_processes_a_synchronized_layer_is_a_local_one(alone: None) -> None:
    x = torch.randn(8, 3, requires_grad=True)
    results = []
    for options in ({"sync": True}, {"process_group": dist.group.WORLD}, {}):
        layer = bn.BatchNorm1d(3, act="relu", memory="save", **options)
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad.clone(), layer.weight.grad, layer.running_var, layer.num_batches_tracked])
        x.grad = None
    for result in results[:2]:
        assert all(a.equal(b) for a, b in zip(result, results[2], strict=True))
    with pytest.raises(ValueError, match=r"needs more than 1 value per channel, got shape \(1, 3\)"):
        bn.BatchNorm1d(3, sync=True)(x[:1])


def test_without_a_process_group_a_synchronized_layer_is_a_local_one() -> None:
    x = torch.randn(8, 3)
    assert bn.BatchNorm1d(3, sync=True)(x).equal(bn.BatchNorm1d(3)(x))


def test_settings_say_what_they_need() -> None:
    layer = bn.BatchNorm1d(3, sync=True)
    assert (layer.sync, layer.process_group) == (True, None)
    assert repr(layer).endswith("sync=True)")
    with pytest.raises(TypeError, match="sync must be True or False, got str"):
        bn.BatchNorm1d(3, sync="yes")
    for flag in (1, 0):
        with pytest.raises(TypeError, match="sync must be True or False, got int"):
            bn.BatchNorm1d(3, sync=flag)
    with pytest.raises(
        TypeError, match=r"process_group must be a ProcessGroup of torch\.distributed or None, got list"
    ):
        layer.process_group = [0, 1]
    with pytest.raises(ValueError, match="process_group must contain this process, got what new_group returns"):
        bn.BatchNorm1d(3, process_group=dist.GroupMember.NON_GROUP_MEMBER)
    assert (layer.sync, layer.process_group) == (True, None)


def test_a_group_is_set_copied_and_pickled_with_its_layer(alone: None) -> None:
    layer = bn.BatchNorm1d(3)
    layer.process_group = dist.group.WORLD
    assert layer.sync is True
    assert "process_group=ranks 0" in repr(layer)
    assert pickle.loads(pickle.dumps(layer)).process_group is dist.group.WORLD
    layer.sync = False
    assert layer.process_group is None
