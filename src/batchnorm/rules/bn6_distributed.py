"""BN6: several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence

# noise of a batch mean is 1/sqrt(M) sd: 0.18 for 32 independent examples, the size for which most networks were tuned
ENOUGH_EXAMPLES = 32
_PARALLEL = "DistributedDataParallel"


def unsynchronized(evidence: Evidence) -> Iterator[Finding]:
    """Every process normalizes its own few examples.

    Why:
        Data-parallel training averages gradients, not statistics. Eight processes with four examples each train with
        the noise of batches of 4, and each stores statistics of its own.

    How:
        The model is in DistributedDataParallel, or world_size is above 1; layers are not SyncBatchNorm; and a
        process has fewer than 32 examples, or an unknown number, in a batch.

    Example:
        torchrun --nproc-per-node 8 train.py --batch-size 4

    Fix:
        nn.SyncBatchNorm.convert_sync_batchnorm(model) on GPUs; larger batches; or batchnorm.freeze for fine-tuning. It
        knows torch.nn's arguments only: layers of this package that apply an activation go through for_export first,
        or their activations are lost.

    References:
        Peng et al. 2018, "MegDet"; pytorch#30718.
    """
    structure, loop = evidence.structure, evidence.loop
    world = loop.world_size if loop else 1
    parallel = world > 1 or (structure is not None and _PARALLEL in structure.wrappers)
    size = loop.batch_size if loop else None
    alone = [name for name, module in (evidence.modules or {}).items() if not module.is_sync and not module.frozen]
    if parallel and alone and (size is None or size < ENOUGH_EXAMPLES):
        yield Finding(
            "",
            f"no synchronization in {listed(alone)}; "
            f"{'an unknown number of' if size is None else size} examples in a process",
            remedy=f"torch.nn.SyncBatchNorm.convert_sync_batchnorm({_as_torchs(evidence)})",
        )


def _as_torchs(evidence: Evidence) -> str:
    """The model, as a tool takes it that knows no arguments but torch.nn's."""
    applies = any(module.act for module in (evidence.modules or {}).values())
    return "batchnorm.for_export(model)" if applies else "model"


def sync_on_cpu(evidence: Evidence) -> Iterator[Finding]:
    """SyncBatchNorm on a CPU cannot train.

    Why:
        torch synchronizes statistics on accelerators only. On a CPU the layer raises an error in train mode.

    How:
        The layer is a SyncBatchNorm whose tensors are on the CPU, and the model is in train mode or on the CPU as
        a whole.

    Example:
        ValueError: SyncBatchNorm expected input tensor to be on GPU

    Fix:
        Move the model before training; or batchnorm.replace the layers by plain ones.

    References:
        pytorch#78078.
    """
    for name, module in (evidence.modules or {}).items():
        if module.is_sync and module.device == "cpu" and not module.frozen:
            yield Finding(name, f"{module.kind} on the CPU")


def buffers_not_broadcast(evidence: Evidence) -> Iterator[Finding]:
    """Every process keeps statistics of its own.

    Why:
        Without broadcasting, stored statistics of the processes drift apart. Which ones are saved depends on which
        process saves, and processes evaluate with different ones.

    How:
        DistributedDataParallel with broadcast_buffers=False, and layers that are neither synchronized nor frozen.

    Example:
        DistributedDataParallel(model, broadcast_buffers=False)

    Fix:
        broadcast_buffers=True, SyncBatchNorm, or batchnorm.recalibrate(model, loader) before saving.

    References:
        pytorch#13711; timm#110.
    """
    if evidence.structure is None or evidence.structure.broadcasts_buffers is not False:
        return
    alone = [name for name, module in (evidence.modules or {}).items() if not module.is_sync and not module.frozen]
    if alone:
        yield Finding("", f"broadcast_buffers=False, statistics in {listed(alone)}")
