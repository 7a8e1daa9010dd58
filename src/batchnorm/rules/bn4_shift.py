"""BN4: data that differ from the training data."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import unsettled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.checkpoint.stored import Stored
    from batchnorm.rules.rule_evidence import Evidence, MeasuredLayer

# A mean that moved by one sd, or an sd that doubled or halved: then half of the values are outside of the usual range
# of the layer's outputs. In models in the middle of training, means of channels were up to 0.35 sd off.
MOVED_MEAN = 1.0
MOVED_VARIANCE = 4.0
# a few channels may depend on inputs that are rare in the training data
MOVED_CHANNELS = 0.25
# The curvature of a squared loss is proportional to the square of a feature's scale, so a ratio of 100 between sds
# means a condition number of 10^4. With a mean of 10 sd, the squared mean is 100 times the variance.
SCALE_RATIO = 100.0
FAR_MEAN = 10.0


def shifted_inputs(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The data differ from those that the layer was trained with.

    Why:
        Eval mode subtracts the training data's mean and divides by their standard deviation. On data of another camera,
        another scale or another domain the outputs are then not normalized, and accuracy drops.

    How:
        Measures, for each channel, the distance of the data's mean from the stored one, in stored standard deviations
        (limit 1), and the ratio of the data's variance to the stored one (limits 1/4 and 4). Reported if a quarter of a
        layer's channels are outside of a limit, and are proven to differ without an assumption about the distribution
        of the examples (as in BN116). Only the first such layer in execution order is named, because its outputs shift
        the inputs of later layers. The rule cannot judge a difference that rare examples missing from the data may
        explain: for example, the data's variance is smaller than the stored one, and the means agree. Constant channels
        (BN211) and layers that were never updated do not count.

    Example:
        A model trained on images in 0..1 gets images in 0..255.

    Fix:
        First check that the data are prepared as in training. If the model is to work in the new domain, call
        batchnorm.recalibrate on examples of that domain (adaptive batch normalization).

    References:
        Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation".
        Li et al. 2016, "Revisiting batch normalization for practical domain adaptation".
    """
    measured = evidence.measured or {}
    outside = {name: channels for name, m in measured.items() if (channels := _moved(evidence, name, m))}
    shifted = {name: proven for name, channels in outside.items() if (proven := _shown(measured[name], channels))}
    for name in outside if not shifted else ():
        yield Unknown(
            name, f"{len(outside[name])} of {len(measured[name].mean)} channels moved, {unsettled(measured[name])}"
        )
    if shifted:
        name, channels = next(iter(shifted.items()))
        layer = measured[name]
        distance = statistics.median(abs(layer.mean_deviation[c]) for c in channels)
        ratio = statistics.median(layer.var_ratio[c] for c in channels)
        yield Finding(
            name,
            f"{len(channels)} of {len(layer.mean)} channels moved: by {distance:.2g} sd, variance "
            f"{ratio:.2g} times" + (f"; {len(shifted)} layers in all" if len(shifted) > 1 else ""),
            channels=channels,
        )


def unscaled_inputs(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Input features range over very different scales.

    Why:
        The gradient of a weight in the first layer is proportional to the scale of its feature. Then one learning rate
        is too large for some weights and too small for others, and batch norm behind that layer does not help.

    How:
        Measures the standard deviation and mean of each input feature (axis 1). Reported if the largest standard
        deviation is above 100 times the smallest, or a mean is farther than 10 standard deviations from 0. Constant
        features are left out. Not reported for models that begin with InputNorm or batch norm. Not checked for integer
        inputs and for more than 4096 features.

    Example:
        Columns age (20..80) and income (20000..200000) straight from the table.

    Fix:
        batchnorm.InputNorm.fit(data) as the first module; it is saved with the model.

    References:
        LeCun, Bottou, Orr and Müller 1998, "Efficient BackProp", section 4.3.
    """
    run = evidence.run
    if run is None:
        return
    if run.input_scales is None or run.input_means is None:
        if why := run.unknown.get("inputs"):
            yield Unknown("", why)
        return
    pairs = [(scale, mean) for scale, mean in zip(run.input_scales, run.input_means, strict=True) if scale > 0]
    # the sd of a constant feature is its rounding
    pairs = [(scale, mean) for scale, mean in pairs if scale > abs(mean) * 2**-23]
    if not pairs:
        return
    scales = [scale for scale, _ in pairs]
    ratio = max(scales) / min(scales)
    distance = max(abs(mean) / scale for scale, mean in pairs)
    if ratio > SCALE_RATIO or distance > FAR_MEAN:
        yield Finding(
            "", f"sd of input features {min(scales):.3g} to {max(scales):.3g}, means up to {distance:.3g} sd from 0"
        )


def is_as_constructed(stored: Stored | None) -> bool:
    """Whether a layer has no statistics of data: none are stored, or mean 0 and variance 1."""
    return stored is None or stored.running_mean is None or stored.running_var is None or stored.is_initial


def _moved(evidence: Evidence, name: str, found: MeasuredLayer) -> tuple[int, ...]:
    """Channels that are outside of a limit; () if they are less than MOVED_CHANNELS of the layer."""
    if is_as_constructed(evidence.stored.get(name)):
        return ()
    pairs, constant = zip(found.mean_deviation, found.var_ratio, strict=True), set(found.constant)
    outside = [
        channel
        for channel, (deviation, ratio) in enumerate(pairs)
        if channel not in constant
        if abs(deviation) > MOVED_MEAN or abs(math.log(max(ratio, 1e-300))) > math.log(MOVED_VARIANCE)
    ]
    return _enough(found, outside)


def _shown(found: MeasuredLayer, channels: tuple[int, ...]) -> tuple[int, ...]:
    return _enough(found, [channel for channel in channels if channel in found.shown])


def _enough(found: MeasuredLayer, channels: list[int]) -> tuple[int, ...]:
    return tuple(channels) if len(channels) >= MOVED_CHANNELS * len(found.mean) else ()
