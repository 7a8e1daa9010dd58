"""Question "test time": which statistics serve one example, and is its answer its own?

batch        statistics of the test batch, in batches of several sizes (train mode of batch norm alone)
stored       running averages, as eval mode has them
population   exact statistics of the training data under the final weights (recalibrate)
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
_POPULATION = 512  # training examples that exact statistics are measured on, at most: a pass for every layer
_ALONE = 16  # examples that go through the model one at a time
_STORED = ("running averages (eval mode)", "population statistics")


@dataclass(frozen=True, slots=True)
class HeldOutReading:
    """Mean held-out loss and accuracy; None where there are no classes."""

    loss: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class ModelReadings:
    """One model by all statistics.

    Args:
        batch: By size of the test batch.
        stored: In eval mode; None where no statistics are stored.
        population: By exact statistics; None where none can be stored.
        alone: Largest difference of an output between alone and in a batch, in sd of outputs; None where no tensor
            with one row for each example came out.
    """

    batch: dict[int, HeldOutReading]
    stored: HeldOutReading | None
    population: HeldOutReading | None
    alone: float | None


def read(subject: Subject, model: nn.Module, seed: int) -> ModelReadings:
    """Held-out data through a model in every way; it is left as it was."""
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
    """In random batches of every size, with batch norm in train mode and all else in eval mode."""
    pool, found = None if subject.data.whole else joined(held), {}
    total = examples_in(pool) if pool is not None else 0
    for size in sorted({*_SIZES, subject.data.size}):
        groups = regrouped(held, size, seed) if pool is not None and size <= total else None
        if pool is None and size == subject.data.size:
            groups = [group for group in held if examples_in(group) > 1]
        if groups:
            with kept_buffers(model):
                for layer in own_statistics(model).values():
                    layer.train()
                found[size] = _mean(subject, model, groups)
    return found


def _by_population(subject: Subject, model: nn.Module, held: list[Batch]) -> HeldOutReading | None:
    """None where there are no finite statistics."""
    with kept_buffers(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of layers that no forward reaches, and of NaN
        with suppress(ValueError):
            if subject.data.whole:
                recalibrate(model, _up_to(_POPULATION, subject.data.train))
            else:
                recalibrate(model, list(subject.data.train), max_examples=_POPULATION)
            return _mean(subject, model, held)
    return None


def _up_to(examples: int, batches: Sequence[Batch]) -> list[Batch]:
    """The first whole batches that together have this many examples, or all batches."""
    counts = torch.tensor([0, *map(examples_in, batches)]).cumsum(0)
    return [batch for batch, before in zip(batches, counts, strict=False) if int(before) < examples]


def _mean(subject: Subject, model: nn.Module, batches: Sequence[Batch]) -> HeldOutReading:
    counts = torch.tensor([float(examples_in(batch)) for batch in batches])
    losses = torch.tensor([float(subject.value(model, batch)) for batch in batches])
    right = [subject.accuracy(model, batch) for batch in batches]
    loss = float((losses * counts).sum() / counts.sum())
    known = [value for value in right if value is not None]
    whole = len(known) == len(right)
    return HeldOutReading(loss, float((torch.tensor(known) * counts).sum() / counts.sum()) if whole else None)


def _alone(model: nn.Module, held: list[Batch], *, whole: bool) -> float | None:
    """In eval mode, the same examples alone and together."""
    if whole or not is_rows(held[0]):
        return None
    batch = first_examples(held[0], _ALONE)
    count = examples_in(batch)
    together = first_tensor(call(model, batch))
    if together is None or together.ndim < 1 or len(together) != count or count < 2:
        return None
    singly = [first_tensor(call(model, take(batch, torch.tensor([n])))) for n in range(count)]
    if any(one is None or one.shape != together[:1].shape for one in singly):
        return None
    difference = (torch.cat([one for one in singly if one is not None]) - together).abs().max()
    return float(difference / together.std().clamp_min(torch.finfo(together.dtype).tiny))


def measure(subject: Subject, models: Sequence[nn.Module], seeds: Sequence[int]) -> Result:
    """One model for each seed, or one model with one division into batches for each seed."""
    found = [read(subject, models[n % len(models)], seed) for n, seed in enumerate(seeds)]
    verdicts = [_judge_small(found), _judge_stored(found), _judge_alone(found)]
    numbers: Numbers = {}
    for name, readings in _by_name(found).items():
        numbers[f"held-out loss by {name}"] = paired_seeds.figures(_average([r.loss for r in readings]))
        right = [r.accuracy for r in readings if r.accuracy is not None]
        if len(right) == len(readings):
            numbers[f"held-out accuracy by {name}, %"] = paired_seeds.figures(100 * _average(right))
    return Result(verdicts, [_chart(found, verdicts[0])] if _by_name(found) else [], numbers)


def _by_name(found: list[ModelReadings]) -> dict[str, list[HeldOutReading]]:
    """ModelReadings of every kind of statistics that all models have."""
    names = {f"batches of {size}": [r.batch.get(size) for r in found] for size in sorted(found[0].batch)}
    names |= dict(zip(_STORED, ([r.stored for r in found], [r.population for r in found]), strict=True))
    whole = {name: [r for r in readings if r is not None] for name, readings in names.items()}
    return {name: readings for name, readings in whole.items() if len(readings) == len(found)}


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _relative(found: list[ModelReadings], other: list[HeldOutReading | None]) -> list[float]:
    """Loss above that by population statistics, as a share of the latter; [] where one is missing."""
    pairs = [(r.population, o) for r, o in zip(found, other, strict=True)]
    if _unrelated(found, other):
        return []
    return [(o.loss - p.loss) / abs(p.loss) for p, o in pairs if p is not None and o is not None]


def _unrelated(found: list[ModelReadings], other: list[HeldOutReading | None]) -> str:
    """Why losses have no share of the loss by population statistics, in words; "" if they have."""
    if any(reading is None for reading in other):
        return "the held-out batches cannot be normalized that way"
    if any(r.population is None for r in found):
        return "no population statistics could be stored"
    if not all(r.population.loss for r in found if r.population is not None):
        return "the held-out loss by population statistics is 0, and nothing is a share of it"
    return ""


def _said(reading: list[HeldOutReading | None]) -> str:
    known = [r for r in reading if r is not None]
    if len(known) < len(reading) or not known:
        return "nothing to measure"
    right = [r.accuracy for r in known if r.accuracy is not None]
    correct = f" ({_average(right):.1%} right)" if len(right) == len(known) else ""
    return f"{_average([r.loss for r in known]):.3g}{correct}"


def _judge_small(found: list[ModelReadings]) -> Verdict:
    small = [r.batch.get(SMALL) for r in found]
    values = _relative(found, small)
    failed = _unrelated(found, small)
    if any(r is None for r in small):
        failed = f"held-out examples cannot be put into batches of {SMALL}, or no statistics are stored"
    return judge(
        "test-time-small", values,
        "Held-out loss {population} by population statistics, {own} by those of batches of {size}.",
        failed_guard=failed, population=_said([r.population for r in found]), own=_said(small), size=SMALL,
    )  # fmt: skip


def _judge_stored(found: list[ModelReadings]) -> Verdict:
    values = _relative(found, [r.stored for r in found])
    failed = _unrelated(found, [r.stored for r in found])
    if any(r.stored is None for r in found):
        failed = "the batch norm layers store no statistics of their own"
    # a mean of shares beside means of losses, which may differ in direction
    return judge(
        "test-time-stored", values,
        "Held-out loss {stored} by running averages, {population} by population statistics (seed by seed "
        "{more:share}).",
        failed_guard=failed, stored=_said([r.stored for r in found]), population=_said([r.population for r in found]),
        more=_average(values) if values else nan,
    )  # fmt: skip


def _judge_alone(found: list[ModelReadings]) -> Verdict:
    values = [r.alone for r in found if r.alone is not None]
    whole = len(values) == len(found)
    return judge(
        "test-time-alone", values if whole else [],
        "In eval mode an output differs by at most {most:.1g} standard deviations between alone and in a batch.",
        failed_guard="" if whole else "batches are not rows of examples, or no output has one row for each",
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


# For the words of the question
FIGURES = {"population": _POPULATION, "alone": _ALONE}
