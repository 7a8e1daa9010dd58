"""BN1: whether a layer's stored statistics belong to the data and the weights that it is used with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from batchnorm.checkpoint.averaged_copies import says_average
from batchnorm.checkpoint.identical_parts import find_twins
from batchnorm.checkpoint.stored import is_below
from batchnorm.rules.finding import Finding, Severity, Unknown
from batchnorm.rules.phrases import listed, measure_again, some_of, unsettled
from batchnorm.rules.update_counts import MATTERS, RESIDUE, USUAL_MOMENTUM, StartResidue, claims, is_counted, misfit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.checkpoint import Checkpoint, Stored
    from batchnorm.checkpoint.identical_parts import Twins
    from batchnorm.rules.rule_evidence import Evidence, MeasuredLayer

__all__ = ["RESIDUE", "USUAL_MOMENTUM"]

# |t| > 4 has p = 6e-5 for one channel. The noise in t is an estimate, so a tenth of the channels must exceed the limit
STALE_T = 4.0
STALE_SHARE = 0.1
# smaller differences do not matter: 0.1 sd is the noise of a mean of 100 examples, a variance ratio of 1.25 changes
# outputs by 11 %
STALE_MEAN, STALE_VARIANCE = 0.1, 1.25


def never_updated_statistics(evidence: Evidence) -> Iterator[Finding]:
    """Stored statistics are the initial ones, exactly mean 0 and variance 1, in a trained model.

    Why:
        Train mode does not use stored statistics, so the loss falls as usual. Only eval outputs are wrong, and often no
        better than random.

    How:
        In a layer every running_mean is exactly 0 and every running_var exactly 1, and the model is trained: some layer
        has other statistics, some gamma or beta differs from its initial value, or some num_batches_tracked is above 0.
        A counter of 0 proves nothing: some published models without a fault have it. Not reported if the data have mean
        0 and variance 1, up to 0.05 sd.

    Example:
        Weights copied into a model by name, but not the buffers: load_state_dict(..., strict=False)

    Fix:
        batchnorm fix with --data; or batchnorm.recalibrate(model, loader).

    References:
        Ioffe and Szegedy 2015, algorithm 2.
    """
    if _is_untrained(evidence):
        return
    for name, stored in evidence.stored.items():
        if stored.is_initial and ((distance := misfit(evidence, name)) is None or distance > MATTERS):
            yield Finding(name, "running_mean = 0 and running_var = 1 in every channel", remedy=measure_again(evidence))


def untrained_model(evidence: Evidence) -> Iterator[Finding]:
    """Every layer has the values that it was constructed with.

    Why:
        If this is meant to be a trained model, its batch norm layers were not saved or not loaded.

    How:
        In every layer the mean is exactly 0, the variance 1, gamma 1 or 0, and beta 0, and no batch was counted.

    Example:
        batchnorm doctor model.py:make_model, without --weights

    Fix:
        Give the weights: --weights FILE. A new model needs no fix.
    """
    if evidence.stored and _is_untrained(evidence) and not evidence.unread(("weight", "bias")):
        yield Finding("", "initial statistics, gamma and beta in every layer")


def few_updates(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The stored statistics still contain part of their initial values.

    Why:
        A running average starts at mean 0 and variance 1, and each update multiplies the share of these initial values
        by 1 - momentum. With momentum 0.1, 35 % are left after 10 updates and 1 % after 44.

    How:
        r = (1 - momentum)^num_batches_tracked is above 0.01, and there is a proof. (If a file does not store momentum,
        0.1 is assumed.) Proof with data of mean m and variance v: after these updates the stored statistics should be
        (1 - r) m and r + (1 - r) v. They are less than half as far from these values as from m and v, and the ratio of
        stored to measured variance differs between channels as r explains. Proof without data: two variances are
        exactly r, as in channels that never varied; or the smallest variance of each layer with this counter, in at
        least four layers, is at most 1.1 r, and some variance is above 3 r. Not reported for frozen layers, if the
        counter is 0, if momentum is None, or if a variance is below r (updates cannot make it so small). A small
        counter alone is no proof, because recalibrate and update_bn set one too: the rule then says that it cannot
        judge.

    Example:
        A short fine-tuning with momentum=0.01: after 100 batches 37 % of the initial values are left.

    Fix:
        batchnorm.recalibrate(model, loader): exact statistics in one pass.

    References:
        chemprop#607.
    """
    results = claims(evidence)
    for name, (claim, share) in results.items():
        stored, module = evidence.stored[name], (evidence.modules or {}).get(name)
        if claim is StartResidue.SHOWN and not (module and module.frozen):
            is_known = evidence.momentum(name) is not None or evidence.modules is not None
            yield Finding(
                name,
                f"{stored.num_batches_tracked} updates: {share:.0%} of the initial statistics left"
                f"{'' if is_known else ', if momentum is 0.1'}",
                limit=f"{RESIDUE:.0%}",
                remedy=measure_again(evidence),
            )
    if layers := [name for name, (claim, _) in results.items() if claim is StartResidue.OPEN]:
        counts = sorted({str(evidence.stored[name].num_batches_tracked) for name in layers}, key=int)
        what = f"num_batches_tracked {listed(counts)} means few updates, or statistics that were measured in one pass"
        yield Unknown("", f"{what}; data would show which")


def averaged_weights(evidence: Evidence) -> Iterator[Finding]:
    """Weights are averages, but the statistics belong to other weights.

    Why:
        Averaged weights (EMA, SWA, schedule-free) give other activations than any of the weights that were averaged.
        Statistics that were collected before the averaging do not fit.

    How:
        In a file: two parts have the same layers and, bit for bit, the same statistics, but a weight before some layer
        differs. So the statistics of one part were copied to the other. An error if a name says that a part is an
        average (ema, swa, averaged), a warning for other names (q_net and q_net_target). Not reported if only weights
        behind the last layer differ, such as two heads; if the statistics are initial; if some layers of the two parts
        have different statistics; for frozen layers without a counter; or if the weights differ only in their type. In
        a model: the model is in an AveragedModel that does not average buffers, or the optimizer is schedule-free, so
        that the weights in eval mode are averages. Without data the rule cannot see that the statistics were measured
        again, and reports these two cases anyway. Not reported if data show that the statistics fit.

    Example:
        AveragedModel(model), saved without update_bn

    Fix:
        batchnorm.recalibrate(averaged_model, loader) before it is saved or evaluated.

    References:
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima", section 3.2.
    """
    for layer, measured, severity in _parts_with_other_statistics(evidence):
        unless = "" if severity is Severity.ERROR else ". That is right only if these layers were frozen on purpose"
        yield Finding(
            layer,
            measured,
            consequence=f"Eval mode normalizes the activations of these weights by statistics of other "
            f"weights{unless}.",
            remedy=measure_again(evidence) if evidence.file else "batchnorm.recalibrate(averaged_model, loader)",
            severity=severity,
        )


def stale_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Stored statistics differ from those of the data by more than their noise.

    Why:
        Running averages lag behind weights that still change, and forget early batches. Eval mode then normalizes by
        the statistics of earlier inputs.

    How:
        For each channel, t = (stored - measured) / standard error, for the mean and for the log of the variance. The
        standard error has two parts: the noise of a running average with momentum a over batches of M_eff independent
        values, sd sqrt(a / ((2 - a) M_eff)), and the noise of the measured value. Reported if a tenth of the channels,
        and at least one, meet three conditions. |t| is above 4, for the mean or the variance. The mean differs by more
        than 0.1 sd, or the variance by a factor of more than 1.25. The difference is proven without an assumption about
        the distribution of the examples: a test with an error probability of at most 0.01 for a layer rejects that the
        data have the stored statistics. The rule cannot judge a difference that rare examples missing from the data may
        explain: for example, the data's variance is smaller than the stored one, and the means agree. Channels that are
        constant in the data do not count, and layers with initial statistics are left out (BN101). Needs 4 batches and
        a momentum between 0 and 2. The rule cannot know whether the data are training data. If they are not, the
        statistics may be right and the data different; BN401 reports a large shift.

    Example:
        After 20 steps at a high learning rate: loss 0.356 with measured statistics, 0.476 with the stored ones.

    Fix:
        batchnorm.recalibrate(model, loader), with training data. With other data it adapts the model to those data: in
        one trial that raised the error of a trained model from 0.099 to 0.246.

    References:
        Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
        Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting".
    """
    for name, measured in (evidence.measured or {}).items():
        stored = evidence.stored.get(name)
        if stored is None or stored.running_var is None or stored.is_initial:
            continue
        if measured.t_mean is None and not _is_frozen(evidence, name):
            yield Unknown(name, "the noise of stored statistics is known only with 4 batches and a momentum in (0, 2)")
        off, enough = _stale(measured), max(1.0, STALE_SHARE * len(measured.mean))
        channels = tuple(channel for channel in off if channel in measured.shown)
        if len(channels) < enough <= len(off):
            yield Unknown(name, f"{some_of(off, stored)} differ, {unsettled(measured)}")
        elif len(channels) >= enough:
            largest = max((abs(_t(measured, i)) for i in channels if math.isfinite(_t(measured, i))), default=math.inf)
            yield Finding(
                name,
                f"|t| up to {largest:.0f}, {some_of(channels, stored)} beyond the limit",
                remedy=f"if these are training data: {measure_again(evidence)}",
                channels=channels,
            )


def _stale(measured: MeasuredLayer) -> tuple[int, ...]:
    if measured.t_mean is None:
        return ()
    return tuple(
        i
        for i in range(len(measured.mean))
        if abs(_t(measured, i)) > STALE_T and i not in measured.constant
        if abs(measured.mean_deviation[i]) > STALE_MEAN
        or not 1 / STALE_VARIANCE < measured.var_ratio[i] < STALE_VARIANCE
    )  # fmt: skip


def _t(measured: MeasuredLayer, channel: int) -> float:
    """A channel's t for the mean or for the variance, whichever is larger in absolute value."""
    values = [t[channel] for t in (measured.t_mean, measured.t_var) if t is not None]
    return max(values, key=abs)


def _parts_with_other_statistics(evidence: Evidence) -> Iterator[tuple[str, str, Severity]]:
    """Each part that has statistics of other weights, with the evidence in words and the severity."""
    structure, optimizer = evidence.structure, evidence.optimizer
    if evidence.measured and _fit(evidence):
        return
    if structure and "AveragedModel" in structure.wrappers and structure.averages_buffers is False:
        yield "", "AveragedModel with use_buffers=False", Severity.ERROR
    if optimizer and optimizer.is_schedule_free:
        yield "", f"with {optimizer.kind} the weights in eval mode are averages", Severity.ERROR
    if evidence.file:
        yield from (_reason_of_twins(evidence.file, twins) for twins in find_twins(evidence.file))


def _reason_of_twins(file: Checkpoint, twins: Twins) -> tuple[str, str, Severity]:
    """Place, evidence in words and severity for two parts with equal statistics.

    The place is the part that is an average. If both parts or neither are averages, it is the second part.
    """
    first, second = twins.first, twins.second
    if _is_average(file, first) and not _is_average(file, second):
        first, second = second, first
    severity = Severity.ERROR if _is_average(file, second) else Severity.WARNING
    first, second = _state_of(file, first), _state_of(file, second)
    than = repr(first) if first else "the rest"
    where = second if second in file.states else file.shown(second)
    return (
        where,
        f"{second!r} has other weights than {than} and the same statistics, bit for bit",
        severity,
    )


def _state_of(file: Checkpoint, part: str) -> str:
    """The one state in a part of a file, as a name for --state; the part itself if it has no state or several."""
    states = [name for name in file.states if part and is_below(part, name)]
    return states[0] if len(states) == 1 else part


def _is_average(file: Checkpoint, part: str) -> bool:
    states = (state.is_average for name, state in file.states.items() if is_below(name, part) or is_below(part, name))
    return bool(part) and (any(states) or any(map(says_average, part.split("."))))


def _fit(evidence: Evidence) -> bool:
    """Whether data show that the statistics fit the weights, as after update_bn."""
    is_complete = all(measured.t_mean is not None for measured in (evidence.measured or {}).values())
    return is_complete and not any(isinstance(result, Finding) for result in stale_statistics(evidence))


def _is_untrained(evidence: Evidence) -> bool:
    """Whether all layers with statistics have the values of their construction, and have counted no batch."""
    layers = [stored for stored in evidence.stored.values() if stored.running_var is not None]
    new = (stored.is_initial and _is_initial_affine(stored) and not is_counted(stored) for stored in layers)
    return bool(layers) and all(new)


def _is_frozen(evidence: Evidence, name: str) -> bool:
    module = (evidence.modules or {}).get(name)
    return module is not None and module.frozen


def _is_initial_affine(stored: Stored) -> bool:
    gammas = set(stored.weight or (1.0,))
    return gammas in ({1.0}, {0.0}) and not any(stored.bias or ())
