"""One arm trained at every learning rate of a grid; all arms have the same grid, so they are tuned equally well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from batchnorm.experiment import paired_seeds
from batchnorm.experiment.paired_seeds import Arrival, first_step
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture import data_sets
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, Norm, fully_connected

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SIZES = (64, 64, 64, 64, 64, 10)  # the lecture's five weight matrices W1 .. W5, on digits
STEPS = 300
BATCH = 64
EVERY = 5  # steps between evaluations
TRAIN = 1400  # training examples of the 1797 digits; the others are test examples
TARGET = 0.95  # training accuracy up to which steps are counted
PROBE = 300  # training examples on which accuracy is measured, in eval mode

# Arm -> normalization of the hidden layers
BOTH: dict[str, Norm | None] = {"without": None, "with": BatchNorm1d}


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """Learning curves of one arm.

    Args:
        rates: The learning rates of the grid.
        steps: Training steps at which accuracy and loss were measured, (T,).
        accuracy: Training accuracy in eval mode, (T, seeds, rates).
        loss: Training loss in eval mode, nats, (T, seeds, rates).
    """

    rates: Sequence[float]
    steps: Tensor
    accuracy: Tensor
    loss: Tensor

    def steps_to(self, accuracy: float) -> Tensor:
        """First step with at least this accuracy, (seeds, rates); infinity if it was never reached."""
        return first_step(self.accuracy >= accuracy, self.steps)

    def best_rate(self) -> int:
        """Index of the rate with the fewest median steps to TARGET; if all are infinite, of the best final accuracy."""
        median = paired_seeds.median(self.steps_to(TARGET), 0)
        return int(median.argmin()) if median.isfinite().any() else int(self.accuracy[-1].mean(0).argmax())

    def best(self) -> Arrival:
        """Steps to TARGET at the best rate."""
        return Arrival(self.steps_to(TARGET)[:, self.best_rate()], int(self.steps[-1]))

    def best_curve(self) -> Tensor:
        """Accuracy at the best rate, (T, seeds)."""
        return self.accuracy[:, :, self.best_rate()]

    def largest_rate(self, accuracy: float = 0.9) -> Tensor:
        """The largest rate at which a seed ends with at least this accuracy, (seeds,); 0 if there is no such rate."""
        return torch.where(self.accuracy[-1] >= accuracy, torch.tensor(self.rates), 0.0).amax(1)


@cache
def digits() -> data_sets.Examples:
    """The digits with pixels from 0 to 1; all features have the same range, so inputs need no normalization."""
    raw = data_sets.table("digits")
    return data_sets.Examples(raw.x / 16, raw.y)


def training_indices(settings: RunSettings, steps: int, *, batch: int = BATCH) -> Tensor:
    """Mini-batches from each seed's training split, (seeds, steps, batch); they are the same for every arm."""
    return torch.stack(
        [data_sets.batch_indices(training_split(seed), batch, steps, seed) for seed in settings.all_seeds]
    )


def training_split(seed: int) -> Tensor:
    """Indices of the training examples of a seed."""
    return data_sets.split(len(digits()), TRAIN, seed)[0]


def probe_indices(settings: RunSettings, count: int = PROBE) -> Tensor:
    """Indices of the first ``count`` training examples of each seed, (seeds, count)."""
    return torch.stack([training_split(seed)[:count] for seed in settings.all_seeds])


@cache
def sweep(settings: RunSettings, activation: str, norm: Norm | None) -> Sweep:
    """Train the five-layer network at every rate of RATES; all seeds and rates run at once."""
    rates = torch.tensor(RATES).repeat(settings.seeds)
    ensemble = Ensemble.of(lambda: fully_connected(SIZES, activation, norm), settings.all_seeds, repeat=len(RATES))
    indices = training_indices(settings, settings.steps(STEPS)).repeat_interleave(len(RATES), 0)
    probe = digits()[probe_indices(settings).repeat_interleave(len(RATES), 0)]
    readings: list[tuple[int, Tensor, Tensor]] = []

    def observe(step: int) -> None:
        if step % EVERY == 0:
            with torch.no_grad():
                logits = ensemble(probe.x)
            readings.append((step, accuracies(logits, probe.y), losses(logits, probe.y)))

    sgd(ensemble, digits(), indices, rates, observe)
    steps, accuracy, loss = zip(*readings, strict=True)
    grid = (len(steps), settings.seeds, len(RATES))
    return Sweep(RATES, torch.tensor(steps), torch.stack(accuracy).view(grid), torch.stack(loss).view(grid))
