"""BN1: channels that are magnified too much or contribute nothing, judged by their stored values."""

from __future__ import annotations

import math
from statistics import NormalDist, median
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import some_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.rule_evidence import Evidence, MeasuredLayer

# with a variance below 10 eps, eps changes the output: it varies less than gamma says. That alone is no fault, because
# a convolution's results may have any scale
SMALL = 10.0
# with a variance below eps / 10,000 the output varies by less than 1 % of gamma: the channel was constant in training
CONSTANT = 1e-4
LARGEST_EPS = 1e-3  # the largest eps in common use, TensorFlow's default
# the gain |gamma| / sqrt(var + eps) of an ordinary channel is about 1; with gamma = 1 it is at most 316 for eps = 1e-5
# and at most 32 for eps = 1e-3
STEEP = 100.0
# the product of gain and weight norm must exceed this many times its median over the channels that vary
TIMES_MEDIAN = 10.0
# a sum of a thousand channels that each vary by this much varies by about 0.03
FAINT = 1e-3
RARELY = 0.01  # share of a channel's values
# the range of inputs in which an activation varies by FAINT or more; a channel that stays outside of it is constant
# after the activation. Activations that vary everywhere (leaky ReLU) are not in this table
ACTIVE: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
    "silu": (-9.2, math.inf),  # x sigmoid(x) is -0.0009 at -9.2
    "mish": (-9.2, math.inf),
    "gelu": (-3.5, math.inf),  # x Phi(x) is -0.0008 at -3.5
    "elu": (-7.0, math.inf),  # exp(-7) is 0.0009
    "softplus": (-7.0, math.inf),
    "sigmoid": (-7.0, 7.0),
    "tanh": (-3.8, 3.8),  # 1 - tanh(3.8) is 0.001
}
# a channel that is not active in n independent values is active in less than 3 / n of all values, at 95 % confidence:
# so RARELY needs 300 values. Positions of one image are similar, so a number of examples is required too
FEWEST_VALUES, FEWEST_EXAMPLES = 300, 32


def constant_channel(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A channel hardly varied in training, but it strongly magnifies any later change of its input.

    Why:
        A constant channel has a variance near 0, so division by sqrt(var + eps) magnifies its input: up to 316 times
        with gamma = 1 and eps = 1e-5. That has no effect on the training data. On new data a small change becomes the
        largest signal of the layer.

    How:
        running_var < eps / 10,000, and the gain |gamma| / sqrt(var + eps) is above 100. Behind a convolution or linear
        layer the norm of the channel's weights counts too: gain times norm must be more than 10 times its median over
        the channels that vary. If weight decay has made the weights small as well as the variance, gain times norm is
        small and nothing is magnified. Not reported if BN106 names the same channel of the layer before, and only a
        depthwise convolution and an activation are between the two layers. Not checked if it is not known what is
        before the layer, or if a file does not store eps and a variance is below 1e-7.

    Example:
        A padded corner of images; a one-hot feature that is 0 in all training data.

    Fix:
        Remove the channel, or set its gamma to 0, so that its output is always beta.

    References:
        batchnorm explain BN106.
    """
    for name, stored in evidence.stored.items():
        if not _is_whole(stored):
            continue
        if evidence.known_eps(name) is None:
            if _least(stored) < CONSTANT * LARGEST_EPS:
                yield Unknown(name, "a variance is nearly 0, and eps is not known")
            continue
        dead = dead_before(evidence, name)
        steep = [i for i in _constant(evidence, stored) if _gain(evidence, stored, i) > STEEP and i not in dead]
        is_known, norms = evidence.filters(name)
        if steep and not is_known:
            yield Unknown(name, "a variance is nearly 0, and it is not known what is before the layer")
        elif channels := tuple(i for i in steep if norms is None or _magnifies(evidence, stored, norms, i)):
            steepest = max(_gain(evidence, stored, i) for i in channels)
            yield Finding(
                name,
                f"var < eps / 10,000 and gain up to {steepest:.0f}, {some_of(channels, stored)}",
                channels=channels,
            )


def _magnifies(evidence: Evidence, stored: Stored, norms: Sequence[float], channel: int) -> bool:
    """Whether gain times weight norm of a channel is far above its median over the layer's channels that vary."""
    if len(norms) != stored.channels:
        return True
    constant = set(_constant(evidence, stored))
    others = [_gain(evidence, stored, i) * norms[i] for i in range(stored.channels) if i not in constant]
    return _gain(evidence, stored, channel) * norms[channel] > TIMES_MEDIAN * (median(others) if others else 1.0)


def dead_channel(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A channel contributes next to nothing.

    Why:
        Such a channel costs as much time and memory as any other. Many such channels mean that the learning rate or the
        weight decay was too high, or that the network is wider than necessary.

    How:
        One of two conditions. (1) The output hardly varies: |gamma| < 0.001 and |beta| < 0.001; or var < 10 eps, the
        gain |gamma| / sqrt(var + eps) is at most 100, and gain times sqrt(var) < 0.001. (2) Only an activation reads
        the output, and the activation is hardly ever active. The layer itself, the traced code or the ONNX graph must
        show this activation. With data of at least 32 examples and 300 values, all values of the channel are on one
        side of the range in which the activation varies (above 0 for ReLU, 0 to 6 for ReLU6, above -3 for hardswish).
        Without such data, an output with a normal distribution of mean beta and sd gain times sqrt(var) is in that
        range with a probability below 0.01. If something is added to the output before the activation, only (1) is
        used. Layers with initial statistics, or with gamma 0 in every channel, are not judged. If a ReLU behind some
        channel would hardly ever be active, and it is not known what follows the layer, the rule cannot judge the
        layer.

    Example:
        12 of 512 channels after training with strong weight decay

    Fix:
        The model's outputs are right, so the channels can stay. Or prune them. The next layer receives a constant from
        each of them: multiply the constant by the next layer's weights for that channel, and add the result to the next
        layer's bias.

    References:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    for name, stored in evidence.stored.items():
        if not _can_be_judged(stored):
            continue
        still = still_channels(evidence, stored)
        inactive, how = _rarely_active(evidence, stored)
        if channels := tuple(sorted(still | inactive)):
            what = [f"{len(still)} hardly vary" if still else "", f"{len(inactive)} are {how}" if inactive else ""]
            yield Finding(name, f"{some_of(channels, stored)}: {', '.join(filter(None, what))}", channels=channels)
        elif not evidence.activation(name) and _could_be_dead_behind_relu(evidence, stored):
            yield Unknown(
                name,
                "a ReLU behind some channel would hardly ever be active, and it is not known what follows the layer",
            )


def dead_before(evidence: Evidence, layer: str) -> set[int]:
    """Channels that are computed from one dead channel each, because BN106 names that channel in the layer before.

    Between the two layers there must be only an activation and a depthwise convolution; otherwise the set is empty.
    """
    before = evidence.graph.channel_by_channel.get(layer) if evidence.graph else None
    stored = evidence.stored.get(before or "")
    return set() if stored is None else dead_channels(evidence, stored)


def dead_channels(evidence: Evidence, stored: Stored) -> set[int]:
    """Channels that BN106 names."""
    return still_channels(evidence, stored) | (_rarely_active(evidence, stored)[0] if _can_be_judged(stored) else set())


def _can_be_judged(stored: Stored) -> bool:
    return _is_whole(stored) and not stored.is_initial and not stored.is_silent


def _is_whole(stored: Stored) -> bool:
    """Whether variances are stored, all stored tensors have one length, and every value was read."""
    tensors = (stored.running_mean, stored.running_var, stored.weight, stored.bias)
    sizes = {len(values) for values in tensors if values is not None}
    return stored.running_var is not None and len(sizes) == 1 and not stored.unread


def _least(stored: Stored) -> float:
    return min((var for var in stored.running_var or () if var >= 0), default=math.inf)


def _constant(evidence: Evidence, stored: Stored) -> tuple[int, ...]:
    limit = CONSTANT * evidence.eps(stored.name)
    return tuple(i for i, var in enumerate(stored.running_var or ()) if 0 <= var < limit)


def _gain(evidence: Evidence, stored: Stored, channel: int) -> float:
    """|gamma| / sqrt(var + eps)."""
    gamma = abs(stored.weight[channel]) if stored.weight else 1.0
    spread = (stored.running_var[channel] if stored.running_var else 1.0) + evidence.eps(stored.name)
    return gamma / math.sqrt(spread) if spread > 0 else math.inf


def still_channels(evidence: Evidence, stored: Stored) -> set[int]:
    """Channels that BN106 names because their output hardly varies, whatever module follows."""
    return {i for i in range(stored.channels) if _is_still(evidence, stored, i)} if _can_be_judged(stored) else set()


def _is_still(evidence: Evidence, stored: Stored, channel: int) -> bool:
    """Whether a channel's output hardly varies, whatever module follows."""
    var = stored.running_var[channel] if stored.running_var else 1.0
    if not 0 <= var < math.inf:
        return False
    gain = _gain(evidence, stored, channel)
    if var < SMALL * evidence.eps(stored.name) and gain <= STEEP and gain * math.sqrt(var) < FAINT:
        return True
    gamma, beta = _affine(stored, channel)
    return abs(gamma) < FAINT and abs(beta) < FAINT


def _rarely_active(evidence: Evidence, stored: Stored) -> tuple[set[int], str]:
    """Channels that hardly ever vary after the activation that follows the layer, and the reason in words."""
    act = evidence.activation(stored.name)
    if act not in ACTIVE:
        return set(), ""
    low, high = ACTIVE[act]
    measured = (evidence.measured or {}).get(stored.name)
    if measured is not None and _has_enough_data(measured):
        pairs = enumerate(zip(measured.lowest or (), measured.highest or (), strict=True))
        never = {i for i, (lowest, highest) in pairs if highest <= low or lowest >= high}
        return never, f"never active behind {act} in {measured.examples} examples"
    inactive = {i for i in range(stored.channels) if _activity(evidence, stored, i, low, high) < RARELY}
    return inactive, f"hardly ever active behind {act}, if values are normally distributed"


def _could_be_dead_behind_relu(evidence: Evidence, stored: Stored) -> bool:
    """Whether some channel would be dead if a ReLU followed the layer, and it is not known whether one does.

    Call it only if no activation is known. If the code of all modules was traced, no activation follows.
    """
    if evidence.graph is not None and not evidence.graph.unread:
        return False
    return any(_activity(evidence, stored, i, *ACTIVE["relu"]) < RARELY for i in range(stored.channels))


def _has_enough_data(found: MeasuredLayer) -> bool:
    values = found.examples * found.values_per_example
    return found.lowest is not None and found.examples >= FEWEST_EXAMPLES and values >= FEWEST_VALUES


def _affine(stored: Stored, channel: int) -> tuple[float, float]:
    return stored.weight[channel] if stored.weight else 1.0, stored.bias[channel] if stored.bias else 0.0


def _activity(evidence: Evidence, stored: Stored, channel: int, low: float, high: float) -> float:
    """Probability that a channel's eval output lies between low and high, if it is normally distributed.

    Its mean is beta, its sd is gain times sqrt(var). 1 if the gain, var or beta is not finite, or if var is negative.
    """
    var, (_, beta) = (stored.running_var or (1.0,) * stored.channels)[channel], _affine(stored, channel)
    sd = _gain(evidence, stored, channel) * math.sqrt(max(var, 0.0))
    if not (var >= 0 and math.isfinite(sd) and math.isfinite(beta)):
        return 1.0
    if not sd:
        return float(low < beta < high)
    normal = NormalDist(beta, sd)
    return normal.cdf(high) - normal.cdf(low)
