"""BN1: single stored values and tensors of a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from batchnorm.rules.bn1_channels import dead_channels
from batchnorm.rules.finding import Finding, Fix
from batchnorm.rules.phrases import measure_again, mend, some_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.rule_evidence import Evidence

HALF = {"float16", "bfloat16"}
# smallest normal number of each type
TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
# a variance between -eps / 2^24 and 0 changes 1/sqrt(var + eps) by at most 2^-25 of its value: less than float32
# resolves
ROUNDING = 2.0**-24
# an input that is 10,000 of its sd from zero has lost 13 of float32's 24 bits before it is normalized
FAR = 1e4
COUNTED = 2  # the version of torch's layers that added num_batches_tracked


def non_finite_statistics(evidence: Evidence) -> Iterator[Finding]:
    """A stored mean or variance is NaN or infinite.

    Why:
        One bad batch is enough: a running average that is NaN stays NaN. Training goes on, because train mode does not
        use the average, but every eval output of the channel is NaN.

    How:
        running_mean or running_var has a value that is NaN or infinite.

    Example:
        fp16 overflow in one step of mixed precision: the loss scaler skipped the step, but the buffers kept the
        infinity.

    Fix:
        batchnorm fix with --data measures the statistics again. Layers of this package leave batches with NaN or
        infinity out of the stored statistics.

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
                remedy=measure_again(evidence),
                channels=channels,
            )


def negative_variance(evidence: Evidence) -> Iterator[Finding]:
    """A stored variance is negative.

    Why:
        If var < -eps, the square root is NaN. If var = -eps, outputs are infinite or NaN. If -eps < var < 0, the
        channel is magnified more than a variance of 0 would do.

    How:
        running_var < 0. A value of at least -eps / 2^24 is rounding, and the safe fix sets it to 0. A lower value has
        to be measured again.

    Example:
        Averages of E[x^2] - E[x]^2, or weights that were extrapolated or quantized together with buffers.

    Fix:
        batchnorm fix; with --data if the value is not rounding.
    """
    for name, stored in evidence.stored.items():
        if channels := _where(stored.running_var, lambda var: -math.inf < var < 0):
            lowest = _least(stored, channels)
            safe = -lowest <= ROUNDING * evidence.eps(name)
            yield Finding(
                name,
                f"running_var down to {lowest:.3g}, {some_of(channels, stored)}",
                consequence="Rounding below zero." if safe else "The channel's eval output is NaN or too large.",
                remedy=mend(evidence) if safe else measure_again(evidence),
                channels=channels,
                fixable=Fix.SAFE if safe else Fix.DATA,
            )


def denormal_variance(evidence: Evidence) -> Iterator[Finding]:
    """A stored variance is a denormal number.

    Why:
        Some processors and compilers treat denormal numbers as 0, others compute slowly with them, so run times depend
        on the machine. Compared with eps such a variance is 0 anyway: with 0 in its place no output changes.

    How:
        0 < running_var < the smallest normal number of its type (1.2e-38 for float32), and below eps / 2^24. A float16
        variance of 6e-5 is denormal too, but not negligible beside eps, so it is not reported. Channels that BN106
        names are not reported either.

    Example:
        A channel behind a dead ReLU: each step multiplies its variance by 0.9, and it never becomes 0.

    Fix:
        batchnorm fix sets it to 0; eval outputs change by less than float32 resolves.
    """
    for name, stored in evidence.stored.items():
        tiny = TINY.get(stored.dtypes.get("running_var", ""), TINY["float32"])
        limit = min(tiny, ROUNDING * evidence.eps(name))
        tiny_channels = _where(stored.running_var, lambda var, limit=limit: 0 < var < limit)
        dead = dead_channels(evidence, stored) if tiny_channels else set()
        if channels := tuple(i for i in tiny_channels if i not in dead):
            yield Finding(
                name,
                f"running_var down to {_least(stored, channels):.3g}, {some_of(channels, stored)}",
                limit=f"0, or at least {tiny:.3g}",
                remedy=mend(evidence),
                channels=channels,
            )


def non_finite_affine(evidence: Evidence) -> Iterator[Finding]:
    """Gamma or beta is NaN or infinite.

    Why:
        Every output of the channel is NaN or infinite, in train and in eval mode. So is what later layers compute
        from it.

    How:
        weight or bias has a value that is NaN or infinite.

    Example:
        A training that diverged, saved afterwards

    Fix:
        Go back to an earlier checkpoint. To examine the rest of the model, batchnorm fix --unsafe-fixes sets such
        gammas to 1 and such betas to 0.
    """
    for name, stored in evidence.stored.items():
        gammas, betas = _where(stored.weight, _is_broken), _where(stored.bias, _is_broken)
        if channels := tuple(sorted({*gammas, *betas})):
            yield Finding(
                name,
                f"{'gamma' if gammas else 'beta'} is NaN or infinite, {some_of(channels, stored)}",
                channels=channels,
            )


def half_precision_statistics(evidence: Evidence) -> Iterator[Finding]:
    """Statistics are stored in half precision.

    Why:
        A float16 variance overflows at 65504. A bfloat16 average stops changing: with 8 bits, adding a tenth of a small
        difference has no effect. In inference, digits are lost that float32 statistics keep at no cost.

    How:
        running_mean or running_var has the type float16 or bfloat16. Not reported for ONNX, which is not trained
        further.

    Example:
        model.half(): running_var = inf. model.bfloat16(): a running mean that stalls at 4.78 where 4.97 is true.

    Fix:
        batchnorm fix stores the same values in float32. Only a new measurement restores lost digits:
        batchnorm.recalibrate(model, loader). This package's layers keep float32 statistics under half() and bfloat16().
    """
    for name, stored in () if _is_onnx(evidence) else evidence.stored.items():
        kinds = {stored.dtypes.get(key) for key in ("running_mean", "running_var")} & HALF
        if kinds:
            yield Finding(name, f"statistics in {' and '.join(sorted(map(str, kinds)))}", remedy=mend(evidence))


def incomplete_layer(evidence: Evidence) -> Iterator[Finding]:
    """A layer lacks one of its statistics, or their sizes differ.

    Why:
        load_state_dict(strict=True) refuses a missing tensor. With strict=False the tensor keeps its initial value,
        without a message.

    How:
        Only one of running_mean and running_var is stored, or tensors of one layer differ in length.

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
            )


def far_mean(evidence: Evidence) -> Iterator[Finding]:
    """A channel's mean is very far from zero in units of its standard deviation.

    Why:
        float32 has 7 digits. If values are 10,000 standard deviations from zero, 3 digits are left for their variation.
        Folding computes beta - mean * gamma / sd and loses these digits too.

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
                channels=channels,
            )


def silent_layer(evidence: Evidence) -> Iterator[Finding]:
    """Every gamma of a trained layer is zero.

    Why:
        The layer returns beta for every input, so everything before it in its branch is computed for nothing. Residual
        branches often start with gamma 0 on purpose. A branch that still has gamma 0 after training never learned.

    How:
        Every gamma is exactly 0 and the statistics are not the initial ones.

    Example:
        zero_init_residual=True, with gammas that are in no parameter group of the optimizer

    Fix:
        Check that the optimizer has the layer's parameters; or remove the branch.

    References:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1.
    """
    for name, stored in evidence.stored.items():
        if stored.is_silent and not stored.is_initial:
            yield Finding(name, f"gamma = 0 in all {stored.channels} channels")


def missing_counter(evidence: Evidence) -> Iterator[Finding]:
    """num_batches_tracked is missing where loading needs it.

    Why:
        torch adds a missing counter to states of old versions, which had no counter. If a state says that it is of a
        newer version, its counter was lost, and load_state_dict(strict=True) refuses the state.

    How:
        Statistics are stored, but no num_batches_tracked, and the state's _metadata has version 2 or more for the
        layer; or the counter is not one number. States without _metadata (plain dicts, safetensors) and states of old
        versions load without counters.

    Example:
        state = model.state_dict(); del state["bn.num_batches_tracked"]; torch.save(state, path)

    Fix:
        batchnorm fix adds the counter with the value 0. Only layers with momentum=None use it.
    """
    for name, stored in evidence.stored.items():
        if stored.running_var is not None and (why := _counter_refused(evidence, stored)):
            yield Finding(name, why, remedy=mend(evidence))


def _counter_refused(evidence: Evidence, stored: Stored) -> str:
    """Why load_state_dict(strict=True) would refuse a layer's counter; "" if it would not."""
    if evidence.file is None or stored.num_batches_tracked is not None or _is_onnx(evidence):
        return ""
    version = evidence.file.versions.get(stored.name, 0)
    if "num_batches_tracked" in stored.dtypes:
        return "unusable num_batches_tracked"
    return f"no num_batches_tracked in a state of version {version}" if version >= COUNTED else ""


def _is_onnx(evidence: Evidence) -> bool:
    return evidence.file is not None and evidence.file.format == "onnx"


def _where(values: Sequence[float] | None, test: Callable[[float], bool]) -> tuple[int, ...]:
    return tuple(i for i, value in enumerate(values or ()) if test(value))


def _least(stored: Stored, channels: tuple[int, ...]) -> float:
    return min(var for i, var in enumerate(stored.running_var or ()) if i in channels)


def _is_broken(value: float) -> bool:
    return not math.isfinite(value)
