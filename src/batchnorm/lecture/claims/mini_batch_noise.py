"""Claim "noise": the statistics of a mini-batch are noisy, and this noise regularizes slightly.

For a value z that is standardized by the population, and a batch of M values with mean d and standard deviation s,
batch norm returns (z - d) / s instead of z (``instruments.batch_noise``). Without eps, the covariance of (z - d) / s
and z within the batch is s. So the mean over batches is E[((z - d) / s - z)^2] = 2 (1 - E[s]). To first order in 1 / M
this is (kurtosis + 3) / (4 M): 1 / M from the mean and (kurtosis - 1) / (4 M) from the standard deviation.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.instruments.batch_noise import Value, dropout_rate, log_slope, noise_power
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture import data_sets
from batchnorm.lecture.claim_criteria import CRITERIA, judge
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, Norm, fully_connected
from batchnorm.lecture.rate_sweep import digits
from batchnorm.lecture.renormalized import GhostNorm, with_population
from batchnorm.reporting.charts.chart_data import Chart, Rows

SIZES = (64, 64, 64, 10)
TRAIN = 512  # training examples; in the comparison of GROUPS every batch has all, so only the groups are random
STEPS = 150
RATE = 0.3
GROUPS = (4, 8, 16, 32, 128, 512)
BATCHES = (16, 32, 128)  # batch sizes of the naive comparison, in which the optimizer's batch changes too
LEARNED = 0.95
MEASURED = tuple(2**k for k in range(1, 10))
ROWS = 16384  # about this number of examples is drawn for each batch size
AT_LEAST = 64  # the fewest batches of each size

_EPS = BatchNorm1d(1).eps


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """Networks after training with one kind of normalization, with exact population statistics.

    Args:
        ensemble: One network for each seed.
        train_accuracy: (seeds,).
        test_loss: Test loss in nats, (seeds,).
        test_accuracy: (seeds,).
    """

    ensemble: Ensemble
    train_accuracy: Tensor
    test_loss: Tensor
    test_accuracy: Tensor


def train_arm(settings: RunSettings, norm: Norm, batch: int = TRAIN) -> Arm:
    """One network for each seed, trained with ``norm`` for STEPS steps of ``batch`` examples."""
    splits = [data_sets.split(len(digits()), TRAIN, seed) for seed in settings.all_seeds]
    steps = settings.steps(STEPS)
    indices = [
        data_sets.batch_indices(pool, batch, steps, seed)
        for (pool, _), seed in zip(splits, settings.all_seeds, strict=True)
    ]
    ensemble = Ensemble.of(lambda: fully_connected(SIZES, norm=norm), settings.all_seeds)
    sgd(ensemble, digits(), torch.stack(indices), torch.full((settings.seeds,), RATE))
    train, test = (digits()[torch.stack(part)] for part in zip(*splits, strict=True))
    exact = with_population(ensemble, SIZES, train.x)
    with torch.no_grad():
        fitted, unseen = exact(train.x), exact(test.x)
    return Arm(exact, accuracies(fitted, train.y), losses(unseen, test.y), accuracies(unseen, test.y))


def pre_activations(ensemble: Ensemble, x: Tensor) -> list[Tensor]:
    """Inputs of each batch norm layer in eval mode, (R, N, C) each, standardized over the N examples of ``x``."""
    standardized = []
    children = list(ensemble.template.named_children())
    for end, (name, _) in enumerate(children):
        if name.startswith("norm"):
            with torch.no_grad():
                received = ensemble.through(nn.Sequential(OrderedDict(children[:end])), x)
            mean, std = received.mean(1, keepdim=True), received.std(1, correction=0, keepdim=True)
            standardized.append((received - mean) / std)
    return standardized


def noise_of_batches(z: Tensor, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise power of batch norm and variance of the batch mean, for each channel, in batches of ``size``.

    Batches are drawn with replacement, so that the M examples of a batch are independent.

    Args:
        z: Population of standardized values, (N, C).
        size: Number of examples in a batch, M.
        random: Generator that draws the batches.

    Returns:
        Mean over batches and their examples of (normalized - z)^2, (C,); mean of the squared batch mean, (C,).
    """
    batches = max(ROWS // size, AT_LEAST)
    drawn = z[torch.randint(len(z), (size, batches), generator=random)].double()  # (M, batches, C)
    mean = drawn.mean(0)
    return noise_power(mean, drawn.var(0, correction=0), _EPS).mean(0), mean.square().mean(0)


def kurtosis(z: Tensor) -> Tensor:
    """E[z^4] of standardized values, 3 for a normal distribution: (..., N, C) -> (..., C)."""
    return z.double().pow(4).mean(-2)


def theory(kurtosis: Value, size: int) -> Value:
    """Noise power of a batch of ``size`` to first order, (kurtosis + 3) / (4 M)."""
    return (kurtosis + 3) / (4 * size)


def gaussian(size: int) -> float:
    """Noise power of a batch of ``size`` normal values, exactly: 2 (1 - E[s]).

    E[s] = sqrt(2 / M) Gamma(M / 2) / Gamma((M - 1) / 2), the mean of a chi variable with M - 1 degrees of freedom.
    """
    log_mean = 0.5 * math.log(2 / size) + math.lgamma(size / 2) - math.lgamma((size - 1) / 2)
    return -2 * math.expm1(log_mean)


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Noise of mini-batches at each size of MEASURED, mean over layers and channels.

    Args:
        power: Noise power, (sizes, seeds).
        mean: Variance of the batch mean, (sizes, seeds).
        kurtosis: Kurtosis of the layers' inputs, (seeds,).
    """

    power: Tensor
    mean: Tensor
    kurtosis: Tensor

    def slopes(self) -> Tensor:
        """Least-squares slope of log power over log size, (seeds,)."""
        return log_slope(self.power, MEASURED)


def measure_noise(ensemble: Ensemble, settings: RunSettings) -> Noise:
    """The noise of batches from all digits, averaged over the batch norm layers of ``ensemble``."""
    layers = pre_activations(ensemble, digits().x)
    power, mean = (torch.zeros(len(MEASURED), settings.seeds, dtype=torch.float64) for _ in range(2))
    for index, seed in enumerate(settings.all_seeds):
        random = torch.Generator().manual_seed(seed)
        for row, size in enumerate(MEASURED):
            noise_by_layer = [noise_of_batches(z[index], size, random) for z in layers]
            power[row, index], mean[row, index] = (torch.cat(part).mean() for part in zip(*noise_by_layer, strict=True))
    return Noise(power, mean, torch.cat([kurtosis(z) for z in layers], 1).mean(1))


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train with every group size and batch size, and measure the noise of the networks trained with one group."""
    arms: dict[int, Arm] = {}
    naive: dict[int, Arm] = {}
    for done, size in enumerate(GROUPS + BATCHES):
        if done < len(GROUPS):
            arms[size] = train_arm(settings, partial(GhostNorm, size=size))
        else:
            naive[size] = train_arm(settings, BatchNorm1d, size)
        progress((done + 1) / (len(GROUPS) + len(BATCHES) + 1))
    noise = measure_noise(arms[TRAIN].ensemble, settings)
    progress(1.0)
    slope, effect = _judge_slope(noise), judge_effect(arms)
    charts = [_power_chart(noise, slope), _dropout_chart(noise), _effect_chart(arms, naive)]
    return Result([slope, effect], charts, _numbers(noise, arms, naive))


def _judge_slope(noise: Noise) -> Verdict:
    slopes, power = noise.slopes(), noise.power.mean(1)
    return judge(
        "noise-slope", slopes.tolist(),
        "The noise power is {first:.2f} in batches of {smallest} and {last:.4f} in batches of {largest}: it varies as "
        "the batch size to the power {slope:.2f} (theory: −1).",
        first=power[0], smallest=MEASURED[0], last=power[-1], largest=MEASURED[-1], slope=slopes.mean(),
    )  # fmt: skip


def judge_effect(arms: Mapping[int, Arm]) -> Verdict:
    """The verdict on the test loss with groups of 512 minus the test loss with groups of 16."""
    small, large = arms[16], arms[512]
    effect = large.test_loss - small.test_loss
    worst = {size: float(arms[size].train_accuracy.min()) for size in (16, 512)}
    failed = "; ".join(f"groups of {g} ended at {w:.1%} training accuracy" for g, w in worst.items() if w < LEARNED)
    return judge(
        "noise-regularizes", effect.tolist(),
        "The test loss is {small:.3f} nats with groups of 16, {large:.3f} with groups of 512 ({apart:.3f} {direction}; "
        "accuracy {points:+.1f} points with groups of 16); {shape}.",
        failed_guard=failed, small=small.test_loss.mean(), large=large.test_loss.mean(), apart=effect.mean().abs(),
        direction="lower" if effect.mean() >= 0 else "higher", shape=_shape(arms),
        points=100 * (small.test_accuracy - large.test_accuracy).mean(),
    )  # fmt: skip


def _shape(arms: Mapping[int, Arm]) -> str:
    """Whether the test loss rises with every larger size of groups, in words."""
    mean = {size: float(arm.test_loss.mean()) for size, arm in arms.items()}
    ordered = [mean[size] for size in sorted(mean)]
    if ordered == sorted(ordered):
        return "the smaller the groups, the lower the loss"
    return f"not monotone: lowest with groups of {min(mean, key=mean.__getitem__)}"


def _numbers(noise: Noise, arms: Mapping[int, Arm], naive: Mapping[int, Arm]) -> Numbers:
    numbers: Numbers = {"kurtosis of pre-activations (3 for a normal law)": paired_seeds.mean(noise.kurtosis)}
    for size in (2, 8, 32, 512):
        ratio = noise.power[MEASURED.index(size)].mean() / theory(noise.kurtosis, size).mean()
        numbers[f"batches of {size}, noise power over theory"] = paired_seeds.figures(ratio, 3)
    for size in (16, TRAIN):
        numbers[f"groups of {size}, test accuracy, %"] = paired_seeds.mean(100 * arms[size].test_accuracy)
        numbers[f"groups of {size}, training accuracy, %"] = paired_seeds.mean(100 * arms[size].train_accuracy)
    for size, arm in naive.items():
        numbers[f"optimizer batches of {size}, test loss, nats"] = paired_seeds.mean(arm.test_loss)
        numbers[f"optimizer batches of {size}, training accuracy, %"] = paired_seeds.mean(100 * arm.train_accuracy)
    return numbers


_MEASURED, _FIRST_ORDER, _NORMAL = "measured", "first order in 1 / M", "normal law, exact"


def _lines(panel: str, values: Tensor, theories: Mapping[str, Callable[[int], float]]) -> Rows:
    """Chart rows of measured ``values``, (sizes, seeds), and of theories, at every size of MEASURED."""
    rows = paired_seeds.curve(MEASURED, values, middle=torch.mean, series=_MEASURED, panel=panel)
    for name, formula in theories.items():
        rows += [{"x": m, "y": paired_seeds.figures(formula(m)), "series": name, "panel": panel} for m in MEASURED]
    return rows


def _power_chart(noise: Noise, slope: Verdict) -> Chart:
    kappa = float(noise.kurtosis.mean())
    whole = {_FIRST_ORDER: lambda m: theory(kappa, m), _NORMAL: gaussian}
    rows = _lines("of a normalized value", noise.power, whole)
    rows += _lines("of the batch mean", noise.mean, {_FIRST_ORDER: lambda m: 1 / m})
    return chart(
        "lecture", "noise", "power", rows, {_MEASURED: "with", _FIRST_ORDER: "neutral", _NORMAL: "neutral"},
        dashed=(_FIRST_ORDER, _NORMAL), title=slope.heading, sentence=slope.sentence,
    )  # fmt: skip


def _dropout_chart(noise: Noise) -> Chart:
    kappa = float(noise.kurtosis.mean())
    equal = dropout_rate(noise.power)
    at = {size: 100 * equal[MEASURED.index(size)].mean() for size in (8, 32, 512)}
    summary = ", ".join(f"{share:.2g}% with batches of {size}" for size, share in at.items())
    return chart(
        "lecture", "noise", "dropout", _lines("", equal, {_FIRST_ORDER: lambda m: dropout_rate(theory(kappa, m))}),
        {_MEASURED: "with", _FIRST_ORDER: "neutral"}, dashed=(_FIRST_ORDER,), summary=summary,
    )  # fmt: skip


def _effect_chart(arms: Mapping[int, Arm], naive: Mapping[int, Arm]) -> Chart:
    kinds = {_GROUPED: arms, _RESIZED: {**naive, TRAIN: arms[TRAIN]}}
    rows = []
    for kind, arms_of_kind in kinds.items():
        for size, arm in arms_of_kind.items():
            change = paired_seeds.interval(arm.test_loss - arms[TRAIN].test_loss, CRITERIA.level, "y")
            rows.append({"x": size, **change, "series": kind, "panel": kind})
        rows += [{"x": size, "y": 0.0, "series": _SAME, "panel": kind} for size in (min(GROUPS), TRAIN)]
    changes = {row["x"]: row["y"] for row in rows if row["series"] == _GROUPED and row["x"] != TRAIN}
    summary = ", ".join(f"{change:+.3f} with groups of {size}" for size, change in changes.items())
    return chart(
        "lecture", "noise", "effect", rows, {_GROUPED: "with", _RESIZED: "neutral", _SAME: "neutral"}, dashed=(_SAME,),
        train=TRAIN, summary=summary,
    )  # fmt: skip


_GROUPED, _RESIZED, _SAME = f"groups, optimizer batch {TRAIN}", "optimizer batch itself", "no change"

CLAIM = claim(
    "lecture", "noise", run, smallest=MEASURED[0], largest=MEASURED[-1], train=TRAIN, steps=STEPS, rate=RATE,
    groups=", ".join(map(str, GROUPS[:-1])), largest_group=GROUPS[-1], tested=1797 - TRAIN,
    batches=", ".join(map(str, BATCHES)),
)  # fmt: skip
