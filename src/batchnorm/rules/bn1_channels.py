"""BN1: channels that do too much or nothing, by what is stored of them."""

from __future__ import annotations

import math
from statistics import NormalDist, median
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import some_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.rule_evidence import Evidence, Measured

# a variance below 10 eps is partly eps: the output varies less than gamma says. That alone is no fault: the scale of
# what a convolution makes is arbitrary
SMALL = 10.0
# below eps / 10,000 the output varies by less than 1 % of gamma: on the training data the channel was constant
CONSTANT = 1e-4
LARGEST_EPS = 1e-3  # that anybody uses: TensorFlow's
# gain |gamma| / sqrt(var + eps) of an ordinary channel is around 1, that of gamma = 1 at most 316 for eps = 1e-5 and 32
# for 1e-3
STEEP = 100.0
STEEPER = 10.0  # times what other channels make of the same input
# a channel whose result varies by less than this moves a sum of a thousand such ones by about 0.03
FAINT = 1e-3
RARELY = 0.01  # of the positions
# where an activation varies by FAINT or more, in its inputs: outside of it a channel is constant behind it. Those that
# pass everything on (leaky ReLU) are not here
ACTIVE: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
    "silu": (-9.2, math.inf),  # x sigmoid(x) is -0.0009 there
    "mish": (-9.2, math.inf),
    "gelu": (-3.5, math.inf),  # x Phi(x) is -0.0008 there
    "elu": (-7.0, math.inf),  # exp(-7) is 0.0009
    "softplus": (-7.0, math.inf),
    "sigmoid": (-7.0, 7.0),
    "tanh": (-3.8, 3.8),  # 1 - tanh(3.8) is 0.001
}
# never active in n independent values means active in less than 3 / n of all (95 %): 300 for RARELY. Positions of one
# image are alike, so it takes examples too
FEWEST_VALUES, FEWEST_EXAMPLES = 300, 32


def constant_channel(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A channel hardly varied in training, yet it magnifies whatever varies in it later.

    Why:
        Dividing by sqrt(var + eps) of a constant channel multiplies by up to 316. On training data nothing comes of
        it; on new data a small change becomes the largest signal of the layer.

    How:
        running_var < eps / 10,000 and a gain |gamma| / sqrt(var + eps) > 100. Behind a convolution or linear layer the
        norm of the channel's weights counts too: gain times norm must be more than 10 times what it is in half of the
        other channels, since weights that have decayed with the variance magnify nothing (BN106). Silent behind a
        depthwise convolution of a channel that BN106 names in the layer before. Not checked where
        nothing tells what is before the layer, or a file does not tell eps and a variance is below 1e-7.

    Example:
        A padded corner, a one-hot feature that training data lack.

    Fix:
        Remove the channel, or set its gamma to 0 if its beta is what is wanted.

    References:
        batchnorm explain BN106.
    """
    for name, stored in evidence.stored.items():
        if not _is_whole(stored):
            continue
        if evidence.known_eps(name) is None:
            if _least(stored) < CONSTANT * LARGEST_EPS:
                yield Unknown(name, "a variance is next to nothing, and eps is not told")
            continue
        dead = dead_before(evidence, name)
        steep = [i for i in _constant(evidence, stored) if _gain(evidence, stored, i) > STEEP and i not in dead]
        known, norms = evidence.filters(name)
        if steep and not known:
            yield Unknown(name, "a variance is next to nothing, and nothing tells what is before the layer")
        elif channels := tuple(i for i in steep if norms is None or _magnifies(evidence, stored, norms, i)):
            steepest = max(_gain(evidence, stored, i) for i in channels)
            yield Finding(
                name,
                f"var < eps / 10,000 and gain up to {steepest:.0f}, {some_of(channels, stored)}",
                channels=channels,
            )


def _magnifies(evidence: Evidence, stored: Stored, norms: Sequence[float], channel: int) -> bool:
    """Whether weights and gain of a channel together are far above those of the layer's channels that vary."""
    if len(norms) != stored.channels:
        return True
    constant = set(_constant(evidence, stored))
    others = [_gain(evidence, stored, i) * norms[i] for i in range(stored.channels) if i not in constant]
    return _gain(evidence, stored, channel) * norms[channel] > STEEPER * (median(others) if others else 1.0)


def dead_channel(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A channel contributes next to nothing.

    Why:
        It takes time and memory like any other. Many of them say that the learning rate or the weight decay was too
        high, or that the network is wider than it needs to be.

    How:
        Its output hardly varies: |gamma| < 0.001 with |beta| < 0.001, or var < 10 eps with
        |gamma| / sqrt(var + eps) sqrt(var) < 0.001. Or it hardly ever varies behind an activation that is known to be
        all that reads it, by the layer itself, the traced code or the ONNX graph: data of 32 or more examples with
        300 or more values have none between the ends where the activation varies (above 0 for ReLU, between 0 and 6
        for ReLU6, above -3 for hardswish); or without such data P < 0.01 for gamma z + beta with a standard normal z.
        Where something is added first nothing is said of activity, and where no code tells what follows it is not
        checked.

    Example:
        12 of 512 channels after training with strong weight decay.

    Fix:
        Nothing is wrong with the answers. Prune the channels, adding the constant that the next layer gets of them to
        its bias; or leave them.

    References:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    for name, stored in evidence.stored.items():
        if not _may_be_dead(stored):
            continue
        still = still_channels(evidence, stored)
        rare, how = _rarely_active(evidence, stored)
        if channels := tuple(sorted(still | rare)):
            what = [f"{len(still)} hardly vary" if still else "", f"{len(rare)} are {how}" if rare else ""]
            yield Finding(name, f"{some_of(channels, stored)}: {', '.join(filter(None, what))}", channels=channels)
        elif not evidence.activation(name) and _is_open(evidence, stored):
            yield Unknown(name, "a ReLU would hardly ever be active behind a channel, and nothing tells what follows")


def dead_before(evidence: Evidence, layer: str) -> set[int]:
    """Channels that get the constant result of a dead channel of the layer before them, which BN106 names there."""
    before = evidence.graph.channel_by_channel.get(layer) if evidence.graph else None
    stored = evidence.stored.get(before or "")
    return set() if stored is None else dead_channels(evidence, stored)


def dead_channels(evidence: Evidence, stored: Stored) -> set[int]:
    """Channels that BN106 names."""
    return still_channels(evidence, stored) | (_rarely_active(evidence, stored)[0] if _may_be_dead(stored) else set())


def _may_be_dead(stored: Stored) -> bool:
    return _is_whole(stored) and not stored.is_initial and not stored.is_silent


def _is_whole(stored: Stored) -> bool:
    """Whether there are variances, and of all else as many or none."""
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
    """Channels that BN106 names because their output hardly varies, whatever follows."""
    return {i for i in range(stored.channels) if _is_still(evidence, stored, i)} if _may_be_dead(stored) else set()


def _is_still(evidence: Evidence, stored: Stored, channel: int) -> bool:
    """Whether a channel's output hardly varies, whatever follows."""
    var = stored.running_var[channel] if stored.running_var else 1.0
    if not 0 <= var < math.inf:
        return False
    gain = _gain(evidence, stored, channel)
    if var < SMALL * evidence.eps(stored.name) and gain <= STEEP and gain * math.sqrt(var) < FAINT:
        return True
    gamma, beta = _affine(stored, channel)
    return abs(gamma) < FAINT and abs(beta) < FAINT


def _rarely_active(evidence: Evidence, stored: Stored) -> tuple[set[int], str]:
    """Channels that hardly ever vary behind the activation that follows, and how that is known."""
    act = evidence.activation(stored.name)
    if act not in ACTIVE:
        return set(), ""
    low, high = ACTIVE[act]
    found = (evidence.measured or {}).get(stored.name)
    if found is not None and _tells_activity(found):
        pairs = enumerate(zip(found.lowest or (), found.highest or (), strict=True))
        never = {i for i, (least, most) in pairs if most <= low or least >= high}
        return never, f"never active behind {act} in {found.examples} examples"
    rare = {i for i in range(stored.channels) if _activity(evidence, stored, i, low, high) < RARELY}
    return rare, f"hardly ever active behind {act}, for values that are near normal"


def _is_open(evidence: Evidence, stored: Stored) -> bool:
    """Whether it matters that no activation is known: not where code was read that shows that there is none."""
    if evidence.graph is not None and not evidence.graph.unread:
        return False
    return any(_activity(evidence, stored, i, *ACTIVE["relu"]) < RARELY for i in range(stored.channels))


def _tells_activity(found: Measured) -> bool:
    values = found.examples * found.values_per_example
    return found.lowest is not None and found.examples >= FEWEST_EXAMPLES and values >= FEWEST_VALUES


def _affine(stored: Stored, channel: int) -> tuple[float, float]:
    return stored.weight[channel] if stored.weight else 1.0, stored.bias[channel] if stored.bias else 0.0


def _activity(evidence: Evidence, stored: Stored, channel: int, low: float, high: float) -> float:
    """P(low < gamma z + beta < high) for z of the stored variance over itself and eps; 1 for what is no number."""
    var, (_, beta) = (stored.running_var or (1.0,) * stored.channels)[channel], _affine(stored, channel)
    sd = _gain(evidence, stored, channel) * math.sqrt(max(var, 0.0))
    if not (var >= 0 and math.isfinite(sd) and math.isfinite(beta)):
        return 1.0
    if not sd:
        return float(low < beta < high)
    normal = NormalDist(beta, sd)
    return normal.cdf(high) - normal.cdf(low)
