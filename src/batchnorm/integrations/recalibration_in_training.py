"""Recalibration inside a framework's training, on the data of all its processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from batchnorm.call_types import Batch
from batchnorm.population import recalibrate
from batchnorm.replicas import broadcast_statistics

# accelerate's loader of data that one process reads: each batch takes all ranks, so no rank may stop a pass early
_DISPATCHER = "DataLoaderDispatcher"


def calibrate(
    model: nn.Module,
    loader: Iterable[Batch],
    max_examples: int | None,
    *,
    forward: Callable[[nn.Module, Batch], object],
    is_distributed: bool,
    exact: bool = True,
) -> None:
    """Recalibrate on the data of all processes if the training ``is_distributed``.

    Layers that are not measured then have the statistics of rank 0 on all ranks.
    """
    if is_distributed:
        broadcast_statistics(model)
    with torch.inference_mode(False):  # some frameworks evaluate in inference mode, whose tensors cannot be trained
        recalibrate(
            model, loader, max_examples, forward=forward, exact=exact, group="all" if is_distributed else None,
            memory=0 if type(loader).__name__ == _DISPATCHER else None,
        )  # fmt: skip


def with_own_workers(loader: Any) -> Any:
    """The loader, or a copy of it if reading the loader would restart the running epoch."""
    if not getattr(loader, "persistent_workers", False):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin
