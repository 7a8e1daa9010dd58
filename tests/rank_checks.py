"""What every rank of torch.distributed checks: ``main`` runs all checks that are made for its number of ranks.

Each check is a function without arguments that every rank calls; it knows the batches of all ranks, so it can compare
with one process that has them all. A failed assertion on one rank is told by that rank; others may time out then.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.processes import collectives

# a check, and the numbers of ranks that it is made for
CHECKS: dict[str, tuple[Callable[[], object], tuple[int, ...]]] = {}
SECONDS = 30
C = 6


def check(*worlds: int) -> Callable:
    def register(function: Callable[[], object]) -> Callable[[], object]:
        CHECKS[function.__name__] = (function, worlds)
        return function

    return register


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def batches(sizes: list[int], *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """The batches of all ranks; values are far from zero, and each rank has another mean."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (100 + 5 * i + (i + 1) * torch.randn(n, C, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        for i, n in enumerate(sizes)
    ]


def sizes(*of_ranks: int) -> list[int]:
    return list(of_ranks[: world()])


def on_every_rank(value: Any) -> list[Any]:
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def trained_together(layer: nn.Module, xs: list[Tensor], **options: list[Any]) -> dict[str, Tensor]:
    """One pass on this rank's batch: y, d_x, and the gradients of gamma and beta added over the ranks."""
    x = xs[rank()].clone().requires_grad_()
    y = layer(x, **{name: values[rank()] for name, values in options.items()})
    (y * weight_of(y, rank())).sum().backward()
    result = {"y": y.detach(), "d_x": x.grad}
    for name, p in layer.named_parameters():
        dist.all_reduce(p.grad)
        result[name] = p.grad
    return result | {name: b.clone() for name, b in layer.named_buffers()}


def weight_of(y: Tensor, i: int) -> Tensor:
    """Weights of the loss, which differ between all values."""
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def trained_alone(layer: nn.Module, xs: list[Tensor], **options: list[Any]) -> dict[str, Tensor]:
    """The same in one process, on the batches of all ranks in a row; y and d_x of this rank."""
    layer.sync = False
    x = torch.cat(xs).requires_grad_()
    y = layer(x, **{name: None if values[0] is None else torch.cat(values) for name, values in options.items()})
    weight = torch.cat([weight_of(part, i) for i, part in enumerate(y.split([len(b) for b in xs]))])
    (y * weight).sum().backward()
    parts = [len(b) for b in xs]
    result = {"y": y.detach().split(parts)[rank()], "d_x": x.grad.split(parts)[rank()]}
    result |= {name: p.grad for name, p in layer.named_parameters()}
    return result | {name: b.clone() for name, b in layer.named_buffers()}


def oracle(xs: list[Tensor], eps: float = 1e-5) -> dict[str, np.ndarray]:
    """NumPy in float64, from the formulas of Ioffe and Szegedy, for gamma 1 and beta 0."""
    x = np.concatenate([np.asarray(b, dtype=np.float64) for b in xs])
    g = np.concatenate([np.asarray(weight_of(b, i), dtype=np.float64) for i, b in enumerate(xs)])
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    count = x.size // x.shape[1]
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    z = (x - mean) / np.sqrt(var + eps)
    d_x = (g - g.mean(axes, keepdims=True) - z * (g * z).mean(axes, keepdims=True)) / np.sqrt(var + eps)
    own = slice(sum(len(b) for b in xs[: rank()]), sum(len(b) for b in xs[: rank() + 1]))
    return {
        "y": z[own], "d_x": d_x[own], "weight": (g * z).sum(axes), "bias": g.sum(axes),
        "running_mean": 0.1 * mean.reshape(-1), "running_var": 0.9 + 0.1 * var.reshape(-1) * count / (count - 1),
    }  # fmt: skip


def ulps(a: Tensor, b: Any) -> float:
    """The largest difference in units in the last place of the largest value of ``b``."""
    b = torch.as_tensor(b)
    if not b.numel():
        return 0.0
    largest = float(b.abs().max()) or 1.0
    return float((a.double() - b.double()).abs().max()) / (torch.finfo(a.dtype).eps * largest)


def require_close(found: dict[str, Tensor], expected: dict[str, Any], limit: float) -> dict[str, float]:
    """Every value within ``limit`` ulps of the largest; returns the distances."""
    names = [name for name, value in found.items() if value.is_floating_point()]
    distances = {name: ulps(found[name], expected[name]) for name in names}
    assert all(value <= limit for value in distances.values()), distances
    return distances


def require_same_bits(layer: nn.Module) -> None:
    state = [tensor.numpy().tobytes() for tensor in layer.state_dict().values()]
    assert all(other == state for other in on_every_rank(state))


def layer(**options: Any) -> Any:
    return bn.BatchNorm1d(C, sync=True, dtype=torch.float64, **options)


# 100 / sd is at most 100: x - mean has lost 2 digits, 1 ulp of x is 128 of z; sums over 80 values add a factor of 10
ULPS = 1300.0


@check(2, 3, 4)
def unequal_batches_equal_one_process() -> object:
    xs = batches(sizes(5, 3, 7, 1), 4)
    distances = require_close(trained_together(layer(), xs), trained_alone(layer(), xs), ULPS)
    require_close(trained_together(layer(), xs), oracle(xs), ULPS)
    together = layer()
    trained_together(together, xs)
    require_same_bits(together)
    return distances


@check(2, 3)
def an_empty_rank_takes_part() -> object:
    xs = batches([0, 9, 4][: world()], 4)
    together = layer()
    distances = require_close(trained_together(together, xs), trained_alone(layer(), xs), ULPS)
    require_same_bits(together)
    assert together.num_batches_tracked == 1
    return distances


@check(2)
def batches_that_are_all_empty_change_nothing() -> None:
    together = layer()
    x = torch.zeros(0, C, 4, dtype=torch.float64, requires_grad=True)
    y = together(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert together.num_batches_tracked == 0
    assert together.running_mean.count_nonzero() == 0


@check(2, 3)
def masked_ranks_equal_one_process() -> object:
    xs = batches(sizes(4, 5, 3), 8)
    # all of rank 1 is padding, and padding is NaN
    masks = [torch.rand(len(x), 8, generator=torch.Generator().manual_seed(i)) < 0.6 for i, x in enumerate(xs)]
    masks[1] = torch.zeros_like(masks[1])
    xs = [torch.where(mask.unsqueeze(1), x, torch.nan) for x, mask in zip(xs, masks, strict=True)]
    together = layer()
    found = trained_together(together, xs, mask=masks)
    distances = require_close(found, trained_alone(layer(), xs, mask=masks), ULPS)
    padding = ~masks[rank()].unsqueeze(1).expand_as(found["y"])
    assert found["y"][padding].count_nonzero() == found["d_x"][padding].count_nonzero() == 0
    require_same_bits(together)
    return distances


@check(2)
def a_mask_on_one_rank_only_counts_there() -> object:
    xs = batches([4, 5], 8)
    masks = [torch.ones(4, 8, dtype=torch.bool), torch.arange(8).expand(5, 8) < 3]
    x = xs[rank()].clone().requires_grad_()
    y = layer()(x, mask=masks[1] if rank() else None)
    (y * weight_of(y, rank())).sum().backward()
    return require_close({"y": y.detach(), "d_x": x.grad}, trained_alone(layer(), xs, mask=masks), ULPS)


@check(2, 3)
def weights_equal_one_process() -> object:
    xs = batches(sizes(4, 5, 3), 8)
    weights = [torch.rand(len(x), generator=torch.Generator().manual_seed(i)).double() * 3 for i, x in enumerate(xs)]
    weights[0][0] = 0
    together = layer()
    found = trained_together(together, xs, weight=weights)
    distances = require_close(found, trained_alone(layer(), xs, weight=weights), ULPS)
    require_same_bits(together)
    return distances


@check(2, 3)
def renorm_corrects_by_the_moments_of_all_ranks() -> object:
    xs, options = batches(sizes(5, 3, 7), 4), {"renorm": bn.Renorm(1.5, 0.5), "momentum": 0.5}
    distances = {}
    for masked in (False, True):
        masks = [torch.arange(4).expand(len(x), 4) < 2 + i for i, x in enumerate(xs)]
        given = {"mask": masks} if masked else {}
        together, alone = layer(**options), layer(**options)
        for step in range(2):  # first both corrections are at their limits, then neither
            found, expected = trained_together(together, xs, **given), trained_alone(alone, xs, **given)
            distances[f"masked {masked}, step {step}"] = require_close(found, expected, ULPS)
            for each in (together, alone):
                each.zero_grad()
                each.running_mean.fill_(104)
                each.running_var.fill_(5)
        require_same_bits(together)
    return distances


@check(2, 3)
def ghost_batches_are_local_and_store_the_moments_of_all_ranks() -> object:
    xs = batches(sizes(8, 5, 3), 4)
    together, alone, local = layer(ghost_batch_size=2), layer(), layer(ghost_batch_size=2)
    local.sync = alone.sync = False
    found = []
    for each in (together, local):
        x = xs[rank()].clone().requires_grad_()
        y = each(x)
        (y * weight_of(y, rank())).sum().backward()
        found.append({"y": y.detach(), "d_x": x.grad, "weight": each.weight.grad, "bias": each.bias.grad})
    require_close(*found, 0)
    alone(torch.cat(xs))
    require_same_bits(together)
    return require_close(dict(together.named_buffers()), dict(alone.named_buffers()), ULPS)


@check(2, 3)
def a_ghost_batch_of_one_value_is_an_error_on_every_rank() -> None:
    xs = batches(sizes(2, 4, 4))
    for mask in (None, torch.arange(len(xs[rank()])) > 0):
        together = layer(ghost_batch_size=1 if rank() == 0 else 4) if mask is None else layer(ghost_batch_size=2)
        text = message(ValueError, lambda x: together(x, mask=mask), xs[rank()])  # noqa: B023
        assert "in every ghost batch of ranks 0" in text, text
        assert together.num_batches_tracked == 0
    together = layer(ghost_batch_size=2, single_element="population")
    y = together(xs[rank()], mask=torch.arange(len(xs[rank()])) > (0 if rank() == 0 else -1))
    assert together.num_batches_tracked == 0
    assert torch.allclose(y[1:], xs[rank()][1:] / (1 + 1e-5) ** 0.5, rtol=1e-12)


@check(2)
def padding_can_be_kept() -> object:
    xs = batches([4, 5], 8)
    masks = [torch.arange(8).expand(len(x), 8) < 3 + i for i, x in enumerate(xs)]
    found = trained_together(layer(padding="keep"), xs, mask=masks)
    return require_close(found, trained_alone(layer(padding="keep"), xs, mask=masks), ULPS)


@check(2)
def activation_and_residual_stay_local() -> object:
    xs, residuals = batches([4, 5], 8), batches([4, 5], 8, seed=1)
    found = trained_together(layer(act="silu"), xs, residual=residuals)
    return require_close(found, trained_alone(layer(act="silu"), xs, residual=residuals), ULPS)


@check(2)
def every_type_and_layout_equals_one_process() -> object:
    distances = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form in (torch.contiguous_format, torch.channels_last):
            xs = [x.to(memory_format=form) for x in batches([4, 5], 8, 8, dtype=dtype)]
            made = [bn.BatchNorm2d(C, sync=True, act="relu") for _ in range(2)]
            found, alone = trained_together(made[0], xs), trained_alone(made[1], xs)
            distances[f"{dtype} {form}"] = require_close(found, alone, 8)
            require_same_bits(made[0])
    return distances


@check(2, 4)
def too_few_values_raise_the_same_error_on_every_rank() -> str:
    xs = batches([1, *[0] * (world() - 1)])
    text = message(ValueError, layer(), xs[rank()])
    assert f"in the batches of ranks {', '.join(map(str, range(world())))} together, got 1" in text
    assert "Expected more than 1 value per channel when training" in text
    assert set(on_every_rank(text)) == {text}
    mask = torch.zeros(len(xs[rank()]), dtype=torch.bool)
    assert "together, got 0" in message(ValueError, layer(), xs[rank()], mask=mask if rank() == 0 else None)
    return text


def told(kind: type[Warning], function: Callable, *args: Any) -> str:
    """The text of the first warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    assert caught[0].category is kind
    return str(caught[0].message)


def message(kind: type[BaseException], function: Callable, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@check(2)
def one_value_on_each_rank_is_enough() -> object:
    xs = batches([1, 1])
    found, alone = trained_together(layer(), xs), trained_alone(layer(), xs)
    # of two values z is 1 and -1, so d_x is 0 but for eps: what is left of terms of the size of 1
    assert (found.pop("d_x") - alone.pop("d_x")).abs().max() < 1e-13
    return require_close(found, alone, ULPS)


@check(2)
def a_single_value_of_all_ranks_may_use_stored_statistics() -> None:
    xs = batches([0, 1])
    together = layer(single_element="population")
    y = together(xs[rank()])
    assert torch.allclose(y, xs[rank()] / (1 + 1e-5) ** 0.5, rtol=1e-12)
    assert together.num_batches_tracked == 0
    pair = batches([1, 1])
    together(pair[rank()])
    assert together.num_batches_tracked == 1


@check(3)
def a_value_that_is_not_finite_leaves_out_its_channel_on_every_rank() -> None:
    xs = batches([4, 5, 3])
    xs[1][2, 3] = torch.inf
    together = layer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        together(xs[rank()])
    assert ["1 of 6 channels" in str(w.message) for w in caught] == [True]
    assert together.skipped_updates == 1
    assert together.running_mean[3] == 0
    require_same_bits(together)


@check(2)
def cumulative_averages_have_the_same_bits() -> None:
    together = layer(momentum=None)
    for step in range(3):
        together(batches([3, 6], seed=step)[rank()])
    require_same_bits(together)
    alone = bn.BatchNorm1d(C, momentum=None, dtype=torch.float64)
    for step in range(3):
        alone(torch.cat(batches([3, 6], seed=step)))
    require_close(dict(together.named_buffers()), dict(alone.named_buffers()), ULPS)


@check(2, 3)
def after_the_first_call_each_pass_is_one_collective() -> None:
    calls = []
    real = collectives._all_gather
    collectives._all_gather = lambda rows, values, group: (calls.append(len(values)), real(rows, values, group))[1]
    try:
        together, xs = layer(), batches(sizes(3, 4, 5), 2)
        for _ in range(2):
            together(xs[rank()].requires_grad_()).sum().backward()
    finally:
        collectives._all_gather = real
    moments, sums = 2 + 3 * C, 1 + 2 * C
    assert calls == [512, moments, 512, sums, moments, sums], calls


@check(2)
def no_sum_of_squares_is_taken() -> float:
    """Mean 1e8 and sd 1 in float64: a sum of squares would lose all digits of the variance."""
    generator = torch.Generator().manual_seed(0)
    xs = [1e8 + torch.randn(50, C, generator=generator, dtype=torch.float64) for _ in range(2)]
    together = layer(momentum=1.0)
    together(xs[rank()])
    exact = np.concatenate([x.numpy().astype(np.longdouble) for x in xs]).var(0, ddof=1)
    distance = float(np.abs(together.running_var.numpy() / exact - 1).max())
    assert distance < 1e-7, distance  # the inputs have 8 digits behind the mean
    return distance


@check(2)
def eval_mode_and_a_layer_without_sync_do_not_wait() -> None:
    if rank() == 0:  # the other rank calls nothing
        layer().eval()(batches([3])[0])
        bn.BatchNorm1d(C)(batches([3], dtype=torch.float32)[0])
        untracked = layer(track_running_stats=False).eval()
        untracked(batches([3])[0])


@check(2, 4)
def training_in_ddp_equals_one_process() -> object:
    """20 steps of a network in float64 on halves of a batch, and in one process on all of it."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, C), bn.BatchNorm1d(C, sync=True), nn.ReLU(),
            nn.Linear(C, C), bn.BatchNorm1d(C, sync=True, act="relu"), nn.Linear(C, 1),
        ).double()  # fmt: skip

    generator = torch.Generator().manual_seed(3)
    data = torch.randn(20, 8 * world(), 5, generator=generator, dtype=torch.float64)
    together, alone = network(), network()
    for each in (alone[1], alone[4]):
        each.sync = False
    ddp = nn.parallel.DistributedDataParallel(together)
    for net, own in ((ddp, slice(8 * rank(), 8 * rank() + 8)), (alone, slice(None))):
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for x in data[:, own]:
            optimizer.zero_grad()
            net(x).sub(x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    require_same_bits(together)
    states = together.state_dict(), alone.state_dict()
    distances = {
        k: float((states[0][k] - v).abs().max() / v.abs().max()) for k, v in states[1].items() if v.is_floating_point()
    }
    # each of 20 steps multiplies a difference of some ulps by a factor of the order of 2
    assert max(distances.values()) < 1e-9, distances
    return {"largest relative difference": max(distances.values())}


@check(2)
def layers_that_differ_raise_the_same_error_on_every_rank() -> list[str]:
    x = batches([3, 3])[rank()]
    wide = bn.BatchNorm1d(C + 2 * rank(), sync=True)
    texts = [message(RuntimeError, wide, torch.randn(3, C + 2 * rank()))]
    assert "BatchNorm1d(6)" in texts[0]
    assert "BatchNorm1d(8)" in texts[0]
    texts.append(message(RuntimeError, layer(eps=1e-3 if rank() else 1e-5), x))
    assert "eps=1e-05" in texts[1]
    assert "eps=0.001" in texts[1]
    pair = nn.ModuleDict({"first": layer(), "second": layer()})

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = pair

        def forward(self, x: Tensor, names: list[str]) -> Tensor:
            for name in names:
                x = self.encoder[name](x)
            return x

    model, order = Swapped(), ["first", "second"]
    texts.append(message(RuntimeError, model, x, order[:: -1 if rank() else 1]))
    assert "'encoder.first', a BatchNorm1d(6)" in texts[2]
    assert "'encoder.second', a BatchNorm1d(6)" in texts[2]
    model(x, order).sum().backward()
    # both layers have met by now: a later exchange finds it by the fingerprint
    texts.append(message(RuntimeError, model, x, order[:: -1 if rank() else 1]))
    assert "'encoder.second'" in texts[3]
    for text in texts:
        assert set(on_every_rank(text)) == {text}
        assert " on rank 0" in text
        assert " on rank 1" in text
        assert "same model on every rank" in text
    return texts


@check(2)
def a_layer_more_on_one_rank_is_found_in_the_backward_pass() -> str:
    layers = nn.Sequential(*[layer() for _ in range(1 + rank())])
    y = layers[0](batches([3, 3])[rank()].requires_grad_())
    text = message(RuntimeError, layers[1], y) if rank() else message(RuntimeError, y.sum().backward)
    assert "in the backward pass on rank 0" in text
    assert "in the forward pass on rank 1" in text
    assert set(on_every_rank(text)) == {text}
    return text


@check(3, 4)
def groups_synchronize_their_own_ranks() -> None:
    groups = [dist.new_group([0, 1]), dist.new_group(list(range(2, world())))]
    own = groups[rank() // 2]
    together = bn.BatchNorm1d(C, process_group=own, dtype=torch.float64)
    assert together.sync is True
    assert f"process_group=ranks {'0, 1' if rank() < 2 else '2' + ', 3' * (world() == 4)}" in repr(together)
    xs = batches(sizes(5, 3, 7, 2))
    y = together(xs[rank()]).detach()
    members = dist.get_process_group_ranks(own)
    expected = bn.BatchNorm1d(C, dtype=torch.float64)(torch.cat([xs[i] for i in members]))
    parts = expected.split([len(xs[i]) for i in members])
    assert ulps(y, parts[members.index(rank())].detach()) < ULPS
    text = message(ValueError, bn.BatchNorm1d, C, process_group=groups[1 - rank() // 2])
    assert f"process_group must contain rank {rank()}" in text
    assert "new_group" in text
    together.sync = False
    assert together.process_group is None
    together.process_group = own
    assert together.sync is True


@check(2)
def copies_and_pickles_keep_their_group() -> None:
    group = dist.new_group([0, 1])
    together = bn.BatchNorm1d(C, process_group=group)
    assert copy.deepcopy(together).process_group is group
    loaded = pickle.loads(pickle.dumps(together))
    assert loaded.process_group is group
    x = batches([4, 2], dtype=torch.float32)[rank()]
    assert copy.deepcopy(together)(x).equal(loaded(x))
    state = pickle.dumps(together)
    dist.destroy_process_group(group)
    gone = pickle.loads(state)
    text = message(RuntimeError, gone, x)
    assert "got <ranks 0, 1 of another run>" in text
    gone.eval()(x)
    gone.process_group = None
    assert gone.sync is True
    gone.train()(x)
    assert "a destroyed ProcessGroup" in repr(together)


class Networks:
    """Networks of one batch norm layer, for the ways in which torch runs several processes."""

    @staticmethod
    def made(layer: nn.Module) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(C, C), layer, nn.Linear(C, 1))

    KINDS: ClassVar[dict[str, Callable[[], nn.Module]]] = {
        "local": lambda: bn.BatchNorm1d(C),
        "sync": lambda: bn.BatchNorm1d(C, sync=True),
        "frozen": lambda: bn.freeze(bn.BatchNorm1d(C)),
        "averaged": lambda: bn.BatchNorm1d(C, momentum=None, sync=True, act="relu"),
    }


@check(2)
def two_forward_passes_before_one_backward_pass_work_in_ddp() -> None:
    """A GAN's discriminator sees real and made examples; every forward of DDP writes into the buffers."""
    options = [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"broadcast_buffers": False}]
    for make in Networks.KINDS.values():
        for each in options:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers
                model = nn.parallel.DistributedDataParallel(Networks.made(make()), **each)
            for step in range(2):
                real, fake = batches([4, 3], seed=step, dtype=torch.float32)[rank()].split([2, 4 - 2 - rank()])
                fake = torch.cat([fake, fake])
                (model(real).mean() - model(fake).square().mean()).backward()
            gradients = [p.grad.tolist() for p in model.parameters()]
            assert on_every_rank(gradients) == [gradients] * 2


@check(2)
def gradients_accumulate_without_sync_of_ddp() -> object:
    """no_sync leaves out DDP's own exchange of gradients, not that of the layer."""
    model = nn.parallel.DistributedDataParallel(Networks.made(bn.BatchNorm1d(C, sync=True)).double())
    alone = Networks.made(bn.BatchNorm1d(C)).double()
    xs = [batches([4, 4], seed=seed) for seed in range(2)]
    with model.no_sync():
        model(xs[0][rank()]).square().mean().backward()
    model(xs[1][rank()]).square().mean().backward()
    for pair in xs:
        alone(torch.cat(pair)).square().mean().backward()
    found = {name: p.grad for name, p in model.module.named_parameters()}
    # batch norm takes the mean away, so the bias in front of it has no gradient but rounding
    assert found.pop("0.bias").abs().max() < 1e-12
    return require_close(found, {name: p.grad for name, p in alone.named_parameters()}, ULPS)


@check(2)
def fsdp2_keeps_statistics_in_float32() -> object:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    distances = {}
    for dtype, limit in ((None, ULPS), (torch.bfloat16, 8)):
        model = Networks.made(bn.BatchNorm1d(C, sync=True))
        alone = copy.deepcopy(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        xs = batches([4, 4], dtype=torch.float32)
        y = model(xs[rank()])
        y.float().square().mean().backward()
        assert model[1].running_mean.dtype == model[1].running_var.dtype == torch.float32
        with torch.autocast("cpu", dtype or torch.float32, enabled=False):
            alone = alone if dtype is None else alone.to(dtype)
            alone[1].sync = False
            expected = alone(torch.cat(xs).to(y.dtype))
        distances[str(dtype)] = ulps(y.detach(), expected.detach()[4 * rank() : 4 * rank() + 4])
        assert distances[str(dtype)] < limit, distances
        state = [model[1].running_mean.tolist(), model[1].running_var.tolist()]
        assert on_every_rank(state) == [state] * 2
    return distances


@check(2, 3)
def a_program_of_torch_compile_has_the_collective_in_one_graph() -> object:
    """Also where a rank's batch is all padding, and in a named group."""
    distances = {}
    masks = [
        torch.ones(4, 2, dtype=torch.bool),
        torch.zeros(3, 2, dtype=torch.bool),
        torch.zeros(5, 2, dtype=torch.bool),
    ]
    cases = {"whole": {}, "masked": {"mask": masks[: world()]}, "group": {}}
    for case, options in cases.items():
        torch._dynamo.reset()
        group = dist.group.WORLD if case == "group" else None
        eager, compiled = (bn.BatchNorm1d(C, process_group=group, sync=True, act="silu") for _ in range(2))
        program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for step in range(2):
            xs = batches(sizes(4, 3, 5), 2, dtype=torch.float32, seed=step)
            found, expected = (trained_together(each, xs, **options) for each in (program, eager))
            found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
            # d_x is a difference of terms up to 100 times as large
            distances[f"{case} {step}"] = require_close(found, expected, 400)
            eager.zero_grad()
            compiled.zero_grad()
        require_same_bits(compiled)
    return distances


@check(2)
def recomputed_segments_exchange_again() -> object:
    from torch.utils.checkpoint import checkpoint

    xs = batches([4, 3])
    found = []
    for use in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        together = layer()
        x = xs[rank()].clone().requires_grad_()
        use(lambda x, together=together: together(x).sin(), x).sum().backward()
        found.append({"x": x.grad, "weight": together.weight.grad})
        assert together.num_batches_tracked == 1
    return require_close(*found, 0)


@check(2)
def a_model_in_train_mode_may_be_copied_and_its_copy_run() -> None:
    model = Networks.made(bn.BatchNorm1d(C, sync=True))
    x = batches([4, 3], dtype=torch.float32)[rank()]
    y = model(x)
    assert copy.deepcopy(model)(x).equal(y)


def model_of_two() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), bn.BatchNorm1d(4, sync=True))
    model(torch.randn(8, 3))
    return model


@check(3)
def replicas_are_compared_in_everything() -> str:
    model = model_of_two()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    same = bn.check_replicas(wrapped)
    assert same.are_equal
    assert str(same) == "2 batch norm layers on ranks 0, 1, 2: no differences"
    if rank() == 1:
        model[1].running_var[2] += 0.25
        model[1].running_mean[0] = torch.nan
        model[1].eval()
        model[3].eps = 1e-3
    if rank() == 2:
        model[3].weight.data[0] -= 3
        model[3].half()
    found = bn.check_replicas(model)
    assert set(on_every_rank(str(found))) == {str(found)}
    by = {(each.layer, each.what): each for each in found.differences}
    assert by["1", "running_var"].largest == 0.25
    assert by["1", "running_var"].values == ("version 1", "version 2", "version 1")
    assert by["1", "running_mean"].largest != by["1", "running_mean"].largest  # NaN
    assert by["1", "training"].values == ("True", "False", "True")
    assert by["3", "eps"].values == ("1e-05", "0.001", "1e-05")
    assert by["3", "weight"].values == ("(4,) float32", "(4,) float32", "(4,) float16")
    assert set(by) == {
        ("1", "running_var"), ("1", "running_mean"), ("1", "training"), ("3", "eps"), ("3", "weight"), ("3", "bias"),
    }  # fmt: skip
    return str(found)


@check(2, 3)
def models_of_other_layers_are_compared_without_waiting() -> str:
    model = model_of_two()
    if rank() == 1:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 9), nn.BatchNorm1d(9), nn.BatchNorm1d(9))
    found = bn.check_replicas(model)
    assert set(on_every_rank(str(found))) == {str(found)}
    text = str(found)
    assert "layer 3 in order: no layer on rank" in text
    assert "'4' on rank 1" in text
    by = {(each.layer, each.what): each for each in found.differences}
    assert by["3", "class"].values[:2] == ("batchnorm.BatchNorm1d", "torch.BatchNorm1d")
    assert by["3", "running_mean"].values[:2] == ("(4,) float32", "(9,) float32")
    error = message(RuntimeError, bn.broadcast_statistics, model)
    assert "needs the same layers on every rank" in error
    assert set(on_every_rank(error)) == {error}
    assert bn.check_replicas(nn.Linear(2, 2) if rank() else nn.BatchNorm1d(2)).differences
    return text


@check(3)
def statistics_of_one_rank_are_given_to_all() -> None:
    model = model_of_two().double()
    for _ in range(rank()):
        model[1](torch.randn(4 + rank(), 4).double() * 3)
    buffers = list(model.buffers())
    source = [b.clone() for b in buffers]
    expected = on_every_rank(source)[2]
    model[3].weight.data += rank()
    gamma = model[3].weight.detach().clone()
    bn.broadcast_statistics(nn.DataParallel(model), src=2)
    assert model[3].weight.equal(gamma)
    assert all(a is b and a.equal(c) for a, b, c in zip(model.buffers(), buffers, expected, strict=True))
    assert [each.what for each in bn.check_replicas(model).differences] == ["weight"]
    pair = dist.new_group([0, 2])
    if rank() == 1:
        assert "must contain rank 1" in message(ValueError, bn.check_replicas, model, group=pair)
        return
    model[1].running_mean.fill_(rank())
    assert "one of 0, 2, got 1" in message(ValueError, bn.broadcast_statistics, model, src=1, group=pair)
    bn.broadcast_statistics(model, src=2, group=pair)
    assert model[1].running_mean.tolist() == [2.0] * 4
    assert bn.check_replicas(model, group=pair).ranks == (0, 2)


@check(2)
def sharded_parameters_are_named_as_not_compared() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of_two()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found = bn.check_replicas(model)
    assert not found.differences
    assert not found.are_equal
    assert "not compared: '1' weight is sharded over ranks" in str(found)
    bn.broadcast_statistics(model, src=1)
    return str(found)


@check(2)
def conversion_runs_on_one_rank_alone() -> None:
    """Comparison with an example waits for nobody; also torch's SyncBatchNorm, which refuses the CPU, is compared."""
    group = dist.new_group([0, 1])
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.SyncBatchNorm(4, process_group=group), nn.ReLU(), nn.BatchNorm1d(4))
    example = torch.randn(4, 3, 5)
    if rank() == 0:
        bn.convert(bn.convert(model, fuse=True, example=example, sync=True), fuse=True, example=example)
    dist.barrier()
    together = bn.convert(model, sync=True)
    assert (type(together[1]), together[1].process_group, together[3].process_group) == (bn.BatchNorm1d, group, None)
    y = together(example + rank()).detach()
    assert abs(sum(on_every_rank(float(y.sum())))) < 1e-3  # the last layer has beta 0
    back = bn.revert(together)
    assert (type(back[1]), back[1].process_group, type(back[3])) == (nn.SyncBatchNorm, group, nn.BatchNorm1d)


@check(2)
def measurements_of_one_rank_wait_for_nobody() -> None:
    from batchnorm.instruments import companion_flips, gradient_depth, train_eval_gap

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, sync=True), nn.Linear(4, 2))
    xs = [torch.randn(8, 3) for _ in range(4)]
    if rank() == 0:
        bn.examine(model, xs)
        assert "measured the data of rank 0 alone" in told(RuntimeWarning, bn.recalibrate, model, xs)
        gradient_depth(model, xs[0], lambda y, _: y.square().mean())
        companion_flips(model, xs[0], torch.cat(xs), batch=4, train=True)
        train_eval_gap(model, xs, lambda y, _: y.square().mean())
        bn.probe(model, xs[0])
    assert on_every_rank(rank()) == [0, 1]  # an exchange without the other rank would have broken the group


@check(2, 3)
def a_step_of_micro_batches_moves_statistics_once_by_the_values_of_all_ranks() -> object:
    micros = [batches(sizes(*of_ranks), 4, seed=i) for i, of_ranks in enumerate(([3, 5, 2], [2, 0, 4]))]
    together, found = layer(), []
    with bn.step(together):
        for xs in micros:
            x = xs[rank()].clone().requires_grad_()
            y = together(x)
            (y * weight_of(y, rank())).sum().backward()
            found.append({"y": y.detach(), "d_x": x.grad})
    distances = []
    for xs, each in zip(micros, found, strict=True):
        expected = trained_alone(layer(), xs)
        distances.append(require_close(each, {name: expected[name] for name in each}, ULPS))
    require_same_bits(together)
    assert together.num_batches_tracked == 1
    values = torch.cat([x for xs in micros for x in xs]).transpose(0, 1).flatten(1).numpy()
    require_close({"mean": together.running_mean}, {"mean": torch.as_tensor(0.1 * values.mean(1))}, ULPS)
    require_close({"var": together.running_var}, {"var": torch.as_tensor(0.9 + 0.1 * values.var(1, ddof=1))}, ULPS)
    return distances


@check(2, 3)
def second_derivatives_equal_one_process() -> object:
    """A penalty on the gradient of x, differentiated in x and gamma; by the kernels and by the formula."""
    xs = batches(sizes(3, 4, 2), 3)
    distances = []
    for given in (False, True):
        weights = [
            torch.rand(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            for i, x in enumerate(xs)
        ]
        made, found = [layer(act="silu"), layer(act="silu")], []
        made[1].sync = False
        own = slice(sum(len(x) for x in xs[: rank()]), sum(len(x) for x in xs[: rank() + 1]))
        for each, x, weight in zip(
            made, (xs[rank()], torch.cat(xs)), (weights[rank()], torch.cat(weights)), strict=True
        ):
            x = x.clone().requires_grad_()
            y = each(x, weight=weight if given else None)
            (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            d_x.square().sum().backward()
            found.append({"x": x.grad, "gamma": each.weight.grad, "beta": each.bias.grad})
        for name in ("gamma", "beta"):
            dist.all_reduce(found[0][name])
        found[1]["x"] = found[1]["x"][own]
        distances.append(require_close(*found, 100 * ULPS))  # twice differences of terms that are 10 times as large
    return distances


@check(2, 3)
def step_backward_joins_the_micro_batches_of_all_ranks() -> object:
    parts = [batches(sizes(*of_ranks), seed=i) for i, of_ranks in enumerate(([3, 5, 2], [2, 0, 4], [4, 1, 3]))]
    torch.manual_seed(0)
    inner = nn.Linear(C, C).double()
    found = []
    for segments in (1, 2):
        model = nn.Sequential(layer(), copy.deepcopy(inner), layer(), nn.SiLU())
        alone = copy.deepcopy(model)
        alone[0].sync = alone[2].sync = False
        micros = [xs[rank()] for xs in parts[: 3 - rank() % 2]]  # the second rank has one micro-batch less
        bn.step_backward(model, micros, lambda y, _: y.pow(3).sum(), reduction="sum", segments=segments)
        values = [x for r in range(world()) for x in (xs[r] for xs in parts[: 3 - r % 2])]
        alone(torch.cat(values)).pow(3).sum().backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        scale = max(float(p.grad.abs().max()) for p in alone.parameters())
        found.append(max(float((p.grad - q.grad).abs().max()) / scale for p, q in pairs))
        assert found[-1] < 1e-9
        require_same_bits(model)
        torch.testing.assert_close(model[2].running_var, alone[2].running_var, rtol=1e-9, atol=0)
    single = [torch.randn(1, C, dtype=torch.float64)] if rank() == 0 else [torch.empty(0, C, dtype=torch.float64)]
    text = message(ValueError, bn.step_backward, layer(), single, lambda y, _: y.sum(), reduction="sum")
    assert "more than 1 value per channel in a step, got 1" in text
    return found


@check(2)
def the_log_and_profiles_name_the_layer() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("batchnorm.processes")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        model = nn.ModuleDict({"stem": bn.BatchNorm1d(C, sync=True)})
        model.forward = lambda x: model["stem"](x)  # type: ignore[method-assign]
        container = nn.Sequential(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            container(batches([3, 4], dtype=torch.float32)[rank()])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert [(r.levelname, r.getMessage()) for r in records] == [
        ("INFO", "'0.stem', a BatchNorm1d(6), is synchronized over ranks 0, 1"),
        ("DEBUG", "'0.stem', a BatchNorm1d(6), exchanges 512 numbers in its forward pass"),
        ("DEBUG", "'0.stem', a BatchNorm1d(6), exchanges 20 numbers in its forward pass"),
    ]
    assert "batchnorm exchange, forward: '0.stem', a BatchNorm1d(6)," in {each.key for each in profile.key_averages()}


@check(2)
def complex_batches_equal_one_process() -> object:
    parts = [batches([3, 5], 4, seed=seed) for seed in (0, 1)]
    xs = [torch.complex(*pair) for pair in zip(*parts, strict=True)]
    made = [bn.BatchNorm1d(C, sync=sync, dtype=torch.complex128) for sync in (True, False)]
    found = []
    for each, x in zip(made, (xs[rank()], torch.cat(xs)), strict=True):
        x = x.clone().requires_grad_()
        weight = torch.cat([weight_of(b.real, i) for i, b in enumerate(xs)])
        own = slice(None) if len(x) == 8 else slice(3 * rank(), 3 + 5 * rank())
        (each(x) * weight[own]).abs().square().sum().backward()
        found.append(x.grad if len(x) < 8 else x.grad[3 * rank() : 3 + 5 * rank()])
    require_same_bits(made[0])
    reals = [torch.view_as_real(t).detach() for t in (*found, made[0].running_mean, made[1].running_mean)]
    distances = require_close({"d_x": reals[0], "mean": reals[2]}, {"d_x": reals[1], "mean": reals[3]}, ULPS)
    return distances | require_close({"var": made[0].running_var}, {"var": made[1].running_var}, ULPS)


@check(2)
def gradients_by_torch_func_equal_those_of_autograd() -> object:
    xs, together = batches([3, 4], 2), layer()
    expected = trained_together(layer(), xs)
    weight = weight_of(expected["y"], rank())
    d_x = torch.func.grad(lambda x: (together(x) * weight).sum())(xs[rank()]).detach()
    assert together.num_batches_tracked == 1
    text = message(
        RuntimeError, torch.func.vmap(lambda x: layer(track_running_stats=False)(x)), torch.stack([xs[rank()]] * 2)
    )
    assert "needs a call outside of vmap and jvp" in text
    return require_close(
        {"d_x": d_x, "mean": together.running_mean}, {"d_x": expected["d_x"], "mean": expected["running_mean"]}, ULPS
    )


@check(2)
def ghost_batches_are_local_and_their_stored_moments_those_of_all_ranks() -> None:
    xs = batches([8, 5], 3)
    together, alone = layer(ghost_batch_size=4), layer(ghost_batch_size=4)
    alone.sync = False
    assert together(xs[rank()]).equal(alone(xs[rank()]))
    whole = layer()
    whole.sync = False
    whole(torch.cat(xs))
    require_close(dict(together.named_buffers()), dict(whole.named_buffers()), ULPS)
    require_same_bits(together)


@check(2)
def renormalized_batches_have_one_correction_on_all_ranks() -> object:
    xs = batches([3, 5], 4)
    found, alone = trained_together(layer(renorm=True), xs), trained_alone(layer(renorm=True), xs)
    return require_close(found, alone, ULPS)


@check(2)
def a_whole_step_of_all_ranks_equals_one_process() -> object:
    """step_backward with exact gradients on two ranks of two micro-batches each, against one process and one batch."""
    together = Networks.made(layer()).double()
    alone = copy.deepcopy(together)
    alone[1].sync = False
    xs = batches([6, 6], seed=4)
    bn.step_backward(together, list(xs[rank()].split(3)), lambda y, _: y.square().mean(), gradient="exact")
    alone(torch.cat(xs)).square().mean().backward()
    for p in together.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    require_same_bits(together[1])
    expected = {name: p.grad for name, p in alone.named_parameters()}
    found = {name: p.grad for name, p in together.named_parameters()}
    assert found.pop("0.bias").abs().max() < 1e-12  # batch norm takes the mean away
    require_close(dict(together.named_buffers()), dict(alone.named_buffers()), ULPS)
    return require_close(found, expected, ULPS)


def data_of(r: int) -> list[Tensor]:
    """The data of a rank: those of odd ranks have another mean."""
    generator = torch.Generator().manual_seed(r)
    return list((torch.randn(256, 4, generator=generator) + 3 * (r % 2)).split(64))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 2))


@check(2, 3)
def examine_tells_all_ranks_the_same_measured_differences() -> object:
    model = network()
    for x in data_of(rank()) * 5:
        model(x)
    stored = [torch.empty(world(), C, dtype=torch.float64) for _ in range(2)]
    for all_ranks, own in zip(stored, (model[1].running_mean, model[1].running_var), strict=True):
        dist.all_gather(list(all_ranks.unbind()), own.double())
    means, variances = (each.numpy() for each in stored)
    unit = np.sqrt(variances.mean(0) + model[1].eps)
    expected = [float(np.sqrt((((v.max(0) - v.min(0)) / unit) ** 2).mean())) for v in (means, np.sqrt(variances))]
    before = copy.deepcopy(model.state_dict())
    found = bn.examine(model, data_of(rank()), group="all")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    texts = [None] * world()
    dist.all_gather_object(texts, json.dumps(found.to_dict()))
    assert len({*texts}) == 1
    by_code = {finding.code: finding for finding in found.findings}
    assert by_code["BN605"].measured.startswith(f"running_mean {expected[0]:.2g} sd")
    assert (expected[1] > 0.1) == ("running_var" in by_code["BN605"].measured)
    assert "inputs differs between ranks by" in by_code["BN601"].measured
    assert "BN604" in found.checked
    assert {"BN604", "BN605"}.isdisjoint(found.not_checked)
    assert "256 examples in 4 batches on ranks" in found.data
    (difference, *_) = bn.check_replicas(model).differences
    assert abs(difference.in_sd - expected[0]) < 1e-9
    return expected


@check(2)
def examine_finds_copies_that_differ_on_every_rank() -> object:
    model = network()
    if rank():
        model[1].eps, model[1].weight.data[0] = 0.1, 3.0
        model[1].eval()
    found = bn.examine(model, group="all")
    measured = {finding.measured for finding in found.findings if finding.code == "BN604"}
    assert measured == {
        "training: True on rank 0; False on rank 1",
        "eps: 1e-05 on rank 0; 0.1 on rank 1",
        "weight: version 1 on rank 0; version 2 on rank 1, by up to 2",
    }
    longer = network() if rank() else nn.Sequential(*network(), nn.BatchNorm1d(2))
    (layers,) = [f for f in bn.examine(longer, group="all").findings if f.code == "BN604"]
    assert layers.measured == "layer 2 in order: '4' on rank 0; no layer on rank 1"
    only = [f for f in bn.examine(model, group="all").findings if f.measured.endswith(" on rank 1")]
    assert only  # findings of one rank say so
    return sorted(measured)


@check(2, 3)
def a_rank_that_fails_in_examine_stops_no_other() -> None:
    group = dist.group.WORLD
    model = network() if rank() != 1 else "model.pt"
    text = message((ValueError, RuntimeError), bn.examine, model, group=group)
    assert ("got a file" in text) if rank() == 1 else text.startswith("examine failed on rank 1; on rank 1: ValueError")
    bad = [torch.randn(8, 5 if rank() == 1 else 4) for _ in range(2)]
    text = message((ValueError, RuntimeError), bn.examine, network(), bad, group=group)
    assert ("expected 4 features" in text) if rank() == 1 else ("examine failed on rank 1" in text)
    assert bn.examine(network(), data_of(0), group=group).ok


@check(2)
def examine_without_a_group_waits_for_nobody_though_the_model_is_wrapped() -> None:
    model = nn.parallel.DistributedDataParallel(network())
    if rank() == 0:
        found = bn.examine(model, data_of(0))
        assert "BN604" in found.not_checked
        assert "group=" in found.not_checked["BN604"]
    dist.barrier()
    found = bn.examine(model, data_of(rank())[: 2 + rank()], group="all")
    assert found.data == "128 examples in 2 batches on rank 0; 192 examples in 3 batches on rank 1"
    assert {f.code for f in found.findings} >= {"BN601"}
    model(data_of(rank())[0]).sum().backward()  # the wrapper exchanges again
    gradients = [torch.empty_like(p) for p in [model.module[0].weight] * 2]
    dist.all_gather(gradients, model.module[0].weight.grad)
    assert gradients[0].equal(gradients[1])


def main(*names: str, checks: dict[str, tuple[Callable[[], object], tuple[int, ...]]] = CHECKS) -> None:
    """Run the checks, or those with these names, and print what came out of each as JSON."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    results = {}
    for name, (function, worlds) in checks.items():
        if world() in worlds and (not names or name in names):
            try:
                results[name] = ["ok", function()]
            except Exception:  # noqa: BLE001 - told by name
                results[name] = ["failed", traceback.format_exc()]
    print(json.dumps(results), flush=True)  # noqa: T201 - read by test_processes
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
