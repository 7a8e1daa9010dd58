"""BN1: what a layer stores."""

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
# -var of at most this share of eps moves 1/sqrt(var + eps) by half of it: less than float32 resolves
ROUNDING = 2.0**-24
# float32 keeps 24 bits: an input this far from zero in its sd has lost 13 of them before it is normalized
FAR = 1e4
COUNTED = 2  # the version of torch's layers that added num_batches_tracked


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
                remedy=measure_again(evidence),
                channels=channels,
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
                consequence="Rounding below zero." if safe else "The channel's eval output is NaN, or far too large.",
                remedy=mend(evidence) if safe else measure_again(evidence),
                channels=channels,
                fixable=Fix.SAFE if safe else Fix.DATA,
            )


def denormal_variance(evidence: Evidence) -> Iterator[Finding]:
    """A stored variance is a denormal number.

    Why:
        Processors and compilers treat denormals differently, some as 0 and some slowly, so that times depend on the
        machine. Beside eps it is 0 anyway: no output changes.

    How:
        0 < running_var < the smallest normal number of its type (1.2e-38 for float32), and at most eps / 2^24. A
        float16 of 6e-5 is denormal too, but no zero beside eps: not meant. Silent for channels that BN106 names.

    Example:
        A channel behind a dead ReLU: its variance shrinks by 0.9 in each step and never arrives at 0.

    Fix:
        batchnorm fix sets it to 0; eval outputs change by less than float32 resolves.
    """
    for name, stored in evidence.stored.items():
        tiny = TINY.get(stored.dtypes.get("running_var", ""), TINY["float32"])
        limit = min(tiny, ROUNDING * evidence.eps(name))
        tiny_ones = _where(stored.running_var, lambda var, limit=limit: 0 < var < limit)
        dead = dead_channels(evidence, stored) if tiny_ones else set()
        if channels := tuple(i for i in tiny_ones if i not in dead):
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
                channels=channels,
            )


def half_precision_statistics(evidence: Evidence) -> Iterator[Finding]:
    """Statistics are stored in half precision.

    Why:
        A float16 variance overflows at 65504. A bfloat16 average stops moving: with 8 bits, adding a tenth of a
        small difference changes nothing. Inference with them costs digits that float32 buffers keep for free.

    How:
        running_mean or running_var has the type float16 or bfloat16. Silent for ONNX, which is not trained further.

    Example:
        model.half(): running_var = inf. model.bfloat16(): a running mean that stalls at 4.78 where 4.97 is true.

    Fix:
        batchnorm fix stores them in float32, which is exact; digits that are lost come back with --data.
        This package's layers keep float32 statistics under half() and bfloat16().
    """
    for name, stored in () if _is_onnx(evidence) else evidence.stored.items():
        kinds = {stored.dtypes.get(key) for key in ("running_mean", "running_var")} & HALF
        if kinds:
            yield Finding(name, f"statistics in {' and '.join(sorted(map(str, kinds)))}", remedy=mend(evidence))


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
        if stored.is_silent and not stored.is_initial:
            yield Finding(name, f"gamma = 0 in all {stored.channels} channels")


def missing_counter(evidence: Evidence) -> Iterator[Finding]:
    """num_batches_tracked is missing where loading needs it.

    Why:
        torch fills a missing counter in, unless the state says that it was saved by a version that has one. Such a
        state lost the counter on its way, and load_state_dict(strict=True) refuses it.

    How:
        Statistics are there, num_batches_tracked is not, and the state's _metadata has version 2 or more for the
        layer; or the counter is not one number. States without _metadata (plain dicts, safetensors) load without
        counters, and so do old ones.

    Example:
        state = model.state_dict(); del state["bn.num_batches_tracked"]; torch.save(state, path)

    Fix:
        batchnorm fix adds it with the value 0. Nothing but momentum=None uses it.
    """
    for name, stored in evidence.stored.items():
        if stored.running_var is not None and (why := _counter_refused(evidence, stored)):
            yield Finding(name, why, remedy=mend(evidence))


def _counter_refused(evidence: Evidence, stored: Stored) -> str:
    """What loading stumbles over in a layer's counter; "" if nothing."""
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
