"""Question "test time": which statistics are best for test data, and does an output depend on other examples?

batch        statistics of the test batch, for batches of several sizes (only batch norm is in train mode)
stored       running averages, as in eval mode
population   exact statistics of at most 512 training examples with the final weights (``recalibrate``)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import nan

import torch
from torch import nn

from batchnorm.ablation.question_criteria import judge
from batchnorm.ablation.user_data import examples_in, first_examples, is_rows, joined, regrouped, take
from batchnorm.ablation.user_model import Subject, first_tensor, kept_buffers, own_statistics
from batchnorm.call_types import Batch
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart
from batchnorm.experiment.judgement import Verdict
from batchnorm.population import recalibrate
from batchnorm.population.batches import call
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.reporting.charts.chart_data import Chart, Rows

SMALL = 4
_SIZES = (SMALL, 16, 64)
_POPULATION = 512  # the most training examples for exact statistics, which need a pass for every layer
_ALONE = 16  # the most examples that pass through the model one at a time
_STORED = ("running averages (eval mode)", "population statistics")


@dataclass(frozen=True, slots=True)
class HeldOutReading:
    """Mean held-out loss and accuracy; the accuracy is None for a user's own loss, or if the targets are no classes."""

    loss: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class ModelReadings:
    """The readings of one model with all statistics.

    Args:
        batch: Size of the test batches -> the reading by batch statistics.
        stored: The reading by stored statistics; None if a layer stores no statistics.
        population: The reading by exact statistics; None if ``stored`` is None, without layers to recalibrate, or
            without finite statistics.
        alone: Largest difference between an example's output alone and in a batch, in standard deviations of the
            outputs; None if ``stored`` is None, or if it cannot be measured, for example if no output has one row for
            each example.
    """

    batch: dict[int, HeldOutReading]
    stored: HeldOutReading | None
    population: HeldOutReading | None
    alone: float | None


def read(subject: Subject, model: nn.Module, seed: int) -> ModelReadings:
    """Measure a model on the held-out data with all statistics; the model's buffers and modes are restored."""
    held = list(subject.data.held)
    own = own_statistics(model)
    stored = population = alone = None
    with torch.no_grad(), kept_buffers(model):
        model.eval()
        batch = _by_batch(subject, model, held, seed) if own else {}
        if all(has_stored_statistics(layer) for layer in own.values()):  # type: ignore[arg-type]
            stored, alone = _mean(subject, model, held), _alone(model, held, whole=subject.data.whole)
            population = _by_population(subject, model, held) if own else None
    return ModelReadings(batch, stored, population, alone)


def _by_batch(subject: Subject, model: nn.Module, held: list[Batch], seed: int) -> dict[int, HeldOutReading]:
    """Readings in random batches of every size; batch norm is in train mode, all other modules in eval mode."""
    pool, readings = None if subject.data.whole else joined(held), {}
    total = examples_in(pool) if pool is not None else 0
    for size in sorted({*_SIZES, subject.data.size}):
        groups = regrouped(held, size, seed) if pool is not None and size <= total else None
        if pool is None and size == subject.data.size:
            groups = [group for group in held if examples_in(group) > 1]
        if groups:
            with kept_buffers(model):
                for layer in own_statistics(model).values():
                    layer.train()
                readings[size] = _mean(subject, model, groups)
    return readings


def _by_population(subject: Subject, model: nn.Module, held: list[Batch]) -> HeldOutReading | None:
    """The reading by exact statistics; None if there are no finite statistics."""
    with kept_buffers(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about layers that do not run, and about NaN
        with suppress(ValueError):
            if subject.data.whole:
                recalibrate(model, _up_to(_POPULATION, subject.data.train))
            else:
                recalibrate(model, list(subject.data.train), max_examples=_POPULATION)
            return _mean(subject, model, held)
    return None


def _up_to(examples: int, batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, uncut, until they have at least this number of examples; else all batches."""
    counts = torch.tensor([0, *map(examples_in, batches)]).cumsum(0)
    return [batch for batch, before in zip(batches, counts, strict=False) if int(before) < examples]


def _mean(subject: Subject, model: nn.Module, batches: Sequence[Batch]) -> HeldOutReading:
    counts = torch.tensor([float(examples_in(batch)) for batch in batches])
    losses = torch.tensor([float(subject.value(model, batch)) for batch in batches])
    right = [subject.accuracy(model, batch) for batch in batches]
    loss = float((losses * counts).sum() / counts.sum())
    shares = [value for value in right if value is not None]
    is_complete = len(shares) == len(right)
    return HeldOutReading(loss, float((torch.tensor(shares) * counts).sum() / counts.sum()) if is_complete else None)


def _alone(model: nn.Module, held: list[Batch], *, whole: bool) -> float | None:
    """The number ``ModelReadings.alone``, in eval mode."""
    if whole or not is_rows(held[0]):
        return None
    batch = first_examples(held[0], _ALONE)
    count = examples_in(batch)
    together = first_tensor(call(model, batch))
    if together is None or together.ndim < 1 or len(together) != count or count < 2:
        return None
    outputs = [first_tensor(call(model, take(batch, torch.tensor([n])))) for n in range(count)]
    if any(one is None or one.shape != together[:1].shape for one in outputs):
        return None
    difference = (torch.cat([one for one in outputs if one is not None]) - together).abs().max()
    return float(difference / together.std().clamp_min(torch.finfo(together.dtype).tiny))


def measure(subject: Subject, models: Sequence[nn.Module], seeds: Sequence[int]) -> Result:
    """Verdicts on test time; ``models`` has one model for each seed, or one model for all seeds."""
    models_read = [read(subject, models[n % len(models)], seed) for n, seed in enumerate(seeds)]
    verdicts = [_judge_small(models_read), _judge_stored(models_read), _judge_alone(models_read)]
    numbers: Numbers = {}
    for name, readings in _by_name(models_read).items():
        numbers[f"held-out loss by {name}"] = paired_seeds.figures(_average([r.loss for r in readings]))
        right = [r.accuracy for r in readings if r.accuracy is not None]
        if len(right) == len(readings):
            numbers[f"held-out accuracy by {name}, %"] = paired_seeds.figures(100 * _average(right))
    return Result(verdicts, [_chart(models_read, verdicts[0])] if _by_name(models_read) else [], numbers)


def _by_name(found: list[ModelReadings]) -> dict[str, list[HeldOutReading]]:
    """Kind of statistics -> readings of all models, for the kinds that all models have."""
    names = {f"batches of {size}": [r.batch.get(size) for r in found] for size in sorted(found[0].batch)}
    names |= dict(zip(_STORED, ([r.stored for r in found], [r.population for r in found]), strict=True))
    whole = {name: [r for r in readings if r is not None] for name, readings in names.items()}
    return {name: readings for name, readings in whole.items() if len(readings) == len(found)}


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _relative(found: list[ModelReadings], other: list[HeldOutReading | None]) -> list[float]:
    """(loss - population loss) / |population loss| for each model; [] if it cannot be computed for a model."""
    pairs = [(r.population, o) for r, o in zip(found, other, strict=True)]
    if _unrelated(found, other):
        return []
    return [(o.loss - p.loss) / abs(p.loss) for p, o in pairs if p is not None and o is not None]


def _unrelated(found: list[ModelReadings], other: list[HeldOutReading | None]) -> str:
    """Why ``_relative`` cannot be computed, in words; "" if it can."""
    if any(reading is None for reading in other):
        return "the held-out batches cannot be normalized by these statistics"
    if any(r.population is None for r in found):
        return "there are no finite population statistics"
    if not all(r.population.loss for r in found if r.population is not None):
        return "the held-out loss by population statistics is 0, so no share of it exists"
    return ""


def _said(reading: list[HeldOutReading | None]) -> str:
    measured = [r for r in reading if r is not None]
    if len(measured) < len(reading) or not measured:
        return "not measured"
    right = [r.accuracy for r in measured if r.accuracy is not None]
    correct = f" ({_average(right):.1%} right)" if len(right) == len(measured) else ""
    return f"{_average([r.loss for r in measured]):.3g}{correct}"


def _judge_small(found: list[ModelReadings]) -> Verdict:
    small = [r.batch.get(SMALL) for r in found]
    values = _relative(found, small)
    failed = _unrelated(found, small)
    if any(r is None for r in small):
        failed = f"held-out examples cannot be put into batches of {SMALL}, or all batch norm layers are frozen"
    return judge(
        "test-time-small", values,
        "The held-out loss is {population} by population statistics, and {own} by those of batches of {size}.",
        failed_guard=failed, population=_said([r.population for r in found]), own=_said(small), size=SMALL,
    )  # fmt: skip


def _judge_stored(found: list[ModelReadings]) -> Verdict:
    values = _relative(found, [r.stored for r in found])
    failed = _unrelated(found, [r.stored for r in found])
    if any(r.stored is None for r in found):
        failed = "the batch norm layers store no statistics"
    # the sentence has means of losses and the mean of shares, which may disagree about the sign
    return judge(
        "test-time-stored", values,
        "The held-out loss is {stored} by running averages, and {population} by population statistics (seed by seed "
        "{more:share}).",
        failed_guard=failed, stored=_said([r.stored for r in found]), population=_said([r.population for r in found]),
        more=_average(values) if values else nan,
    )  # fmt: skip


_UNKNOWN_ALONE = (
    "batches are not rows of 2 examples or more, no output has a row for each example, or layers store no statistics"
)


def _judge_alone(found: list[ModelReadings]) -> Verdict:
    values = [r.alone for r in found if r.alone is not None]
    whole = len(values) == len(found)
    return judge(
        "test-time-alone", values if whole else [],
        "In eval mode the output of an example alone and in a batch differs by at most {most:.1g} standard deviations.",
        failed_guard="" if whole else _UNKNOWN_ALONE,
        most=max(values) if whole else nan,
    )  # fmt: skip


def _chart(found: list[ModelReadings], verdict: Verdict) -> Chart:
    rows: Rows = []
    for name, readings in _by_name(found).items():
        losses = torch.tensor([r.loss for r in readings])
        if bool(losses.isfinite().all()):
            series = "stored" if name in _STORED else "its own"
            extent = {"low": paired_seeds.figures(losses.min()), "high": paired_seeds.figures(losses.max())}
            rows.append({"label": name, "value": paired_seeds.figures(losses.mean()), **extent, "series": series})
    return chart(
        "ablation", "test-time", "main", rows, {"its own": "neutral", "stored": "with"}, title=verdict.heading,
        told=verdict.statement,
    )  # fmt: skip


# For the texts of the question
FIGURES = {"population": _POPULATION, "alone": _ALONE}
