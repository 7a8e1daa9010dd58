"""Lock step: forwards that wait at the layer which is measured give the bits that restarted forwards give."""

from __future__ import annotations

import copy
import gc
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import batchnorm as bn
from batchnorm import adapt, recalibrate
from batchnorm.population import layer_by_layer, lock_step
from batchnorm.population.held_memory import HeldMemory
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.lock_step import digest


def rows(*sizes: int) -> list[torch.Tensor]:
    return list(torch.randn(sum(sizes), 4).mul(3).add(1).split(list(sizes)))


class Stack(nn.Module):
    """Layers one after another; ``between`` is done to what goes from one to the next."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(depth))

    def between(self, x: torch.Tensor, index: int) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self.between(norm(linear(x)).tanh() + x, index)
        return x


def both_ways(model: nn.Module, batches, measure=recalibrate, **options) -> str:
    """Measure with forwards that may wait and with restarted ones; the same bits. Why forwards did not wait."""
    twin = copy.deepcopy(model)
    found, expected = measure(model, batches, **options), measure(twin, batches, **{**options, "memory": 0})
    assert expected.restarted == "memory=0 lets no forward wait"
    assert list(found) == list(expected)
    for path, moments in found.items():
        for name in ("count", "mean", "m2"):
            assert torch.equal(getattr(moments, name), getattr(expected[path], name)), (path, name)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    return found.restarted


@pytest.mark.slow
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=7), depth=st.integers(1, 4), seed=st.integers(0, 99))
def test_waiting_and_restarted_forwards_give_the_same_bits(sizes, depth, seed):
    torch.manual_seed(seed)
    assert both_ways(Stack(depth), rows(*sizes)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_convolutions_give_the_same_bits_in_every_type(dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 5, 3), bn.BatchNorm2d(5)
    )
    images = torch.randn(20, 3, 9, 9).to(dtype).split(6)
    assert both_ways(net.to(dtype), images) == ""


@pytest.mark.parametrize("options", [{}, {"prior": 16.0}, {"prior": float("inf")}])
def test_adapt_waits_too(options):
    assert both_ways(Stack(), rows(5, 5, 3), adapt, **options) == ""


def test_a_model_that_is_one_layer_waits():
    assert both_ways(nn.BatchNorm1d(4), rows(5, 5, 3)) == ""


class Counting(Stack):
    """Counts forwards that begin, and passes of layers, outside of the model."""

    begun = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.begun += 1
        return super().forward(x)


def test_each_batch_runs_once_and_the_first_ones_again():
    Counting.begun = 0
    assert recalibrate(Counting(8), rows(4, 4, 4, 4, 4)).restarted == ""
    assert Counting.begun == 5 + 1 + 2


class Scaled(Stack):
    """A hook that lasts for a forward multiplies results by a number of the batch; not in batches of 5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 5:
            return super().forward(x)
        handle = self.linears[1].register_forward_hook(lambda _, __, y: y * len(x))
        try:
            return super().forward(x)
        finally:
            handle.remove()


@pytest.mark.parametrize("sizes", [(4, 3, 6), (5, 5, 3, 4)])
def test_hooks_that_last_for_a_forward_do_not_reach_others(sizes):
    assert both_ways(Scaled(), rows(*sizes)) in (
        "the model changes its own attributes in a forward",
        "a forward attaches or removes hooks",
    )


# memory


@pytest.mark.parametrize("waiting", [1, 2, 3, 5, 6])
def test_the_bits_do_not_depend_on_how_many_forwards_may_wait(waiting, monkeypatch):
    monkeypatch.setattr(lock_step.LockStep, "_bytes_of_one", lambda *_: 100)
    assert both_ways(Stack(4), rows(5, 5, 4, 3, 5), memory=100 * waiting + 50) == ""


@pytest.mark.parametrize("waiting", [1, 3])
def test_batches_that_take_different_ways_may_be_more_than_memory_holds(waiting, monkeypatch):
    monkeypatch.setattr(lock_step.LockStep, "_bytes_of_one", lambda *_: 100)
    assert both_ways(Skipping(), rows(5, 4, 3, 2, 5), memory=100 * waiting) == ""


def test_memory_for_less_than_one_forward_restarts_them():
    assert both_ways(Stack(), rows(5, 5), memory=10) == "memory= is less than one waiting forward needs"


def test_memory_that_is_free_decides_where_nothing_else_does(monkeypatch):
    monkeypatch.setattr(layer_by_layer, "free_memory", lambda _: 20)
    assert both_ways(Stack(), rows(5, 5)) == "memory= is less than one waiting forward needs"


@pytest.mark.parametrize(("memory", "error"), [(-1, ValueError), (1.5, TypeError), ("1 GB", TypeError)])
@pytest.mark.parametrize("measure", [recalibrate, adapt])
def test_memory_is_a_number_of_bytes(measure, memory, error):
    with pytest.raises(error, match=r"^memory must be a"):
        measure(Stack(), rows(5), memory=memory)


def test_what_a_forward_holds_is_counted_where_it_waits():
    held = HeldMemory()
    with held:
        x = torch.ones(1000)
        y = x * 2
        with held.off():
            held.look()
        del y
        z = x + 1
        del x, z
        with held.off():
            held.look()
    assert held.most == 2 * 4000


# ways through the model


class Skipping(Stack):
    """The second layer sees only batches whose sum is positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.linears[0](x))
        if len(x) % 2:
            x = self.norms[1](self.linears[1](x)).relu()
        return self.norms[2](self.linears[2](x))


@pytest.mark.parametrize("measure", [recalibrate, adapt])
def test_batches_that_skip_a_layer_wait_for_those_that_do_not(measure):
    assert both_ways(Skipping(), rows(4, 5, 2, 3), measure) == ""


class Domains(nn.Module):
    """A stem of its own for each domain, declared last first, and a shared trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.BatchNorm1d(2)
        self.stems = nn.ModuleDict({"b": nn.BatchNorm1d(2), "a": nn.BatchNorm1d(2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(self.stems["a" if len(x) % 2 else "b"](x).relu())


def test_adapt_measures_a_shared_layer_behind_all_stems_in_whatever_order_batches_come():
    """The order of first calls, stem a, trunk, stem b, would measure the trunk behind what stem b stored before."""
    net = Domains().double()
    a, b = torch.randn(10, 2, dtype=torch.float64) + 5, torch.randn(6, 2, dtype=torch.float64) * 9
    batches = [a[:5], b[:2], a[5:], b[2:]]
    assert both_ways(copy.deepcopy(net), batches, adapt) == ""
    assert list(adapt(net, batches)) == ["stems.a", "stems.b", "trunk"]
    stems = [(x.mean(0), x.var(0)) for x in (a, b)]
    hidden = torch.cat([F.batch_norm(x, *stem).relu() for x, stem in zip((a, b), stems, strict=True)])
    # sums of 16 values, each with two roundings of what it is made of
    torch.testing.assert_close(net.trunk.running_var, hidden.var(0), rtol=64 * 2.0**-52, atol=0)


# what speaks against waiting


class Remembers(Stack):
    def between(self, x, index):
        if index == 0:
            self.first = x
        return x + self.first if index == 2 else x


class Lists(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def between(self, x, index):
        self.seen.append(x)
        return x


class Buffers(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def between(self, x, index):
        self.scale.add_(0.1)
        return x * self.scale


class Draws(Stack):
    def between(self, x, index):
        return x + torch.rand_like(x) if index == 1 else x


class DrawsByNumPy(Stack):
    def between(self, x, index):
        return x + float(np.random.rand())


class DrawsByPython(Stack):
    def between(self, x, index):
        return x + random.random()


class OwnGenerator(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.random = torch.Generator()

    def __deepcopy__(self, memo):
        other = OwnGenerator()
        other.load_state_dict(self.state_dict())
        other.random.set_state(self.random.get_state())
        return other

    def between(self, x, index):
        return x + torch.rand(x.shape, generator=self.random)


class Twice(Stack):
    def between(self, x, index):
        return self.norms[0](x) if index == 1 else x


class Either(Stack):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x):
        a, b = self.norms[:2]
        return b(a(x)) if len(x) % 2 else a(b(x))


class Settings(Stack):
    def forward(self, x):
        with warnings.catch_warnings():
            return super().forward(x)


class Watches(Stack):
    def forward(self, x):
        with torch.device("cpu"):
            return super().forward(x)


class Threads(Stack):
    def forward(self, x):
        results = []
        thread = threading.Thread(target=lambda: results.append(super(Threads, self).forward(x)))
        thread.start()
        thread.join()
        return results[0] if results else x


class Offloads(Stack):
    def __init__(self) -> None:
        super().__init__()
        self._hf_hook = None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Remembers, "the model changes its own attributes in a forward"),
        (Lists, "the model changes its own attributes in a forward"),
        (Buffers, "the model changes its own attributes in a forward"),
        (OwnGenerator, "the model changes its own attributes in a forward"),
        (Draws, "the model draws random numbers"),
        (DrawsByNumPy, "the model draws random numbers"),
        (DrawsByPython, "the model draws random numbers"),
        (Twice, "a forward enters 'norms.0' more than once"),
        (Either, "forwards enter the layers in orders that contradict each other"),
        (Settings, "the model changes settings of the process"),
        (Watches, "the model changes settings of the process"),
        (Offloads, "the model is offloaded, and its weights are loaded and freed in each forward"),
    ],
)
def test_what_speaks_against_waiting_is_found_and_said(make, reason):
    model = make()
    paths = [name for name, _ in model.named_modules() if name.startswith("norms.")]
    restarted = recalibrate(model, rows(5, 4, 3)).restarted
    assert restarted == reason
    assert all(float(model.get_submodule(path).running_var[0]) != 1 for path in paths if make is not Either)


@pytest.mark.parametrize("make", [Twice, Either, Remembers, Settings, Watches, Offloads])
def test_the_result_is_then_that_of_restarted_forwards(make):
    assert both_ways(make(), rows(5, 4, 3)) != ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_layers_that_run_in_another_thread_are_measured_by_restarted_forwards():
    assert "thread" in recalibrate(Threads(), rows(5, 4, 3)).restarted


HELD = {}


class RemembersElsewhere(Stack):
    """Holds what it needs later where nobody looks: the scout cannot see it, the proof does."""

    def between(self, x, index):
        if index == 0:
            HELD["first"] = x
        return x + HELD["first"].mean() if index == 1 else x


def test_values_that_cross_from_one_forward_to_another_are_found_by_the_proof(monkeypatch):
    model, batches = RemembersElsewhere(), rows(5, 4, 3)
    assert both_ways(copy.deepcopy(model), batches) == "a layer receives other values from a forward that waits"
    twin = copy.deepcopy(model)
    monkeypatch.setattr(lock_step.LockStep, "_prove", lambda _: None)
    wrong, right = recalibrate(model, batches), recalibrate(twin, batches, memory=0)
    assert not torch.equal(wrong["norms.2"].mean, right["norms.2"].mean)  # what the proof is for


def test_greenlet_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(lock_step, "find_spec", lambda _: None)
    assert both_ways(Stack(), rows(5, 4)) == "greenlet is not installed (pip install greenlet)"


def test_the_digest_of_an_input_tells_rows_apart_that_changed_places():
    x = torch.randn(6, 4)
    swapped = x[[1, 0, 2, 3, 4, 5]]
    parts = [InputMoments.of(each) for each in (x, swapped)]
    assert digest(x, parts[0]) == digest(x.clone(), InputMoments.of(x.clone()))
    assert digest(x, parts[0]) != digest(swapped, parts[1])


# modes


@pytest.mark.parametrize(
    "block",
    [
        torch.inference_mode,
        torch.enable_grad,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", enabled=False),
    ],
    ids=["inference", "grad", "no grad", "autocast", "no autocast"],
)
@pytest.mark.parametrize(
    "around", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["plain", "cast"]
)
def test_a_forward_that_waits_inside_of_a_block_leaves_none_of_it_to_others(block, around):
    class Blocks(Stack):
        def forward(self, x):
            if len(x) % 2 == 0:
                return super().forward(x)
            assert torch.is_autocast_enabled("cpu") == was_cast
            with block():
                return super().forward(x)

    with around():
        was_cast = torch.is_autocast_enabled("cpu")
        assert both_ways(Blocks(), rows(5, 4, 3, 2)) == ""
        assert torch.is_autocast_enabled("cpu") == was_cast
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_same_examples_come_from_a_loader_that_shuffles():
    data = TensorDataset(torch.randn(23, 4))

    def loader():
        return DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(3))

    model = Stack()
    twin = copy.deepcopy(model)
    assert recalibrate(model, loader()).restarted == ""
    recalibrate(twin, loader(), memory=0)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


class Reshuffling(RandomSampler):
    """Shuffles every pass in another way, as samplers do that accelerate makes."""

    def __init__(self, data) -> None:
        super().__init__(data)
        self.epoch = 3

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.epoch)
        yield from super().__iter__()
        self.epoch += 1


def with_batch_sampler(data):
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 5, drop_last=False))


def with_batches_of_indices(data):
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, 5, drop_last=False))


def with_counted_passes(data):
    return DataLoader(data, 5, sampler=Reshuffling(data))


@pytest.mark.parametrize("loader", [with_batch_sampler, with_batches_of_indices, with_counted_passes])
@pytest.mark.parametrize("most", [None, 12])
def test_every_pass_has_the_same_examples_wherever_the_loader_keeps_its_order(loader, most):
    data = TensorDataset(torch.randn(23, 4) * torch.arange(1.0, 24).unsqueeze(1))
    model = Stack()
    expected = None
    for memory in (None, 700, 0):  # all forwards wait, some of them, none
        twin = copy.deepcopy(model)
        recalibrate(twin, loader(data), most, memory=memory)
        expected = expected or list(twin.buffers())
        assert all(map(torch.equal, twin.buffers(), expected)), memory


def test_a_recalibration_is_no_epoch_of_a_loader():
    loader = with_counted_passes(TensorDataset(torch.randn(23, 4)))
    recalibrate(Stack(), loader, memory=0)
    assert loader.sampler.epoch == 3


# errors


class Fails(Stack):
    """Fails on batches of three examples, behind its first layer."""

    error: type[BaseException] = ZeroDivisionError

    def between(self, x, index):
        if len(x) == 3:
            raise self.error
        return x


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (4, 5, 4, 3, 4)], ids=str)
def test_a_forward_that_fails_ends_all_others_and_leaves_the_model_as_it_was(sizes, error):
    model = Fails()
    model.error = error
    batches = rows(*sizes)
    before = fingerprint(model)
    with pytest.raises(error):
        recalibrate(model, batches)
    assert fingerprint(model) == before
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is lock_step.LockStep]


def test_a_model_that_catches_what_ends_a_forward_is_ended_all_the_same():
    class Stubborn(Fails):
        def between(self, x, index):
            try:
                return self.norms[1](x) if index == 1 and len(x) == 7 else super().between(x, index)
            except BaseException as error:
                if isinstance(error, ZeroDivisionError):
                    raise
                return x

    model = Stubborn()
    batches = rows(4, 7, 3)
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError):
        recalibrate(model, batches)
    assert fingerprint(model) == before


def test_too_few_values_are_refused_as_by_restarted_forwards():
    class Flat(Stack):
        def between(self, x, index):
            return x[:1]

    model, batches = Flat(), rows(5)
    before = fingerprint(model)
    for memory in (None, 0):
        with pytest.raises(
            ValueError, match=r"^recalibrate needs at least 2 finite values per channel, got 1 in channel 0"
        ):
            recalibrate(model, batches, memory=memory)
    assert fingerprint(model) == before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_forwards_that_wait_inside_an_autograd_function_leave_forward_mode_on():
    class Recomputing(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    model = Recomputing(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    recalibrate(model, [torch.randn(8, 3, requires_grad=True) for _ in range(3)])
    assert torch._C._is_fwd_grad_enabled()
