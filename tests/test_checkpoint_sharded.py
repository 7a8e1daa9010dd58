"""Tensors without numbers of their own: shards, summands, meta, sparse, quantized and uninitialized ones."""

from __future__ import annotations

import argparse
import pickle

import forked
import pytest
import torch
import torch.distributed as dist
from checkpoint_files import legacy, saved, trained
from torch import nn

from batchnorm.checkpoint import Checkpoint, read
from batchnorm.doctor import examine
from batchnorm.doctor.diagnosis_report import report
from batchnorm.reporting.formats import FORMATS, rendered

REMEDY = "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"


def reading(tmp_path, data: bytes, name: str = "c.pt") -> Checkpoint:
    (tmp_path / name).write_bytes(data)
    return read(tmp_path / name)


def save_sharded(rank: int, world: int, folder: str) -> None:
    """A process of a group that saves one model in each of the ways in which it may be cut."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    net = trained()
    plain = net.state_dict()
    mesh = init_device_mesh("cpu", (world,))
    for name, placement in {"cut": Shard(0), "whole": Replicate()}.items():
        state = {
            key: distribute_tensor(value, mesh, [placement if value.ndim else Replicate()])
            for key, value in plain.items()
        }
        torch.save(state, f"{folder}/{name}.{world}.{rank}.pt")
    part = DTensor.from_local(plain["1.running_var"], mesh, [Partial()], run_check=False)
    torch.save({**plain, "1.running_var": part}, f"{folder}/partial.{world}.{rank}.pt")
    fully_shard(net)
    torch.save(net.state_dict(), f"{folder}/fsdp.{world}.{rank}.pt")
    full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(full, f"{folder}/full.{world}.pt")
    dcp.save(net.state_dict(), checkpoint_id=f"{folder}/shards{world}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sharded")
    for world in (1, 2):
        forked.ranks(save_sharded, (world, str(place)), world)
    return place


@pytest.fixture(scope="module")
def plain(folder):
    torch.save(trained().state_dict(), folder / "plain.pt")
    return read(folder / "plain.pt").layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp.1.0", "cut.1.0", "whole.1.0", "whole.2.0", "whole.2.1", "full.1", "full.2"])
def test_a_shard_that_is_all_of_its_tensor_is_read(folder, plain, name):
    assert read(folder / f"{name}.pt").layers == plain


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_statistics_beside_sharded_parameters_are_read_and_these_are_named(folder, plain, rank):
    """fully_shard cuts parameters and leaves buffers whole."""
    path = folder / f"fsdp.2.{rank}.pt"
    layers = read(path).layers
    assert [stored.running_var for stored in layers.values()] == [stored.running_var for stored in plain.values()]
    assert [stored.num_batches_tracked for stored in layers.values()] == [3, 3]
    assert f"only 2 of the 4 numbers of a DTensor. Save whole tensors: {REMEDY}" in layers["1"].unread["weight"]
    assert set(layers["2.1"].unread) == {"weight", "bias"}
    diagnosis = examine(path)
    assert {"BN102", "BN103"} <= set(diagnosis.checked)
    assert diagnosis.not_checked["BN107"] == "some values could not be read (1, 2.1)"
    for name in FORMATS:
        if name != "jsonl":
            assert "StateDictOptions(" in rendered(report(diagnosis), name), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sharded_statistics_are_not_checked(folder, rank):
    stored = read(folder / f"cut.2.{rank}.pt").layers["1"]
    assert (stored.running_mean, stored.running_var, stored.weight) == (None, None, None)
    assert REMEDY in stored.unread["running_var"]
    diagnosis = examine(folder / f"cut.2.{rank}.pt")
    assert diagnosis.findings == ()
    assert not [code for code in diagnosis.checked if code.startswith("BN1")]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sum_that_is_not_taken_yet_is_not_read(folder, rank):
    stored = read(folder / f"partial.2.{rank}.pt").layers["1"]
    assert stored.running_var is None
    assert stored.unread["running_var"].startswith("one term of the sum that makes up a DTensor. Save whole tensors: ")
    assert stored.unread["running_mean"] == "of no use without running_var."


@pytest.mark.slow
@pytest.mark.parametrize("place", ["shards1", "shards2", "shards2/__0_0.distcp", "shards2/__1_0.distcp"])
def test_a_distributed_checkpoint_is_named_with_the_command_that_joins_it(folder, place):
    with pytest.raises(ValueError, match=r"dcp_to_torch .*shards\d model\.pt\. Then give model\.pt\."):
        read(folder / place)


@pytest.mark.slow
def test_the_index_of_a_distributed_checkpoint_is_named(folder):
    with pytest.raises(ValueError, match="got the index of a distributed checkpoint"):
        read(folder / "shards2" / ".metadata")


@pytest.mark.slow
def test_the_command_for_a_distributed_checkpoint_makes_a_file_that_is_read(folder, plain):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "shards2", folder / "joined.pt")
    assert read(folder / "joined.pt").layers == plain


class Labelled(torch.Tensor):
    """A subclass that has its numbers."""


@pytest.mark.parametrize("write", [saved, lambda v: saved(v, pickle_protocol=5), legacy, pickle.dumps])
def test_a_subclass_with_its_numbers_is_read(tmp_path, write):
    state = trained().state_dict()
    expected = reading(tmp_path, saved(state)).layers
    labelled = {name: value.as_subclass(Labelled) for name, value in state.items()}
    assert reading(tmp_path, write(labelled)).layers == expected


def on_meta() -> dict[str, torch.Tensor]:
    return nn.Sequential(nn.BatchNorm2d(4)).to("meta").state_dict()


def given_back() -> dict[str, torch.Tensor]:
    state = nn.Sequential(nn.BatchNorm2d(4)).state_dict()
    state["0.running_var"].untyped_storage().resize_(0)
    return state


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyBatchNorm2d())


def two() -> dict[str, torch.Tensor]:
    from torch.testing._internal.two_tensor import TwoTensor

    return {"0.running_mean": torch.ones(4), "0.running_var": TwoTensor(torch.ones(4), torch.ones(4))}


def quantized(scheme: str) -> dict[str, torch.Tensor]:
    values = torch.ones(4)
    if scheme == "tensor":
        made = torch.quantize_per_tensor(values, 0.1, 0, torch.quint8)
    else:
        made = torch.quantize_per_channel(values, torch.ones(4), torch.zeros(4), 0, torch.qint8)
    return {"0.running_mean": values, "0.running_var": made}


UNREAD = {
    "meta": (on_meta, "on the meta device, without values. Load the weights"),
    "lazy": (lambda: lazy().state_dict(), "not initialized. Run one batch"),
    "whole lazy module": (lazy, "not initialized. Run one batch"),
    "sparse": (lambda: {"0.running_mean": torch.ones(4), "0.running_var": torch.ones(4).to_sparse()},
               "sparse. Save tensor.to_dense()."),
    "compressed": (lambda: {"0.running_mean": torch.ones(2, 2), "0.running_var": torch.ones(2, 2).to_sparse_csr()},
                   "sparse. Save tensor.to_dense()."),
    "quantized": (lambda: quantized("tensor"), "quantized. Save tensor.dequantize()."),
    "quantized by channel": (lambda: quantized("channel"), "quantized. Save tensor.dequantize()."),
    "nested": (lambda: {"0.running_var": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
               "nested. Save a tensor for each of its parts."),
    "of two": (two, "a TwoTensor without numbers of its own. Save a plain tensor in its place."),
    "given back": (given_back, "memory was freed before saving. Save whole tensors: get_model_state_dict("),
    "of the other sign": (
        lambda: {"0.running_mean": torch.ones(2), "0.running_var": torch.tensor([1j, 2j]).conj().imag},
        "stored with all signs flipped. Save tensor.resolve_neg()."),
    # torch pickles types without a storage class by another function
    "of the other sign, without storage class": (
        lambda: {"0.running_mean": torch.ones(2), "0.running_var": torch._neg_view(torch.ones(2, dtype=torch.uint16))},
        "stored with all signs flipped. Save tensor.resolve_neg()."),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per", "ignore:The PyTorch API of nested")
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Couldn't retrieve")
@pytest.mark.parametrize("write", [saved, lambda v: saved(v, pickle_protocol=5)])
@pytest.mark.parametrize(("make", "why"), UNREAD.values(), ids=UNREAD)
def test_a_layer_without_numbers_is_there_and_not_checked(tmp_path, make, why, write):
    result = reading(tmp_path, write(make()))
    assert list(result.layers) == ["0"]
    stored = result.layers["0"]
    assert (stored.running_mean, stored.running_var) == (None, None)
    assert why in stored.unread["running_var"]
    diagnosis = examine(tmp_path / "c.pt")
    assert diagnosis.findings == ()
    assert not {"BN101", "BN102", "BN103", "BN104", "BN105", "BN109", "BN110"} & set(diagnosis.checked)
    assert any(why in note for note in diagnosis.notes)


def test_a_whole_object_beside_tensors_without_numbers_is_named_too(tmp_path):
    (tmp_path / "c.pt").write_bytes(saved({**on_meta(), "args": argparse.Namespace()}))
    notes = examine(tmp_path / "c.pt").notes
    assert notes[0] == "left unread: argparse.Namespace"
    assert notes[1].startswith("not checked: weight, bias, running_mean, running_var, num_batches_tracked of 0: on the")
