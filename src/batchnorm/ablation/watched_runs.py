"""Runs that are measured while they train: inputs of batch norm layers, and the loss along the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from batchnorm.ablation.arm_training import train
from batchnorm.ablation.user_model import Subject, kept_buffers, quiet_divergence, received
from batchnorm.call_types import Batch
from batchnorm.instruments.layer_drift import drift, noise_floor
from batchnorm.instruments.loss_landscape import Roughness, along_gradient
from batchnorm.instruments.network_vectors import Vectors, of_one
from batchnorm.instruments.signal_propagation import sample

LOOKS = 10  # the least measurements of the layers' inputs after the first measurement, if a run has as many steps
PROBES = 6  # the least measurements of the loss along the gradient, if a run has as many steps
_WORDS = 200  # the most characters of an error's message
_FIRST = 0  # the seed that chooses the probe batch, the same for all arms and seeds


@final
@dataclass(frozen=True, slots=True, eq=False)
class WatchedRun:
    """One run with its measurements.

    Args:
        model: The trained model.
        looked: The T + 1 steps at which the layers' inputs were measured ("looks").
        moved: Layer -> drift of its inputs from one look to the next, (T,).
        floor: Layer -> noise floor of the drift, mean over looks.
        probed: The P steps at which the loss along the gradient was measured; fewer if the run diverged.
        landscape: The loss along the gradient at these steps, fields of (P,).
        failed: The error that ended the measurements before the run ended; "" if there was no error.
    """

    model: nn.Module
    looked: Sequence[int]
    moved: dict[str, Tensor]
    floor: dict[str, float]
    probed: Sequence[int]
    landscape: Roughness
    failed: str = ""

    @property
    def average(self) -> float:
        """Drift between two looks, mean over layers and time; NaN if nothing was measured."""
        return float(torch.cat([*self.moved.values()]).mean()) if self.moved else float("nan")


def watch(subject: Subject, arm: str, seed: int, rate: float, steps: int) -> WatchedRun:
    """Train one run and measure it; the training gives the same numbers as without measurement."""
    looks = _Looks(subject, rate, steps, next(subject.data.deal(_FIRST)))
    model = train(subject, arm, seed, rate, steps, looks.observe)[1]
    moved, floor = _drifts(looks.values)
    landscape = Roughness.joined(looks.met, torch.cat) if looks.met else Roughness.of_nothing()
    return WatchedRun(model, looks.looked, moved, floor, looks.probed, landscape, looks.failed)


@final
@dataclass
class _Looks:
    """The measurements of a run while it trains; an error ends the measurements but not the run."""

    subject: Subject
    rate: float
    steps: int
    probe: Batch
    looked: list[int] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)
    met: list[Roughness] = field(default_factory=list)
    failed: str = ""

    def observe(self, step: int, model: nn.Module, batch: Batch) -> None:
        """Called before each step; measures at some steps, and restores the random state for dropout."""
        state = torch.get_rng_state()
        try:
            if not self.failed:
                self._look(step, model, batch)
        except Exception as error:  # noqa: BLE001 - the run and the other questions do not need these measurements
            self.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_WORDS]
        finally:
            torch.set_rng_state(state)

    def _look(self, step: int, model: nn.Module, batch: Batch) -> None:
        if step % max(1, self.steps // LOOKS) == 0:
            self.values.append(_values(model, self.probe))
            self.looked.append(step)
        if step % max(1, self.steps // PROBES) == 0 and step < self.steps:
            self.met.append(_landscape(self.subject, model, batch, self.rate))
            self.probed.append(step)


def _values(model: nn.Module, probe: Batch) -> dict[str, Tensor]:
    """Layer -> its inputs for the probe batch in train mode, (N, units)."""
    with kept_buffers(model):
        torch.manual_seed(0)  # the same dropout at every look
        return {path: sample(x)[0].float() for path, x in received(model, probe).items() if x.ndim > 1}


def _drifts(values: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    moved, floor = {}, {}
    for path in values[0] if values else ():
        looks = [look[path] for look in values if path in look]
        if len(looks) < 2 or len({x.shape for x in looks}) > 1:
            continue
        stacked = torch.stack(looks)
        moved[path] = drift(stacked[:-1], stacked[1:]).total
        floor[path] = float(noise_floor(stacked).mean())
    return moved, floor


def _landscape(subject: Subject, model: nn.Module, batch: Batch, rate: float) -> Roughness:
    """The loss of one batch along its gradient, in train mode; the model is restored."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]

    def evaluate(there: Sequence[Tensor]) -> tuple[Tensor, Vectors]:
        _move(parameters, [t[0] for t in there])
        torch.manual_seed(0)
        loss = subject.value(model, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach().reshape(1), of_one(gradients)

    with kept_buffers(model), quiet_divergence():
        try:
            return along_gradient(evaluate, [p.unsqueeze(0) for p in before], torch.tensor([rate]))
        finally:
            _move(parameters, before)


def _move(parameters: Sequence[Tensor], there: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, there, strict=True):
            parameter.copy_(value)
