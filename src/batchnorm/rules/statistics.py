"""BN1: what a layer stores."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Fix
from batchnorm.rules.words import measure_again, some_of, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.evidence import Evidence

HALF = {"float16", "bfloat16"}
# smallest normal number of each type
TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
# -var of at most this share of eps moves 1/sqrt(var + eps) by half of it: less than float32 resolves
ROUNDING = 2.0**-24
# a variance below 10 eps is partly eps: the output varies less than gamma says. That alone is no fault: the scale of
# what a convolution makes is arbitrary
SMALL = 10.0
# below eps / 10,000 the output varies by less than 1 % of gamma: on the training data the channel was constant
CONSTANT = 1e-4
# gain |gamma| / sqrt(var + eps) of an ordinary channel is around 1, that of gamma = 1 at most 316 for eps = 1e-5 and 32
# for 1e-3
STEEP = 100.0
# a channel whose result varies by less than this moves a sum of a thousand such ones by about 0.03
FAINT = 1e-3
RARELY = 0.01  # of the positions
# float32 keeps 24 bits: an input this far from zero in its sd has lost 13 of them before it is normalized
FAR = 1e4


def non_finite_statistics(evidence: Evidence) -> Iterator[Finding]:
    """A stored mean or variance is NaN or infinite.

    Why:
        One bad batch is enough: running averages never forget NaN. Training goes on, because train mode does not
        use them, and every eval output of the channel is NaN.

    How:
        running_mean or running_var has a value that is NaN or infinite.

    Example:
        fp16 overflow in one step of mixed precision; the loss scaler skipped the step, the buffers kept it.

    Fix:
        batchnorm fix with --data measures them again. This package's layers leave such batches out.

    References:
        pytorch#88474, pytorch#115500.
    """
    for name, stored in evidence.stored.items():
        means = _where(stored.running_mean, _is_broken)
        variances = _where(stored.running_var, _is_broken)
        if channels := tuple(sorted({*means, *variances})):
            key, values = ("running_var", stored.running_var) if variances else ("running_mean", stored.running_mean)
            first = (variances or means)[0]
            yield Finding(
                name,
                f"{key}[{first}] = {values[first] if values else 0}, {some_of(channels, stored)}",
                "finite numbers",
                "Eval outputs of these channels, and of everything behind them, are NaN or constant.",
                measure_again(evidence),
                channels=channels,
                fixable=Fix.DATA,
            )


def negative_variance(evidence: Evidence) -> Iterator[Finding]:
    """A stored variance is negative.

    Why:
        Below -eps the square root is NaN. Above it the channel is magnified by more than any real variance could.

    How:
        running_var < 0. If it is rounding, at least -eps / 2^24, the safe fix sets it to 0; otherwise it has to be
        measured again.

    Example:
        Averages of E[x^2] - E[x]^2, or weights that were extrapolated or quantized together with buffers.

    Fix:
        batchnorm fix; with --data where it is no rounding.
    """
    for name, stored in evidence.stored.items():
        if channels := _where(stored.running_var, lambda var: -math.inf < var < 0):
            least = _least(stored, channels)
            safe = -least <= ROUNDING * evidence.eps(name)
            yield Finding(
                name,
                f"running_var down to {least:.3g}, {some_of(channels, stored)}",
                "0 or more",
                "Rounding below zero." if safe else "The channel's eval output is NaN, or far too large.",
                f"batchnorm fix {target_of(evidence)}" if safe else measure_again(evidence),
                channels=channels,
                fixable=Fix.SAFE if safe else Fix.DATA,
            )


def denormal_variance(evidence: Evidence) -> Iterator[Finding]:
    """A stored variance is a denormal number.

    Why:
        Processors and compilers treat denormals differently, some as 0 and some slowly, so that results and times
        depend on the machine. Beside eps it is 0 anyway.

    How:
        0 < running_var < the smallest normal number of its type (1.2e-38 for float32).

    Example:
        A channel behind a dead ReLU: its variance shrinks by 0.9 in each step and never arrives at 0.

    Fix:
        batchnorm fix sets it to 0; eval outputs change by less than float32 resolves.
    """
    for name, stored in evidence.stored.items():
        tiny = TINY.get(stored.dtypes.get("running_var", ""), TINY["float32"])
        if channels := _where(stored.running_var, lambda var, tiny=tiny: 0 < var < tiny):
            yield Finding(
                name,
                f"running_var down to {_least(stored, channels):.3g}, {some_of(channels, stored)}",
                f"0, or at least {tiny:.3g}",
                "Machines differ in what they make of it.",
                f"batchnorm fix {target_of(evidence)}",
                channels=channels,
                fixable=Fix.SAFE,
            )


def constant_channel(evidence: Evidence) -> Iterator[Finding]:
    """A channel hardly varied in training, yet its gamma magnifies whatever varies in it later.

    Why:
        Dividing by sqrt(var + eps) of a constant channel multiplies by up to 316. On training data nothing comes of
        it; on new data a small change becomes the largest signal of the layer.

    How:
        running_var < eps / 10,000 and |gamma| / sqrt(var + eps) > 100. A channel with a small gamma is harmless: BN106.
        Silent for files that do not tell eps: with 1e-3 the same variance is harmless.

    Example:
        A padded corner, a one-hot feature that training data lack, a dead filter that noise wakes up.

    Fix:
        Remove the channel, or set its gamma to 0 if its beta is what is wanted.

    References:
        batchnorm explain BN106.
    """
    for name, stored in evidence.stored.items():
        if not _is_whole(stored) or (evidence.modules is None and stored.eps is None):
            continue
        channels = tuple(i for i in _constant(evidence, stored) if _gain(evidence, stored, i) > STEEP)
        if channels:
            steepest = max(_gain(evidence, stored, i) for i in channels)
            yield Finding(
                name,
                f"var < eps / 10,000 and gain up to {steepest:.0f}, {some_of(channels, stored)}",
                f"gain up to {STEEP:.0f}",
                "A small change of the input there is magnified above everything else.",
                "set gamma of these channels to 0, or prune them",
                channels=channels,
            )


def dead_channel(evidence: Evidence) -> Iterator[Finding]:
    """A channel contributes next to nothing.

    Why:
        It takes time and memory like any other. Many of them say that the learning rate or the weight decay was too
        high, or that the network is wider than it needs to be.

    How:
        |gamma| < 0.001 and, with a ReLU behind it, hardly ever active: P = Phi(beta / |gamma|) < 0.01, for inputs
        that are near normal; or var < 10 eps with |gamma| / sqrt(var + eps) sqrt(var) < 0.001: it is constant.

    Example:
        12 of 512 channels after training with strong weight decay.

    Fix:
        Nothing is wrong with the answers. Prune the channels, or leave them.

    References:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    for name, stored in evidence.stored.items():
        if not _is_whole(stored) or stored.is_initial or _is_silent(stored):
            continue
        if channels := tuple(i for i in range(stored.channels) if _is_dead(evidence, stored, i)):
            yield Finding(
                name,
                f"{some_of(channels, stored)} hardly vary or are hardly ever active",
                f"|gamma| or output sd of {FAINT:g}",
                "They cost time and memory and contribute next to nothing.",
                "prune them, or leave them",
                channels=channels,
            )


def non_finite_affine(evidence: Evidence) -> Iterator[Finding]:
    """Gamma or beta is NaN or infinite.

    Why:
        Every output of the channel is NaN, in train and in eval mode, and so is all that depends on it.

    How:
        weight or bias has a value that is NaN or infinite.

    Example:
        A training that diverged and was saved.

    Fix:
        Go back to an earlier checkpoint. batchnorm fix --unsafe-fixes sets them to 1 and 0, to look at the rest.
    """
    for name, stored in evidence.stored.items():
        gammas, betas = _where(stored.weight, _is_broken), _where(stored.bias, _is_broken)
        if channels := tuple(sorted({*gammas, *betas})):
            yield Finding(
                name,
                f"{'gamma' if gammas else 'beta'} is NaN or infinite, {some_of(channels, stored)}",
                "finite numbers",
                "Outputs of these channels are NaN in every mode.",
                "go back to an earlier checkpoint",
                channels=channels,
                fixable=Fix.UNSAFE,
            )


def half_precision_statistics(evidence: Evidence) -> Iterator[Finding]:
    """Statistics are stored in half precision.

    Why:
        A float16 variance overflows at 65504. A bfloat16 average stops moving: with 8 bits, adding a tenth of a
        small difference changes nothing. Inference with them costs digits that float32 buffers keep for free.

    How:
        running_mean or running_var has the type float16 or bfloat16.

    Example:
        model.half(): running_var = inf. model.bfloat16(): a running mean that stalls at 4.78 where 4.97 is true.

    Fix:
        batchnorm fix stores them in float32, which is exact; digits that are lost come back with --data.
        This package's layers keep float32 statistics under half() and bfloat16().
    """
    for name, stored in evidence.stored.items():
        kinds = {stored.dtypes.get(key) for key in ("running_mean", "running_var")} & HALF
        if kinds:
            yield Finding(
                name,
                f"statistics in {' and '.join(sorted(map(str, kinds)))}",
                "float32",
                "Large variances overflow or small updates are lost, should it be trained further.",
                f"batchnorm fix {target_of(evidence)}",
                fixable=Fix.SAFE,
            )


def incomplete_layer(evidence: Evidence) -> Iterator[Finding]:
    """A layer lacks one of its statistics, or their sizes differ.

    Why:
        It cannot be loaded with strict=True; with strict=False what is missing stays at its initial value, silently.

    How:
        One of running_mean and running_var is there without the other, or tensors of one layer differ in length.

    Example:
        Keys dropped by a filter such as "if 'running_var' not in key".

    Fix:
        Save the state_dict again, or measure: batchnorm.recalibrate(model, loader).
    """
    for name, stored in evidence.stored.items():
        tensors = {key: getattr(stored, key) for key in ("running_mean", "running_var", "weight", "bias")}
        sizes = {key: len(values) for key, values in tensors.items() if values is not None}
        halves = (stored.running_mean is None) != (stored.running_var is None)
        if halves or len(set(sizes.values())) > 1:
            yield Finding(
                name,
                ", ".join(f"{key} {size}" for key, size in sizes.items())
                + (f", no {'running_mean' if stored.running_mean is None else 'running_var'}" if halves else ""),
                "running_mean and running_var, one value for each channel",
                "Loading fails, or leaves initial values in place of what is missing.",
                "save the state_dict again, or batchnorm.recalibrate(model, loader)",
            )


def far_mean(evidence: Evidence) -> Iterator[Finding]:
    """A channel's mean is very far from zero in units of its standard deviation.

    Why:
        float32 has 7 digits. What lies 10,000 standard deviations from zero keeps 3 of them for what varies, and
        folding, which forms beta - mean * gamma / sd, loses them from the weights.

    How:
        |running_mean| / sqrt(running_var + eps) > 10,000.

    Example:
        A timestamp in seconds as a feature: mean 1.7e9, standard deviation 1e4.

    Fix:
        Subtract the offset from the data first: batchnorm.InputNorm.fit(data).
    """
    for name, stored in evidence.stored.items():
        mean, var, eps = stored.running_mean, stored.running_var, evidence.eps(name)
        if mean is None or var is None or len(mean) != len(var):
            continue
        ratios = [abs(m) / math.sqrt(v + eps) if v + eps > 0 else 0.0 for m, v in zip(mean, var, strict=True)]
        if channels := tuple(i for i, ratio in enumerate(ratios) if FAR < ratio < math.inf):
            yield Finding(
                name,
                f"mean up to {max(ratios[i] for i in channels):.2g} sd from zero, {some_of(channels, stored)}",
                f"{FAR:g} sd",
                "Few digits are left for what varies; folding loses more.",
                "take the offset out of the data: batchnorm.InputNorm.fit(data)",
                channels=channels,
            )


def silent_layer(evidence: Evidence) -> Iterator[Finding]:
    """Every gamma of a trained layer is zero.

    Why:
        The layer returns beta whatever comes in: all before it, in its branch, is computed for nothing. Residual
        branches begin so on purpose; one that is still so after training never learned.

    How:
        Every gamma is exactly 0 and the statistics are not the initial ones.

    Example:
        zero_init_residual=True with gammas that the optimizer does not know.

    Fix:
        Check that the optimizer gets the layer's parameters; or remove the branch.

    References:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1.
    """
    for name, stored in evidence.stored.items():
        if _is_silent(stored) and not stored.is_initial:
            yield Finding(
                name,
                f"gamma = 0 in all {stored.channels} channels",
                "some gamma that is not 0",
                "The layer returns a constant; its branch is computed for nothing.",
                "check that the optimizer updates it, or remove the branch",
            )


def missing_counter(evidence: Evidence) -> Iterator[Finding]:
    """num_batches_tracked is missing.

    Why:
        torch's own files may lack it: they carry a version number by which torch fills it in. Files of other formats
        do not, and load_state_dict(strict=True) then fails.

    How:
        Statistics are there and num_batches_tracked is not, in a file that is not ONNX.

    Example:
        A checkpoint of torch 0.4, or one that was converted from another framework.

    Fix:
        batchnorm fix adds it with the value 0. Nothing but momentum=None uses it.
    """
    if evidence.file is None or evidence.file.format == "onnx":
        return
    names = [
        name
        for name, stored in evidence.stored.items()
        if stored.running_var is not None and stored.num_batches_tracked is None
    ]
    for name in names:
        yield Finding(
            name,
            "no num_batches_tracked",
            "one counter for each layer",
            "load_state_dict(strict=True) may refuse the file.",
            f"batchnorm fix {target_of(evidence)}",
            fixable=Fix.SAFE,
        )


def _is_whole(stored: Stored) -> bool:
    """Whether there are variances, and gammas and betas of the same number or none."""
    sizes = {len(values) for values in (stored.running_var, stored.weight, stored.bias) if values is not None}
    return stored.running_var is not None and len(sizes) == 1


def _is_silent(stored: Stored) -> bool:
    return bool(stored.weight) and not any(stored.weight or ())


def _constant(evidence: Evidence, stored: Stored) -> tuple[int, ...]:
    limit = CONSTANT * evidence.eps(stored.name)
    return _where(stored.running_var, lambda var: 0 <= var < limit)


def _gain(evidence: Evidence, stored: Stored, channel: int) -> float:
    """|gamma| / sqrt(var + eps)."""
    gamma = abs(stored.weight[channel]) if stored.weight else 1.0
    spread = (stored.running_var[channel] if stored.running_var else 1.0) + evidence.eps(stored.name)
    return gamma / math.sqrt(spread) if spread > 0 else math.inf


def _is_dead(evidence: Evidence, stored: Stored, channel: int) -> bool:
    var = stored.running_var[channel] if stored.running_var else 1.0
    if not 0 <= var < math.inf:
        return False
    gain = _gain(evidence, stored, channel)
    if var < SMALL * evidence.eps(stored.name) and gain <= STEEP and gain * math.sqrt(var) < FAINT:
        return True
    gamma = abs(stored.weight[channel]) if stored.weight else 1.0
    beta = stored.bias[channel] if stored.bias else 0.0
    return gamma < FAINT and _activity(beta, gamma) < RARELY


def _activity(beta: float, gamma: float) -> float:
    """P(gamma z + beta > 0) for a standard normal z."""
    return NormalDist().cdf(beta / gamma) if gamma else float(beta > 0)


def _where(values: Sequence[float] | None, test: Callable[[float], bool]) -> tuple[int, ...]:
    return tuple(i for i, value in enumerate(values or ()) if test(value))


def _least(stored: Stored, channels: tuple[int, ...]) -> float:
    return min(var for i, var in enumerate(stored.running_var or ()) if i in channels)


def _is_broken(value: float) -> bool:
    return not math.isfinite(value)
