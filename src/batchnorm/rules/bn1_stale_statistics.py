"""BN1: whether what a layer stores comes from the data and the weights that it is used with."""

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
    from batchnorm.rules.rule_evidence import Evidence, Measured

__all__ = ["RESIDUE", "USUAL_MOMENTUM"]

# two-sided p = 6e-5 for one channel; M_eff is an estimate, so a layer is named only if a tenth of it is beyond
STALE_T = 4.0
STALE_SHARE = 0.1
# smaller ones do not matter: 0.1 sd is the noise of a batch of 100, 1.25 changes outputs by 11 %
STALE_MEAN, STALE_VARIANCE = 0.1, 1.25


def never_updated_statistics(evidence: Evidence) -> Iterator[Finding]:
    """Stored statistics are the initial ones, mean 0 and variance 1 exactly, behind trained weights.

    Why:
        Train mode does not use stored statistics, so nothing is seen in training: the loss falls, and eval mode
        answers at random.

    How:
        Every running_mean is exactly 0 and every running_var exactly 1, in a model that is trained: another layer
        has other statistics, some gamma or beta has moved, or num_batches_tracked counted batches. A count of 0 says
        nothing: healthy shipped models have it. Silent where data have that mean and variance.

    Example:
        Weights copied by name into a model, buffers forgotten: load_state_dict(..., strict=False).

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
    """Every layer is as it was constructed.

    Why:
        If this is meant to be a trained model, its batch norm layers were not saved or not loaded.

    How:
        In every layer mean 0, variance 1, gamma 1 or 0, and beta 0, exactly, and no batch was counted.

    Example:
        batchnorm doctor model.py:make_model, without --weights

    Fix:
        --weights FILE; or nothing, for a new model.
    """
    if evidence.stored and _is_untrained(evidence) and not evidence.unread(("weight", "bias")):
        yield Finding("", "initial statistics, gamma and beta in every layer")


def few_updates(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The stored statistics still contain part of their initial values.

    Why:
        A running average starts at mean 0 and variance 1 and forgets by 1 - momentum in each step. After a few steps
        much of that start is still in it: 35 % after 10, 1 % after 44, for momentum 0.1.

    How:
        r = (1 - momentum)^num_batches_tracked > 0.01, with momentum 0.1 where a file does not tell, and it is shown:
        data whose statistics m, v are farther from what is stored than (1 - r) m, r + (1 - r) v, by half or more; or,
        without data, two variances that are r exactly, as those of channels that never varied, or four layers whose
        smallest variances begin at r. Silent if a variance is below r, which no update leaves, and for a count of 0
        and momentum=None. A small count alone shows nothing, since recalibrate and update_bn leave one too: then it
        is not checked.

    Example:
        A short fine-tuning with momentum=0.01: after 100 batches 37 % of the start is left.

    Fix:
        batchnorm.recalibrate(model, loader): exact statistics in one pass.

    References:
        chemprop#607.
    """
    known = claims(evidence)
    for name, (claim, share) in known.items():
        stored, module = evidence.stored[name], (evidence.modules or {}).get(name)
        if claim is StartResidue.SHOWN and not (module and module.frozen):
            told = evidence.momentum(name) is not None or evidence.modules is not None
            yield Finding(
                name,
                f"{stored.num_batches_tracked} updates: {share:.0%} of the initial statistics left"
                f"{'' if told else ', if momentum is 0.1'}",
                limit=f"{RESIDUE:.0%}",
                remedy=measure_again(evidence),
            )
    if some := [name for name, (claim, _) in known.items() if claim is StartResidue.OPEN]:
        counts = sorted({str(evidence.stored[name].num_batches_tracked) for name in some}, key=int)
        what = f"num_batches_tracked of {listed(counts)} is that of few updates, or of statistics measured at once"
        yield Unknown("", f"{what}; data tell")


def averaged_weights(evidence: Evidence) -> Iterator[Finding]:
    """Weights are averages, statistics are those of other weights.

    Why:
        Averaged weights (EMA, SWA, schedule-free) make other activations than any of the weights that were averaged.
        Statistics collected with those do not fit.

    How:
        Two parts of a file have the same layers and, bit for bit, the same statistics, and the weight before some
        layer is another one: the statistics of one of them were copied. An error where a name says that it is an
        average (ema, swa, averaged), a warning where names say nothing (q_net and q_net_target). Silent where only
        weights behind the last layer differ, such as two heads; where statistics are initial; where some layers have
        their own; for frozen layers without a counter; and for the same weights in another type. Or a model is in an
        AveragedModel that does not average buffers; or the optimizer is a schedule-free one, whose eval weights are
        averages. Statistics that were measured again look the same without data; with data that show that they
        fit, it is silent.

    Example:
        AveragedModel(model), saved without update_bn

    Fix:
        batchnorm.recalibrate(averaged_model, loader) before it is saved or evaluated.

    References:
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima", section 3.2.
    """
    for layer, measured, severity in _reasons_for_averages(evidence):
        unless = "" if severity is Severity.ERROR else ", unless its layers were frozen on purpose"
        yield Finding(
            layer,
            measured,
            consequence=f"Eval mode normalizes the activations of these weights by statistics of other "
            f"weights{unless}.",
            remedy=measure_again(evidence) if evidence.file else "batchnorm.recalibrate(averaged_model, loader)",
            severity=severity,
        )


def stale_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Stored statistics differ from fresh ones by more than their noise.

    Why:
        Running averages lag behind weights that still move, and forget early batches. Eval mode then normalizes by
        what the layer used to see.

    How:
        For each channel, t = (stored - fresh) / standard error, for the mean and for the log of the variance. The
        error is that of a running average over batches of M_eff independent values, sd sqrt(a / ((2 - a) M_eff)) for
        momentum a, and that of the fresh estimate. Fires if a tenth of the channels have |t| > 4, are off by more than
        0.1 sd or 1.25 times the variance, and are shown to be, whatever the law of the examples: their clipped
        scores have a larger mean than any law of the stored statistics gives them, at a chance of 0.01 for a layer at
        most. Not checked where examples too rare to be among these can explain what is
        missing, as with a variance that is only smaller. It takes 4 batches and a momentum. The data do not say what
        they are: if they are not training data, the statistics may be right and the data others; BN401 tells a large
        shift.

    Example:
        After 20 steps at a high rate: loss 0.356 with fresh statistics, 0.476 with stored ones.

    Fix:
        batchnorm.recalibrate(model, loader), with training data. With other data it fits the model to those: that
        raised the error of a trained model from 0.099 to 0.246.

    References:
        Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
        Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting".
    """
    for name, measured in (evidence.measured or {}).items():
        stored = evidence.stored.get(name)
        if stored is None or stored.running_var is None or stored.is_initial:
            continue
        if measured.t_mean is None and not _is_frozen(evidence, name):
            yield Unknown(name, "the noise of stored statistics is known from 4 batches on, for a momentum in (0, 2)")
        off, enough = _stale(measured), max(1.0, STALE_SHARE * len(measured.mean))
        channels = tuple(channel for channel in off if channel in measured.shown)
        if len(channels) < enough <= len(off):
            yield Unknown(name, f"{some_of(off, stored)} are off, {unsettled(measured)}")
        elif len(channels) >= enough:
            largest = max((abs(_t(measured, i)) for i in channels if math.isfinite(_t(measured, i))), default=math.inf)
            yield Finding(
                name,
                f"|t| up to {largest:.0f}, {some_of(channels, stored)} beyond the limit",
                remedy=f"if these are training data: {measure_again(evidence)}",
                channels=channels,
            )


def _stale(measured: Measured) -> tuple[int, ...]:
    if measured.t_mean is None:
        return ()
    return tuple(
        i
        for i in range(len(measured.mean))
        if abs(_t(measured, i)) > STALE_T and i not in measured.constant
        if abs(measured.mean_deviation[i]) > STALE_MEAN
        or not 1 / STALE_VARIANCE < measured.var_ratio[i] < STALE_VARIANCE
    )  # fmt: skip


def _t(measured: Measured, channel: int) -> float:
    """The larger one of a channel's two t."""
    values = [t[channel] for t in (measured.t_mean, measured.t_var) if t is not None]
    return max(values, key=abs)


def _reasons_for_averages(evidence: Evidence) -> Iterator[tuple[str, str, Severity]]:
    """The part that has statistics of other weights, what shows it, and how bad that is."""
    structure, optimizer = evidence.structure, evidence.optimizer
    if evidence.measured and _fit(evidence):
        return
    if structure and "AveragedModel" in structure.wrappers and structure.averages_buffers is False:
        yield "", "AveragedModel with use_buffers=False", Severity.ERROR
    if optimizer and optimizer.is_schedule_free:
        yield "", f"{optimizer.kind} evaluates averages", Severity.ERROR
    if evidence.file:
        yield from (_copied(evidence.file, twins) for twins in find_twins(evidence.file))


def _copied(file: Checkpoint, twins: Twins) -> tuple[str, str, Severity]:
    """An average has the statistics of what it averages; of two others, the second is named."""
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
    """The state that is all of a part of a file, as --state takes it; else the part."""
    states = [name for name in file.states if part and is_below(part, name)]
    return states[0] if len(states) == 1 else part


def _is_average(file: Checkpoint, part: str) -> bool:
    states = (state.is_average for name, state in file.states.items() if is_below(name, part) or is_below(part, name))
    return bool(part) and (any(states) or any(map(says_average, part.split("."))))


def _fit(evidence: Evidence) -> bool:
    """Whether data show that statistics fit the weights, as after update_bn."""
    known = all(measured.t_mean is not None for measured in (evidence.measured or {}).values())
    return known and not any(isinstance(found, Finding) for found in stale_statistics(evidence))


def _is_untrained(evidence: Evidence) -> bool:
    """Whether every layer that stores statistics is as it was constructed, and has counted no batch."""
    layers = [stored for stored in evidence.stored.values() if stored.running_var is not None]
    new = (stored.is_initial and _is_initial_affine(stored) and not is_counted(stored) for stored in layers)
    return bool(layers) and all(new)


def _is_frozen(evidence: Evidence, name: str) -> bool:
    module = (evidence.modules or {}).get(name)
    return module is not None and module.frozen


def _is_initial_affine(stored: Stored) -> bool:
    gammas = set(stored.weight or (1.0,))
    return gammas in ({1.0}, {0.0}) and not any(stored.bias or ())
