"""What every rank checks of ``recalibrate(..., group=...)``; ``main`` runs all checks for its number of ranks.

The data are those of one process, split over the ranks, so each check compares with ``recalibrate`` on all of them, and
the first one with NumPy.
"""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rank_checks import main as run_checks
from rank_checks import message, on_every_rank, rank, world
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import batchnorm as bn
from batchnorm.layers import batch_norms

CHECKS: dict[str, tuple[Callable[[], object], tuple[int, ...]]] = {}


def check(*worlds: int) -> Callable:
    def register(function: Callable[[], object]) -> Callable[[], object]:
        CHECKS[function.__name__] = (function, worlds)
        return function

    return register


class Twice(nn.Module):
    """A layer that is called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.between, self.last = nn.BatchNorm1d(5), nn.Linear(5, 5), bn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.between(self.norm(x).relu())))


class Routes(nn.Module):
    """Two layers, of which the sign of an input's sum chooses the order or the one."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.first, self.second, self.both = nn.BatchNorm1d(5), nn.BatchNorm1d(5), both
        self.end = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.first, self.second) if x.sum() > 0 else (self.second, self.first)
        return self.end(other(one(x)) if self.both else one(x))


class Noisy(nn.Module):
    """Draws random numbers where an input's sum is negative, and does nothing with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:
            torch.rand(1)
        return self.b(self.a(x).relu())


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 8),
        bn.BatchNorm1d(8),
        nn.Dropout(),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Linear(8, 4), nn.BatchNorm1d(4)).to(dtype)


def data(count: int = 90, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = 3 + torch.randn(count, 5, generator=generator, dtype=torch.float64) * torch.arange(1.0, 6.0)
    return (x * (1 + torch.arange(count) / count).unsqueeze(1)).to(dtype)


def shards(x: Tensor, *, empty: int | None = None) -> list[list[Tensor]]:
    """The batches of every rank, of sizes that differ; rank ``empty`` has none."""
    ranks = [i for i in range(world()) if i != empty]
    cuts = torch.tensor_split(x, torch.cumsum(torch.arange(1, len(ranks) + 1) ** 2 + 9, 0)[:-1].tolist())
    parts = dict(zip(ranks, cuts, strict=True))
    return [list(parts[i].split(4 + i)) if i in parts else [] for i in range(world())]


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    return [batch for part in parts for batch in part]


def recalibrated(model: nn.Module, batches: list[Tensor], **options: Any) -> tuple[nn.Module, Any]:
    twin = copy.deepcopy(model)
    return twin, bn.recalibrate(twin, batches, **options)


def alone(model: nn.Module, batches: list[Tensor], **options: Any) -> tuple[nn.Module, Any]:
    """What one process with all batches finds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "recalibrate measured the data of rank")
        return recalibrated(model, batches, **options)


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of a statistic, of a mean relative to the layer's largest mean or standard deviation."""
    worst = 0.0
    for x, y in zip(batch_norms(a).values(), batch_norms(b).values(), strict=True):
        assert x.num_batches_tracked == y.num_batches_tracked
        (mean, var), (other_mean, other_var) = ((z.running_mean.double(), z.running_var.double()) for z in (x, y))
        size = max(other_mean.abs().max(), other_var.max().sqrt())
        worst = max(worst, float((mean - other_mean).abs().max() / size))
        worst = max(worst, float((var - other_var).abs().max() / other_var.max()))
    return worst


def require_same_on_all(model: nn.Module, found: Any) -> None:
    bits = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    moments = [(path, *(part.numpy().tobytes() for part in (m.count, m.mean, m.m2))) for path, m in found.items()]
    assert all(each == (bits, moments, found.restarted) for each in on_every_rank((bits, moments, found.restarted)))


def require_like_one_process(
    model: nn.Module, parts: list[list[Tensor]], limit: float = 1e-12, **options: Any
) -> float:
    both, found = recalibrated(model, parts[rank()], group="all", **options)
    one, expected = alone(model, joined(parts), **options) if rank() == 0 else (None, None)
    require_same_on_all(both, found)
    if one is None:
        return 0.0
    assert list(found) == list(expected)
    assert [m.count.tolist() for m in found.values()] == [m.count.tolist() for m in expected.values()]
    assert distance(both, one) <= limit, distance(both, one)
    return distance(both, one)


@check(1, 2, 3, 4)
def all_layers_have_the_statistics_of_all_data() -> object:
    return require_like_one_process(network(), shards(data()))


@check(1, 2, 4)
def numpy_finds_the_same() -> float:
    """The oracle: the formulas, in float64, layer by layer, over the rows of all ranks."""
    model, rows = network(), data().numpy()
    twin, _ = recalibrated(model, shards(data())[rank()], group="all")
    worst = 0.0
    for before, after in zip(model, twin, strict=True):
        if isinstance(before, nn.Linear):
            rows = rows @ before.weight.detach().numpy().T + before.bias.detach().numpy()
        elif isinstance(before, nn.ReLU):
            rows = np.maximum(rows, 0)
        elif not isinstance(before, nn.Dropout):
            mean, var = rows.mean(0), rows.var(0, ddof=1)
            for found, right in ((after.running_mean, mean), (after.running_var, var)):
                worst = max(worst, float(np.abs(found.numpy() - right).max() / np.abs(right).max()))
            rows = (rows - mean) / np.sqrt(
                var + before.eps
            ) * before.weight.detach().numpy() + before.bias.detach().numpy()
    assert worst <= 1e-12, worst
    return worst


@check(2, 3, 4)
def a_rank_may_have_no_batch() -> object:
    return [require_like_one_process(network(), shards(data(), empty=i)) for i in (0, world() - 1)]


@check(2, 3, 4)
def float32_is_within_its_bound() -> object:
    x = data(300, torch.float32)
    model, parts = network(torch.float32), shards(x)
    both, found = recalibrated(model, parts[rank()], group="all")
    require_same_on_all(both, found)
    one, _ = alone(model, [x])  # in one batch
    limits, ratios = float32_limits(one, x), []
    for path, (of_mean, of_var) in limits.items():
        a, b = both.get_submodule(path), one.get_submodule(path)
        ratios.append(float((a.running_mean - b.running_mean).abs().max() / of_mean))
        ratios.append(float((a.running_var - b.running_var).abs().max() / of_var))
    assert max(ratios) <= 1, ratios
    return max(ratios), [float(of_mean) for of_mean, _ in limits.values()]


@torch.no_grad()
def float32_limits(model: nn.Sequential, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer the largest difference of a mean and of a variance between two divisions of the data.

    Moments are merged in float64, so what is stored differs by one rounding to float32, 2u = 2^-23 of the statistic,
    and by what the inputs differ. Let inputs differ by d at most. Then means differ by d, variances by 2 d D, where D
    is the largest deviation from the mean, and outputs by (d + dm) / s + D / s (dv / 2v) and the rounding of 4
    operations on each side, 8u |z|. A linear layer multiplies d by the largest sum of a row of |W|, and its n + 1
    roundings on each side add 2 (n + 1) u |W| |h|. ReLU does not increase a difference.
    """
    u, d, limits = 2.0**-24, torch.tensor(0.0, dtype=torch.float64), {}
    x = x.double()
    for path, layer in copy.deepcopy(model).double().eval().named_children():
        if isinstance(layer, nn.Linear):
            size = layer.weight.abs()
            rounding = 2 * (size.shape[1] + 1) * u * (x.abs() @ size.T + layer.bias.abs()).max()
            d = size.sum(1).max() * d + rounding
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            mean, var = layer.running_mean, layer.running_var
            deviation = (x - mean).abs().max()
            limits[path] = (d + 2 * u * mean.abs().max(), 2 * d * deviation + 2 * u * var.max())
            of_z = (d + limits[path][0]) / var.min().sqrt() + deviation / var.min().sqrt() * limits[path][1] / (
                2 * var.min()
            )
            d = layer.weight.abs().max() * of_z + 8 * u * layer(x).abs().max()
        x = layer(x)
    return limits


@check(2, 3)
def memory_and_one_pass_and_restarts_find_the_same() -> object:
    parts = shards(data())
    restarted = require_like_one_process(network(), parts, memory=0)
    some = require_like_one_process(network(), parts, memory=4000)
    with_one = {"memory": 0} if rank() == 0 else {}
    twin, found = recalibrated(network(), parts[rank()], group="all", **with_one)
    assert found.restarted == "memory=0 lets no forward wait on rank 0"
    plain, _ = recalibrated(network(), parts[rank()], group="all")
    assert all(a.equal(b) for a, b in zip(twin.buffers(), plain.buffers(), strict=True))
    return restarted, some, require_like_one_process(network(), parts, exact=False)


@check(2, 3)
def layers_called_twice_and_models_of_several_routes_find_the_same() -> object:
    x = data() - 7
    x = torch.cat([x[x.sum(1) > 0], x[x.sum(1) <= 0]])  # so that ranks have batches of one route each
    assert (x.sum(1) > 0).any()
    assert (x.sum(1) < 0).any()
    parts = shards(x)
    torch.manual_seed(0)
    models = [Twice(), Routes(both=True), Routes(both=False)]
    return [require_like_one_process(model.double(), parts) for model in models]


@check(2, 3)
def what_stops_one_rank_from_waiting_restarts_all() -> object:
    x = data() - 7
    parts = [[x[:8] + 100] for _ in range(world() - 1)] + [[x[8:20] - 100]]
    twin, found = recalibrated(Noisy().double(), parts[rank()], group="all")
    assert found.restarted == f"the model draws random numbers on rank {world() - 1}", found.restarted
    require_same_on_all(twin, found)
    return require_like_one_process(Routes(both=True).double(), parts)


@check(2, 3)
def max_examples_counts_the_examples_of_all_ranks() -> None:
    x = data(64)
    loader = DataLoader(TensorDataset(x), 4, sampler=DistributedSampler(x, shuffle=False))
    twin, found = recalibrated(network(), loader, max_examples=21, group="all")
    assert found["1"].count.tolist() == [21.0] * 8
    one, _ = alone(network(), [x[:21]])
    require_same_on_all(twin, found)
    pairs = zip(twin.buffers(), one.buffers(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in pairs if a.is_floating_point())
    _, found = recalibrated(network(), list(x.split(4)), max_examples=2, group="all")
    assert found["1"].count[0] == 2  # with three ranks the last has none


@check(2)
def items_that_are_batches_count_whole() -> None:
    items = list(data(60).split(10))
    loader = DataLoader(items, batch_size=None, sampler=DistributedSampler(items, shuffle=False))  # type: ignore[arg-type]
    assert len(loader) == 3
    _, found = recalibrated(network(), loader, group="all")
    assert found["1"].count[0] == 60
    loader = DataLoader(items[:5], batch_size=None, sampler=DistributedSampler(items[:5], shuffle=False))  # type: ignore[arg-type]
    _, found = recalibrated(network(), loader, group="all")
    assert found["1"].count[0] == 60  # the first item counts twice, since it is not known whether rows are examples


@check(2)
def batches_with_nan_are_excluded_and_reported_with_the_rank() -> str:
    parts = shards(data())
    parts[1][0][0, 2] = torch.nan
    text = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin, found = recalibrated(nn.Sequential(nn.BatchNorm1d(5)).double(), parts[rank()], group="all")
        text = " ".join(str(each.message) for each in caught)
    assert "'0' on rank 1 (inputs: 1, channels: 1 of 5)" in text, text
    require_same_on_all(twin, found)
    assert found["0"].count.tolist() == [90, 90, 90 - len(parts[1][0]), 90, 90]
    return text


@check(2)
def unreached_and_frozen_layers_keep_their_statistics() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.held = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.held(self.used(x))

    model = Part().double()
    bn.freeze(model.held)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, found = recalibrated(model, shards(data())[rank()], group="all")
    assert [str(each.message).partition(":")[0] for each in caught] == ["no forward reached 'unused'"]
    assert list(found) == ["used"]


@check(2)
def a_layer_that_one_rank_reaches_has_its_statistics_on_all() -> object:
    x = torch.cat([data(40) + 100, data(40) - 300])
    parts = [list(x[:40].split(7)), list(x[40:].split(9))]
    model = Routes(both=False).double()
    twin, found = recalibrated(model, parts[rank()], group="all")
    require_same_on_all(twin, found)
    assert found["first"].count[0] == found["second"].count[0] == 40
    return require_like_one_process(model, parts)


@check(2, 3)
def empty_loaders_on_all_ranks_are_an_error_on_every_rank() -> str:
    model = network()
    text = message(ValueError, bn.recalibrate, model, [], group="all")
    assert text == (
        f"recalibrate needs at least one batch, got an empty loader on ranks {', '.join(map(str, range(world())))}. "
        "Check the data set's length. Pass list(loader) if it can be read only once."
    )
    assert on_every_rank(text) == [text] * world()
    text = message(ValueError, bn.recalibrate, model, [data(1)] if rank() == 0 else [], group="all")
    assert text.startswith("recalibrate needs at least 2 finite values per channel, got 1 in channel 0 of layer '1'")
    return text


@check(2, 3)
def other_weights_or_settings_are_an_error_on_every_rank_before_data_flow() -> list[str]:
    class Untouched(list):
        def __iter__(self) -> Any:
            raise AssertionError("read")

    def told(change: Callable[[nn.Sequential], object] = lambda _: None, **options: Any) -> str:
        model = network()
        if rank() == 1:
            change(model)
        before = copy.deepcopy(model.state_dict())
        text = message(RuntimeError, bn.recalibrate, model, Untouched(), group="all", **options)
        assert all(a.equal(b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert on_every_rank(text) == [text] * world()
        return text

    others = "rank 0" if world() == 2 else "ranks 0, 2"

    def last_bit(model: nn.Sequential) -> None:
        with torch.no_grad():
            model[0].weight[0, 0] *= 1 + 2**-52

    texts = [
        told(last_bit),
        told(lambda model: model.__setitem__(1, nn.BatchNorm1d(9).double())),
        told(lambda model: model.float()),
        told(lambda model: setattr(model[4], "eps", 0.1)),
        told(lambda model: bn.freeze(model[8])),
        told(exact=rank() != 1),
        told(max_examples=10 + (rank() == 1)),
        told(lambda model: model.__setitem__(2, nn.Tanh())),
    ]
    assert f"'0.weight': version 1 on {others}; version 2 on rank 1. Give every rank the same weights" in texts[0]
    assert f"layer '1': BatchNorm1d of float64 (8,), eps=1e-05 on {others}; BatchNorm1d of float64 (9,)" in texts[1]
    assert " more. Give every rank" in texts[2]
    assert "eps=0.1 on rank 1" in texts[3]
    assert "layer '8': " in texts[4]
    assert "absent on rank 1" in texts[4]
    assert f"exact: True on {others}; False on rank 1" in texts[5]
    assert f"max_examples: 10 on {others}; 11 on rank 1" in texts[6]
    assert f"module '2': ReLU() on {others}; Tanh() on rank 1" in texts[7]
    return texts


@check(2, 3)
def an_error_of_one_rank_ends_all_and_changes_nothing() -> list[str]:
    parts = shards(data())

    def told(fault: Exception | KeyboardInterrupt, *, at: int, in_loader: bool, **options: Any) -> str:
        calls = 0

        def maybe() -> None:
            nonlocal calls
            calls += 1
            if calls == at and rank() == 1:
                raise fault

        class Loader:
            def __iter__(self) -> Any:
                for batch in parts[rank()]:
                    if in_loader:
                        maybe()
                    yield batch

        def forward(model: nn.Module, batch: Tensor) -> Tensor:
            if not in_loader:
                maybe()
            return model(batch)

        model = network()
        before = [tensor.clone() for tensor in model.state_dict().values()]
        kind = type(fault) if rank() == 1 else RuntimeError
        text = message(kind, bn.recalibrate, model, Loader(), forward=forward, group="all", **options)
        assert all(a.equal(b) for a, b in zip(before, model.state_dict().values(), strict=True))
        assert model.training
        assert not any(module._forward_pre_hooks for module in model.modules())
        return text

    texts = []
    for in_loader in (True, False):
        for options in ({}, {"memory": 0}, {"exact": False}):
            at = 4 if options == {"memory": 0} else 2
            texts.append(told(OSError("disk is gone"), at=at, in_loader=in_loader, **options))
    texts.append(told(KeyboardInterrupt(), at=2, in_loader=True))
    expected = "recalibrate needs every rank of its group, got an error on rank 1, so all ranks keep their statistics."
    if rank() != 1:
        assert all(text.startswith(expected) for text in texts)
        assert all(text.endswith("The error: OSError: disk is gone on rank 1") for text in texts[:-1]), texts
        assert texts[-1].endswith("The error: KeyboardInterrupt on rank 1"), texts
    require_like_one_process(network(), parts)  # the group still works
    return texts


@check(2)
def wrong_arguments_of_one_rank_are_told_to_all() -> list[str]:
    wrong = rank() == 1
    kind = TypeError if wrong else RuntimeError
    texts = [
        message(kind, bn.recalibrate, network(), 7 if wrong else [data()], group="all"),
        message(kind, bn.recalibrate, nn.BatchNorm1d if wrong else network(), [data()], group="all"),
        message(kind, bn.recalibrate, network(), [data()], memory="much" if wrong else None, group="all"),
    ]
    if not wrong:
        assert all("got an error on rank 1" in text and "TypeError: " in text for text in texts), texts
    return texts


@check(2)
def without_a_group_a_rank_waits_for_nobody_and_is_warned() -> str:
    model, text = network(), ""
    if rank() == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bn.recalibrate(model, [data()])
        text = str(caught[0].message)
        assert caught[0].category is RuntimeWarning
        assert caught[0].filename == __file__
        assert text.startswith("recalibrate measured the data of rank 0 alone, one of 2 processes")
    assert on_every_rank(rank()) == [0, 1]
    return text


@check(2, 3)
def ddp_does_not_disturb() -> object:
    model = nn.parallel.DistributedDataParallel(network())
    parts = shards(data())
    bn.recalibrate(model, parts[rank()], group="all")
    assert model.require_forward_param_sync
    if rank() == 0:  # without a group, and without the other ranks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bn.recalibrate(copy.deepcopy(model.module), [data()])
    assert on_every_rank(rank()) == list(range(world()))
    plain, found = recalibrated(network(), parts[rank()], group="all")
    require_same_on_all(plain, found)
    assert all(a.equal(b) for a, b in zip(model.module.buffers(), plain.buffers(), strict=True))


@check(2)
def a_wrapped_model_of_one_rank_alone_waits_for_nobody() -> None:
    model = nn.parallel.DistributedDataParallel(network())
    if rank() == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bn.recalibrate(model, [data()])
            bn.adapt(model, [data()])
    assert on_every_rank(rank()) == [0, 1]


@check(2)
def synchronized_layers_are_measured_like_others() -> object:
    model = nn.Sequential(nn.Linear(5, 8), bn.BatchNorm1d(8, sync=True), nn.SyncBatchNorm(8)).double()
    torch.manual_seed(0)
    model[0].reset_parameters()
    return require_like_one_process(model, shards(data()))


@check(3, 4)
def a_group_of_some_ranks_is_enough() -> None:
    group = dist.new_group([0, 2])
    if rank() in {0, 2}:
        twin, found = recalibrated(network(), [data()[:40]] if rank() else [data()[40:]], group=group)
        one, _ = alone(network(), [data()])
        assert distance(twin, copy_counters(one, twin)) <= 1e-12
        assert found["1"].count[0] == 90
    else:
        assert "must contain rank 1" in message(ValueError, bn.recalibrate, network(), [data()], group=group).replace(
            f"rank {rank()}", "rank 1"
        )
    assert on_every_rank(0) == [0] * world()


def copy_counters(one: nn.Module, other: nn.Module) -> nn.Module:
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            a.copy_(b)
    return one


@check(1)
def a_group_of_one_rank_is_one_process_to_the_bit() -> None:
    for options in ({}, {"memory": 0}, {"exact": False}, {"max_examples": 37}):
        batches = list(data().split(8))
        (a, found), (b, _) = (recalibrated(network(), batches, **options, group=g) for g in (dist.group.WORLD, None))
        assert all(x.equal(y) for x, y in zip(a.buffers(), b.buffers(), strict=True))
        require_same_on_all(a, found)


@check(2, 3)
def ctrl_c_during_an_exchange_takes_effect_after_it_and_ends_all_ranks() -> list[str]:
    from batchnorm.population import pool

    plain, parts, texts = pool.of_all_ranks, shards(data()), []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C

    def interrupted(stages: list[str], at: int, value: Any, *rest: Any) -> list[Any]:
        stages.append(value.stage)
        if rank() == 1 and len(stages) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(value, *rest)

    try:
        for at in (1, 2, 4):
            pool.of_all_ranks = partial(interrupted, [], at)
            model = network()
            kind = KeyboardInterrupt if rank() == 1 else RuntimeError
            texts.append(message(kind, bn.recalibrate, model, parts[rank()], group="all"))
            assert all(a.equal(b) for a, b in zip(model.buffers(), network().buffers(), strict=True))
    finally:
        pool.of_all_ranks = plain
        signal.signal(signal.SIGINT, before)
    assert rank() == 1 or all("KeyboardInterrupt on rank 1" in text for text in texts), texts
    require_like_one_process(network(), parts)
    return texts


@check(2)
def one_exchange_for_each_layer() -> list[int]:
    from batchnorm.population import pool

    counts = []
    plain = pool.of_all_ranks
    try:
        for layers in (1, 4):
            stages: list[str] = []
            pool.of_all_ranks = lambda value, *rest, stages=stages: stages.append(value.stage) or plain(value, *rest)
            blocks = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)) for _ in range(layers)]
            model = nn.Sequential(*blocks).double()
            for p in model.parameters():
                nn.init.constant_(p, 0.3)
            bn.recalibrate(model, shards(data())[rank()], group="all")
            counts.append(len(stages))
    finally:
        pool.of_all_ranks = plain
    assert counts == [6, 9], counts  # models, two of reasons, no layer left, the end, and one for each layer
    return counts


def main(*names: str) -> None:
    run_checks(*names, checks=CHECKS)
