"""Running statistics: how stored values move towards those of a batch, and what never enters them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from batchnorm.kernels import cpu, reference
from batchnorm.kernels.choice import updates_natively


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
    """Move running statistics towards those of a batch of ``count`` values a channel, in place.

    Args:
        running_mean: Stored mean, (C,) or (models, C).
        running_var: Stored variance; receives the unbiased one, as in torch.
        num_batches_tracked: Integer, () or (models,): batches so far, or batches averaged if momentum is None.
        skipped: Integer scalar: incremented if a channel's new mean or variance is NaN or infinite. Such a
            channel keeps its stored values; an average of all batches leaves the batch out for every channel.
        mean: The batch's mean.
        var: The batch's biased variance.
        count: Values of each channel in the batch, at least 2.
        momentum: Weight of the new value; None averages all batches equally.
    """
    if updates_natively(running_mean, running_var, mean, var):
        bad = cpu.update_running(running_mean, running_var, num_batches_tracked, mean, var, count, momentum)
        if bad:
            skipped.add_(1)
            _warn_of_skipped(bad, mean, momentum)
        return
    unbiased = var * (count / (count - 1))
    finite = torch.isfinite(mean) & torch.isfinite(unbiased)
    if momentum is None:  # one count serves all channels, so a batch enters the average of each or of none
        whole = finite.all(-1)
        num_batches_tracked.add_(whole)
        used = whole.unsqueeze(-1).expand_as(finite)
        factor = 1 / num_batches_tracked.to(running_mean.dtype).unsqueeze(-1)
    else:
        num_batches_tracked.add_(1)
        used, factor = finite, momentum
    for stored, new in ((running_mean, mean), (running_var, unbiased)):
        stored.copy_(reference.moving_average(stored, torch.where(used, new, torch.nan), factor))
    skipped.add_((~finite).any())
    if warns_at_once(finite.device) and not finite.all():
        _warn_of_skipped(int((~finite).sum()), mean, momentum)


def _warn_of_skipped(bad: int, mean: Tensor, momentum: float | None) -> None:
    if not warns_at_once(mean.device):
        return
    what_happens = "this batch is left out of all" if momentum is None else "these channels keep their"
    warnings.warn(
        f"NaN or infinity in the batch statistics of {bad} of {mean.numel()} channels: "
        f"{what_happens} running statistics. layer.skipped_updates counts such batches.",
        RuntimeWarning,
        stacklevel=3,
    )


def warns_at_once(device: torch.device) -> bool:
    """Whether ``update_running`` warns of what it did not store; on an accelerator asking would make it wait."""
    return device.type == "cpu"
