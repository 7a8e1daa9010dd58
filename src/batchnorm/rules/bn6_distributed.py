"""BN6: several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.reporting.severity import Severity
from batchnorm.rules.finding import Finding
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence

# the mean of M independent examples has a noise of 1/sqrt(M) sd: 0.18 for 32, the batch size that most networks were
# tuned for
ENOUGH_EXAMPLES = 32
_PARALLEL = "DistributedDataParallel"


def unsynchronized(evidence: Evidence) -> Iterator[Finding]:
    """Every process normalizes by the statistics of its own few examples.

    Why:
        Data-parallel training averages gradients, not statistics. Eight processes with four examples each train with
        the noise of batches of 4. By default each forward pass begins with the stored statistics of process 0, so the
        statistics that process 0 saves come from its examples alone.

    How:
        The model contains DistributedDataParallel, or world_size is above 1; some layers are neither synchronized nor
        frozen; and a process has fewer than 32 examples, or an unknown number, in a batch. SyncBatchNorm and layers of
        this package with sync=True or a process_group are synchronized.

    Example:
        torchrun --nproc-per-node 8 train.py --batch-size 4

    Fix:
        batchnorm.convert(model, sync=True), before DistributedDataParallel wraps the model: its layers synchronize over
        every backend, on CPUs too, and keep their activations. Or larger batches; or batchnorm.freeze for fine-tuning.

    References:
        Peng et al. 2018, "MegDet"; pytorch#30718.
    """
    loop = evidence.loop
    size = loop.batch_size if loop else None
    layers = [name for name, module in (evidence.modules or {}).items() if not module.is_sync and not module.frozen]
    if _has_several_processes(evidence) and layers and (size is None or size < ENOUGH_EXAMPLES):
        yield Finding(
            "",
            f"no synchronization in {listed(layers)}; "
            f"{'an unknown number of' if size is None else size} examples in a process",
        )


def _has_several_processes(evidence: Evidence) -> bool:
    """Whether the caller or a wrapper of the model says that several processes train together."""
    structure, loop = evidence.structure, evidence.loop
    return (loop is not None and loop.world_size > 1) or (structure is not None and _PARALLEL in structure.wrappers)


def sync_on_cpu(evidence: Evidence) -> Iterator[Finding]:
    """SyncBatchNorm cannot train on a CPU in a process group.

    Why:
        torch synchronizes statistics on accelerators only. In a process group the layer raises an error if it runs in
        train mode on a CPU. Without a process group, and in eval mode, it computes the same as batch norm.

    How:
        The layer is torch's SyncBatchNorm, is not frozen, and has its tensors on the CPU. An error if the model
        contains DistributedDataParallel, or world_size is above 1; otherwise info. The mode of the model is not
        checked. Layers of this package with sync=True synchronize on a CPU too.

    Example:
        ValueError: SyncBatchNorm expected input tensor to be on GPU

    Fix:
        batchnorm.convert(model, sync=True): layers of this package, with the same state_dict, that synchronize on a
        CPU, for example over gloo. Or move the model to a GPU before training.

    References:
        pytorch#78078.
    """
    severity = Severity.ERROR if _has_several_processes(evidence) else Severity.INFO
    for name, module in (evidence.modules or {}).items():
        if module.is_sync and not module.syncs_on_cpu and module.device == "cpu" and not module.frozen:
            yield Finding(name, f"{module.kind} on the CPU", severity=severity)


def buffers_not_broadcast(evidence: Evidence) -> Iterator[Finding]:
    """Every process has different stored statistics.

    Why:
        Without broadcasting, the stored statistics of the processes drift apart. Every process evaluates with different
        statistics, and a saved file has those of the process that saves.

    How:
        DistributedDataParallel with broadcast_buffers=False (also named forward_sync_buffers), and layers that are
        neither synchronized nor frozen.

    Example:
        DistributedDataParallel(model, broadcast_buffers=False)

    Fix:
        batchnorm.convert(model, sync=True): all processes store the same statistics, bit for bit. Or leave the argument
        out, as buffers are broadcast by default. batchnorm.broadcast_statistics(model) copies the statistics of one
        process to all before evaluating or saving, and batchnorm.check_replicas(model) says whether they are the same.

    References:
        pytorch#13711; timm#110.
    """
    if evidence.structure is None or evidence.structure.broadcasts_buffers is not False:
        return
    layers = [name for name, module in (evidence.modules or {}).items() if not module.is_sync and not module.frozen]
    if layers:
        yield Finding("", f"broadcast_buffers=False, statistics in {listed(layers)}")
