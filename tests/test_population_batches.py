"""recalibrate takes batches of any kind from loaders of any kind, and refuses what it cannot use."""

from __future__ import annotations

import copy
import math
import random
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from batchnorm import recalibrate
from batchnorm.population.batches import Batches, device_of

Pair = namedtuple("Pair", "x y")

pytestmark = pytest.mark.usefixtures("forwards")


class Keyword(nn.Module):
    """Takes its input by name, as models of dict batches do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, scale=1.0):
        return self.norm(input=x * scale)


class Whole(nn.Module):
    """Takes the batch as one object."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch):
        return self.norm(batch["x"] if hasattr(batch, "keys") else batch.x)


X = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 9.0]])


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Keyword, X),
        (Keyword, (X, "label")),
        (Keyword, [X, torch.zeros(3)]),
        (Keyword, Pair(X, torch.zeros(3))),
        (Keyword, {"x": X}),
        (Keyword, UserDict(x=X, scale=torch.ones(3, 1))),
        (Whole, {"x": X, "label": 3}),
        (Whole, SimpleNamespace(x=X)),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "dict", "mapping", "dict as a whole", "object"],
)
def test_batches_of_any_kind_reach_the_model(model, batch):
    net = model()
    recalibrate(net, [batch, batch])
    assert net.norm.running_mean.tolist() == [3, 3]
    # 6 values: m2 = 2 * 14 and 2 * 54
    torch.testing.assert_close(net.norm.running_var, torch.tensor([28 / 5, 108 / 5]), rtol=1e-7, atol=0)


def test_a_forward_of_ones_own_replaces_the_rules():
    net = Keyword()
    recalibrate(net, [{"left": X, "right": X + 1}], forward=lambda model, batch: model(batch["right"]))
    assert net.norm.running_mean.tolist() == [4, 4]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7])
def test_max_examples_cuts_the_last_batch_to_fit_in_all_its_tensors(limit):
    rows = torch.arange(14.0).reshape(7, 2)
    seen = []

    def forward(model, batch):
        x, extra = batch
        assert len(x) == len(extra["id"]) == len(extra["nested"][0])
        assert extra["shared"].shape == (5,)
        seen.extend(extra["id"].tolist())
        return model(x.repeat(2, 1))  # twice, so that one example has a variance

    batches = [
        (x, {"id": i, "nested": [x], "shared": torch.zeros(5), "none": None})
        for x, i in zip(rows.split(3), torch.arange(7).split(3), strict=True)
    ]
    recalibrate(nn.Sequential(nn.BatchNorm1d(2)), batches, limit, forward=forward, exact=False)
    assert seen[-limit:] == list(range(limit))  # after it was tried whether the last batch can be cut


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    "make",
    [iter, lambda batches: (b for b in batches), lambda batches: map(torch.clone, batches)],
    ids=["iterator", "generator", "map"],
)
def test_one_shot_iterators_are_good_for_all_passes(make):
    net, x = two_layers(), torch.randn(12, 2)
    twin = copy.deepcopy(net)
    recalibrate(net, make(x.split(5)), 11)
    recalibrate(twin, x[:11].split(5))
    assert all(a.equal(b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


class Augmented(IterableDataset):
    """Draws from every global source of randomness."""

    def __iter__(self):
        for row in torch.ones(8, 2):
            yield row + random.random() + torch.randn(())


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, torch.Generator().manual_seed(7)], ids=["global", "own generator"])
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "augmented"])
def test_a_loader_gives_every_pass_the_same_examples_and_advances_no_random_state(own, shuffled):
    passes: list[list[list[float]]] = []

    class Watch(nn.Module):
        def forward(self, x):
            passes.append(x.tolist())
            return x

    net = nn.Sequential(Watch(), *two_layers())
    data = TensorDataset(torch.randn(8, 2)) if shuffled else Augmented()
    loader = DataLoader(data, 8, shuffle=shuffled or None, generator=own)
    before = fingerprint(net)[1:], None if own is None else own.get_state().tolist()
    recalibrate(net, loader, 6)
    assert (fingerprint(net)[1:], None if own is None else own.get_state().tolist()) == before
    whole, *cut = passes  # whether it can be cut is tried on the same examples
    assert len(whole) == 8
    assert len(cut) == 4
    assert all(rows == whole[:6] for rows in cut)


def test_batches_are_moved_to_the_model_or_to_a_device_that_is_named():
    seen = []

    def forward(model, batch):
        seen.append((batch["x"].device.type, batch["deep"][0].device.type, batch["label"]))

    batch = {"x": X, "deep": [X], "label": "cat"}
    net = nn.Sequential(nn.BatchNorm1d(2))
    for device in (None, "meta"):
        with pytest.warns(RuntimeWarning, match="no forward reached '0'"):
            recalibrate(net, [batch], forward=forward, device=device)
    assert list(dict.fromkeys(seen)) == [("cpu", "cpu", "cat"), ("meta", "meta", "cat")]
    assert device_of(net.to("meta")) is None  # where numbers would be lost
    assert batch["x"] is X


class OneShot:
    """Iterable, but good for one pass."""

    def __init__(self) -> None:
        self.batches = iter([X, X])

    def __iter__(self):
        return self.batches


TOO_FEW = "at least 2 finite values per channel"


@pytest.mark.parametrize(
    ("loader", "limit", "error", "message"),
    [
        ([], None, ValueError, "at least one batch, got an empty loader. Check the data set's length."),
        (X, None, TypeError, "an iterable of batches, got Tensor. Pass a DataLoader, or a list of batches: [x]."),
        (TensorDataset(X), None, TypeError, "an iterable of batches, got TensorDataset. Pass a DataLoader, or"),
        ([X], 0, ValueError, "max_examples of 1 or more, got 0. Use None for all."),
        (["text"], 1, ValueError, "batches that hold tensors, got str without any. Make the loader yield"),
        ([X[:1]], None, ValueError, f"{TOO_FEW}, got 1 in channel 0 of layer 'norm' (2 of 2 channels). Give more"),
        ([X[:0]], None, ValueError, f"{TOO_FEW}, got 0 in channel 0 of layer 'norm'"),
        ([X * math.nan], None, ValueError, f"{TOO_FEW}, got 0 in channel 0 of layer 'norm'"),
        ([X * 1e30], None, ValueError, "statistics that fit the layer's buffers, got 2.7e+61 for torch.float32 in"),
    ],
    ids=["empty", "tensor", "dataset", "limit 0", "no tensors", "one value", "no rows", "all NaN", "too large"],
)
@pytest.mark.parametrize("exact", [True, False])
def test_what_cannot_be_measured_is_refused_and_the_model_left_as_it_was(loader, limit, error, message, exact):
    net = Keyword()
    before = fingerprint(net)
    with pytest.raises(error) as caught:
        recalibrate(net, loader, limit, exact=exact)
    assert str(caught.value).startswith(f"recalibrate needs {message}")
    assert fingerprint(net) == before


def test_a_loader_that_is_empty_in_its_second_pass_is_refused():
    class Hidden(OneShot):
        def __iter__(self):
            yield from self.batches

    net = two_layers()
    before = fingerprint(net)
    message = r"^recalibrate needs a loader that gives the same batches in every pass, got 2 batches, then 0\. Pass a"
    with pytest.raises(ValueError, match=message):
        recalibrate(net, Hidden(), memory=0)
    assert fingerprint(net) == before


def test_what_gives_the_same_iterator_again_is_good_for_all_passes():
    net = two_layers()
    twin = copy.deepcopy(net)
    recalibrate(net, OneShot())
    recalibrate(twin, [X, X])
    assert all(a.equal(b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


class Writes(nn.Module):
    """Normalizes its input in place, as some models do to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))

    def forward(self, x):
        return self.norms(x.sub_(5.0).div_(3.0))


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize(
    "make",
    [
        list,
        iter,
        lambda batches: [(x, "label") for x in batches],
        lambda batches: [{"x": x} for x in batches],
        lambda batches: DataLoader(batches, batch_size=None),
        lambda batches: DataLoader(torch.cat(batches), 4),
    ],
    ids=["list", "iterator", "tuples", "dicts", "loader of batches", "loader"],
)
def test_a_model_that_writes_to_its_input_spoils_no_batch(make, limit):
    x = torch.randn(12, 2) * 3 + 5
    given, net = x.clone(), Writes()
    recalibrate(net, make(given.split(4)), limit)
    expected = (x[:limit].double() - 5) / 3
    assert torch.equal(given, x)
    torch.testing.assert_close(net.norms[0].running_mean.double(), expected.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(net.norms[0].running_var.double(), expected.var(0), rtol=1e-5, atol=0)


def test_only_memory_that_is_used_again_is_copied(monkeypatch):
    rows, thing = torch.zeros(4, 2), SimpleNamespace()
    ((copied, kept),) = Batches([(rows, thing)], None, torch.device("cpu"))
    assert copied.data_ptr() != rows.data_ptr()
    assert kept is thing
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("a new batch was copied"))
    (batch,) = Batches(DataLoader(rows, 4), None, torch.device("cpu"))
    assert batch.shape == (4, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, sequences):
        assert isinstance(sequences, PackedSequence)
        return self.norm(sequences.data.mul_(2.0))


def test_packed_sequences_are_cut_by_example_and_copied():
    packed = pack_sequence([torch.full((3, 2), 1.0), torch.full((2, 2), 4.0), torch.full((1, 2), 100.0)])
    net = Recurrent()
    recalibrate(net, [packed], 2)
    # 3 values of 2 and 2 of 8
    assert net.norm.running_mean.tolist() == pytest.approx([4.4, 4.4])
    assert packed.data.max() == 100


def test_sparse_batches_are_cut():
    class Dense(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to_dense())

    net = Dense(nn.BatchNorm1d(2))
    recalibrate(net, [X.to_sparse()], 2)
    assert net[0].running_mean.tolist() == [1.5, 0]


@pytest.mark.parametrize("loader", [{"x": X}, "path", b"path"])
def test_one_batch_in_the_place_of_a_loader_is_refused(loader):
    message = rf"^recalibrate needs an iterable of batches, got {type(loader).__name__}\. Pass a DataLoader, or a list"
    with pytest.raises(TypeError, match=message):
        recalibrate(two_layers(), loader)
