"""BN2: batches, the optimizer and the training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence, Run

# ResNet-50's error on ImageNet is 23.6 % with 32 examples per device, 24.8 % with 8, 27.3 % with 4 (Wu and He 2018)
FEWEST_EXAMPLES = 8
# With so many examples per device, accumulation is not reported. Goyal et al. (2017) keep batches of 32 per device; the
# noise of their means, 1 / sqrt(32), is 18 % of the sd.
ENOUGH_EXAMPLES = 32
_NO_SIZE = "the loader's batch size is not known. Give --batch-size, or batch_size= in Python"


def small_batch(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Fewer than 8 examples per device are normalized together.

    Why:
        Train mode estimates each channel's mean and variance from the batch on one device. With M examples the mean has
        a noise of 1 / sqrt(M) of the channel's standard deviation. With few examples training is noisy, and at test
        time the model uses other statistics than in training.

    How:
        Compares the given batch size, or else the loader's, with the limit. The size is multiplied by the number of
        processes if every layer that is not frozen is a SyncBatchNorm. Limit: 8 (ResNet-50 on ImageNet: 24.8 % error at
        8, 27.3 % at 4, 34.7 % at 2). Positions of an image are values too, but similar ones, so they are not counted.
        Not reported if every layer is frozen.

    Example:
        DataLoader(data, batch_size=2)

    Fix:
        Larger batches, SyncBatchNorm over the processes, group normalization, or frozen layers in a pretrained model.

    References:
        Wu and He 2018, "Group Normalization", table 2. Ioffe 2017, "Batch Renormalization".
    """
    size = _normalized_together(evidence)
    if size is None and _measures_batches(evidence):
        yield Unknown("", _NO_SIZE)
    if size is not None and size < FEWEST_EXAMPLES:
        yield Finding(
            "",
            f"{_examples(size)} per batch: noise of the mean {size**-0.5:.0%} of a channel's sd",
            limit=f"{FEWEST_EXAMPLES} examples ({FEWEST_EXAMPLES**-0.5:.0%})",
        )


def last_batch_of_one(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The last batch of an epoch has one example.

    Why:
        One value per channel has no variance. A layer behind a linear layer, or a layer whose image has shrunk to 1 x
        1, raises ValueError at the end of the first epoch. Other layers train on the statistics of one example.

    How:
        The length of the data set modulo the batch size is 1, the batch size is above 1, and drop_last is False; or the
        last batch of a list of batches has one example. Not reported if every layer is frozen. With data, the finding
        names the layers that receive one value per channel.

    Example:
        DataLoader(TensorDataset(torch.randn(65, 3)), batch_size=32)

    Fix:
        drop_last=True in the loader; or layers of this package with single_element="population", which normalize such a
        batch by the stored statistics.

    References:
        pytorch#4534, "Expected more than 1 value per channel when training".
    """
    loop = evidence.loop
    if loop is None or not _measures_batches(evidence):
        return
    if loop.last_batch is None:
        yield Unknown("", "the length of the data set is not known")
    if loop.last_batch != 1 or (loop.batch_size or 0) <= 1:
        return
    raising = [name for name, layer in (evidence.measured or {}).items() if layer.values_per_example == 1]
    layers = listed(raising) if raising else "Layers with one value per channel"
    yield Finding(
        "",
        f"1 example in the last batch, {loop.batch_size} in the others",
        consequence=f"{layers} will raise ValueError; the others train on statistics of a single example.",
    )


def gradient_accumulation(evidence: Evidence) -> Iterator[Finding]:
    """Gradients are accumulated over several batches, but statistics are not.

    Why:
        Accumulation over k batches of M examples gives the gradient of k M examples, but each batch is still normalized
        by the statistics of M. The noise of the mean stays 1 / sqrt(M), so this is not a training with batches of k M.

    How:
        The given accumulation is above 1. Not reported with 32 or more examples per device, where the noise of means is
        below 18 % of the standard deviation; if every layer is frozen; or if the latest step of the layers was one of
        batchnorm.step_backward with as many micro-batches, which it normalizes together.

    Example:
        batchnorm.doctor.examine(model, batch_size=8, accumulation=4)

    Fix:
        batchnorm.step_backward(model, micros, loss) in place of the loop: gradients and statistics are those of the
        whole batch. Or synchronized layers, if there are several processes; a larger batch; group normalization; or
        frozen layers. ``with batchnorm.step(model)`` stores the statistics of the whole step; each micro-batch is still
        normalized by its own.

    References:
        Goyal et al. 2017, section 2.3. keras#16633, matconvnet#405.
    """
    loop, size = evidence.loop, _normalized_together(evidence)
    joined = min((module.joined for module in (evidence.modules or {}).values() if not module.frozen), default=1)
    if loop is None or loop.accumulation <= joined or not _measures_batches(evidence):
        return
    if size is None or size < ENOUGH_EXAMPLES:
        seen = f"{size} examples, not {size * loop.accumulation}" if size else f"1 of {loop.accumulation} batches"
        yield Finding("", f"accumulation {loop.accumulation}: batch norm sees {seen}")


def updated_twice(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """One training step updates the stored statistics twice, because activation checkpointing repeats the forward.

    Why:
        The second forward, in the backward pass, updates running_mean and running_var with the same batch again.
        Momentum m acts as 1 - (1 - m)^2, about 2 m, and num_batches_tracked counts each batch twice.

    How:
        num_batches_tracked is compared before and after the backward pass of one trial step. Every update in the
        backward pass is one too many. Not checked if there was no backward pass, because the step failed or no output
        has a gradient.

    Example:
        torch.utils.checkpoint.checkpoint(block_with_batch_norm, x, use_reentrant=False)

    Fix:
        batchnorm.convert(model): layers of this package store nothing in a forward that a backward pass repeats. Or
        momentum 1 - sqrt(1 - m), with which two updates together have the weight m.

    References:
        pytorch#96136, pytorch#62471.
    """
    for name, again in (evidence.run.updates_backward if evidence.run else {}).items():
        if again > 0:
            module = (evidence.modules or {}).get(name)
            momentum = 0.1 if module is None or module.momentum is None else module.momentum
            yield Finding(
                name,
                f"{again} more update{'s' if again > 1 else ''} in the backward pass",
                remedy="batchnorm.convert(model), whose layers count a repeated forward once, or momentum = "
                f"{1 - (1 - momentum) ** (1 / (1 + again)):.3g}",
            )
    if evidence.run and (why := _no_backward(evidence.run)):
        yield Unknown("", why)
    elif evidence.run and evidence.stored and not evidence.run.updates_forward:
        yield Unknown("", "no layer has a num_batches_tracked that can be read")


def weight_decay_on_affine(evidence: Evidence) -> Iterator[Finding]:
    """Weight decay pulls gamma and beta towards zero.

    Why:
        Weight decay regularizes large weight tensors. gamma and beta are few numbers, and a gamma near 0 switches its
        channel off. Most recipes exclude gamma and beta. Some decay gamma on purpose, to prune channels.

    How:
        The optimizer's parameter group with a layer's gamma or beta has a weight decay above 0.

    Example:
        torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    Fix:
        torch.optim.AdamW(batchnorm.parameter_groups(model, weight_decay=0.05))

    References:
        Goyal et al. 2017, section 5.1. He et al. 2019, "Bag of Tricks", section 3.1. pytorch#1402.
    """
    decayed = {name: decay for name, decay in (evidence.optimizer.decay if evidence.optimizer else {}).items() if decay}
    if decayed:
        yield Finding(
            "", f"weight decay {max(decayed.values()):.3g} on gamma or beta of {len(decayed)} layers: {listed(decayed)}"
        )


def unused_layer(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A layer was not called on the data.

    Why:
        Such a layer learns nothing, and its statistics never change. Often it is a leftover, or in a branch for other
        inputs.

    How:
        The layer was not called on any of the given data in eval mode. A layer whose tensors are used by functions only
        is reported too.

    Example:
        self.spare = nn.BatchNorm2d(8)  # forward does not use it

    Fix:
        Remove the layer, or give data for which it is called.

    References:
        torch.nn.parallel.DistributedDataParallel, find_unused_parameters.
    """
    for name in evidence.run.unwatched if evidence.run else ():
        yield Unknown(name, "its calls cannot be watched")
    for name in evidence.run.never_ran if evidence.run else ():
        yield Finding(name, "0 calls on the data")


def training_step_fails(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A training step raises an error.

    Why:
        The model runs in eval mode but not in train mode, so it cannot be trained as it is.

    How:
        The rule runs one forward and backward pass in train mode on up to 8 examples; the loss is the mean square of
        each output, summed over outputs. If the model fails on the first element of a batch, it is called with all
        elements, such as inputs and labels. Not checked if a batch has one example, or if the model needs arguments
        that the batch lacks and fails outside of its batch norm layers.

    Example:
        A layer that receives (1, C), because the model passes examples to it one by one

    Fix:
        Do what the error says. If the model needs further arguments in train mode, give batches that contain them.

    References:
        pytorch#4534.
    """
    if evidence.run and evidence.run.train_error:
        yield Finding("", evidence.run.train_error)
    if evidence.run and (why := evidence.run.unknown.get("step")):
        yield Unknown("", why)


def not_in_optimizer(evidence: Evidence) -> Iterator[Finding]:
    """A trainable layer is not in the optimizer.

    Why:
        gamma and beta get gradients, but are never updated. Usually the layer was added or replaced after the optimizer
        was constructed.

    How:
        gamma or beta requires a gradient and is in no parameter group.

    Example:
        optimizer = SGD(model.parameters(), lr=0.1); model.bn = nn.BatchNorm2d(8)

    Fix:
        Construct the optimizer after the model is complete, or call optimizer.add_param_group.

    References:
        torch.optim.Optimizer.add_param_group.
    """
    for name in evidence.optimizer.unlisted if evidence.optimizer else ():
        yield Finding(
            name,
            f"gamma or beta is in no group of {evidence.optimizer.kind if evidence.optimizer else 'the optimizer'}",
            remedy=f'optimizer.add_param_group({{"params": model.get_submodule("{name}").parameters()}})',
        )


def _no_backward(run: Run) -> str:
    """Why there was no complete backward pass; "" if there was one."""
    failed = f"the training step failed: {run.train_error}" if run.train_error else ""
    return run.unknown.get("step") or run.unknown.get("backward") or failed


def _measures_batches(evidence: Evidence) -> bool:
    """Whether some layer would normalize by the batch in training."""
    return evidence.modules is None or any(not module.frozen for module in evidence.modules.values())


def _normalized_together(evidence: Evidence) -> int | None:
    """Number of examples that are normalized together; None if it is not known or every layer is frozen."""
    loop, modules = evidence.loop, evidence.modules
    if loop is None or loop.batch_size is None or not _measures_batches(evidence):
        return None
    is_synchronized = bool(modules) and all(module.is_sync or module.frozen for module in modules.values())
    return loop.batch_size * (loop.world_size if is_synchronized else 1)


def _examples(number: int) -> str:
    return f"{number} example{'' if number == 1 else 's'}"
