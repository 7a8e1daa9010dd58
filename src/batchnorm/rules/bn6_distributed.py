"""BN6: several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.reporting.severity import Severity
from batchnorm.rules.bn1_stale_statistics import STALE_MEAN
from batchnorm.rules.finding import STATISTICS, Finding, Unknown
from batchnorm.rules.phrases import has_several_processes, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from batchnorm.replicas.differences import Difference
    from batchnorm.rules.rule_evidence import Evidence

# a difference between the data of ranks matters from here on: twice the limit of stale statistics, as two ranks differ
_APART = 2 * STALE_MEAN
# the difference of two means of N independent examples has a noise of sqrt(2/N) sd
_NOISE = 4.0
# the mean of M independent examples has a noise of 1/sqrt(M) sd: 0.18 for 32, the batch size that most networks were
# tuned for
ENOUGH_EXAMPLES = 32


def unsynchronized(evidence: Evidence) -> Iterator[Finding]:
    """Every process normalizes by the statistics of its own few examples.

    Why:
        Data-parallel training averages gradients, not statistics. Eight processes with four examples each train with
        the noise of batches of 4. By default each forward pass begins with the stored statistics of process 0, so the
        statistics that process 0 saves come from its examples alone.

    How:
        The model contains DistributedDataParallel, or world_size is above 1; some layers are neither synchronized nor
        frozen; and a process has fewer than 32 examples, or an unknown number, in a batch. SyncBatchNorm and layers of
        this package with sync=True or a process_group are synchronized. If examine is called with group= and data on
        every rank, the number of processes is counted, and the means of each layer's inputs are compared: then the rule
        also finds ranks whose data differ by more than 0.2 sd and 4 standard errors, whatever the batch size.

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
    apart, is_few = _inputs_apart(evidence, layers), size is None or size < ENOUGH_EXAMPLES
    if has_several_processes(evidence) and layers and (is_few or apart):
        yield Finding(
            "",
            f"no synchronization in {listed(layers)}; "
            f"{'an unknown number of' if size is None else size} examples in a process{apart}",
            consequence="" if is_few else "Each process normalizes by the statistics of its own data alone.",
        )


def _inputs_apart(evidence: Evidence, layers: Iterable[str]) -> str:
    """The end of a sentence about the layer whose inputs differ most between the ranks; "" if no layer's do."""
    inputs = evidence.ranks.inputs if evidence.ranks else {}
    apart = {
        name: each.in_sd for name in layers
        if (each := inputs.get(name)) and each.in_sd > max(_APART, _NOISE * (2 / each.examples) ** 0.5)
    }  # fmt: skip
    if not apart:
        return ""
    most = max(apart, key=lambda name: apart[name])
    return f"; the mean of its inputs differs between ranks by {apart[most]:.2g} sd in {listed([most])}"


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
    severity = Severity.ERROR if has_several_processes(evidence) else Severity.INFO
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
        neither synchronized nor frozen. If examine is called with group= on every rank, the finding says how far the
        stored statistics differ at present.

    Example:
        DistributedDataParallel(model, broadcast_buffers=False)

    Fix:
        batchnorm.convert(model, sync=True): all processes store the same statistics, bit for bit. Or leave the argument
        out, as buffers are broadcast by default. Before evaluating or saving, batchnorm.recalibrate(model, loader,
        group="all") gives all processes the statistics of the data of all, and batchnorm.broadcast_statistics(model)
        those of one process. batchnorm.check_replicas(model) says whether they are the same.

    References:
        pytorch#13711; timm#110.
    """
    if evidence.structure is None or evidence.structure.broadcasts_buffers is not False:
        return
    layers = [name for name, module in (evidence.modules or {}).items() if not module.is_sync and not module.frozen]
    if layers:
        yield Finding("", f"broadcast_buffers=False, statistics in {listed(layers)}{_at_present(evidence)}")


def _at_present(evidence: Evidence) -> str:
    """The end of a sentence about the statistics of ranks that were compared; "" if they were not."""
    if evidence.ranks is None:
        return ""
    found = [each for each in evidence.ranks.replicas.differences if each.in_sd is not None]
    most = max(found, key=_distance, default=None)
    return "; equal on all ranks so far" if most is None else f"; up to {most.in_sd:.2g} sd apart ({most.layer})"


def _distance(difference: Difference) -> float:
    """A difference in sd; infinite if a rank has NaN."""
    in_sd = difference.in_sd or 0.0
    return in_sd if in_sd == in_sd else float("inf")


def unequal_replicas(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The batch norm layers of the processes are not the same.

    Why:
        Data-parallel training and evaluation need the same model on every rank. If layers, settings, modes, gamma or
        beta differ, each rank computes another function, and what one rank saves is not what the others trained.

    How:
        examine is called with group= on every rank. The ranks compare the order and classes of their layers, their
        modes, eps, momentum, activation and synchronization, and the bits of gamma and beta. Tensors that are spread
        over ranks (FSDP) are not compared.

    Example:
        if rank == 0: model.load_state_dict(torch.load("model.pt"))  # and the other ranks keep their initial values

    Fix:
        Build the same model on every rank and load the same file on every rank. DistributedDataParallel copies
        parameters and buffers of rank 0 when it wraps the model, but no settings and no modes.

    References:
        batchnorm.check_replicas; Li et al. 2020, "PyTorch Distributed".
    """
    assert evidence.ranks is not None  # noqa: S101 - the rule needs it
    replicas = evidence.ranks.replicas
    for each in replicas.differences:
        if each.what not in STATISTICS:
            yield Finding(each.layer, each.words(replicas.ranks))
    yield from (Unknown("", f"not compared: {each}") for each in replicas.unchecked)


def unequal_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The stored statistics of the processes differ, measured.

    Why:
        Each rank then evaluates with other statistics, and the file has those of the rank that saves. The cause is that
        each rank averages the statistics of its own batches, or that a rank was recalibrated or loaded by itself.

    How:
        examine is called with group= on every rank. The ranks compare running_mean and running_var: the rms over the
        channels of the largest difference between two ranks, divided by sqrt(running_var + eps). Differences up to 0.1
        sd are not reported; two ranks that average their own batches of 32 with momentum 0.1 differ by 0.06. A rank
        with NaN where another has none is reported. num_batches_tracked is not compared.

    Example:
        if rank == 0: batchnorm.recalibrate(model, loader)

    Fix:
        batchnorm.broadcast_statistics(model) copies the statistics of one rank to all, before evaluating or saving;
        batchnorm.convert(model, sync=True) keeps them equal during training, bit for bit.

    References:
        pytorch#13711.
    """
    assert evidence.ranks is not None  # noqa: S101 - the rule needs it
    replicas = evidence.ranks.replicas
    by_layer: dict[str, list[Difference]] = {}
    for each in replicas.differences:
        if each.what in STATISTICS and each.in_sd is not None and not each.in_sd <= STALE_MEAN:
            by_layer.setdefault(each.layer, []).append(each)
    for layer, found in by_layer.items():
        words = ", ".join(f"{each.what} {each.in_sd:.2g} sd" for each in found)
        yield Finding(layer, f"{words} apart on ranks {listed(map(str, replicas.ranks), most=8)}")
    yield from (Unknown("", f"not compared: {each}") for each in replicas.unchecked)
