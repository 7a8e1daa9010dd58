"""Running statistics: the stored values that a batch moves, and the warning about values that were not stored."""

from __future__ import annotations

import warnings
from typing import NamedTuple, final

import torch
from torch import Tensor


@final
class Running(NamedTuple):
    """Running statistics that a batch will move, in place.

    Attributes:
        mean: Stored mean, (C,) or (models, C).
        var: Stored variance; receives the unbiased one, as in torch.
        batches: Integer, () or (models,): number of batches so far; if momentum is None, number of averaged batches.
        skipped: Integer scalar: the number of batches in which a channel's mean or variance was NaN or infinite. Such a
            channel keeps its stored values; if momentum is None, all channels do.
        momentum: Weight of the new value; None averages all batches equally.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    skipped: Tensor
    momentum: float | None

    def moved(self, bad: int, channels: int) -> None:
        """Tell autograd that mean and var changed; if ``bad`` channels were not finite, count the batch and warn."""
        torch.autograd.graph.increment_version((self.mean, self.var))
        if bad:
            self.skipped.add_(1)
            warn_of_skipped(bad, channels, self.mean.device, self.momentum)


def warn_of_skipped(bad: int, channels: int, device: torch.device, momentum: float | None) -> None:
    """Warn that a batch had ``bad`` channels whose statistics were not stored; do nothing on an accelerator."""
    if not warns_at_once(device):
        return
    what_happens = "this batch is left out of all" if momentum is None else "these channels keep their"
    warnings.warn(
        f"NaN or infinity in the batch statistics of {bad} of {channels} channels: "
        f"{what_happens} running statistics. layer.skipped_updates counts such batches.",
        RuntimeWarning,
        stacklevel=3,
    )


def warns_at_once(device: torch.device) -> bool:
    """Whether ``update_running`` warns: not on an accelerator, where reading the result would make the CPU wait."""
    return device.type == "cpu"
