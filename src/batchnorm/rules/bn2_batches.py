"""BN2: the contents of batches, measured on data."""

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

    from batchnorm.rules.rule_evidence import Evidence, MeasuredLayer

# Largest probability of a false finding in a whole model; and the smallest allowed ratio of a batch's effective number
# of examples to its number of examples: at one half, means of batches have sqrt(2) times the noise.
CLUSTERING_P = 1e-3
CLUSTERED_SHARE = 0.5
# if 5 % of the values are zeros and the others have a mean of 2 sd, the zeros move the mean by 0.1 sd
PADDED_SHARE = 0.05
# A gap of 0.25 sd changes outputs as much as the noise of a batch of M = 24 examples: 1.5 / M = 0.25^2. In models that
# are still trained at a high rate, where statistics lag behind the weights, gaps of up to 0.2 were measured.
STALE_GAP = 0.25
# times the gap that averaging and the choice of the examples explain
STALE_OVER_NOISE = 3.0
# with fewer batches their noise cannot be measured well
FEWEST_BATCHES = 4
# a finding mentions initial values only if they are a larger share of the stored statistics
_SHARE_WORTH_A_WORD = 0.05


def correlated_batches(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Batches differ from each other by more than chance: they are sorted or correlated.

    Why:
        Batch statistics represent the data only if a batch is a random sample. If the data are sorted by class, or a
        batch comes from one video or one patient, each example is normalized by similar examples, and the stored
        statistics describe only the last few batches.

    How:
        An F-test of batch means against the means of single examples, in every channel of a layer. Reported if three
        conditions are met. The test's p, times the numbers of channels and layers, is below 0.001. Batch means vary as
        if a batch had fewer than half of its examples. In each of 1,999 random orders of the examples, batches differ
        less in the ranks of their examples; this test is valid for any distribution. Needs 4 batches, in the loader's
        order. Layers whose inputs do not have one row per example are left out.

    Example:
        DataLoader(images_sorted_by_class, batch_size=32)  # shuffle=False

    Fix:
        shuffle=True, or a sampler that mixes sources. If these are test data in their own order, examine training data
        instead.

    References:
        Snedecor and Cochran 1989, chapters 12 and 13.
        Pitman 1937, "Significance tests which may be applied to samples from any populations".
        Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 6.
    """
    measured = evidence.measured or {}
    clustered = {
        name: (m.effective_examples, m.batch_examples)
        for name, m in measured.items()
        if m.clustering_p is not None and m.clustering_p * len(measured) < CLUSTERING_P
        if m.effective_examples and m.batch_examples and m.effective_examples < CLUSTERED_SHARE * m.batch_examples
    }
    order_p = evidence.run.order_p if evidence.run else None
    if clustered and order_p is not None and order_p < CLUSTERING_P:
        worst = min(clustered, key=lambda name: clustered[name][0] / clustered[name][1])
        effective, size = clustered[worst]
        yield Finding(
            "",
            f"a batch of {size:.0f} counts for {effective:.1f} random examples in {worst!r} (p = "
            f"{order_p:.1g}; "
            f"{len(clustered)} of {len(measured)} layers)",
            limit=f"{CLUSTERED_SHARE * size:.0f} examples",
        )
    if all(m.clustering_p is None for m in measured.values()):
        yield Unknown("", "needs 4 batches, and a layer that runs once for each batch with one row for each example")


def padding_counted(evidence: Evidence) -> Iterator[Finding]:
    """Padding is counted in the statistics.

    Why:
        Padded positions are not data, but they count as much in the mean and variance. Then valid positions are not
        normalized to mean 0 and variance 1, and an example's output depends on the lengths of the others in its batch.

    How:
        Inputs have shape (N, C, L), the last positions of examples equal each other in all channels, and the examples
        end at different positions. Limit: 5 % of all positions. Padding in other layouts, and padding that earlier
        layers mixed with data, is not found.

    Example:
        pad_sequence(sounds, batch_first=True).transpose(1, 2)  ->  Conv1d  ->  BatchNorm1d

    Fix:
        Layers of this package leave padding out: batchnorm.convert(model), then with batchnorm.padding(model, lengths)
        around each call of the model, or layer(x, mask=mask) in its forward. True means valid.

    References:
        pytorch#70529, deepspeech.pytorch#312.
    """
    for name, layer in (evidence.measured or {}).items():
        if layer.padded_share > PADDED_SHARE:
            yield Finding(name, f"{layer.padded_share:.0%} of the positions are padding")


def non_finite_batch(evidence: Evidence) -> Iterator[Finding]:
    """A layer receives NaN or infinity on these data.

    Why:
        In train mode one NaN makes a channel's batch statistics NaN. torch.nn's layers then store NaN for ever:
        training goes on, but eval outputs are NaN.

    How:
        Counts NaN and infinite values in the inputs of layers, in eval mode. Only the first layer that receives them is
        named. Not reported behind a layer whose stored values cause them (BN102, BN103, BN107).

    Example:
        images[17, 0, 0, 0] = float("inf")

    Fix:
        Find the examples: [i for i, (x, *_) in enumerate(data) if not x.isfinite().all()]. Layers of this package leave
        such batches out of their stored statistics.

    References:
        pytorch#88474, pytorch#115500.
    """
    for name, layer in (evidence.measured or {}).items():
        if layer.non_finite:
            yield Finding(name, f"{layer.non_finite} NaN or infinite inputs in {layer.examples} examples")
            return
        if _breaks_outputs(evidence, name):
            return


def train_eval_gap(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Train mode and eval mode give different outputs for the same data.

    Why:
        The model is trained with batch statistics and used with stored ones. If the stored ones are out of date, its
        layers give other outputs in use than in training.

    How:
        The root mean square difference between a layer's outputs in both modes, in standard deviations of the output.
        It has two parts: noise (statistics of a batch against those of all the data) and stale (statistics of all the
        data against the stored ones). Only channels whose statistics are proven to differ without an assumption about
        the distribution of the examples (as in BN116) count for the stale part. Reported if it is above 0.25, and above
        3 times the gap that averaging and the choice of examples explain: noise sqrt(m / (2 - m) + 1 / batches) for
        momentum m. The rule cannot judge a gap that rare examples missing from the data may explain. Needs 4 batches.
        Not reported for frozen layers and for layers that were never updated (BN101). The finding names a cause if the
        numbers show it: a mixture of the data's statistics with the initial ones, or unbiased variances of single
        batches. Then the stored statistics are less than half as far from these values as from the data's statistics.

    Example:
        Training stopped after 20 steps, or weights were averaged after the statistics were stored.

    Fix:
        batchnorm.recalibrate(model, loader) measures the statistics again, on training data. If the data are not
        training data, the gap comes from their shift (BN401), and recalibrate adapts the model to these data.

    References:
        pytorch#5406, pytorch#19902. Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
    """
    for name, layer in (evidence.measured or {}).items():
        stored, noise, stale = evidence.stored.get(name), layer.gap_noise, layer.gap_stale
        if is_as_constructed(stored) or _is_frozen(evidence, name):
            continue
        if layer.batches < FEWEST_BATCHES:
            yield Unknown("", f"needs {FEWEST_BATCHES} batches")
            continue
        if stale is None or noise is None:
            yield Unknown(name, "no batch with 2 finite values in each channel, or outputs that do not vary")
            continue
        averaging = noise * math.sqrt(_noise_of_averaging(evidence, name) + 1 / layer.batches)
        limit = max(STALE_GAP, STALE_OVER_NOISE * averaging)
        shown_gap = layer.gap_shown or 0.0
        if shown_gap <= limit < stale:
            yield Unknown(name, f"stored statistics move the output by {stale:.2g} sd, {unsettled(layer)}")
        if shown_gap > limit:
            yield Finding(
                name,
                f"stored statistics move the output by {shown_gap:.2g} sd, the batch's noise by {noise:.2g} sd",
                limit=f"{limit:.2g} sd",
                consequence=f"On these data eval mode and train mode give different outputs: "
                f"{_cause(evidence, name, layer)}.",
                remedy=f"if these are training data: {measure_again(evidence)}",
            )


def constant_on_data(evidence: Evidence) -> Iterator[Finding]:
    """A channel has the same value in all the data.

    Why:
        In train mode the channel's output is beta plus magnified rounding errors: with gamma = 1 and eps = 1e-5,
        division by sqrt(eps) magnifies them 316 times.

    How:
        Over all examples, a channel's standard deviation is not larger than the rounding error of its mean. Not
        reported if BN106 names all of these channels: by its condition (1), or in the layer before, with only an
        activation and a depthwise convolution between the two layers.

    Example:
        A column of zeros; a filter behind a ReLU that is never active

    Fix:
        Look at the weights or the column that the channel comes from; remove the column or the filter.

    References:
        Ioffe and Szegedy 2015, section 3: eps.
    """
    for name, layer in (evidence.measured or {}).items():
        stored = evidence.stored.get(name)
        dead = (still_channels(evidence, stored) if stored else set()) | dead_before(evidence, name)
        if layer.constant and layer.examples > 1 and not dead.issuperset(layer.constant):
            yield Finding(
                name,
                f"{len(layer.constant)} of {len(layer.mean)} channels do not vary in {layer.examples} examples",
                channels=layer.constant,
            )


def _breaks_outputs(evidence: Evidence, layer: str) -> bool:
    """Whether a layer's stored values turn finite inputs into NaN or infinity."""
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
    """Variance of the running average divided by that of one batch's value; infinite if the average diverges."""
    momentum = evidence.momentum(layer) or 0.0
    return momentum / (2 - momentum) if momentum < 2 else math.inf


def _cause(evidence: Evidence, layer: str, found: MeasuredLayer) -> str:
    """Why stored statistics differ from those of the data, in words, if the numbers show it; else a general cause."""
    claim, share = claims(evidence)[layer]
    if claim is StartResidue.SHOWN and share > _SHARE_WORTH_A_WORD:
        return f"{share:.0%} of the stored statistics are still the initial ones"
    values = found.examples / found.batches * found.values_per_example
    unbiased = [var * values / (values - 1) for var in found.var] if values > 1 else []
    if unbiased and is_nearer(evidence.stored[layer], found.mean, unbiased, found, evidence.eps(layer)):
        shrinks = 1 - math.sqrt(1 - 1 / values)
        return f"stored variances are unbiased, which alone shrinks outputs by {shrinks:.0%} at {values:.0f} values"
    return "what is stored comes from other weights or other data"
