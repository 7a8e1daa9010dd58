"""BN0: mode and state of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence

# torch's momentum weighs the new batch; values from here on are seen where 1 - momentum was meant (0.9, 0.99, 0.999)
HIGHEST_MOMENTUM = 0.5


def eval_layer_in_training(evidence: Evidence) -> Iterator[Finding]:
    """A trainable layer is in eval mode while the model trains.

    Why:
        Gamma and beta learn for stored statistics that no longer move, while the layers before it change. Tools that
        call eval() on a part of a model, or restore flags one by one, leave such a mix behind.

    How:
        The model's training flag is True, a layer's is False, and the layer's gamma or beta requires a gradient.
        Silent for layers that batchnorm.freeze froze, and for layers whose parameters are fixed: those are meant.

    Example:
        model.train(); model.layer3[1].bn2.eval()

    Fix:
        model.train() before each epoch; or batchnorm.freeze(layer) if it is to stay as it is.

    References:
        pytorch#66073, pytorch#86590.
    """
    if not (evidence.structure and evidence.structure.training):
        return
    for name, module in (evidence.modules or {}).items():
        if not module.training and not module.frozen and module.trainable:
            yield Finding(name, "eval mode, in a model in train mode, with trainable gamma or beta")


def thawed_frozen_layer(evidence: Evidence) -> Iterator[Finding]:
    """Gamma and beta are fixed, but the stored statistics still move in train mode.

    Why:
        requires_grad_(False) stops the optimizer, not the running averages: they are buffers and move in every
        forward pass in train mode. A backbone that was meant to be frozen drifts to the new data, and its eval
        outputs change although no weight did.

    How:
        The model and the layer are in train mode, gamma and beta exist and neither requires a gradient, and the
        layer tracks statistics with a momentum other than 0.

    Example:
        model.backbone.requires_grad_(False); model.train()

    Fix:
        batchnorm.freeze(model.backbone): it holds whatever train() is called later.

    References:
        pytorch#66073; Lightning#15062.
    """
    if not (evidence.structure and evidence.structure.training):
        return
    for name, module in (evidence.modules or {}).items():
        moves = module.training and module.tracks and module.momentum != 0 and not module.frozen
        if moves and module.affine and not module.trainable:
            yield Finding(name, "train mode, gamma and beta fixed")


def frozen_but_trainable(evidence: Evidence) -> Iterator[Finding]:
    """A frozen layer's gamma and beta still learn.

    Why:
        A layer is frozen to keep what it computes. With a gradient on gamma or beta it goes on changing.

    How:
        The layer was frozen by batchnorm.freeze and one of its parameters requires a gradient. Silent for traced
        modules and for classes that never measure a batch: nobody froze those.

    Example:
        batchnorm.freeze(model), which fixes statistics and leaves gamma and beta to the optimizer

    Fix:
        batchnorm.freeze(model, affine=True) if they are meant to stay too.
    """
    for name, module in (evidence.modules or {}).items():
        if module.held and module.trainable:
            yield Finding(name, "frozen, with a gradient on gamma or beta")


def statistics_switched_off(evidence: Evidence) -> Iterator[Finding]:
    """track_running_stats is off, but stored statistics are there and eval mode uses them.

    Why:
        Train mode then normalizes by the batch and never updates what eval mode uses: the same input gives one
        answer in training and another one afterwards. Some fine-tuning helpers freeze layers in this way.

    How:
        track_running_stats is False and running_mean and running_var are not None.

    Example:
        Train output of mean 0.0, eval output of mean 5.0 for one input, measured on such a layer.

    Fix:
        layer.track_running_stats = True; and batchnorm.freeze(layer) if it was meant to be frozen.

    References:
        Lightning#15062, Lightning#20629.
    """
    for name, module in (evidence.modules or {}).items():
        stored = evidence.stored.get(name)
        if not module.tracks and not module.frozen and stored and stored.running_mean is not None:
            yield Finding(name, "track_running_stats=False with stored statistics")


def no_statistics(evidence: Evidence) -> Iterator[Finding]:
    """No statistics are stored: eval mode normalizes by the batch.

    Why:
        An example's answer then depends on what else is in its batch, and a single example has no variance at all.

    How:
        running_mean and running_var are None. torch.func.replace_all_batch_norm_modules_ leaves layers so.

    Example:
        nn.BatchNorm2d(64, track_running_stats=False)

    Fix:
        Construct the layer with track_running_stats=True and measure: batchnorm.recalibrate(model, loader). For
        torch.func, batchnorm.convert(model) gives layers that keep statistics under vmap.

    References:
        functorch#867.
    """
    for name, module in (evidence.modules or {}).items():
        stored = evidence.stored.get(name)
        has_values = not module.is_lazy and module.device != "meta"
        if has_values and stored and stored.running_mean is None and stored.running_var is None:
            yield Finding(name, "no running_mean, no running_var")


def cumulative_momentum(evidence: Evidence) -> Iterator[Finding]:
    """momentum=None averages all batches since the start with equal weight.

    Why:
        That is right for fixed weights. While weights learn, batches of the first epoch, which other weights made,
        count as much as the last ones. Every batch counts alike too, whatever its size.

    How:
        momentum is None. num_batches_tracked says how many batches count alike so far; statistics that were measured
        at fixed weights, as by update_bn, are right as they are.

    Example:
        nn.BatchNorm1d(32, momentum=None)

    Fix:
        momentum=0.1 while training; batchnorm.recalibrate(model, loader) afterwards, which weighs by examples.

    References:
        pytorch#194504 (it also breaks full-graph compilation).
    """
    for name, module in (evidence.modules or {}).items():
        if module.momentum is None and module.tracks and not module.frozen:
            yield Finding(name, "momentum = None")


def zero_momentum(evidence: Evidence) -> Iterator[Finding]:
    """momentum=0: training never updates the stored statistics.

    Why:
        With momentum 0 the new batch has weight 0. The layer trains by the batch and evaluates by what it was
        constructed or loaded with. Converted models carry it where a converter filled in what it did not know.

    How:
        momentum is 0 in a layer that tracks statistics and is not frozen. The model's outputs in eval mode may be
        right: it is a trap for whoever trains it further.

    Example:
        nn.BatchNorm2d(128, momentum=0.0)

    Fix:
        layer.momentum = 0.1; or batchnorm.freeze(model) if statistics are to stay.
    """
    for name, module in (evidence.modules or {}).items():
        if module.momentum == 0 and module.tracks and not module.frozen:
            yield Finding(name, "momentum = 0")


def momentum_convention(evidence: Evidence) -> Iterator[Finding]:
    """momentum is 0.5 or more: the other convention, 1 - momentum, was probably meant.

    Why:
        torch's momentum is the weight of the new batch, TensorFlow's that of the old average. A value of 0.99 taken
        over as it is makes the stored statistics those of the last batch.

    How:
        momentum >= 0.5. The stored mean then has at least a third of the variance of a single batch's mean:
        a / (2 - a) for momentum a.

    Example:
        nn.BatchNorm2d(64, momentum=0.99), for TensorFlow's 0.99, which is torch's 0.01

    Fix:
        layer.momentum = 1 - layer.momentum

    References:
        torchvision#8250; EfficientNet-PyTorch#3.
    """
    for name, module in (evidence.modules or {}).items():
        momentum = module.momentum or 0.0
        if momentum >= HIGHEST_MOMENTUM and module.tracks and not module.frozen:
            yield Finding(
                name, f"momentum = {momentum:g}", remedy=f"layer.momentum = {max(1 - momentum, 0) or 0.1:.4g}"
            )


def skipped_updates(evidence: Evidence) -> Iterator[Finding]:
    """Batches with NaN or infinity were left out of the stored statistics.

    Why:
        The layer protected its statistics, but something in training makes such values: a learning rate that is too
        high, half precision that overflows, or broken examples.

    How:
        skipped_updates of this package's layers is above 0. torch.nn's layers do not count; they store the NaN.

    Example:
        BatchNorm2d(64, eps=1e-05, ..., skipped_updates=3)

    Fix:
        Find the examples: batchnorm doctor with --data reports non-finite inputs by layer.

    References:
        pytorch#88474, pytorch#115500.
    """
    for name, module in (evidence.modules or {}).items():
        if module.skipped_updates:
            yield Finding(name, f"{module.skipped_updates} batches with NaN or infinity")


def uninitialized_layer(evidence: Evidence) -> Iterator[Finding]:
    """A lazy layer has not seen a batch yet.

    Why:
        It has no size, so it can be neither examined, nor counted, nor copied to all processes.

    How:
        The layer is a lazy one whose tensors have no shape.

    Example:
        nn.LazyBatchNorm2d()

    Fix:
        Run one batch through the model.
    """
    for name, module in (evidence.modules or {}).items():
        if module.is_lazy:
            yield Finding(name, "no size yet")
