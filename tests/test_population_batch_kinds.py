"""Batches of every kind at every entrance: the same batches are taken by the same rules."""

from __future__ import annotations

import warnings
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import batchnorm as bn
from batchnorm.population.batch_rows import why_whole
from batchnorm.population.batches import Batches, arguments, call
from batchnorm.population.tensor_memory import same_bits
from batchnorm.population.tensor_trees import _tensors_of_object, examples_in, why_without_rows
from batchnorm.shift.verdict import judge

pytestmark = pytest.mark.usefixtures("forwards")


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class FrozenSides:
    left: Tensor
    right: Tensor


class Net(nn.Module):
    """One batch norm layer between what a kind of batch is turned into, (N, 4), and an output for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def answer(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x).relu())

    def forward(self, x):
        return self.answer(x)


class Two(Net):
    def forward(self, left, right):
        return self.answer(left + right)


class Optional(Net):
    def forward(self, left, right=None):
        return self.answer(left if right is None else left + right)


class Named(Net):
    def forward(self, inputs, mask, task="a"):
        assert task in {"a", "b"}
        return self.answer(inputs * mask)


class Whole(Net):
    """Takes an object, and asks it for its tensors."""

    def forward(self, batch):
        return self.answer(batch.left + batch.right)


class Unpacking(Net):
    """Takes a batch apart by place."""

    def forward(self, batch):
        left, right = batch
        return self.answer(left + right)


class Counting(Net):
    """Takes a batch apart by number."""

    def forward(self, batch):
        return self.answer(batch[0] + batch[1])


class Handing(Net):
    """Hands a batch on to code that asks it for its tensors."""

    def forward(self, batch):
        return self.sum_up(batch)

    def sum_up(self, sides):
        return self.answer(sides.left + sides.right)


class Annotated(Net):
    """Says only by its annotation what it takes."""

    def forward(self, sides: Pair | FrozenSides):
        return self.answer(sum(getattr(sides, name) for name in ("left", "right")))


class Left(Net):
    """Takes one of a batch's parts by its name."""

    def forward(self, left):
        return self.answer(left)


class Keys(Net):
    def forward(self, batch):
        return self.answer(batch["left"] + batch["right"])


class Data(Net):
    """Its argument has the name of a key."""

    def forward(self, left):
        return self.answer(left["left"] + left["right"])


class Free(Net):
    def forward(self, **parts):
        return self.answer(parts["left"] + parts["right"])


class Around(Net):
    """Says nothing of what it takes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, inner.norm

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Images(Net):
    def forward(self, images: list[Tensor]):
        return self.answer(torch.stack([image.mean((1, 2)) for image in images]))


class Listed(Net):
    def forward(self, images):
        return self.answer(torch.stack([image.mean((1, 2)) for image in images]))


class Graph(Net):
    def forward(self, nodes, neighbours):
        return self.answer(nodes[neighbours].mean(1))


class Edges(Net):
    def forward(self, x, edge_index):
        return self.answer(torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]) + x)


class Pooled(Net):
    """One output for each graph, by the number of the graph that a node belongs to."""

    def forward(self, data):
        rows = self.norm(data.x)
        return self.last(torch.zeros(data.num_graphs, 4).index_add(0, data.batch, rows))


class Cloud(Net):
    """Every point is seen beside its nearest neighbours, whatever batch it came in."""

    def forward(self, points):
        near = torch.cdist(points, points).topk(3, largest=False).indices
        return self.answer(points[near].mean(1))


class Packed(Net):
    def forward(self, packed):
        return self.answer(packed.data)


class Nested(Net):
    def forward(self, ragged):
        return self.answer(torch.stack([part.mean(0) for part in ragged.unbind()]))


class Sparse(Net):
    def forward(self, x):
        return self.answer(x.to_dense())


class Neighbours(Net):
    def forward(self, adjacency, x):
        return self.answer(torch.sparse.mm(adjacency, x))


class Labelled(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Sides:
    left: Tensor
    right: Tensor
    note: str = "none"


class Encoding(UserDict):
    """As a tokenizer's: a mapping that can be moved."""

    def to(self, device):
        return Encoding({name: part.to(device) for name, part in self.data.items()})


class Moved:
    """A batch object of one's own, moved in place as PyTorch Geometric does it."""

    def __init__(self, **parts: Any) -> None:
        self._store = parts

    def __getattr__(self, name: str) -> Any:
        store = self.__dict__.get("_store", {})
        if name not in store:
            raise AttributeError(name)
        return store[name]

    def to(self, device):
        for name, part in self._store.items():
            self._store[name] = part.to(device) if isinstance(part, Tensor) else part
        return self

    def clone(self):
        return Moved(**{name: part.clone() if isinstance(part, Tensor) else part for name, part in self._store.items()})


def x(n: int = 40) -> Tensor:
    return torch.randn(n, 4)


def pooled() -> Moved:
    return Moved(x=x(), batch=torch.arange(8).repeat_interleave(5), num_graphs=8)


def ragged() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(3 + i % 4, 4) for i in range(40)], layout=torch.jagged)


def grid() -> Tensor:
    return torch.rand(40, 40).round().to_sparse()


# kind: model, a batch, and whether its rows are examples
KINDS = {
    "tensor": (Net, x, True),
    "with labels": (Net, lambda: (x(), torch.randint(0, 2, (40,))), True),
    "with labels and a weight": (Net, lambda: [x(), torch.randint(0, 2, (40,)), torch.rand(1)], True),
    "two inputs": (Two, lambda: (x(), x()), True),
    "two inputs and labels": (Two, lambda: (x(), x(), torch.zeros(40)), True),
    "a pair of inputs, and labels": (Two, lambda: ((x(), x()), torch.zeros(40)), True),
    "an input that can be left out": (Optional, lambda: (x(), torch.zeros(40)), True),
    "named tuple by name": (Two, lambda: Pair(x(), x()), True),
    "named tuple": (Net, lambda: Labelled(x(), torch.zeros(40)), True),
    "dict": (Named, lambda: {"inputs": x(), "mask": torch.ones(40, 1)}, True),
    "dict with words and numbers": (Named, lambda: {"inputs": x(), "mask": torch.tensor(1.0), "task": "b"}, True),
    "dict and labels": (Named, lambda: ({"inputs": x(), "mask": torch.ones(40, 1)}, torch.zeros(40)), True),
    "user's dict": (Named, lambda: Encoding(inputs=x(), mask=torch.ones(40, 1)), True),
    "dataclass": (Whole, lambda: Sides(x(), x()), True),
    "frozen dataclass": (Whole, lambda: FrozenSides(x(), x()), True),
    "dataclass by its fields": (Two, lambda: FrozenSides(x(), x()), True),
    "named tuple, whole": (Whole, lambda: Pair(x(), x()), True),
    "named tuple, unpacked": (Unpacking, lambda: Pair(x(), x()), True),
    "named tuple, by number": (Counting, lambda: Pair(x(), x()), True),
    "named tuple, handed on": (Handing, lambda: Pair(x(), x()), True),
    "named tuple, annotated": (Annotated, lambda: Pair(x(), x()), True),
    "named tuple, in a wrapper": (lambda: Around(Whole()), lambda: Pair(x(), x()), True),
    "named tuple and labels": (Whole, lambda: (Pair(x(), x()), torch.zeros(40)), True),
    "named tuple by one name": (Left, lambda: Pair(right=x(), left=x()), True),
    "tuple, unpacked": (Unpacking, lambda: (x(), x()), True),
    "tuple, by number": (Counting, lambda: [x(), x()], True),
    "dataclass, annotated": (Annotated, lambda: FrozenSides(x(), x()), True),
    "dataclass and labels": (Whole, lambda: (Sides(x(), x()), torch.zeros(40)), True),
    "dataclass by one name": (Left, lambda: Sides(x(), x()), True),
    "dict by one name": (Left, lambda: {"label": torch.zeros(40), "left": x()}, True),
    "dict with labels": (Named, lambda: {"inputs": x(), "mask": torch.ones(40, 1), "label": torch.zeros(40)}, True),
    "user's dict with labels": (Left, lambda: Encoding(left=x(), label=torch.zeros(40)), True),
    "dict, whole": (Keys, lambda: {"left": x(), "right": x()}, True),
    "dict, whole, under a key's name": (Data, lambda: {"left": x(), "right": x()}, True),
    "dict of free names": (Free, lambda: {"left": x(), "right": x()}, True),
    "dict, whole, in a wrapper": (lambda: Around(Keys()), lambda: {"left": x(), "right": x()}, True),
    "list of images": (Images, lambda: [torch.randn(4, 5, 5) for _ in range(40)], False),
    "packed": (Packed, lambda: pack_sequence([x(i) for i in range(9, 1, -1)]), True),
    "nested": (Nested, ragged, True),
    "sparse": (Sparse, lambda: x().to_sparse(), True),
    "sparse rows": (Sparse, lambda: x().to_sparse_csr(), True),
    "images of one size in a list": (Listed, lambda: ([torch.randn(4, 5, 5) for _ in range(40)], None), False),
    "images of many sizes in a list": (Listed, lambda: ([torch.randn(4, 5 + i % 3, 5) for i in range(40)],), False),
    "graph of neighbours": (Graph, lambda: {"nodes": x(), "neighbours": torch.randint(0, 40, (40, 3))}, False),
    "graph of edges": (Edges, lambda: {"x": x(), "edge_index": torch.randint(0, 40, (2, 90))}, False),
    "graph of a matrix": (Neighbours, lambda: (grid(), x()), False),
    "object": (Whole, lambda: Moved(left=x(), right=x()), False),
    "object of graphs": (Pooled, pooled, False),
    "points": (Cloud, x, False),
}


@pytest.fixture(params=KINDS)
def kind(request):
    model, batch, has_rows = KINDS[request.param]
    torch.manual_seed(0)
    net, batches = model(), [batch() for _ in range(6)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse rows are a prototype
        for each in batches * 20:
            call(net, own(each))
    return net.eval(), batches, has_rows


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Sparse CSR|prototype)")
        yield


def own(batch: Any) -> Any:
    """The batch in memory of its own: deepcopy does not know every kind."""
    return next(iter(Batches([batch], None, torch.device("cpu"))))


def inputs_of(net: nn.Module, batches: list) -> np.ndarray:
    """What the layer receives, in float64, by the model's own forward."""
    seen: list[Tensor] = []
    handle = net.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in batches:
            call(net, own(batch))
    handle.remove()
    return torch.cat(seen).numpy()


def close(found: Any, expected: np.ndarray) -> bool:
    # float32 inputs; sums in float64
    return np.allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entrance", ["recalibrate", "adapt"])
def test_statistics_are_those_of_all_rows(kind, entrance):
    net, batches, _ = kind
    rows = inputs_of(net, batches)
    moments = getattr(bn, entrance)(net, batches)["norm"]
    assert close(moments.mean, rows.mean(0))
    assert close(moments.var, rows.var(0))


@pytest.mark.parametrize("entrance", ["recalibrate", "adapt"])
def test_a_limit_cuts_rows_that_are_examples_and_nothing_else(kind, entrance):
    net, batches, has_rows = kind
    size = examples_in(batches[0])
    moments = getattr(bn, entrance)(net, batches, max_examples=size + 3)["norm"]
    whole = inputs_of(net, batches[:2])
    if has_rows and not hasattr(batches[0], "batch_sizes"):
        whole = whole[: size + 3]
    elif has_rows:  # the first three of each step of the packed sequences
        longest = sum(range(9, 1, -1))
        assert moments.count[0] == longest + 9 + 8 + 7
        return
    assert moments.count[0] == len(whole)
    assert close(moments.mean, whole.mean(0))


def test_a_batch_says_why_it_cannot_be_cut(kind):
    net, batches, has_rows = kind
    why = why_whole(net, batches[0], 3)
    assert bool(why) != has_rows, why


@pytest.mark.slow
def test_examine_and_treat_take_it(kind):
    net, batches, _ = kind
    diagnosis = bn.examine(net, batches)
    assert not [finding for finding in diagnosis.findings if finding.code in {"BN506", "BN205", "BN501"}]
    net.norm.running_var[0] = -1
    treated = bn.treat(net, data=batches)
    assert float(treated.norm.running_var.min()) > 0


def test_probe_takes_it(kind):
    net, batches, _ = kind
    assert bn.probe(net, batches[0])["gamma"] == {"norm": 1.0}


def test_a_monitor_is_calibrated_on_it_and_judges_it(kind):
    net, batches, has_rows = kind
    # nodes of one graph are alike: only the whole is an observation
    unit = "example" if has_rows and len(inputs_of(net, batches[:1])) == examples_in(batches[0]) else "batch"
    monitor = bn.ShiftMonitor(net, unit=unit, budget=None)
    if unit == "batch":
        many = batches * 34  # 200 observations
        assert monitor.calibrate(many).source == "calibrated"
        return
    assert monitor.calibrate(batches).source == "calibrated"
    assert judge(monitor, batches).rang is None


def test_a_monitor_observes_it_in_service(kind):
    net, batches, _ = kind
    monitor = bn.ShiftMonitor(net, budget=None)
    with monitor, torch.no_grad():
        for batch in batches:
            call(net, own(batch))
    assert monitor.stream.evidence.observations > 0


def test_the_batch_is_left_as_it_was_by_a_model_that_writes_to_it(kind):
    net, batches, _ = kind

    def spoil(_, args, kwargs):
        for tensor in _tensors_of_object((args, kwargs)):
            (tensor.values() if tensor.layout == torch.sparse_csr else tensor).zero_()

    before = [tensor.clone() for tensor in _tensors_of_object(batches)]
    assert before
    handle = net.register_forward_pre_hook(spoil, with_kwargs=True)
    bn.recalibrate(net, batches)
    bn.adapt(net, batches)
    bn.probe(net, batches[0])
    handle.remove()
    pairs = zip(before, _tensors_of_object(batches), strict=True)
    assert all(same_bits(*(t.values() if t.is_nested else t for t in pair)) for pair in pairs)


def test_what_a_model_is_given_is_told_by_its_signature():
    left, right, labels = x(), x(), torch.zeros(40)
    assert arguments(Two(), (left, right, labels)) == ((left, right), {})
    assert arguments(Net(), (left, labels)) == ((left,), {})
    assert arguments(Optional(), (left, labels)) == ((left,), {})
    assert arguments(Two(), ((left, right), labels)) == ((left, right), {})
    assert arguments(nn.DataParallel(Two()), (left, right, labels)) == ((left, right), {})


def test_tensors_that_share_no_first_axis_have_no_rows():
    assert why_without_rows({"nodes": x(), "edges": torch.zeros(2, 90)}) == "the first axes have the sizes 40, 2"
    assert why_without_rows({"nodes": x(), "scale": torch.tensor(1.0), "name": "a"}) == ""


@pytest.mark.parametrize(
    "kind", ["graph of neighbours", "graph of edges", "object of graphs", "two inputs"], indirect=True
)
def test_a_monitor_shows_a_compiled_model_no_part_of_what_cannot_be_cut(kind):
    net, batches, _ = kind
    compiled = torch.compile(net, backend="eager")
    monitor = bn.ShiftMonitor(compiled, budget=None)
    with monitor, torch.no_grad():
        for batch in batches:
            call(compiled, own(batch))
    assert monitor.stream.evidence.observations >= len(batches)


class AddsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        x += 1
        return x


class Unpacks(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        left, right = pair
        return left + right


def test_a_number_that_is_added_to_an_input_is_no_key_of_it() -> None:
    x = torch.ones(3)
    assert arguments(AddsInPlace(), [x, torch.tensor(1)]) == ((x,), {})


def test_a_pair_of_inputs_beside_its_target_is_given_without_it() -> None:
    left, right, target = torch.ones(3), torch.ones(3), torch.zeros(3)
    assert torch.equal(call(Unpacks(), ((left, right), target)), left + right)
    assert torch.equal(call(Unpacks(), (left, right)), left + right)
