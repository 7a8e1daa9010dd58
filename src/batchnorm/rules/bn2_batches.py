"""BN2: what batches hold, as measured on data."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING

from batchnorm.rules.bn1_channels import dead_before, still_channels
from batchnorm.rules.bn4_shift import is_as_constructed
from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import measure_again, unsettled
from batchnorm.rules.update_counts import StartResidue, claims, is_nearer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.rules.rule_evidence import Evidence, Measured

# Probability of a false alarm of a whole model, and the share of its information that a batch may lose: a batch that
# counts for half as many examples has means with sqrt(2) times the noise.
CLUSTERING_P = 1e-3
CLUSTERED_SHARE = 0.5
# 5 % zeros among values of mean 2 sd move the mean by 0.1 sd
PADDED_SHARE = 0.05
# A gap of 0.25 sd disturbs outputs as the noise of a batch of 24 does: 1.5 / M = 0.25^2. Models that are still trained
# at a high rate, whose statistics lag behind their weights, were measured up to 0.2.
STALE_GAP = 0.25
# 3 sd of what averaging and the choice of the examples explain
STALE_OVER_NOISE = 3.0
# of the batch's noise one sees little with fewer
FEWEST_BATCHES = 4
# parts of the stored statistics worth a word
_SHARE_WORTH_A_WORD = 0.05


def correlated_batches(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Batches differ from each other by more than chance: they are sorted or correlated.

    Why:
        Batch statistics stand for the data only if a batch is a random draw. Sorted by class, taken from one video
        or one patient, a batch tells what the others hold, and the stored statistics remember the last few.

    How:
        An F-test of batch means against the means of single examples, in every channel of a layer. Fires if its p,
        times channels and layers, is below 0.001, and batch means scatter as if a batch had fewer than half of its
        examples; and if batches differ less, by ranks, in each of 1,999 random orders of the examples, which holds for
        every law. Needs 4 batches, in the loader's order; silent where a layer has other rows than the model.

    Example:
        DataLoader(images_sorted_by_class, batch_size=32)  # shuffle=False

    Fix:
        shuffle=True, or a sampler that mixes sources. If these were test data in their own order: give training data.

    References:
        Snedecor and Cochran 1989, chapters 12 and 13.
        Pitman 1937, "Significance tests which may be applied to samples from any populations".
        Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 6.
    """
    measured = evidence.measured or {}
    found = {
        name: (m.effective_examples, m.batch_examples)
        for name, m in measured.items()
        if m.clustering_p is not None and m.clustering_p * len(measured) < CLUSTERING_P
        if m.effective_examples and m.batch_examples and m.effective_examples < CLUSTERED_SHARE * m.batch_examples
    }
    order_p = evidence.run.order_p if evidence.run else None
    if found and order_p is not None and order_p < CLUSTERING_P:
        worst = min(found, key=lambda name: found[name][0] / found[name][1])
        effective, size = found[worst]
        yield Finding(
            "",
            f"a batch of {size:.0f} counts for {effective:.1f} random examples in {worst!r} (p = "
            f"{order_p:.1g}; "
            f"{len(found)} of {len(measured)} layers)",
            limit=f"{CLUSTERED_SHARE * size:.0f} examples",
        )
    if all(m.clustering_p is None for m in measured.values()):
        yield Unknown("", "it takes 4 batches whose rows in a layer are the model's examples, each used once")


def padding_counted(evidence: Evidence) -> Iterator[Finding]:
    """Padding is counted in the statistics.

    Why:
        Padded positions are not data, but they weigh as much in the mean and variance. Valid positions then do not
        come out at mean 0 and variance 1, and an example's output depends on how long its neighbours are.

    How:
        In (N, C, L) inputs, positions at the end that repeat one value in all channels, with ends that differ between
        examples. Limit: 5 % of all positions. Other layouts, and padding that was smeared by layers before, are not
        seen.

    Example:
        pad_sequence(sounds, batch_first=True).transpose(1, 2)  ->  Conv1d  ->  BatchNorm1d

    Fix:
        Normalize valid positions only: pick them by their mask as (values, C), and put them back.

    References:
        pytorch#70529, deepspeech.pytorch#312.
    """
    for name, found in (evidence.measured or {}).items():
        if found.padded_share > PADDED_SHARE:
            yield Finding(name, f"{found.padded_share:.0%} of the positions are padding")


def non_finite_batch(evidence: Evidence) -> Iterator[Finding]:
    """The data bring NaN or infinity into a layer.

    Why:
        In train mode one NaN makes a channel's batch statistics NaN, and with torch.nn's layers the stored ones for
        ever: training goes on, eval mode gives NaN.

    How:
        NaN and infinite values in the inputs of layers, in eval mode. Only the first layer that gets any is named.
        Silent behind a layer whose own values make them (BN102, BN103, BN107).

    Example:
        images[17, 0, 0, 0] = float("inf")

    Fix:
        Find the examples: [i for i, (x, *_) in enumerate(data) if not x.isfinite().all()]. Layers of this package
        leave such batches out of what they store.

    References:
        pytorch#88474, pytorch#115500.
    """
    for name, found in (evidence.measured or {}).items():
        if found.non_finite:
            yield Finding(name, f"{found.non_finite} NaN or infinite inputs in {found.examples} examples")
            return
        if _breaks_outputs(evidence, name):
            return


def train_eval_gap(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Train mode and eval mode give different outputs for the same data.

    Why:
        The model learned with batch statistics and is used with stored ones. If these are stale, it is used with
        other outputs than it learned with.

    How:
        The root mean square difference of a layer's outputs in units of their standard deviation, in two parts: noise
        (batch against all the data) and stale (all the data against what is stored). Fires if the stale part is above
        0.25 and above 3 times what averaging and the choice of examples explain, noise sqrt(m / (2 - m) + 1 / batches)
        for momentum m, in channels that are shown to have other statistics whatever the law of the examples (as in
        BN116). Not checked where examples too rare to be among these can explain it. Needs 4 batches. Silent for
        frozen layers and those that were never updated (BN101). A cause is told where the numbers show it: if what is
        stored is nearer, by half, to a mixture of the data's statistics with the initial ones, or to unbiased variances
        of single batches.

    Example:
        Training stopped after 20 steps, or weights were averaged after the statistics were stored.

    Fix:
        batchnorm.recalibrate(model, loader) measures the statistics anew, on training data. If the data are not those
        of training, the gap is their shift (BN401), and measuring on them fits the model to them.

    References:
        pytorch#5406, pytorch#19902. Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
    """
    for name, found in (evidence.measured or {}).items():
        stored, noise, stale = evidence.stored.get(name), found.gap_noise, found.gap_stale
        if is_as_constructed(stored) or _is_frozen(evidence, name):
            continue
        if found.batches < FEWEST_BATCHES:
            yield Unknown("", f"it takes {FEWEST_BATCHES} batches")
            continue
        if stale is None or noise is None:
            yield Unknown(name, "no batch with 2 finite values in each channel, or outputs that do not vary")
            continue
        averaging = noise * math.sqrt(_noise_of_averaging(evidence, name) + 1 / found.batches)
        limit = max(STALE_GAP, STALE_OVER_NOISE * averaging)
        shown = found.gap_shown or 0.0
        if shown <= limit < stale:
            yield Unknown(name, f"stored statistics move the output by {stale:.2g} sd, {unsettled(found)}")
        if shown > limit:
            yield Finding(
                name,
                f"stored statistics move the output by {shown:.2g} sd, the batch's noise by {noise:.2g} sd",
                limit=f"{limit:.2g} sd",
                consequence=f"On these data eval mode and train mode give different outputs: "
                f"{_cause(evidence, name, found)}.",
                remedy=f"if these are training data: {measure_again(evidence)}",
            )


def constant_on_data(evidence: Evidence) -> Iterator[Finding]:
    """A channel has one value on all the data.

    Why:
        Its output is beta and nothing else, and in train mode it divides by sqrt(eps): rounding errors are magnified
        up to 316 times at eps = 1e-5.

    How:
        A standard deviation no larger than the rounding of the input's type, over all examples. Silent where BN106
        names all of these channels, here or before a depthwise convolution.

    Example:
        A column of zeros; a filter behind a ReLU that never fires.

    Fix:
        Look at what feeds the channel; remove the column or the filter.

    References:
        Ioffe and Szegedy 2015, section 3: eps.
    """
    for name, found in (evidence.measured or {}).items():
        stored = evidence.stored.get(name)
        named = (still_channels(evidence, stored) if stored else set()) | dead_before(evidence, name)
        if found.constant and found.examples > 1 and not named.issuperset(found.constant):
            yield Finding(
                name,
                f"{len(found.constant)} of {len(found.mean)} channels do not vary in {found.examples} examples",
                channels=found.constant,
            )


def _breaks_outputs(evidence: Evidence, layer: str) -> bool:
    """Whether what a layer stores turns good inputs into NaN or infinity."""
    stored = evidence.stored.get(layer)
    if stored is None:
        return False
    tensors = (stored.running_mean, stored.running_var, stored.weight, stored.bias)
    broken = not all(map(math.isfinite, chain.from_iterable(tensor or () for tensor in tensors)))
    return broken or any(value + evidence.eps(layer) <= 0 for value in stored.running_var or ())


def _is_frozen(evidence: Evidence, layer: str) -> bool:
    module = (evidence.modules or {}).get(layer)
    return module is not None and module.frozen


def _noise_of_averaging(evidence: Evidence, layer: str) -> float:
    """Variance of the running average over that of one batch; infinite if it diverges."""
    momentum = evidence.momentum(layer) or 0.0
    return momentum / (2 - momentum) if momentum < 2 else math.inf


def _cause(evidence: Evidence, layer: str, found: Measured) -> str:
    """What makes stored statistics differ from fresh ones, in words: only what the numbers show."""
    claim, share = claims(evidence)[layer]
    if claim is StartResidue.SHOWN and share > _SHARE_WORTH_A_WORD:
        return f"{share:.0%} of the stored statistics are still the initial ones"
    values = found.examples / found.batches * found.values_per_example
    unbiased = [var * values / (values - 1) for var in found.var] if values > 1 else []
    if unbiased and is_nearer(evidence.stored[layer], found.mean, unbiased, found, evidence.eps(layer)):
        shrinks = 1 - math.sqrt(1 - 1 / values)
        return f"stored variances are unbiased, which alone shrinks outputs by {shrinks:.0%} at {values:.0f} values"
    return "what is stored comes from other weights or other data"
