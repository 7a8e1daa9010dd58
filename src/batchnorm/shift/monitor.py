"""ShiftMonitor: an alarm for covariate shift that may be read at any time and needs no reference data."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.call_types import Arguments, Batch, Keywords
from batchnorm.model_wrappers import is_compiled, unwrapped
from batchnorm.population.absent_numbers import note_absence, refusing_absences
from batchnorm.population.batches import Batches
from batchnorm.population.eager import uncompiled
from batchnorm.population.hooks import Hook, detach
from batchnorm.population.tensor_trees import examples_in, rows_of, why_without_rows
from batchnorm.shift.alarm import Alarm, LayerShift
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.data_passes import passes
from batchnorm.shift.fleet import WITHIN, combined
from batchnorm.shift.fleet_states import Replica
from batchnorm.shift.layer_observer import ALL, LayerObserver, random_rows, storing_layers
from batchnorm.shift.monitor_settings import check_settings
from batchnorm.shift.observation_units import Grouping, Unit, name_of
from batchnorm.shift.observing_budget import ObservingBudget
from batchnorm.shift.stream import LOGGER, Stream
from batchnorm.shift.stream_state import StreamState


@final
class ShiftMonitor:
    """Observes the inputs of a deployed model, and raises an alarm when they differ from the training inputs.

    ::

        monitor = bn.ShiftMonitor(model)           # the checkpoint is the reference
        with monitor:                              # or monitor.start() ... monitor.stop()
            serve(model)                           # forward passes in eval mode are observed
        monitor.alarm                              # None, or what moved and where first

    On clean data the probability that it ever raises an alarm is at most ``alpha``. With ``arl`` instead, the first
    false alarm comes after at least that many observations on average. ``batchnorm.shift.alarm_reference`` has the
    conditions, ``batchnorm.shift.betting`` and ``batchnorm.shift.conformal`` have the proofs. An alarm says that the
    distribution moved, not that accuracy fell; a shift that keeps every channel's mean and every layer's energy is not
    detected. The model is not changed: its layers have hooks while it is observed.

    A few examples of each batch are observed, drawn at random, because batches may be sorted. After 256 of them, whole
    batches are skipped if observing would take more than ``budget`` of the inference time; if that leaves fewer than
    5 %, the monitor warns once. Which batches are skipped depends on counts and earlier times, not on their contents.
    Passes in several threads are not mixed; a thread waits while another one counts its pass.

    Args:
        model: Any model with batch norm layers that store statistics, torch.nn's or ours, compiled or not.
        alpha: Largest probability that clean data ever raise an alarm.
        unit: What one observation is: "example"; "batch", if examples of a batch or neighbouring batches may be alike;
            or a function from the inputs to a key per example: neighbours with the same key form one observation.
        arl: Smallest average number of observations until a false alarm; used instead of ``alpha``. The alarm's power
            to detect a later shift does not fall with time.
        reference: The result of ``calibrate``, or its file. None: the checkpoint's own statistics are the reference.
        examples: Number of examples of a batch that are observed, drawn at random; None for all. If ``unit`` is a
            function, all examples are observed. With unit "batch" and a calibrated reference, an observation has as
            many examples as in the calibration (with None, as many as the first batch of the calibration), and smaller
            batches are combined.
        budget: Largest share of the inference time that observing may take, once 256 examples were observed; None for
            no limit. If ``unit`` is a function and the reference is calibrated, all batches are observed.
        batch: Number of examples in a training batch; the precision of the stored statistics depends on it. Not used if
            ``reference`` is given, or after ``calibrate``.
        kurtosis: Largest fourth moment of a layer's standardized inputs on clean data, 3 for normal inputs; None if it
            is unknown. It sets the tolerance for stored variances (None: as for 3), and lets lower energy count as
            evidence too. Not used if ``reference`` is given, or after ``calibrate``.
        on_alarm: Called once, with the alarm. Exceptions that it raises are logged.

    Raises:
        TypeError: If the model is not a module, or an argument that must be a number, or a whole number, is not.
        ValueError: If the model has no batch norm layer that stores statistics, an argument is out of range, or the
            reference is out of date, damaged, or belongs to another model or unit.
        OSError: If the reference's file cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.01,
        unit: Unit = "example",
        *,
        arl: float | None = None,
        reference: Reference | str | os.PathLike[str] | None = None,
        examples: int | None = 4,
        budget: float | None = 0.01,
        batch: int = 64,
        kurtosis: float | None = None,
        on_alarm: Callable[[Alarm], object] | None = None,
    ) -> None:
        check_settings(alpha=alpha, arl=arl, examples=examples, budget=budget, kurtosis=kurtosis)
        self.model = unwrapped(model)
        self.layers = storing_layers(self.model)
        self.unit, self.examples, self.budget = unit, examples, budget
        self.observed = model
        self._trained = {"batch": batch, "kurtosis": kurtosis}
        self._error_rates = {"alpha": alpha, "arl": arl, "on_alarm": on_alarm}
        self._is_whole = False  # whether a compiled model needs whole batches, because it failed on some rows of one
        self._handles: list[RemovableHandle] = []
        self._guard = ExitStack()
        self._passes = threading.local()  # each thread's own pass: its start time
        self._use(self._referred(reference))

    def _referred(self, reference: Reference | str | os.PathLike[str] | None) -> Reference:
        if reference is None:
            return Reference.from_checkpoint(self.model, self.layers, unit=name_of(self.unit), **self._trained)
        bounds = reference if isinstance(reference, Reference) else Reference.load(reference)
        bounds.check(self.model, tuple(self.layers))
        if bounds.unit != name_of(self.unit):
            raise ValueError(
                f"the reference was calibrated with unit {bounds.unit!r}, got unit {name_of(self.unit)!r}. "
                "Calibrate again, or use the reference's unit."
            )
        return bounds

    def _use(self, reference: Reference) -> None:
        self.reference = reference
        self._tap = LayerObserver(self.layers, reference)
        self.reset()

    def reset(self) -> None:
        """Forget all evidence and the alarm, and start a new stream."""
        self.stream = Stream(self.reference, self.unit, **self._error_rates)
        self._costs = ObservingBudget(self.budget)

    def __repr__(self) -> str:
        alarm_text = "no alarm" if self.alarm is None else f"alarm at {self.alarm.first or 'no single layer'}"
        doubt = f"; doubtful: {tail}" if (tail := self.stream.tail) else ""
        return (
            f"ShiftMonitor({type(self.model).__name__}, layers={len(self.layers)}, observed {self.stream.looked} of "
            f"{self.stream.passed} examples, {alarm_text}{doubt})"
        )

    @property
    def alarm(self) -> Alarm | None:
        """The alarm, once the evidence has reached the limit, until ``reset``; None before."""
        return self.stream.alarm

    @property
    def log_evidence(self) -> float:
        """Logarithm of the evidence against clean data, from all observations so far."""
        return self.stream.update()

    @property
    def limit(self) -> float:
        """Log evidence that raises the alarm: log(1 / alpha), or log(arl)."""
        return self.stream.limit

    def table(self) -> list[LayerShift]:
        """The evidence for every layer now."""
        return self.stream.table()

    # -- observing ------------------------------------------------------------------------------------------------

    def __enter__(self) -> ShiftMonitor:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        note_absence(self.model, error)
        self.stop()

    def start(self) -> ShiftMonitor:
        """Observe forward passes from now on."""
        if not self.is_observing:
            self._guard.enter_context(refusing_absences(self.model))
            before, after = (Hook(work, is_always=True) for work in (self._before, self._after))
            self._handles = [
                self.observed.register_forward_pre_hook(before, with_kwargs=True),
                *([] if self.is_compiled else self._tap.attach()),
                self.observed.register_forward_hook(after, with_kwargs=True, always_call=True),
            ]
        return self

    def stop(self) -> None:
        """Stop observing, and add waiting observations to the evidence."""
        detach(self._handles)
        self._guard.close()
        self.stream.update()

    @property
    def is_observing(self) -> bool:
        """Whether the monitor observes forward passes now."""
        return bool(self._handles)

    def leave_out(self) -> None:
        """Do not observe the running pass of this thread."""
        self._tap.end()

    @property
    def cost(self) -> float:
        """The time of observing divided by the remaining inference time."""
        return self._costs.cost

    @property
    def is_compiled(self) -> bool:
        """Whether forward runs as a traced program, which would trace hooks too."""
        return is_compiled(self.observed)

    @property
    def _of_each(self) -> int:
        """Number of examples of a batch to observe: all if keys group examples into observations."""
        return ALL if callable(self.unit) else self.reference.examples or self.examples or ALL

    @property
    def _needs_all(self) -> bool:
        """Whether no batch may be skipped: skipping would break long runs of keys more often than short ones."""
        return callable(self.unit) and self.reference.clean is not None

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:  # noqa: ARG002
        self._passes.began = time.perf_counter()
        is_observed = self._needs_all or self._costs.allows(self.stream.looked)
        self._tap.begin(self._of_each if is_observed else 0, seed=self.stream.passed)
        if not is_observed:
            self._costs.skip()

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Arguments, kwargs: Keywords, output: object) -> None:  # noqa: ARG002
        start = time.perf_counter()
        if output is None and sys.exc_info()[0] is not None:  # the pass failed and raises its own error
            self._tap.begin(0, 0)
            self._tap.seconds_taken()
            self.stream.missed()
            return
        asked, statistics = self._tap.end(), self._tap.taken()
        if asked and statistics is None and self._can_pass_again():
            statistics = self._second_pass((args, kwargs), self._drawn((args, kwargs), asked))
        with self.stream.lock:
            size = examples_in((args, kwargs)) or 0
            self.stream.passed += size
            if statistics is not None:
                self.stream.observe(*statistics, inputs=args[0] if args else kwargs)
            else:
                self.stream.missed()
            now = time.perf_counter()
            spent = now - start + self._tap.seconds_taken()
            self._costs.add(min(asked, max(1, size)), now - self._passes.began, spent)
            if problem := self._costs.problem(self.stream.passed, self.stream.looked):
                self.stream.warn("budget", problem)

    def _can_pass_again(self) -> bool:
        """Whether an uncompiled second pass can measure the batch: of a compiled model in eval mode. Else warn."""
        if all(layer.training for layer in self.layers.values()):
            message = "the model is in train mode, and does not use its stored statistics. Call eval()."
            self.stream.warn("train", message)
            return False
        if not self.is_compiled:
            message = "a pass did not reach every batch norm layer with each example once; this pass is skipped."
            self.stream.warn("missed", message)
        return self.is_compiled

    def _drawn(self, given: Batch, examples: int) -> list[int] | None:
        """Rows of a batch for the second pass; None for all."""
        if self._is_whole or why_without_rows(given):
            return None
        return random_rows(examples_in(given) or 1, examples, self.stream.passed)

    def _second_pass(self, given: tuple[Arguments, Keywords], rows: list[int] | None) -> tuple[Tensor, Tensor] | None:
        """Statistics of these rows of a batch, from a pass without compilation; ``rows`` is None for all rows."""
        ((args, kwargs),) = Batches([given if rows is None else rows_of(given, rows)], None, None)
        try:
            with self._tap.attached(), uncompiled(), torch.no_grad():
                self.model(*args, **kwargs)
                return self._tap.taken()
        except Exception:
            if rows is None:
                raise
            self._is_whole = True  # the model fails on some of the rows alone, so rows are not examples
            return self._second_pass(given, None)

    # -- the reference --------------------------------------------------------------------------------------------

    def calibrate(self, loader: Iterable[Batch], max_examples: int | None = None) -> Reference:
        """Measure the reference on clean examples, use it from now on, and return it to be saved.

        The model runs in eval mode and is left as it was, bit for bit.

        Args:
            loader: Clean batches in the forms that ``recalibrate`` accepts, in the order and batch size in which
                batches will be observed. They must give 200 observations or more.
            max_examples: Largest number of examples to use; None uses all.

        Raises:
            TypeError: If ``loader`` is not an iterable of batches.
            ValueError: If there are too few observations, activations are not finite, a layer does not run in a pass,
                layers receive different numbers of examples, or the unit's function returns too few keys.
            RuntimeError: If the monitor is observing.
        """
        if self.is_observing:
            raise RuntimeError("calibrate must be called before observation starts. Call monitor.stop() first.")
        fresh = Reference.from_checkpoint(self.model, self.layers, unit=name_of(self.unit), **self._trained)
        grouping, parts, examples = None, [], 0
        tap = LayerObserver(self.layers, fresh)
        with closing(passes(self.model, tap, loader, max_examples, "calibrate")) as batches:
            for inputs, z, q in batches:
                if grouping is None:
                    examples = (self.examples or len(z)) if self.unit == "batch" else 0
                    grouping = Grouping(self.unit, examples)
                parts.append(grouping.of(z, q, inputs))
        z, q = (torch.cat(rows) for rows in zip(*parts, strict=True))
        self._use(replace(fresh, examples=examples).calibrated(z, q))
        return self.reference

    # -- files and replicas ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream's state to a file that ends in .bnshift.safetensors; a failed write leaves no part of it.

        Any thread may save while the monitor observes. The file may be an address of fsspec, such as s3://....

        Raises:
            ValueError: If the name has another ending, or a key that the unit's function returned is not JSON data.
            ModuleNotFoundError: If the package that an address needs is not installed.
            OSError: If the file cannot be written.
        """
        self.stream.state().save(path)

    def load(self, path: str | os.PathLike[str]) -> ShiftMonitor:
        """Continue, bit for bit, where a saved monitor of this model stopped.

        Raises:
            ValueError: If the file is damaged or of another kind, or its monitor had another reference, unit, alpha or
                arl.
            ModuleNotFoundError: If the package that an address needs is not installed.
            OSError: If the file cannot be read.
        """
        self.stream.put(StreamState.load(path))
        return self

    def pooled(
        self,
        *others: ShiftMonitor | str | os.PathLike[str],
        fleet: int | None = None,
        independent: bool = False,
        within: float = WITHIN,
    ) -> Alarm | None:
        """An alarm if the combined evidence of several replicas reaches the limit, else None; nothing is changed.

        The replicas serve the same model with the same reference, and each observation belongs to one of them. The
        combined evidence keeps the promise of one monitor; ``batchnorm.shift.fleet`` has the rules and proofs. From a
        checkpoint it is the sum of the replicas' e-values, divided by their number unless ``arl`` is given. With a
        calibrated reference the largest e-value counts, divided by their number unless ``arl`` is given. Of several
        states of one stream the latest counts.

        Args:
            others: The other replicas: monitors, or the files or addresses to which their ``save`` wrote.
            fleet: Number of replicas that the fleet has, fixed before anyone looks at the evidence. None: the number
                of streams among these replicas; then it must be the same at every call.
            independent: Declares that no observation of a replica tells about an observation of another one, so that
                their e-values may be multiplied. Calibrated replicas then need a calibration each. Not with ``arl``.
            within: Seconds by which times of states may differ that count as one time.

        Raises:
            TypeError: If ``fleet`` is not a whole number, or ``within`` is not a number.
            ValueError: If a file is damaged, of another kind or without a stream id; a replica has another model,
                reference, unit, alpha or arl; two states are forks of one stream; there are more streams than
                ``fleet``; or independence is declared and cannot be used.
            OSError: If a file cannot be read.
        """
        replicas = [Replica("this monitor", self._settled()), *(_replica(i, each) for i, each in enumerate(others, 2))]
        return self._combined(replicas, fleet=fleet, independent=independent, within=within)

    def pooled_over_ranks(
        self, group: torch.distributed.ProcessGroup | None = None, *, independent: bool = False
    ) -> Alarm | None:
        """``pooled`` over the ranks of torch.distributed; every rank must call it, and each gets the same result."""
        states: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(states, self._settled(), group=group)
        replicas = [Replica(f"rank {rank}", state) for rank, state in enumerate(states)]
        return self._combined(replicas, fleet=len(states), independent=independent, within=math.inf)

    def _settled(self) -> StreamState:
        """The state, after waiting observations were added to the evidence."""
        self.stream.update()
        return self.stream.state()

    def _combined(self, replicas: list[Replica], **how: Any) -> Alarm | None:
        fleet = combined(replicas, furthest=self.reference.furthest, **how)
        for sentence in fleet.left_out:
            LOGGER.warning("%s", sentence)
        return fleet.alarm


def _replica(number: int, other: ShiftMonitor | str | os.PathLike[str]) -> Replica:
    if isinstance(other, ShiftMonitor):
        return Replica(f"monitor {number}", other._settled())
    return Replica(os.fspath(other), StreamState.load(other))
