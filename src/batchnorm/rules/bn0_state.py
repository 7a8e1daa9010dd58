"""BN0: mode and state of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence

# torch's momentum is the weight of the new batch. Values of this size or more (0.9, 0.99, 0.999) are usual where the
# weight of the old average was meant
HIGHEST_MOMENTUM = 0.5


def eval_layer_in_training(evidence: Evidence) -> Iterator[Finding]:
    """A trainable layer is in eval mode while the model trains.

    Why:
        Gamma and beta are trained with stored statistics that stay the same, while the layers before it change. Tools
        that call eval() on a part of a model, or restore training flags one by one, leave such a mix of modes.

    How:
        The model's training flag is True, the layer's is False, and the layer's gamma or beta requires a gradient. Not
        reported for layers that are frozen (by batchnorm.freeze or by their class), and for layers whose gamma and beta
        require no gradient: in these cases eval mode is intended.

    Example:
        model.train(); model.layer3[1].bn2.eval()

    Fix:
        Call model.train() before each epoch, or batchnorm.freeze(layer) if the layer shall not change.

    References:
        pytorch#66073, pytorch#86590.
    """
    if not (evidence.structure and evidence.structure.training):
        return
    for name, module in (evidence.modules or {}).items():
        if not module.training and not module.frozen and module.trainable:
            yield Finding(name, "eval mode, in a model in train mode, with trainable gamma or beta")


def thawed_frozen_layer(evidence: Evidence) -> Iterator[Finding]:
    """Gamma and beta are fixed, but the stored statistics still change in train mode.

    Why:
        requires_grad_(False) stops the optimizer, not the running averages: they are buffers and change in every
        forward pass in train mode. A backbone that was meant to be frozen drifts to the new data, and its eval outputs
        change although no weight did.

    How:
        The model and the layer are in train mode. Gamma and beta exist, and neither requires a gradient. The layer is
        not frozen, and it tracks statistics with a momentum other than 0.

    Example:
        model.backbone.requires_grad_(False); model.train()

    Fix:
        batchnorm.freeze(model.backbone): its layers stay frozen, also after later calls of train().

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
        A layer is frozen so that it always computes the same. If gamma or beta has a gradient, the optimizer changes
        it.

    How:
        The layer was frozen by batchnorm.freeze and one of its parameters requires a gradient. Not reported for traced
        modules and for classes that always use stored statistics: the user did not freeze these.

    Example:
        batchnorm.freeze(model), which fixes the statistics, but neither gamma nor beta

    Fix:
        batchnorm.freeze(model, affine=True), if gamma and beta shall not change either.
    """
    for name, module in (evidence.modules or {}).items():
        if module.held and module.trainable:
            yield Finding(name, "frozen, with a gradient on gamma or beta")


def statistics_switched_off(evidence: Evidence) -> Iterator[Finding]:
    """track_running_stats is False, but the layer still stores statistics, and eval mode uses them.

    Why:
        Train mode then normalizes by the batch and never updates the statistics that eval mode uses. The same input
        gives one output in train mode and another in eval mode. Some fine-tuning helpers freeze layers in this way.

    How:
        track_running_stats is False, running_mean is not None, and the layer is not frozen.

    Example:
        For the same input such a layer gave outputs of mean 0.0 in train mode and of mean 5.0 in eval mode.

    Fix:
        layer.track_running_stats = True; then batchnorm.freeze(layer), if the layer was meant to be frozen.

    References:
        Lightning#15062, Lightning#20629.
    """
    for name, module in (evidence.modules or {}).items():
        stored = evidence.stored.get(name)
        if not module.tracks and not module.frozen and stored and stored.running_mean is not None:
            yield Finding(name, "track_running_stats=False with stored statistics")


def no_statistics(evidence: Evidence) -> Iterator[Finding]:
    """No statistics are stored, so eval mode normalizes by the batch.

    Why:
        An example's output then depends on the other examples in its batch, and a single value has no variance.

    How:
        running_mean and running_var are None. torch.func.replace_all_batch_norm_modules_ makes such layers.

    Example:
        nn.BatchNorm2d(64, track_running_stats=False)

    Fix:
        Construct the layer with track_running_stats=True, then measure its statistics: batchnorm.recalibrate(model,
        loader). For torch.func, batchnorm.convert(model) returns layers that keep statistics under vmap.

    References:
        functorch#867.
    """
    for name, module in (evidence.modules or {}).items():
        stored = evidence.stored.get(name)
        has_values = not (module.is_lazy or module.device == "meta" or (stored and stored.unread))
        if has_values and stored and stored.running_mean is None and stored.running_var is None:
            yield Finding(name, "no running_mean, no running_var")


def cumulative_momentum(evidence: Evidence) -> Iterator[Finding]:
    """momentum=None averages all batches since the start with equal weight.

    Why:
        Equal weights are right as long as the model's weights are fixed. While they are trained, the first batches,
        computed with other weights, count as much as the last ones. A small batch also counts as much as a large one.

    How:
        momentum is None in a layer that tracks statistics and is not frozen. num_batches_tracked is the number of
        batches in the average. Statistics that were measured with fixed weights, as by update_bn, are right.

    Example:
        nn.BatchNorm1d(32, momentum=None)

    Fix:
        momentum=0.1 in training; then batchnorm.recalibrate(model, loader), where every example has the same weight.

    References:
        pytorch#194504 (it also breaks full-graph compilation).
    """
    for name, module in (evidence.modules or {}).items():
        if module.momentum is None and module.tracks and not module.frozen:
            yield Finding(name, "momentum = None")


def zero_momentum(evidence: Evidence) -> Iterator[Finding]:
    """momentum=0: training never updates the stored statistics.

    Why:
        With momentum 0 a new batch has weight 0. In train mode the layer normalizes by the batch, in eval mode by the
        statistics that it was constructed or loaded with. Some converters write 0 if they do not know the momentum.

    How:
        momentum is 0 in a layer that tracks statistics and is not frozen. The model's outputs in eval mode may be
        right; the fault shows when the model is trained further.

    Example:
        nn.BatchNorm2d(128, momentum=0.0)

    Fix:
        layer.momentum = 0.1; or batchnorm.freeze(model), if the statistics shall not change.
    """
    for name, module in (evidence.modules or {}).items():
        if module.momentum == 0 and module.tracks and not module.frozen:
            yield Finding(name, "momentum = 0")


def momentum_convention(evidence: Evidence) -> Iterator[Finding]:
    """momentum is 0.5 or more: the other convention, 1 - momentum, was probably meant.

    Why:
        torch's momentum is the weight of the new batch, TensorFlow's is the weight of the old average. With a value of
        0.99 from TensorFlow, torch stores little more than the statistics of the last batch.

    How:
        momentum >= 0.5 in a layer that tracks statistics and is not frozen. The variance of the stored mean is then at
        least a third of the variance of one batch's mean: a / (2 - a) for momentum a.

    Example:
        nn.BatchNorm2d(64, momentum=0.99), for TensorFlow's 0.99, which is torch's 0.01

    Fix:
        layer.momentum = 1 - layer.momentum, or 0.1 if that is not between 0 and 0.5.

    References:
        torchvision#8250; EfficientNet-PyTorch#3.
    """
    for name, module in (evidence.modules or {}).items():
        momentum = module.momentum or 0.0
        if momentum >= HIGHEST_MOMENTUM and module.tracks and not module.frozen:
            other = 1 - momentum if 0 < 1 - momentum < HIGHEST_MOMENTUM else 0.1
            yield Finding(name, f"momentum = {momentum:g}", remedy=f"layer.momentum = {other:.4g}")


def skipped_updates(evidence: Evidence) -> Iterator[Finding]:
    """Batches with NaN or infinity were left out of the stored statistics.

    Why:
        The layer protected its statistics, but something in training makes such values: a learning rate that is too
        high, half precision that overflows, or broken examples.

    How:
        skipped_updates of a layer of this package is above 0. torch.nn's layers have no such counter: they store the
        NaN.

    Example:
        BatchNorm2d(64, eps=1e-05, ..., skipped_updates=3)

    Fix:
        batchnorm doctor with --data names the first layer that receives NaN or infinity (BN208).

    References:
        pytorch#88474, pytorch#115500.
    """
    for name, module in (evidence.modules or {}).items():
        if module.skipped_updates:
            yield Finding(name, f"{module.skipped_updates} batches with NaN or infinity")


def uninitialized_layer(evidence: Evidence) -> Iterator[Finding]:
    """A lazy layer has not received a batch yet.

    Why:
        Its tensors have no size, so the layer cannot be examined or copied to other processes.

    How:
        The layer's class is lazy, and its tensors have no shape.

    Example:
        nn.LazyBatchNorm2d()

    Fix:
        Run one batch through the model.
    """
    for name, module in (evidence.modules or {}).items():
        if module.is_lazy:
            yield Finding(name, "no size yet")
