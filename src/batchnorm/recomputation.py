"""What a repeated forward takes from the first: values computed from stored statistics, which may have moved since.

Activation checkpointing drops the tensors between two layers and computes them again in the backward pass. The result
has to be that of the first forward. Usually it depends on the batch alone; a value that depends on stored statistics as
well is kept with the checkpoint, as long as autograd keeps that, and is found there by the repetition: see
``open_checkpoints``. Without a checkpoint nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final
from warnings import warn

import torch
from torch import Tensor

from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.repeated_forwards import is_repeated
from batchnorm.open_checkpoints import open_checkpoints

_KEPT = "_batchnorm_first_values"  # an attribute of a checkpoint


@final
@dataclass(eq=False)
class _First:
    """One call of a layer in a first forward.

    Args:
        moments: The moments of its batch.
        values: The values that it computed.
        used_by: The backward pass that repeated it last; no pass is -1.
    """

    moments: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    used_by: int = -1


def first_values(
    layer: object, moments: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``compute()`` in a first forward; in its repetition inside a backward pass, the values of the first forward.

    A checkpoint keeps copies of the values of every call in it. A compiler or a transform computes them anew.

    Args:
        layer: The layer, which is not changed.
        moments: Tensors by which a batch is recognized among those of a checkpoint, bit for bit; NaN is equal to NaN.
        compute: Returns the values, from stored statistics.

    Warns:
        RuntimeWarning: If a forward inside a backward pass repeats none that is known: the values are new.
    """
    if not is_plain(*moments):
        return compute()
    first, repeated = open_checkpoints()
    values = _repeated(layer, repeated, moments, compute) if is_repeated() else compute()
    for checkpoint in first:
        kept = _First(_copies(moments), _copies(values))
        vars(checkpoint).setdefault(_KEPT, {}).setdefault(layer, []).append(kept)
    return values


def _repeated(
    layer: object, checkpoint: object | None, moments: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The values of the first call of a checkpoint with these moments that this backward pass has not repeated yet."""
    calls: list[_First] = [] if checkpoint is None else vars(checkpoint).get(_KEPT, {}).get(layer, [])
    task = torch._C._current_graph_task_id()
    found = next((each for each in calls if each.used_by != task and _are_same(each.moments, moments)), None)
    if found is not None:
        found.used_by = task
        return found.values
    warn(
        f"{type(layer).__name__} runs inside a backward pass, and no first forward of a checkpoint had this batch: the "
        "result depends on stored statistics that may have moved since, so gradients may be wrong. Use "
        "torch.utils.checkpoint, and keep preserve_rng_state=True.",
        RuntimeWarning,
        stacklevel=3,
    )
    return compute()


def _copies(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone() for t in tensors)


def _are_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )
