"""The collectives of all exchanges: a tensor or an object of every rank, in the order of the ranks of a group."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from batchnorm.processes.failures import about_failure
from batchnorm.processes.membership import ranks_in_words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("batchnorm.processes")


def gathered(values: Tensor, group: ProcessGroup, name: str, direction: str) -> Tensor:
    """``values`` (K,) of every rank: (ranks, K), in rank order; without gradient.

    Args:
        values: A tensor of the same size and type on every rank.
        group: The process group.
        name: The layer, for errors and for the log.
        direction: "forward" or "backward".

    Raises:
        RuntimeError: If the backend reports a failure; on gloo within the group's timeout, on NCCL if it waits.
    """
    _log.debug("%s exchanges %d numbers in its %s pass", name, len(values), direction)
    size = distributed.get_world_size(group)
    rows = values.new_empty(size * len(values))
    try:
        with torch.profiler.record_function(f"batchnorm exchange, {direction}: {name}"):
            _all_gather(rows, values.contiguous(), group)
    except RuntimeError as error:
        need = f"{name} needs the moments of {ranks_in_words(group)} in its {direction} pass"
        suspicion = "is in eval mode, or runs other layers (batchnorm.check_replicas compares them)"
        raise RuntimeError(about_failure(group, need, suspicion, error)) from error
    return rows.view(size, -1)


def of_all_ranks(value: object, group: ProcessGroup, who: str, what: str) -> list[Any]:
    """The values of all ranks, of any kind and size, in rank order; every rank must call this.

    Args:
        value: This rank's value; tensors must be on the CPU.
        group: The process group.
        who: The caller, for errors.
        what: The values in words, for errors.

    Raises:
        RuntimeError: If the backend reports a failure, as in ``gathered``.
    """
    values: list[object] = [None] * distributed.get_world_size(group)
    try:
        distributed.all_gather_object(values, value, group=group)
    except Exception as error:  # bytes of another collective may fail in any way
        need = f"{who} needs {what} of {ranks_in_words(group)}"
        raise RuntimeError(about_failure(group, need, f"or does not call {who} with this group", error)) from error
    return values


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block after which Ctrl-C takes effect: half an exchange would leave the ranks out of step."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: arrived.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for arguments in arrived[:1]:
            handler(*arguments)


# the new name of all_gather_into_tensor, which torch 2.13 deprecates
_all_gather: Any = getattr(distributed, "all_gather_single", None) or getattr(
    distributed, "all_gather_into_tensor", None
)


def recorded(values: Tensor, group: ProcessGroup) -> Tensor:
    """As ``gathered``, as operators of a program of torch.compile: differentiable, and with torch's own errors."""
    from torch.distributed import _functional_collectives as functional

    # the second is the name before torch 2.13
    gather: Any = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
    return functional.wait_tensor(gather(values, 0, group)).view(distributed.get_world_size(group), -1)
