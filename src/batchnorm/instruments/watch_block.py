"""watch: the block that measures batch norm while a model trains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from batchnorm.call_types import Batch
from batchnorm.instruments.look_schedule import Schedule
from batchnorm.instruments.probe_tier import Loss
from batchnorm.instruments.sinks import Sink
from batchnorm.instruments.watched_training import Group, LogFolder, Watch


def watch(
    model: nn.Module,
    *,
    log: LogFolder = None,
    every: int = 100,
    budget: float = 0.02,
    probe: Batch = None,
    loss: Loss | None = None,
    sinks: Iterable[Sink] = (),
    group: Group = "all",
) -> Watch:
    """A ``with`` block that measures the training of ``model``; the trained weights are the same, bit for bit.

    Every torch.optim optimizer that has one of the model's parameters counts steps; optimizers that share the
    parameters of one backward pass make one step together. Without such an optimizer, call ``run.step()`` after each
    step. Measurements ("looks") are ``every`` steps apart; at the start they are closer, and if they would take more
    than ``budget`` of the training time, they are further apart. A look has two tiers:

    - free, from the running averages after each of eight or more steps in a row: batch noise, effective batch size,
      equivalent dropout, staleness of stored statistics, gap between stored and batch statistics, shift, gamma and
      beta, dead channels;
    - probe, at every second look, from a fixed batch: drift, signal propagation, loss in train and eval mode. A sharded
      model is measured without this tier.

    If a layer's statistics do not change (frozen, momentum 0, unused), its numbers that need new statistics are None.
    If a step has several passes, each pass is compared with the same pass of other steps. If the training calls a
    compiled model other than ``model``, single passes cannot be recorded; if a step then has several passes, noise is
    None, and an event says why. An error of the measurement ends it with a RuntimeWarning, and the training continues.
    Under torch.distributed there is one log, whether one rank or every rank calls ``watch``: the first rank of the
    group measures and writes it, with plain batch norm its own batches, with synchronized layers the batches of all
    ranks. If other ranks call ``watch`` too, they leave copies of their stored statistics in the store of the process
    group after common steps, ``every`` apart, and the first rank records how far these differ (``rank_means``,
    ``rank_sds``). There are no collectives, and no rank waits for another, except that ``stop`` on the first rank
    waits up to a second for the last copies.

    Args:
        model: Any model with batch norm; it may be compiled or wrapped.
        log: Folder of the run's log, which ``batchnorm watch`` shows. A log of the same model is continued. None keeps
            records in memory only (``run.records``).
        every: Steps between looks.
        budget: Largest share of the training time that looks may take.
        probe: The probe batch, in any form that ``recalibrate`` accepts; with (inputs, targets) the loss is measured
            too. None uses the inputs of the first pass in train mode, at most 64 examples. False measures no probe.
        loss: ``loss(output, batch)`` for the batch ``probe``, unused if no batch is given; None chooses a loss in the
            same way as ``batchnorm.probe``.
        sinks: Receivers of the numbers besides the log.
        group: The processes that train the model together: "all", or a ``ProcessGroup`` with this process; None: this
            process trains it alone.

    Raises:
        TypeError: If ``model``, ``probe``, ``log`` or ``group`` is of a wrong type.
        ValueError: If the model has no batch norm, or has fake tensors, if ``every`` or ``budget`` is out of range, or
            if the log's folder has the log of another model, a log of a newer version, or a log that is being written;
            if ``group`` is another word, this rank is not in it, or it needs a process group that is not initialized.
        OSError: If the log cannot be written at the start.

    Example:
        >>> import torch, batchnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> with batchnorm.watch(model, every=10, budget=1.0) as run:
        ...     for _ in range(40):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> list(run.latest["gamma"])
        ['1']
    """
    return Watch(
        model, log=log, schedule=Schedule(every, budget), probe=probe, loss=loss, sinks=tuple(sinks), group=group
    )
