"""Running statistics as registered operators, for vmap, torch.compile, torch.export and the transforms of torch.func.

``moved_running`` computes their new values, which the caller copies. ``update_running`` changes them in place, for
torch.func.grad, vjp and jvp: inside these nothing can be copied into a tensor that is no argument of the transformed
function. But ``torch.func.functionalize`` refuses an operator that mutates its arguments, and so does ``draft_export``
after a batch that moved nothing. Inside a backward pass both leave running statistics as they are: there a forward is
repeated (``repeated_forwards``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo

from batchnorm.kernels import choice
from batchnorm.kernels.interface import ChannelStatistics
from batchnorm.kernels.operators import Axes, Flat, models_first
from batchnorm.kernels.repeated_forwards import is_repeated
from batchnorm.kernels.running_statistics import Running

_STORED = "Tensor{} running_mean, Tensor{} running_var, Tensor{} num_batches_tracked, Tensor{} skipped"
_BATCH = "Tensor mean, Tensor var, SymInt count, float? momentum"
_MOVED = f"({_STORED.format('', '', '', '')}, {_BATCH}) -> (Tensor, Tensor, Tensor, Tensor)"
_UPDATE = f"({_STORED.format('(a0!)', '(a1!)', '(a2!)', '(a3!)')}, {_BATCH}) -> ()"


def _of_update(*flat: Flat) -> tuple[Running, ChannelStatistics, int]:
    """The arguments of an update operator, with Running and ChannelStatistics built from them."""
    *stored, mean, var, count, momentum = flat
    return Running(*stored, momentum=momentum), ChannelStatistics(mean, var), count


def _moved(*flat: Flat) -> tuple[Tensor, ...]:
    running, statistics, count = _of_update(*flat)
    mean, var, batches, skipped = stored = tuple(t.clone() for t in running[:4])
    if not is_repeated():
        choice.update_running(Running(mean, var, batches, skipped, running.momentum), statistics, count)
    return stored


def _update(*flat: Flat) -> None:
    if not is_repeated():
        choice.update_running(*_of_update(*flat))


moved_running = torch.library.custom_op("batchnorm::moved_running", _moved, mutates_args=(), schema=_MOVED)
update_running = torch.library.custom_op(
    "batchnorm::update_running",
    _update,
    mutates_args={"running_mean", "running_var", "num_batches_tracked", "skipped"},
    schema=_UPDATE,
)


@moved_running.register_fake
def _(*flat: Flat) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in _of_update(*flat)[0][:4])


@update_running.register_fake
def _(*_: Flat) -> None:
    return None


@moved_running.register_vmap
def _(info: VmapInfo, in_dims: Axes, *flat: Flat) -> tuple[tuple[Tensor, ...], Axes]:
    return moved_running(*_for_each_model(info, in_dims, flat)), (0, 0, 0, None)


@update_running.register_vmap
def _(info: VmapInfo, in_dims: Axes, *flat: Flat) -> tuple[None, None]:
    update_running(*_for_each_model(info, in_dims, flat))
    return None, None


def _for_each_model(info: VmapInfo, in_dims: Axes, flat: Sequence[Flat]) -> list[Flat]:
    """The arguments of an update operator, with the models of the ensemble on axis 0; they share ``skipped``.

    Raises:
        RuntimeError: If the models share running statistics.
    """
    if any(dim is None for dim in in_dims[:3]):
        raise RuntimeError(
            "BatchNorm in train mode under vmap needs running statistics for each model, got one set shared by "
            f"{info.batch_size}. Pass the buffers of torch.func.stack_module_state through vmap, or use "
            "track_running_stats=False."
        )
    first = [models_first(t, axis, info.batch_size) for t, axis in zip(flat, in_dims, strict=True)]
    first[3] = flat[3] if in_dims[3] is None else flat[3].select(in_dims[3], 0)  # temporary
    return first


def flat_update(running: Running, statistics: ChannelStatistics, count: int) -> tuple[Flat, ...]:
    """The arguments of an update operator."""
    return *running[:4], *statistics, count, running.momentum


def move(running: Running, statistics: ChannelStatistics, count: int) -> None:
    """Move running statistics in place: compute new values by ``moved_running``, then copy them."""
    for stored, moved in zip(running[:4], moved_running(*flat_update(running, statistics, count)), strict=True):
        stored.copy_(moved if torch.compiler.is_compiling() else _fitting(stored, moved))


def _fitting(stored: Tensor, moved: Tensor) -> Tensor:
    """New values, unwrapped if torch.func.functionalize wrapped them but not ``stored``, which is no argument to it."""
    if torch._is_functional_tensor(stored) or not torch._is_functional_tensor(moved):
        return moved
    torch._sync(moved)
    return torch._from_functional_tensor(moved)
