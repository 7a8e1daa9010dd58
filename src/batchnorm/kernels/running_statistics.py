"""Running statistics: how stored values move towards those of a batch, and what never enters them."""

from __future__ import annotations

import warnings
from typing import NamedTuple, final

import torch
from torch import Tensor

from batchnorm.kernels import cpu, reference
from batchnorm.kernels.choice import updates_natively


@final
class Running(NamedTuple):
    """Running statistics that a batch will move, in place.

    Attributes:
        mean: Stored mean, (C,) or (models, C).
        var: Stored variance; receives the unbiased one, as in torch.
        batches: Integer, () or (models,): batches so far, or batches averaged if momentum is None.
        skipped: Integer scalar: incremented if a channel's new mean or variance is NaN or infinite. Such a
            channel keeps its stored values; an average of all batches leaves the batch out for every channel.
        momentum: Weight of the new value; None averages all batches equally.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    skipped: Tensor
    momentum: float | None

    def moved(self, bad: int, channels: int) -> None:
        """Tell autograd that kernels wrote, and the user where ``bad`` channels were not finite."""
        torch.autograd.graph.increment_version((self.mean, self.var))
        if bad:
            self.skipped.add_(1)
            _warn_of_skipped(bad, channels, self.mean.device, self.momentum)


def update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    skipped: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Move running statistics towards those of a batch of ``count`` values a channel, at least 2, in place.

    Args:
        running_mean: As Running.mean, and so on.
        running_var: See Running.
        num_batches_tracked: See Running.
        skipped: See Running.
        mean: The batch's mean.
        var: The batch's biased variance.
        count: Values of each channel in the batch.
        momentum: See Running.
    """
    running = Running(running_mean, running_var, num_batches_tracked, skipped, momentum)
    if updates_natively(running, mean, var):
        return cpu.update_running(running, mean, var, count)
    unbiased = var * (count / (count - 1))
    # what overflows the stored type is as bad as what is not finite
    finite = torch.isfinite(mean.to(running_mean.dtype)) & torch.isfinite(unbiased.to(running_var.dtype))
    if momentum is None:  # one count serves all channels, so a batch enters the average of each or of none
        whole = finite.all(-1)
        num_batches_tracked.add_(whole)
        used = whole.unsqueeze(-1).expand_as(finite)
        factor = 1 / num_batches_tracked.to(mean.dtype).unsqueeze(-1)
    else:
        num_batches_tracked.add_(1)
        used, factor = finite, momentum
    for stored, new in ((running_mean, mean), (running_var, unbiased)):
        stored.copy_(reference.moving_average(stored, torch.where(used, new, torch.nan), factor))
    skipped.add_((~finite).any())
    if warns_at_once(finite.device) and not finite.all():
        _warn_of_skipped(int((~finite).sum()), mean.numel(), mean.device, momentum)
    return None


def _warn_of_skipped(bad: int, channels: int, device: torch.device, momentum: float | None) -> None:
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
    """Whether ``update_running`` warns of what it did not store; on an accelerator asking would make it wait."""
    return device.type == "cpu"
