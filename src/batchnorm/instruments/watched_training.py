"""Watch: a training that is measured while it runs, at a small cost.

The steps of the model's optimizers are counted (``optimizer_steps``). The running averages are copied after a few
consecutive steps, and the statistics of the batches are computed from the copies. This works in compiled models, under
AMP, and with layers of torch.nn and of this package. If a step has several passes, copies are also made between the
passes (``passes``). At longer intervals a fixed probe batch passes through the model. The measurement does not change
the model: the trained weights are the same with and without it, bit for bit. Of several processes that train together
the first one measures; the others only leave copies of their stored statistics, which it compares
(``rank_comparison``).
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Union, final

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from batchnorm.argument_types import require_type
from batchnorm.call_types import Batch
from batchnorm.instruments.free_tier import LEAST
from batchnorm.instruments.look_schedule import Schedule
from batchnorm.instruments.looks import Looks, lab_record
from batchnorm.instruments.open_window import WINDOW, OpenWindow
from batchnorm.instruments.optimizer_steps import Steps
from batchnorm.instruments.passes import Passes
from batchnorm.instruments.probe_tier import Loss, Probe, with_shape
from batchnorm.instruments.rank_comparison import RankComparison
from batchnorm.instruments.sinks import Outlets, Sink
from batchnorm.instruments.snapshots import Layers
from batchnorm.instruments.training_events import (
    NO_PROBE,
    Events,
    TrainingEvent,
    foreign_steps,
    no_steps,
    not_the_first,
    postponed,
    too_short,
)
from batchnorm.layers import batch_norms
from batchnorm.model_wrappers import unwrapped
from batchnorm.population.absent_numbers import note_absence, refusing_absences, require_real
from batchnorm.population.batches import on_device_of
from batchnorm.population.hooks import Hook, detach
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.tensor_memory import emptiness
from batchnorm.population.tensor_trees import tensors_in
from batchnorm.processes import group_named
from batchnorm.processes.membership import members
from batchnorm.record import Record

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group = Union["ProcessGroup", Literal["all"], None]
LogFolder = str | os.PathLike[str] | None

PROBE_EXAMPLES = 64
_PROBE_EVERY = 2  # looks
_PROBE_SECONDS = 0.003  # expected time of the first probe per layer, without its two passes
_KEPT = 256  # records in memory
_PULSE = 1.0  # seconds between progress lines
_FOREIGN = 100  # steps of other optimizers in a row; two trainings that alternate have fewer


@final
class Watch:
    """A training that is being measured; made by ``watch``.

    Attributes:
        records: The last 256 records, oldest first.
        steps: Number of optimizer steps so far; with a continued log, including the steps in the log. On all ranks of a
            process group but its first one it counts from 0, and ``records`` stays empty.
    """

    _steps: Steps | None = None
    _looks: Looks | None = None
    _ranks: RankComparison | None = None
    _group: ProcessGroup | None = None  # in use since the start; None if this process trains alone
    _follows = False  # whether another rank measures
    _probe: Probe | None
    _by_hand, _foreign = False, 0  # whether run.step() counts; steps of other optimizers in a row
    _began = 0  # steps that the log had at the start
    _looked, _next_probe = 0, 1

    def __init__(
        self,
        model: nn.Module,
        *,
        log: LogFolder,
        schedule: Schedule,
        probe: Batch,
        loss: Loss | None,
        sinks: tuple[Sink, ...],
        group: Group = "all",
    ):
        self.records: deque[Record] = deque(maxlen=_KEPT)
        self.steps = 0
        self._outer, self._model = model, unwrapped(model)
        require_real(self._model, "watch")
        require_type(log, (str, os.PathLike, NoneType), "watch needs the path of a folder as log", "None keeps no log.")
        if not batch_norms(self._model):
            raise ValueError(
                f"watch needs a model with batch norm layers, got {type(self._model).__name__} without any. "
                "Pass the model that has the layers."
            )
        group_named(group)  # raises if it names no group
        self._asked_group = group
        self._outlets, self._schedule = Outlets(log, sinks), schedule
        self._captures, self._probe = probe is None, None
        if probe is not None and probe is not False:
            self._probe = Probe.of_batch(on_device_of(self._model, probe, who="watch"), loss)
        self._events = Events()
        self._pulse = time.perf_counter()
        self._handles: list[RemovableHandle] = []
        self._guard = ExitStack()
        self._on = False

    def __enter__(self) -> Watch:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        note_absence(self._model, error)
        self.stop("finished" if kind is None else f"raised {kind.__name__}")

    def start(self) -> Watch:
        """Begin to measure; a ``with`` statement calls it."""
        if self._on:
            return self
        group = group_named(self._asked_group)
        self._group = group if group is not None and len(members(group)) > 1 else None
        self._follows = self._group is not None and torch.distributed.get_rank() != members(self._group)[0]
        self._on = True
        if not any(isinstance(layer, LazyModuleMixin) for layer in batch_norms(self._model).values()):
            self._begin()  # raises before the training if the log cannot be written
        self._by_hand, self._foreign = False, 0
        self._steps = Steps(
            self._model, batch_norms(self._model).values(), self._after_step, self._after_foreign, self._give_up
        )
        self._steps.on()
        if self._follows:
            return self
        self._guard.enter_context(refusing_absences(self._model))
        if self._captures and self._probe is None:
            self._handles.append(self._outer.register_forward_pre_hook(Hook(self._capture), with_kwargs=True))
        return self

    def stop(self, reason: str = "finished") -> None:
        """Measure the open window, and end the log; a ``with`` statement calls it."""
        if not self._on:
            return
        if not self._follows:
            self._guarded(self._finish)
            self._outlets.tell_left_out(self.steps)
            if self.steps == self._began:
                self._outlets.unsaid.append(no_steps(self._foreign))
        self._release(reason)
        while self._outlets.unsaid:
            _warn(self._outlets.unsaid.pop())

    @property
    def latest(self) -> Record:
        """The last record of the free tier.

        Raises:
            RuntimeError: If there is no such record yet.
        """
        for record in reversed(self.records):
            if record.tier == "free":
                return record
        if self._follows and self._group is not None:
            raise RuntimeError(not_the_first(torch.distributed.get_rank(), members(self._group)))
        if not self._on:
            raise RuntimeError(f"{too_short(self.steps - self._began, LEAST - 1)}.")
        raise RuntimeError(
            f"nothing was measured yet after {self.steps} steps. Read it later, lower every=, or raise budget=."
        )

    @property
    def cost(self) -> float:
        """Time spent on measuring, divided by the time spent on training."""
        return self._schedule.cost

    def log(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record numbers of this step, such as ``loss=loss``; the log gets their means, once a second at most.

        Tensors stay on their device, and a GPU is not waited for. None is left out. A value that is no single number is
        left out too, and its name is reported once: by an event in the log, or without a log by a warning at the end.
        NaN and infinity are written as null.
        """
        by_name = dict(values) if isinstance(values, Mapping) else {} if values is None else {"values": values}
        self._outlets.note({**{str(name): value for name, value in by_name.items()}, **more})
        if self._outlets.has_log:
            self._guarded(lambda: self._outlets.tell_left_out(self.steps))

    def lab(self, values: Mapping[str, Mapping[str, float]] | None = None, **model: float) -> None:
        """Record numbers that you measured at this step.

        For example ``run.lab(largest_share=gap.worst.share.value)``.

        Args:
            values: Quantity -> layer -> number; a layer without a number gets None.
            model: Numbers of the whole model, by quantity.
        """
        self._guarded(lambda: self._note_lab(values or {}, model))

    def _note_lab(self, values: Mapping[str, Mapping[str, float]], model: Mapping[str, float]) -> None:
        if not self._follows:
            self._begin()
            self._keep(lab_record(self.steps, self._looking.names, values, model))

    def step(self) -> None:
        """Count a step that no torch.optim optimizer takes; after the first call, steps of optimizers do not count."""
        self._by_hand = True  # from now on steps of optimizers do not count
        self._guarded(self._count)

    def _after_step(self, taker: int) -> None:
        self._foreign = 0
        if not self._by_hand:
            self._guarded(lambda: self._count(taker))

    def _after_foreign(self, optimizer: torch.optim.Optimizer) -> None:
        self._foreign += 1
        counts = not (self._by_hand or self._follows) and self._foreign == _FOREIGN
        if counts and self._steps is not None and self._steps.saw_passes():
            self._guarded(lambda: self._tell_foreign(optimizer))

    def _tell_foreign(self, optimizer: torch.optim.Optimizer) -> None:
        self._begin()
        self._outlets.event(self.steps, foreign_steps(self._foreign, type(optimizer).__name__))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Call ``work`` while measuring; an error in it stops the measurement but not the training."""
        if not self._on:
            return
        try:
            with self._schedule.spending():
                work()
        except Exception as error:  # noqa: BLE001 - the training must go on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._on:
            self._release(f"stopped by {type(error).__name__}")
            _warn(f"watch stopped at step {self.steps}: {type(error).__name__}: {error}. The training goes on.")

    def _count(self, taker: int = 0) -> None:
        self._begin()
        self.steps += 1
        self._compare_ranks()
        if self._follows:
            return
        due = self._schedule.is_due()
        if self._window.ends:
            self._window.add(taker)
            self._go_on(due=due)
        elif due:
            self._open_window()
            self._window.since = 0
        if time.perf_counter() - self._pulse >= _PULSE:
            self._beat()

    def _compare_ranks(self) -> None:
        if self._ranks is None:
            return
        try:
            self._note_ranks(self._ranks.stepped(self.steps - self._began, self._schedule))
        except RuntimeError as error:  # the store of the process group; the measurement needs no other rank
            self._ranks.end()
            self._ranks = None
            self._outlets.tell(self.steps, f"the stored statistics of ranks are no longer compared: {error}")

    def _note_ranks(self, found: tuple[Record | None, list[TrainingEvent]]) -> None:
        record, events = found
        if record is not None:
            self._keep(replace(record, step=self._began + record.step))
        for event in events:
            self._outlets.event(self.steps, event.message, event.layer, event.code)

    def _open_window(self) -> None:
        if self._steps is not None:
            self._steps.refresh()
        self._window.open()

    def _go_on(self, *, due: bool) -> None:
        """Look if the window is long enough; close the first window, open from the start, if no look is due soon."""
        if self._window.since is not None:
            self._window.since += 1
            if self._window.is_enough():
                self._look()
        elif due:
            self._window.since = 0
        elif self.steps - self._began >= 2 * WINDOW:
            self._window.close()

    @property
    def _looking(self) -> Looks:
        assert self._looks is not None  # noqa: S101 - _begin sets it
        return self._looks

    @property
    def _window(self) -> OpenWindow:
        return self._looking.window

    def _begin(self) -> None:
        """Open the log and the first window, once; lazy layers have a shape only after their first pass."""
        if self._looks is not None:
            return
        layers = Layers(with_shape(self._model, "watch"))
        about = {"window": WINDOW, **self._schedule.about()}
        steps = None if self._follows else self._outlets.open(self._model, layers, about, self._group)
        self.steps = self._began = self.steps if steps is None else steps
        self._looks = Looks(layers, Passes(self._outer, layers, self._guarded), self._events)
        if self._group is not None and self._ranks is None:
            self._ranks = RankComparison(self._group, layers, self._schedule.every)
        if not self._follows:
            self._open_window()

    def _look(self) -> None:
        with self._schedule.looking("free"):
            record, events = self._looking.free(self.steps)
            self._keep(record)
            for event in events:
                self._outlets.event(self.steps, event.message, event.layer, event.code)
        self._looked += 1
        if self._probe is not None and self._probe_is_due():
            with self._schedule.looking("probe"):
                self._keep(self._looking.probed(self.steps, self._probe, self._model))
            self._next_probe = self._looked + _PROBE_EVERY

    def _probe_is_due(self) -> bool:
        self._schedule.expect("probe", _PROBE_SECONDS * len(self._looking.names))
        return self._looked >= self._next_probe and not is_sharded(self._model) and self._schedule.affords("probe")

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._outlets.record(record)

    def _beat(self) -> None:
        self._pulse = time.perf_counter()
        self._outlets.progress(self.steps, self.cost)

    def _capture(self, module: nn.Module, args: tuple[Batch, ...], kwargs: dict[str, Batch]) -> None:
        """Use the first inputs in train mode as the probe batch."""
        if not module.training or not self._on or self._probe is not None:
            return
        if any(map(emptiness, tensors_in((args, kwargs)))):  # the model is being traced
            return
        self._guarded(lambda: self._hold(args, kwargs))

    def _hold(self, args: tuple[Batch, ...], kwargs: dict[str, Batch]) -> None:
        self._probe = Probe.of_call(args, kwargs, PROBE_EXAMPLES)
        detach(self._handles)

    def _finish(self) -> None:
        if self._looks is None:
            return
        if self._ranks is not None:
            self._note_ranks(self._ranks.finished())
        if len(self._window.ends) >= LEAST:
            self._look()
        elif self.steps > self._began and self._looks.last is None:
            self._outlets.event(self.steps, too_short(self.steps - self._began, LEAST - 1))
        if self._captures and self._probe is None and self.steps:
            self._outlets.event(self.steps, NO_PROBE)
        if self._schedule.postponed:
            self._outlets.event(self.steps, postponed(self._schedule.postponed, self._schedule.budget))
        self._beat()

    def _release(self, reason: str) -> None:
        self._on = False
        detach(self._handles)
        self._guard.close()
        if self._steps is not None:
            self._steps.off()
        if self._looks is not None:
            self._looks.window.close()
        if not self._follows:
            self._outlets.close(self.steps, reason, self.cost)
        if self._ranks is not None:
            self._ranks.end()
        self._ranks = None  # it keeps the store of the process group open
        self._looks = None  # a second start opens the log again


_warn = partial(warnings.warn, category=RuntimeWarning, stacklevel=3)
