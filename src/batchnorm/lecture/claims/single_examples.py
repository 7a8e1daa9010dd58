"""Claim "test time": single examples need stored statistics, with which an output depends on its example alone.

There are three choices of statistics for a trained network: the statistics of the test batch (train mode), the
exponentially weighted average of the training (running statistics, EMA), and the statistics of the whole training set
with the final weights (population). With the last two, which are stored, an output depends on its example alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart, claim
from batchnorm.experiment.judgement import Verdict
from batchnorm.experiment.run_settings import Progress, RunSettings
from batchnorm.instruments.companion_examples import disagreement
from batchnorm.lecture import data_sets
from batchnorm.lecture.claim_criteria import judge
from batchnorm.lecture.data_sets import Examples
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import SIZES, digits
from batchnorm.lecture.renormalized import GhostNorm, with_norm, with_population
from batchnorm.reporting.charts.chart_data import Chart, Role

BATCH = 32
STEPS = 300
RATE = 0.1
MEASURED = (2, 4, 8, 16, 32, 64, 128)
TEST = 768  # a multiple of every size measured, so that no example is left out of a batch
PARTITIONS = 8  # random ways to divide the test examples into batches
ALONE = 256  # test examples that also pass through the network one at a time
EARLY = 20  # steps after which the EMA is still inaccurate
READ = (5, 10, EARLY, 40, 70, 100, 150, 200, 300)  # steps at which test accuracy is measured
POPULATION, EMA, OWN = "population statistics", "running average (EMA)", "statistics of the test batch"


@dataclass(frozen=True, slots=True, eq=False)
class StepReading:
    """Test accuracy and loss in nats after ``step`` steps, by one kind of stored statistics, (seeds,) each."""

    step: int
    statistics: str
    accuracy: Tensor
    loss: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """One network for each seed after training, with its running statistics.

    Args:
        ensemble: The networks.
        exact: The same networks with population statistics.
        test: Test examples for each network, (seeds, TEST, ...).
        readings: Readings during the training, in the order of steps.
    """

    ensemble: Ensemble
    exact: Ensemble
    test: Examples
    readings: list[StepReading]

    def reading(self, statistics: str, step: int | None = None) -> StepReading:
        """The reading after ``step``; None means the last reading."""
        of_kind = [reading for reading in self.readings if reading.statistics == statistics]
        return of_kind[-1] if step is None else next(reading for reading in of_kind if reading.step == step)


def train(settings: RunSettings) -> Trained:
    """Train the lecture's five-layer network with batches of BATCH; the TEST test examples are left out."""
    splits = [data_sets.split(len(digits()), len(digits()) - TEST, seed) for seed in settings.all_seeds]
    fitted, test = (digits()[torch.stack(part)] for part in zip(*splits, strict=True))
    steps = settings.steps(STEPS)
    indices = [
        data_sets.batch_indices(pool, BATCH, steps, seed)
        for (pool, _), seed in zip(splits, settings.all_seeds, strict=True)
    ]
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), settings.all_seeds)
    readings: list[StepReading] = []

    def observe(step: int) -> None:
        if step in READ or step == steps:
            exact = with_population(ensemble, SIZES, fitted.x)
            readings.extend(_read(step, kind, nets, test) for kind, nets in ((EMA, ensemble), (POPULATION, exact)))

    sgd(ensemble, digits(), torch.stack(indices), torch.full((settings.seeds,), RATE), observe)
    return Trained(ensemble, with_population(ensemble, SIZES, fitted.x), test, readings)


def _read(step: int, statistics: str, ensemble: Ensemble, test: Examples) -> StepReading:
    with torch.no_grad():
        logits = ensemble(test.x)
    return StepReading(step, statistics, accuracies(logits, test.y), losses(logits, test.y))


def logits_in_batches(ensemble: Ensemble, x: Tensor, size: int, settings: RunSettings) -> Tensor:
    """Logits in train mode, each example among random companions: (seeds, PARTITIONS, N, classes).

    Args:
        ensemble: Fully connected networks of SIZES, which are not changed.
        x: Examples for each network, (seeds, N, features); N is a multiple of ``size``.
        size: Number of examples in a batch.
        settings: The seeds that draw the companions.
    """
    orders = torch.stack([_partitions(x.shape[1], seed) for seed in settings.all_seeds])  # (seeds, PARTITIONS, N)
    mixed = x.gather(1, orders.flatten(1)[:, :, None].expand(-1, -1, x.shape[2]))
    # all batches at once: each group of ``size`` neighbours is normalized by its own statistics
    in_groups = with_norm(ensemble, SIZES, partial(GhostNorm, size=size))
    with torch.no_grad():
        logits = in_groups(mixed, train=True)
    logits = logits.unflatten(1, orders.shape[1:])
    return torch.empty_like(logits).scatter_(2, orders[..., None].expand_as(logits), logits)


def _partitions(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=random) for _ in range(PARTITIONS)])


@dataclass(frozen=True, slots=True, eq=False)
class InBatches:
    """Test results in train mode, in batches of each size of MEASURED.

    Args:
        accuracy: Test accuracy, (sizes, seeds).
        flips: Probability that another batch changes an example's predicted class, (sizes, seeds).
        spread: Standard deviation of a logit over partitions, divided by that of all logits, (sizes, seeds).
    """

    accuracy: Tensor
    flips: Tensor
    spread: Tensor


def measure_batches(trained: Trained, settings: RunSettings) -> InBatches:
    """Accuracy, flips and spread in batches of every size."""
    accuracy, flips, spread = [], [], []
    for size in MEASURED:
        logits = logits_in_batches(trained.ensemble, trained.test.x, size, settings)
        predicted = logits.argmax(-1)
        accuracy.append((predicted == trained.test.y[:, None]).double().mean((1, 2)))
        flips.append(disagreement(predicted))
        spread.append(logits.var(1).mean((1, 2)).sqrt() / logits.std((1, 2, 3)))
    return InBatches(torch.stack(accuracy), torch.stack(flips), torch.stack(spread))


@dataclass(frozen=True, slots=True, eq=False)
class SameAnswers:
    """Differences between outputs of examples alone and in batches of every size, with stored statistics.

    Args:
        largest: Largest difference of a logit, in units of the logits' standard deviation, (seeds,).
        same_bits: Share of logits that are equal bit for bit.
        layer_same_bits: Share of a batch norm layer's outputs that are equal bit for bit.
        changes: Share of predicted classes that differ.
    """

    largest: Tensor
    same_bits: float
    layer_same_bits: float
    changes: float


def measure_alone(trained: Trained, settings: RunSettings) -> SameAnswers:
    """Pass ALONE test examples through each network one at a time, and in random batches of every size."""
    largest, logit_bits, layer_bits, changes = [], [], [], []
    for index, seed in enumerate(settings.all_seeds):
        net = partial(_one_network, trained.exact, index)
        x = trained.test.x[index, :ALONE]
        order = torch.randperm(ALONE, generator=torch.Generator().manual_seed(seed))
        alone = net("", x, 1, order)
        batched = torch.stack([net("", x, size, order) for size in MEASURED])
        largest.append((batched - alone).abs().max() / alone.std())
        logit_bits.append((batched == alone).double().mean())
        changes.append((batched.argmax(-1) != alone.argmax(-1)).double().mean())
        received = net("w1", x, ALONE, order)
        layer_alone = net("norm1", received, 1, order)
        layer_batched = torch.stack([net("norm1", received, size, order) for size in MEASURED])
        layer_bits.append((layer_batched == layer_alone).double().mean())
    shares = (float(torch.stack(share).mean()) for share in (logit_bits, layer_bits, changes))
    return SameAnswers(torch.stack(largest), *shares)


def _one_network(ensemble: Ensemble, index: int, child: str, x: Tensor, size: int, order: Tensor) -> Tensor:
    """Outputs of network ``index``, or of its child, in eval mode, for ``x`` in batches of ``size`` in this order."""
    prefix = f"{child}." if child else ""
    state = {**ensemble.parameters, **ensemble.buffers}
    mine = {k.removeprefix(prefix): v[index] for k, v in state.items() if k.startswith(prefix)}
    part = ensemble.template.get_submodule(child).eval()
    with torch.no_grad():
        outputs = torch.cat([functional_call(part, mine, (batch,)) for batch in x[order].split(size)])
    return torch.empty_like(outputs).index_copy_(0, order, outputs)


def refusal_of_one(trained: Trained) -> str:
    """Whether train mode accepts a single example, in words."""
    try:
        trained.ensemble(trained.test.x[:, :1], train=True, keep_statistics=True)
    except ValueError as error:
        return f"refused: {error}"
    return "accepted"


def run(settings: RunSettings, progress: Progress) -> Result:
    """Train the networks, then test them with all kinds of statistics and batches."""
    trained = train(settings)
    progress(0.6)
    batches = measure_batches(trained, settings)
    progress(0.9)
    alone = measure_alone(trained, settings)
    progress(1.0)
    verdicts = [_judge_size(trained, batches, name, size) for name, size in (("small", 2), ("medium", 8))]
    verdicts.append(_judge_alone(alone, batches))
    charts = [_accuracy_chart(trained, batches), _flip_chart(batches, alone), _early_chart(trained)]
    return Result(verdicts, charts, _numbers(trained, batches))


def _judge_size(trained: Trained, batches: InBatches, name: str, size: int) -> Verdict:
    population, batch = trained.reading(POPULATION).accuracy.double(), batches.accuracy[MEASURED.index(size)]
    return judge(
        f"test-time-{name}", (population - batch).tolist(),
        "The accuracy on test data is {population:.1%} with population statistics, {own:.1%} with those of batches of "
        "{size}.",
        population=population.mean(), own=batch.mean(), size=size,
    )  # fmt: skip


def _judge_alone(alone: SameAnswers, batches: InBatches) -> Verdict:
    return judge(
        "test-time-alone", alone.largest.tolist(),
        "With stored statistics a logit differs by at most {largest:.1g} of the logits' standard deviation between an "
        "example alone and in a batch; {same_bits:.0%} of logits and {layer_same_bits:.0%} of a batch norm layer's "
        "outputs are equal bit for bit. In train mode another batch of {size} changes the class of an example with "
        "probability {flips:.1%}.",
        largest=alone.largest.max(), same_bits=alone.same_bits, layer_same_bits=alone.layer_same_bits, size=BATCH,
        flips=batches.flips[MEASURED.index(BATCH)].mean(),
    )  # fmt: skip


def _numbers(trained: Trained, batches: InBatches) -> Numbers:
    numbers: Numbers = {"a batch of 1 in train mode": refusal_of_one(trained)}
    last = trained.readings[-1].step
    for step in sorted({EARLY, last}):
        for kind in (EMA, POPULATION):
            reading = trained.reading(kind, step)
            numbers[f"after {step} steps, {kind}, test accuracy, %"] = round(100 * float(reading.accuracy.mean()), 2)
            numbers[f"after {step} steps, {kind}, test loss, nats"] = round(float(reading.loss.mean()), 4)
    for size in (MEASURED[0], BATCH, MEASURED[-1]):
        spread = batches.spread[MEASURED.index(size)]
        numbers[f"batches of {size} in train mode, spread of a logit, standard deviations of logits"] = (
            paired_seeds.mean(spread)
        )
    return numbers


# All series are with batch norm; the one without stored statistics is grey
_SERIES: dict[str, Role] = {OWN: "neutral", POPULATION: "with", EMA: "with"}
_STORED = "stored statistics"


def _accuracy_chart(trained: Trained, batches: InBatches) -> Chart:
    rows = paired_seeds.curve(MEASURED, batches.accuracy, middle=torch.mean, series=OWN)
    stored = {kind: float(trained.reading(kind).accuracy.mean()) for kind in (POPULATION, EMA)}
    rows += [
        {"x": m, "y": round(y, 4), "series": kind} for kind, y in stored.items() for m in (MEASURED[0], MEASURED[-1])
    ]
    small, large = (float(batches.accuracy[row].mean()) for row in (0, -1))
    summary = (
        f"Batches of {MEASURED[0]} reach {small:.1%}, batches of {MEASURED[-1]} {large:.1%}, population statistics "
        f"{stored[POPULATION]:.1%}, and the running average {stored[EMA]:.1%}"
    )
    return chart("lecture", "test-time", "accuracy", rows, _SERIES, dashed=(POPULATION, EMA), title=summary)


def _flip_chart(batches: InBatches, alone: SameAnswers) -> Chart:
    rows = paired_seeds.curve(MEASURED, batches.flips, middle=torch.mean, series=OWN)
    rows += [{"x": m, "y": paired_seeds.figures(alone.changes), "series": _STORED} for m in (MEASURED[0], MEASURED[-1])]
    first, middle = batches.flips[0].mean(), batches.flips[MEASURED.index(BATCH)].mean()
    return chart(
        "lecture", "test-time", "flip", rows, {OWN: "neutral", _STORED: "with"}, dashed=(_STORED,), first=first,
        smallest=MEASURED[0], middle=middle, batch=BATCH, changes=alone.changes,
    )  # fmt: skip


def _early_chart(trained: Trained) -> Chart:
    rows = [
        row
        for reading in trained.readings
        for row in paired_seeds.curve(
            [reading.step], reading.accuracy[None], middle=torch.mean, series=reading.statistics
        )
    ]
    early = {kind: float(trained.reading(kind, EARLY).accuracy.mean()) for kind in (POPULATION, EMA)}
    summary = (
        f"After {EARLY} steps the running average gives {early[EMA]:.1%} accuracy, population statistics "
        f"{early[POPULATION]:.1%}"
    )
    return chart(
        "lecture", "test-time", "early", rows, {kind: _SERIES[kind] for kind in (POPULATION, EMA)}, title=summary,
    )  # fmt: skip


CLAIM = claim(
    "lecture", "test-time", run, steps=STEPS, batch=BATCH, rate=RATE, test=TEST, smallest=MEASURED[0],
    largest=MEASURED[-1], partitions=PARTITIONS, alone=ALONE,
)  # fmt: skip
