"""Recalibration inside a framework's training, with the same statistics in all processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from batchnorm.call_types import Batch
from batchnorm.population import recalibrate
from batchnorm.replicas import broadcast_statistics


def calibrate(
    model: nn.Module,
    loader: Iterable[Batch],
    max_examples: int | None,
    *,
    forward: Callable[[nn.Module, Batch], object],
    exact: bool = True,
) -> None:
    """Recalibrate; with several processes, every rank then gets the statistics that rank 0 measured on its data."""
    with torch.inference_mode(False):  # some frameworks evaluate in inference mode, whose tensors cannot be trained
        recalibrate(model, loader, max_examples, forward=forward, exact=exact)
    broadcast_statistics(model)


def with_own_workers(loader: Any) -> Any:
    """The loader, or a copy of it if reading the loader would restart the running epoch."""
    if not getattr(loader, "persistent_workers", False):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin
