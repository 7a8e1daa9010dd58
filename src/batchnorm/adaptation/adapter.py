"""Adapter: after a shift alarm, replaces a model's statistics by those of its new inputs, guarded and reversible.

    watching     The deployed statistics are in use. An alarm leads to: gathering.
    gathering    The deployed statistics are in use. The model also answers each batch under trial statistics, which the
                 caller does not see. If no guard objects, the trial statistics are used: adapted. If a guard still
                 objects after four windows of examples, or the model raises an error in the trial: refused.
    adapted      The trial statistics are in use, and grow with each batch. A guard's objection leads to: rolled back.
    refused, rolled back
                 The deployed statistics are in use. If a layer's energy (the mean square of its standardized inputs)
                 changes by a factor of 1.25: gathering.

``reset`` leads from each state to: watching.

``guards`` contains the guards, ``cumulative`` computes the growing statistics.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm.adaptation.answer_window import PredictionWindow
from batchnorm.adaptation.cumulative import energy
from batchnorm.adaptation.guards import Limits, against_start, against_use, required_share
from batchnorm.adaptation.layer_statistics import adaptable
from batchnorm.adaptation.predictions import Predictions
from batchnorm.adaptation.trial_statistics import Trial
from batchnorm.argument_types import require_number, require_type, require_whole_number
from batchnorm.call_types import Answer, Arguments, Keywords
from batchnorm.population.absent_numbers import note_absence
from batchnorm.population.hooks import Hook, detach, seeing
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.stored_statistics import Statistics
from batchnorm.population.tensor_trees import examples_in
from batchnorm.shift import ShiftMonitor

Layers = dict[str, _BatchNorm]

LOGGER = logging.getLogger("batchnorm.adaptation")
LOGGER.addHandler(logging.NullHandler())  # like the monitor's logger
State = Literal["watching", "gathering", "adapted", "refused", "rolled back"]
_PATIENCE = 4  # windows that a trial lasts before it is refused
_ENERGY_FACTOR = 1.25  # if a layer's energy changes by this factor, the inputs have changed again


@final
@dataclass(frozen=True, slots=True)
class Event:
    """A change of an adapter's state.

    Args:
        state: The new state.
        reason: Why the state changed.
        examples: Number of examples that the monitor had counted.
        seconds: Unix time of the change.
    """

    state: State
    reason: str
    examples: int
    seconds: float

    def __str__(self) -> str:
        """The change in one line."""
        return f"{self.state} after {self.examples} examples: {self.reason}"


@final
class Adapter:
    """Adapts a deployed model's statistics to shifted inputs after a monitor's alarm, while this improves predictions.

    ::

        monitor = bn.ShiftMonitor(model, examples=None, budget=None)
        adapter = bn.Adapter(monitor)
        with adapter:                       # observes through the monitor, which it starts and stops
            serve(model)
        adapter.state, adapter.history

    Until the alarm, answers are those of the deployed model, bit for bit. Then the model also answers each batch under
    trial statistics, which combine every example since the alarm with ``prior`` stored ones. They are used once
    ``minimum`` examples are counted and no guard objects. They keep growing: each batch is counted before it is
    answered. When a guard objects during use, the next batches are answered by the deployed statistics again, bit for
    bit, until ``reset``, or until a layer's energy under the deployed statistics changes by a factor of 1.25: then
    another trial begins.

    Guards assume that the model's outputs are class logits. For other outputs give ``classes``. Without classes only
    energies are judged, and a stream is refused if the monitor finds that neighbouring examples are alike; ``history``
    says so. With predicted classes but no probabilities, the guard "need" objects unless nearly all predictions are the
    same. A calibrated monitor distinguishes another mix of classes, which needs no new statistics, from other inputs.

    Only ``running_mean`` and ``running_var`` are written, and the block restores them at its end. Passes with
    a layer to adapt in train mode are ignored. A trial calls ``model.forward`` a second time on copies of the inputs,
    without the hooks of the model itself. A compiled model is called a second time, uncompiled, in each pass of a trial
    and while it is adapted.

    Args:
        monitor: The monitor whose alarm starts a trial. It detects sooner if it observes all examples of a batch.
        prior: Number of examples that the stored statistics count as.
        minimum: Number of examples to count before their statistics are used.
        floor: Smallest weight of a new example; about 1 / floor examples are remembered.
        window: Number of latest examples that the guards judge.
        limits: The guards' requirements.
        classes: "logits" if outputs are logits (N, K) of K classes; a function from the output to such logits, or to
            the predicted class of each example, (N,); None if there are no classes.

    Raises:
        TypeError: If ``monitor`` is not a ShiftMonitor, or an argument that must be a number, or a whole number
            (``window``), is not, or a layer to adapt is complex.
        ValueError: If an argument is out of range, or the model has no layer to adapt.
    """

    def __init__(
        self,
        monitor: ShiftMonitor,
        *,
        prior: float = 16,
        minimum: int = 16,
        floor: float = 1 / 1024,
        window: int = 64,
        limits: Limits | None = None,
        classes: Literal["logits"] | Callable[[Answer], Tensor] | None = "logits",
    ) -> None:
        require_type(
            monitor,
            ShiftMonitor,
            "Adapter needs a ShiftMonitor",
            "Make a monitor of the model: Adapter(ShiftMonitor(model)).",
        )
        _check(prior, minimum, floor, window)
        self.monitor, self.minimum, self.limits = monitor, minimum, limits or Limits()
        self.history: list[Event] = []
        self._window, self._options = window, {"prior": prior, "floor": floor, "window": window}
        self._classes = classes
        self._layers: Layers = adaptable(monitor.model, "Adapter")
        self._handles: list[RemovableHandle] = []
        self._attached = ExitStack()  # hooks on the layers during the running pass
        self._start()

    def _start(self) -> None:
        self.state: State = "watching"
        self._deployed = Statistics.of(self._layers)
        self._before_alarm: Predictions | None = None
        self._renew()

    def _renew(self) -> None:
        self._trial = Trial(self._layers, self._deployed, **self._options)
        self._share = self.limits.accept  # share of the information that was required when use began
        self._is_counted = False  # whether a trial has already counted the running pass
        self._energies: dict[str, tuple[float, float]] = {}  # of one pass, under the deployed statistics
        self._latest = PredictionWindow(self._window)  # energies under the deployed statistics
        self._first_energies: dict[str, float] = {}  # those of the first window after a refusal or rollback

    def reset(self) -> None:
        """Start a new stream: restore the deployed statistics, and forget evidence and alarm, but not the history."""
        self._deployed.put(self._layers)
        self.monitor.reset()
        self._start()
        self._become("watching", "reset")

    def __enter__(self) -> Adapter:
        if self._handles:
            raise RuntimeError("an adapter observes one block at a time, got a second block. Leave the first block.")
        if not self._deployed.are_in(self._layers):  # somebody trained or recalibrated the model since
            self._start()
        if self.state == "adapted":
            self._trial.statistics.put(self._layers)
        self._starts_monitor = not self.monitor.is_observing
        self.monitor.start()
        outer = self.monitor.observed
        before, hush, after = (Hook(work, is_always=True) for work in (self._before, self._hush, self._after))
        self._handles = [
            # ``before`` runs before the monitor's hooks, so that the monitor does not observe a trial
            outer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            outer.register_forward_pre_hook(hush),
            outer.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        note_absence(self.monitor.model, error)
        detach(self._handles)
        self._attached.close()
        if self._starts_monitor:
            self.monitor.stop()
        if self.state == "adapted":
            self._trial.statistics = Statistics.of(self._layers)
            self._deployed.put(self._layers)

    # -- one pass -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:  # noqa: ARG002
        if not self._is_followed:
            return
        if self.state == "gathering":
            self._gather(args, kwargs)
        elif self.state == "adapted" and self.monitor.is_compiled:
            self._trial.begin()
            self._trial.shadow(self.monitor.model, args, kwargs)
            self._trial.statistics.put(self._layers)
        elif self.state == "adapted":
            self._trial.begin()
            self._attached.enter_context(seeing(self._layers, self._trial.growing.see))
        elif self.state != "watching":
            self._attached.enter_context(seeing(self._layers, self._look))

    def _hush(self, *_: object) -> None:
        """Keep the monitor from observing adapted layers, because these change the inputs of later layers."""
        if self.state == "adapted":
            self.monitor.leave_out()

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Arguments, kwargs: Keywords, output: Answer) -> None:  # noqa: ARG002
        self._attached.close()
        examples = examples_in((args, kwargs)) or 0
        if not self._is_followed or not examples:
            return
        if output is None:  # the pass failed
            if self.state == "adapted" and not self._is_counted:
                self._trial.undo()
        elif self.state == "watching":
            self._watch(args, kwargs, output)
        elif self.state == "gathering":
            self._trial.old.add_answers(self._answers(output), examples)
        elif self.state == "adapted":
            self._judge(output, examples)
        else:
            self._reconsider(examples)
        self._is_counted = False

    @property
    def _is_followed(self) -> bool:
        return not any(layer.training for layer in self._layers.values())

    def _watch(self, args: Arguments, kwargs: Keywords, output: Answer) -> None:
        answers = self._answers(output)
        if self.monitor.alarm is None:
            if answers is not None:
                new = Predictions.of(answers)
                self._before_alarm = new if self._before_alarm is None else self._before_alarm + new
            return
        self._become("gathering", str(self.monitor.alarm))
        if answers is None:
            self._note("there are no classes: only energies are judged")
        elif self._before_alarm is None:
            self._before_alarm = Predictions.of(answers[:0])
        self._trial.old.add_answers(answers, len(answers) if answers is not None else 0)
        self._gather(args, kwargs)

    def _gather(self, args: Arguments, kwargs: Keywords) -> None:
        """Count a batch in the trial, and judge it."""
        trial, examples = self._trial, examples_in((args, kwargs)) or 0
        try:
            output = trial.shadow(self.monitor.model, args, kwargs)
        except Exception as error:  # a failed trial must not stop inference
            LOGGER.exception("a trial pass raised")
            self._leave("refused", f"the trial pass raised {error!r}")
            return
        trial.count(self._answers(output), examples)
        if trial.new.examples < self.minimum or (trial.old.answers is None and self._before_alarm is not None):
            return  # the deployed statistics answer this batch only after the trial
        objection = self._objection()
        if objection is None:
            self._share = required_share(*self._circumstances())
            trial.statistics.put(self._layers)
            self._is_counted = True
            self._become("adapted", f"no guard objects to the statistics of {trial.new.examples} examples")
        elif trial.new.examples >= _PATIENCE * self._window:
            self._leave("refused", objection)

    def _objection(self) -> str | None:
        if self._before_alarm is None and self.monitor.stream.autocorrelation.is_wrong:
            return "neighbouring examples are alike, and without classes a biased mix cannot be recognized"
        if self.state == "adapted":
            return against_use(self._trial.new, self._before_alarm, self.limits, self._share)
        return against_start(*self._circumstances())

    def _circumstances(
        self,
    ) -> tuple[PredictionWindow, PredictionWindow, Predictions | None, Limits, tuple[float, float] | None]:
        return self._trial.new, self._trial.old, self._before_alarm, self.limits, self.monitor.stream.furthest()

    def _judge(self, output: Answer, examples: int) -> None:
        """Count a batch that was answered under new statistics; restore the deployed ones if a guard objects."""
        if not self._is_counted:
            self._trial.count(self._answers(output), examples)
        if objection := self._objection():
            self._deployed.put(self._layers)
            self._leave("rolled back", objection)

    def _leave(self, state: State, reason: str) -> None:
        self._renew()
        self._become(state, reason)

    def _look(self, path: str, layer: _BatchNorm, x: Tensor) -> None:
        self._energies[path] = energy(layer, InputMoments.of(x.detach()).moments), 1.0

    def _reconsider(self, examples: int) -> None:
        """Begin another trial if the energies have changed since the last trial ended."""
        if not self._energies:
            return  # the trial was refused in this pass
        self._latest.add_energies(self._energies, examples)
        self._latest.add_answers(None, examples)
        if self._latest.examples < self._window:
            return
        if not self._first_energies:
            self._first_energies = dict(self._latest.energies)
        for path, first in self._first_energies.items():
            latest = self._latest.energies[path]
            if not first / _ENERGY_FACTOR <= latest <= first * _ENERGY_FACTOR:
                self._renew()
                self.monitor.stream.look_anew()
                self._become("gathering", f"the energy of layer {path!r} moved from {first:.2f} to {latest:.2f}")
                return

    def _answers(self, output: Answer) -> Tensor | None:
        """Predicted probabilities, (N, K), float64 on the CPU; None if there are no classes or no logits (N, K)."""
        if self._classes is None:
            return None
        scores = output if self._classes == "logits" else self._classes(output)
        is_tensor = isinstance(scores, Tensor)
        if is_tensor and scores.is_floating_point() and scores.ndim == 2 and scores.shape[1] > 1:
            p = scores.detach().cpu().double().softmax(1)
            # NaN carries no information: such an example gets equal probabilities
            return torch.where(p.isfinite().all(1, keepdim=True), p, 1 / p.shape[1])
        if self._classes == "logits":
            return None
        if is_tensor and not scores.is_floating_point() and scores.ndim == 1:
            return nn.functional.one_hot(scores.detach().cpu().long()).double()
        got = f"{tuple(scores.shape)} of {scores.dtype}" if is_tensor else type(scores).__name__
        raise ValueError(f"classes must give logits (N, K) or predicted classes (N,), got {got}. Change the function.")

    # -- history --------------------------------------------------------------------------------------------------

    def _become(self, state: State, reason: str) -> None:
        self.state = state
        self._note(reason)

    def _note(self, reason: str) -> None:
        event = Event(self.state, reason, self.monitor.stream.passed, time.time())
        self.history.append(event)
        LOGGER.warning("%s", event)


def _check(prior: float, minimum: int, floor: float, window: int) -> None:
    for name, value in (("prior", prior), ("minimum", minimum), ("floor", floor), ("window", window)):
        (require_whole_number if name == "window" else require_number)(value, name, "Leave it out for the default.")
    if not (prior >= 0 and math.isfinite(prior)):
        raise ValueError(f"prior must be a number of examples, 0 or more, got {prior}. 16 is usual.")
    if not 2 <= minimum <= window:
        raise ValueError(f"Adapter needs 2 <= minimum <= window, got minimum {minimum}, window {window}. Try 16, 64.")
    if not 0 < floor < 1:
        raise ValueError(f"floor must be between 0 and 1, got {floor}. 0.001 remembers about 1000 examples.")
