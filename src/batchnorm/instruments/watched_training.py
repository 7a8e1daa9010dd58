"""watch: what batch norm does while a model trains, measured at a cost that lets one leave it on.

The clock is the model's optimizers (``optimizer_steps``): after a step the running averages are all there, and a few
copies of them say what the batches looked like, in compiled models, under AMP, and with layers of torch.nn and ours
alike. Where a step has several passes, copies are taken between them as well (``passes``). At longer intervals a fixed
probe batch passes through the model. None of it leaves a trace in the model: trained weights are the same, bit for bit.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from importlib.metadata import version
from types import NoneType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from batchnorm.argument_types import require_type
from batchnorm.instruments.free_tier import LEAST, Window, shift, shift_floor
from batchnorm.instruments.gamma_and_beta import census
from batchnorm.instruments.look_schedule import Schedule
from batchnorm.instruments.optimizer_steps import Steps
from batchnorm.instruments.passes import End, Passes
from batchnorm.instruments.probe_tier import Probe, View, with_shape
from batchnorm.instruments.sinks import Outlets, Sink, number_of
from batchnorm.instruments.snapshots import Layers, Snapshot
from batchnorm.instruments.training_events import Events
from batchnorm.layers import batch_norms, unwrapped
from batchnorm.population.absent_numbers import note_absence, refusing_absences, require_real
from batchnorm.population.batches import Batches, call, on_device_of
from batchnorm.population.hooks import Hook, detach
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.tensor_memory import emptiness
from batchnorm.population.tensor_trees import tensors_in
from batchnorm.record import QUANTITIES, Record

if TYPE_CHECKING:
    from batchnorm.instruments.probe_tier import Loss

WINDOW = 8  # steps of one look: 6 second differences, pooled over channels
_LONGEST = 4 * WINDOW  # where a layer is not updated in every step
PROBE_EXAMPLES = 64
_PROBE_EVERY = 2  # looks
_PROBE_SECONDS = 0.003  # a layer, beside the two passes; only the first probe is planned by it
_KEPT = 256  # records in memory
_PULSE = 1.0  # seconds between progress lines
_FOREIGN = 100  # steps of others' optimizers without one of the model's: no alternation of two trainings has so many


def watch(
    model: nn.Module,
    *,
    log: str | os.PathLike[str] | None = None,
    every: int = 100,
    budget: float = 0.02,
    probe: Any = None,
    loss: Loss | None = None,
    sinks: Iterable[Sink] = (),
) -> Watch:
    """A block in which the training of ``model`` is measured; what it trains to is the same, bit for bit.

    Steps are those of every torch.optim optimizer that has one of the model's parameters, and those that share the
    parameters of one backward pass take one together; without any call ``run.step()`` after each step. Looks are
    ``every`` steps apart, closer at the start, and further where they would take more than ``budget`` of the time
    of training. Two tiers are measured:

    - free, from the running averages after ``WINDOW`` consecutive steps: batch noise, effective batch, equivalent
      dropout, staleness of stored statistics, stored against batch, shift, gamma and beta, dead channels;
    - probe, every second look, from a fixed batch: drift, signal propagation, loss in train and eval mode.

    A layer whose statistics do not move (frozen, momentum 0, unused) has None for what could not be measured. Where a
    step has several passes, each is compared with the same pass of other steps; a compiled model that is not the one
    given here has None for noise then, and an event that says so.
    An error of the measuring itself ends it with a RuntimeWarning; the training goes on. Under torch.distributed
    only rank 0 measures: its own batches with plain batch norm, all ranks' with SyncBatchNorm.

    Args:
        model: Any model with batch norm, compiled or wrapped or not.
        log: Folder of the run's log, which ``batchnorm watch`` shows; one of the same model is continued. None keeps
            records in memory only (``run.records``).
        every: Steps between looks.
        budget: Largest share of the time of training that looking may take.
        probe: The probe batch, as ``recalibrate`` takes one: (inputs, targets) lets the loss be measured. None
            takes the inputs of the first pass in train mode, at most 64 examples; False measures no probe.
        loss: ``loss(output, batch)`` for the probe; None guesses as ``probe`` does.
        sinks: Where numbers go besides the log.

    Raises:
        TypeError: If ``model``, ``probe`` or ``log`` is of a wrong type.
        ValueError: If the model has no batch norm or fake tensors, ``every`` or ``budget`` is out of range, or the
            log's folder has the log of another model.
        OSError: If the log cannot be written at the start.

    Example:
        >>> import torch, batchnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> with batchnorm.watch(model, every=10, budget=1.0) as run:
        ...     for _ in range(40):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> list(run.latest["gamma"])
        ['1']
    """
    return Watch(model, log=log, schedule=Schedule(every, budget), probe=probe, loss=loss, sinks=tuple(sinks))


@final
class Watch:
    """A training that is being measured; made by ``watch``.

    Attributes:
        records: The last records, oldest first.
        steps: Optimizer steps so far, with those of a log that is continued.
    """

    def __init__(
        self, model: nn.Module, *, log: Any, schedule: Schedule, probe: Any, loss: Any, sinks: tuple[Sink, ...]
    ):
        self.records: deque[Record] = deque(maxlen=_KEPT)
        self.steps = 0
        self._outer, self._model = model, unwrapped(model)
        require_real(self._model, "watch")
        require_type(log, (str, os.PathLike, NoneType), "watch needs the path of a folder as log", "None keeps no log.")
        if not batch_norms(self._model):
            raise ValueError(
                f"watch needs a model with batch norm layers, got {type(self._model).__name__} without one. "
                "Watch the model that has them."
            )
        self._outlets, self._schedule = Outlets(log, sinks), schedule
        self._probe = self._made_probe(probe, loss)
        self._captures = probe is None
        self._layers: Layers | None = None
        self._steps: Steps | None = None
        self._by_hand = False  # steps are counted by run.step()
        self._foreign = 0  # steps of optimizers without our parameters since the last of ours
        self._passes: Passes | None = None
        self._window: list[End] = []
        self._since: int | None = None  # steps since a look was due; None while none is
        self._began = 0  # steps that were counted before
        self._last: tuple[int, Snapshot] | None = None  # the last look's step and end
        self._view: tuple[int, View] | None = None
        self._looks, self._next_probe = 0, 1
        self._events = Events()
        self._unsaid: list[str] = []  # what there is no log for
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
        """Begin to measure; ``with`` does it."""
        if self._on or not _is_first_rank():
            return self
        self._on = True
        if not any(isinstance(layer, LazyModuleMixin) for layer in batch_norms(self._model).values()):
            self._begin()  # a log that cannot be written is told before the training, not after its first step
        self._by_hand, self._foreign = False, 0
        self._steps = Steps(
            self._model, batch_norms(self._model).values(), self._after_step, self._after_foreign, self._give_up
        )
        self._steps.on()
        self._guard.enter_context(refusing_absences(self._model))
        if self._captures and self._probe is None:
            self._handles.append(self._outer.register_forward_pre_hook(Hook(self._capture), with_kwargs=True))
        return self

    def stop(self, reason: str = "finished") -> None:
        """Measure what is left, and end the log; ``with`` does it."""
        if not self._on:
            return
        self._guarded(self._finish)
        self._guarded(self._tell_left_out)
        if self.steps == self._began:
            self._unsaid.append(self._without_steps())
        self._release(reason)
        while self._unsaid:
            _warn(self._unsaid.pop())

    def _without_steps(self) -> str:
        remedy = (
            "Call run.step() after each step if no torch.optim one takes them, or one inside of a compiled function."
        )
        if not self._foreign:
            return f"watch saw no step of an optimizer. {remedy}"
        return (
            f"watch saw no step of an optimizer that holds one of the model's parameters, and "
            f"{_counted(self._foreign, 'step')} of others. Make the optimizer after parameters are replaced, and give "
            "it model.parameters(). Call run.step() after each step if it trains copies of them."
        )

    @property
    def latest(self) -> Record:
        """The last record of the free tier.

        Raises:
            RuntimeError: If there is none yet.
        """
        for record in reversed(self.records):
            if record.tier == "free":
                return record
        if not self._on:
            raise RuntimeError(f"{self._too_short()}.")
        raise RuntimeError(f"nothing was measured yet after {self.steps} steps. Look later, or set every= lower.")

    @property
    def cost(self) -> float:
        """Time that looking took, as a share of the time that was left for training."""
        return self._schedule.cost

    def log(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Note numbers of this step, such as ``loss=loss``; the log gets their means, once a second at most.

        Tensors are kept where they are and not waited for. None is left out, as is what is no single number: it is
        told once, as an event, or by a warning at the end without a log. NaN and infinity are null in the log.
        """
        given = dict(values) if isinstance(values, Mapping) else {} if values is None else {"values": values}
        self._outlets.note({**{str(name): value for name, value in given.items()}, **more})
        if self._outlets.has_log:
            self._guarded(self._tell_left_out)

    def lab(self, values: Mapping[str, Mapping[str, float]] | None = None, **model: float) -> None:
        """Note what was measured on demand at this step: numbers of layers by quantity and layer, and of the model.

        ``run.lab(largest_share=gap.worst.share.value)``, for example. Layers without a number have None.
        """
        self._guarded(lambda: self._keep(self._of_lab(values or {}, model)))

    def _of_lab(self, values: Mapping[str, Mapping[str, float]], model: Mapping[str, float]) -> Record:
        self._begin()
        names = self._known.names
        rows = {name: [_plain(row.get(layer)) for layer in names] for name, row in values.items()}
        numbers = {name: _plain(value) for name, value in model.items()}
        return Record(self.steps, names, rows, numbers, "lab", time.time())

    def step(self) -> None:
        """Count a step that no torch.optim optimizer takes."""
        self._by_hand = True  # from now on no optimizer's steps count
        self._guarded(self._count)

    # -- at every step --------------------------------------------------------------------------------------------

    def _after_step(self, taker: int) -> None:
        self._foreign = 0
        if not self._by_hand:
            self._guarded(lambda: self._count(taker))

    def _after_foreign(self, optimizer: torch.optim.Optimizer) -> None:
        self._foreign += 1
        if self._foreign == _FOREIGN and not self._by_hand and self._steps is not None and self._steps.saw_passes():
            self._guarded(lambda: self._tell_foreign(optimizer))

    def _tell_foreign(self, optimizer: torch.optim.Optimizer) -> None:
        self._begin()
        self._outlets.event(
            self.steps,
            f"{self._foreign} steps in a row of {type(optimizer).__name__}, which holds none of the model's parameters "
            "while its statistics move: nothing is measured. If it trains copies of them, or parameters that were "
            "replaced, call run.step() after each step",
        )

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do something that must not disturb the training whatever goes wrong in it."""
        if not self._on:
            return
        try:
            with self._schedule.spending():
                work()
        except Exception as error:  # noqa: BLE001 - the training is worth more than its measurement
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._on:
            self._release(f"stopped by {type(error).__name__}")
            _warn(f"watch stopped at step {self.steps}: {type(error).__name__}: {error}. The training goes on.")

    def _count(self, taker: int = 0) -> None:
        self._begin()
        self.steps += 1
        due = self._schedule.is_due()
        if self._window:
            self._window.append(End(Snapshot.of(self._known), self._seen.taken(), taker))
            self._go_on(due=due)
        elif due:
            self._open()
            self._since = 0
        if time.perf_counter() - self._pulse >= _PULSE:
            self._beat()

    def _open(self) -> None:
        """Begin a window with what is stored now."""
        if self._steps is not None:
            self._steps.refresh()
        self._seen.on()
        self._window = [End.alone(Snapshot.of(self._known))]

    def _go_on(self, *, due: bool) -> None:
        """Look if the window is long enough; the first one, open from the start, ends unused if no look can follow."""
        if self._since is not None:
            self._since += 1
            if self._since >= WINDOW and self._is_enough():
                self._look()
        elif due:
            self._since = 0
        elif self.steps - self._began >= 2 * WINDOW:
            self._close()

    def _close(self) -> None:
        self._seen.off()
        self._window, self._since = [], None

    def _is_enough(self) -> bool:
        """Whether all layers that were updated at all have been often enough; asked after W, 2 W and 4 W steps."""
        assert self._since is not None  # noqa: S101 - a look is due
        if self._since >= _LONGEST:
            return True
        if self._since % WINDOW:
            return False
        counts = torch.stack([end.snapshot.updates for end in self._window[-self._since - 1 :]]).cpu()
        moved = (counts.diff(dim=0) > 0).sum(0)
        return bool(((moved == 0) | (moved >= WINDOW)).all())

    @property
    def _known(self) -> Layers:
        assert self._layers is not None  # noqa: S101 - _begin sees to it
        return self._layers

    @property
    def _seen(self) -> Passes:
        assert self._passes is not None  # noqa: S101 - _begin sees to it
        return self._passes

    def _begin(self) -> None:
        """Know the layers, open the log and the first window; lazy layers have a shape from the first pass on."""
        if self._layers is not None:
            return
        self._layers = Layers(with_shape(self._model, "watch"))
        steps = self._outlets.open(self._layers, self._about())
        self.steps = self._began = self.steps if steps is None else steps
        self._passes = Passes(self._outer, self._layers, self._guarded)
        self._open()

    def _about(self) -> dict[str, Any]:
        return {
            "model": type(self._model).__name__,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "schedule": {"every": self._schedule.every, "budget": self._schedule.budget, "window": WINDOW},
            "versions": {name: version(name) for name in ("batchnorm", "torch")},
        }

    # -- a look ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        with self._schedule.looking("free"):
            self._read()
        self._looks += 1
        if self._probe is not None and self._probe_is_due():
            with self._schedule.looking("probe"):
                self._keep(self._probed(self._probe))
            self._next_probe = self._looks + _PROBE_EVERY

    def _probe_is_due(self) -> bool:
        self._schedule.expect("probe", _PROBE_SECONDS * len(self._known.names))
        return self._looks >= self._next_probe and not is_sharded(self._model) and self._schedule.affords("probe")

    def _read(self) -> None:
        ends = [end.cpu() for end in self._window[-max(self._since or 0, WINDOW) - 1 :]]
        self._close()
        window, seen = [end.snapshot for end in ends], Window.of(ends, self._known)
        values = {field.name: getattr(seen, field.name) for field in fields(Window) if field.name in QUANTITIES}
        values |= self._moved(window[-1], seen.wander) | census(self._known, window[-1])
        record = Record(self.steps, self._known.names, _rows(values), {}, "free", time.time())
        self._keep(record)
        self._tell_events(window, {**record.values, **_rows({"short_var": seen.short_var})})
        self._last = self.steps, window[-1]

    def _moved(self, now: Snapshot, noise: Tensor) -> dict[str, Tensor]:
        if self._last is None:
            return {}
        step, before = self._last
        scale = 100 / (self.steps - step)
        floor = shift_floor(before, now, self._known, noise)
        return {"shift": scale * shift(before, now, self._known), "shift_floor": scale * floor}

    def _probed(self, probe: Probe) -> Record:
        view = probe.look(self._model, self._known)
        values = {name: row for name, row in view.values().items() if name != "gap"}  # the free tier has it
        if self._view is not None:
            step, earlier = self._view
            scale = 100 / (self.steps - step)
            values["drift"] = [None if moved is None else scale * moved for moved in view.drift_from(earlier)]
        self._view = self.steps, view
        return Record(self.steps, self._known.names, values, view.of_model, "probe", time.time(), view.arrays())

    def _tell_events(self, window: list[Snapshot], values: Mapping[str, Sequence[float | None]]) -> None:
        moves = (window[-1].updates > window[0].updates).tolist()
        finite = [bool(part.isfinite().all()) for part in (window[-1].mean + window[-1].var).split(self._known.sizes)]
        early = self.steps < _early(self._known)
        names = self._known.names
        counts = [update >= 0 for update in window[-1].updates.tolist()]
        for event in (
            *self._events.of_updates({n: m for n, m, c in zip(names, moves, counts, strict=True) if c}),
            *self._events.of_poison({n: f for n, f, c in zip(names, finite, counts, strict=True) if c}),
            *self._events.of_passes(names, values),
            *self._events.of(names, values, early=early),
        ):
            self._outlets.event(self.steps, event.message, event.layer, event.code)

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._outlets.record(record)

    def _beat(self) -> None:
        self._pulse = time.perf_counter()
        self._outlets.progress(self.steps, self.cost)

    # -- the ends -------------------------------------------------------------------------------------------------

    def _made_probe(self, batch: Any, loss: Any) -> Probe | None:
        if batch is None or batch is False:
            return None
        batch = on_device_of(self._model, batch, who="watch")
        return Probe(lambda model: call(model, batch), batch, loss)

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the first inputs in train mode for the probe, and never look again."""
        if not module.training or not self._on or self._probe is not None:
            return
        if any(map(emptiness, tensors_in((args, kwargs)))):  # a trace runs through the model
            return
        self._guarded(lambda: self._hold(args, kwargs))

    def _hold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            ((args, kwargs),) = Batches([(args, kwargs)], PROBE_EXAMPLES, None)  # copies, that no step writes into
        self._probe = Probe(lambda model: model(*args, **kwargs), None)
        detach(self._handles)

    def _finish(self) -> None:
        if self._layers is None:
            return
        if len(self._window) >= LEAST:
            self._look()
        elif self.steps > self._began and self._last is None:
            self._outlets.event(self.steps, self._too_short())
        if self._captures and self._probe is None and self.steps:
            self._outlets.event(
                self.steps,
                "no probe was taken: the model's forward hooks never ran, as in a compiled model; pass probe=",
            )
        if self._schedule.postponed:
            self._outlets.event(
                self.steps,
                f"{self._schedule.postponed} looks were put off to stay under {self._schedule.budget:.1%} of the time",
            )
        self._beat()

    def _release(self, reason: str) -> None:
        self._on = False
        detach(self._handles)
        self._guard.close()
        if self._steps is not None:
            self._steps.off()
        if self._passes is not None:
            self._close()
        self._outlets.close(self.steps, reason, self.cost)
        self._layers = self._last = self._view = None  # a second start opens the log again

    def _tell_left_out(self) -> None:
        """Say what the user gave that is no number, once for each name."""
        if found := self._outlets.no_numbers():
            named = ", ".join(f"{name} ({kind})" for name, kind in found.items())
            self._tell(f"left out of the numbers that were logged, since it is no single number: {named}")

    def _tell(self, told: str) -> None:
        """Say something in the log, or as a warning at the end where there is none to read."""
        if self._outlets.has_log:
            self._outlets.event(self.steps, told)
        else:
            self._unsaid.append(f"watch: {told}.")

    def _too_short(self) -> str:
        steps = _counted(self.steps - self._began, "step")
        return (
            f"nothing was measured in {steps}: a look takes {LEAST - 1} or more in which statistics are updated, and "
            "time for it within the budget. Train for longer, or set every= lower or budget= higher"
        )


def _rows(values: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Plain numbers; NaN is what could not be measured."""
    return {name: [None if math.isnan(v) else v for v in value.tolist()] for name, value in values.items()}


def _early(layers: Layers) -> float:
    """Steps until less than 1 % of the initial values is left in every average."""
    momenta = [layer.momentum for layer in layers.layers if layer.momentum]
    return max((4.6 / momentum for momentum in momenta), default=0.0)


def _plain(value: Any) -> float | None:
    """A number, or None for what is none."""
    with suppress(Exception):
        return float(number_of(value))
    return None


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_first_rank() -> bool:
    there_are_others = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not there_are_others or torch.distributed.get_rank() == 0


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
