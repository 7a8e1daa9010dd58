"""The collective of all exchanges: a tensor of every rank, in the order of the ranks of a group."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from batchnorm.processes.failures import about_failure

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
        raise RuntimeError(about_failure(group, name, direction, error)) from error
    return rows.view(size, -1)


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
