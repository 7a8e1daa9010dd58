"""Lock step: one forward per batch; all of them wait at the layer that is measured next.

The statistics of layer k need its inputs from all batches before any batch may continue. Rerunning every forward for
each layer costs (L + 1) / 2 passes. Here each forward runs in its own greenlet, waits where it enters a layer that is
not finished, and continues from there: one pass for all layers, with the same bits.

Waiting must not change the results. The first batch runs alone and shows whether the model changes itself, draws random
numbers, changes settings of the process, or enters a layer twice. At the end the first two batches run again without
waiting, and every layer must receive the same inputs as before: the moments of each input and 1,024 or more of its
values, if it has as many, are compared bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial, reduce
from importlib.util import find_spec
from operator import add
from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from batchnorm.population.held_memory import HeldMemory
from batchnorm.population.hooks import seeing
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.model_marks import HookMarks, ModelMarks
from batchnorm.population.observation import EndForward, Observation
from batchnorm.population.pool import Place, UnsuitedError
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.state_shield import preserve_random_state, random_state
from batchnorm.population.stored_statistics import Statistics
from batchnorm.population.tensor_memory import emptiness
from batchnorm.population.tensor_trees import examples_in, tensors_in
from batchnorm.population.torch_modes import Modes, shared_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from greenlet import greenlet

    from batchnorm.call_types import Batch

    # called with a layer's path and the moments of all its inputs; stores the layer's statistics
    Finish = Callable[[str, InputMoments], None]

_CONTRADICTION = "forwards enter the layers in orders that contradict each other"
_BATCHES_CHECKED = 2  # number of batches that run again without waiting
_SAMPLE = 1024  # least number of values of an input, if it has as many, that are compared one by one


def why_not(model: nn.Module) -> str:
    """Why the model's forwards may not wait, as far as this can be seen before a run; "" if no reason is seen."""
    if find_spec("greenlet") is None:
        return "greenlet is not installed (pip install greenlet)"
    if is_sharded(model):
        return "the model is sharded, and its forwards must run through on all ranks"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "the model is offloaded, and its weights are loaded and freed in each forward"
    if any(emptiness(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return "some of the model's tensors have no numbers between forwards"
    return ""


def greenlets() -> ModuleType:
    """The module greenlet, which is loaded when forwards wait."""
    import greenlet

    return greenlet


@final
@dataclass(eq=False)
class _Forward:
    """The model's run on one batch.

    Args:
        index: The batch's position in the loader.
        run: The greenlet in which it runs and waits.
        at: The layer at which it waits; None if it does not wait.
        part: Moments of the input of that layer.
        digests: Digest of each layer's input in order of calls, for the first two batches; () for others.
        passed: The layers that it has entered without waiting, since an earlier run finished them.
    """

    index: int
    run: greenlet | None = None
    at: str | None = None
    part: InputMoments = field(default_factory=InputMoments)
    digests: dict[str, tuple[object, ...]] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.run is None or bool(self.run.dead)


@final
class LockStep:
    """The forwards of a model on all batches, or on as many as memory allows to wait.

    Args:
        observation: The model, its layers and its data.
        stored: The original statistics of the layers; finished layers store new statistics, and are not restored.
        memory: Most bytes of memory for waiting forwards.
    """

    def __init__(self, observation: Observation, stored: Statistics, memory: int) -> None:
        self._view, self._stored, self._memory = observation, stored, memory
        self._loop = greenlets().getcurrent()  # starts the forwards, and continues when one waits
        self._thread = threading.get_ident()
        self._modes, self._hooks = Modes.now(), HookMarks(observation.model)
        self._forwards: list[_Forward] = []
        self._running: _Forward | None = None
        self._copies: list[Batch] = []  # of the batches that run again
        self._finished: dict[str, InputMoments] = {}
        self._kept: dict[
            str, int
        ] = {}  # layers that an earlier run finished, with their numbers: no forward waits there
        self._order: list[str] | None = None  # execution order of all layers; None if it is not known yet
        self._has_rest = False  # whether some batches' forwards do not wait
        self._is_ending = False
        self._unsuited = ""

    def measure(self, finish: Finish) -> dict[str, InputMoments]:
        """Moments of each layer's inputs, measured after the layers before it are finished, in execution order.

        Raises:
            UnsuitedError: If it is not certain that waiting changes nothing.
        """
        try:
            self._take_kept(finish)
            with seeing(self._view.layers, self._enter, without_padding=True):
                self._hooks = HookMarks(self._view.model)
                self._begin()
                state = random_state()
                self._go_on(finish)
            self._prove()
        finally:
            self._end()
        self._require(state == random_state(), "the model draws random numbers")
        return self._finished

    # starting

    def _take_kept(self, finish: Finish) -> None:
        """Finish the layers that an earlier run has measured."""
        for step in self._view.finished.steps:
            if (found := self._view.kept(step.path)) is not None:
                finish(step.path, found)
                self._finished[step.path] = found
        self._kept = {path: number for number, path in enumerate(self._finished)}

    def _begin(self) -> None:
        """Start a forward for each batch, as many as memory allows."""
        view, most = self._view, None
        view.examples = 0
        with preserve_random_state(*view.batches.generators):
            for index, batch in enumerate(view.batches):
                if index < _BATCHES_CHECKED:
                    self._copies.append(view.batches.copy_of(batch))
                if most is None:
                    most = self._memory // max(1, self._bytes_of_one(view.batches.copy_of(batch)))
                    self._require(most > 0, "memory= is less than one waiting forward needs")
                if index == most:
                    self._has_rest = True
                    break
                view.examples += examples_in(batch) or 0
                self._start(index, batch)

    def _start(self, index: int, batch: Batch) -> None:
        forward = _Forward(index)
        forward.run = greenlets().greenlet(partial(self._view.end_early, batch))
        forward.run.gr_context = copy_context()
        self._forwards.append(forward)
        state = random_state()
        self._resume(forward)
        self._require(state == random_state(), "the model draws random numbers")

    def _bytes_of_one(self, batch: Batch) -> int:
        """The most memory that a waiting forward holds; the batch runs alone, which also shows whether it may wait.

        Raises:
            UnsuitedError: If the batch's forward may not wait.
        """
        held, entered = HeldMemory(), set[str]()

        def see(path: str, _: nn.Module, __: Tensor) -> None:
            with held.off():
                held.look()
                self._require_thread()
                self._require(path not in entered, f"a forward enters {path!r} more than once")
                self._require(shared_settings() == settings, "the model changes settings of the process")
                self._require(marks.are_same(), "the model changes its own attributes in a forward")
            entered.add(path)

        state = random_state()
        with preserve_random_state(), self._without_waiting(), seeing(self._view.layers, see, without_padding=True):
            marks = ModelMarks(self._view.model)
            with held:
                settings = shared_settings()
                self._run_alone(batch)
            self._require(marks.are_same(), "the model changes its own attributes in a forward")
            self._require(random_state() == state, "the model draws random numbers")
        return held.most + sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(batch))

    def _run_alone(self, batch: Batch) -> None:
        try:
            self._view.end_early(batch)
        except Exception as error:
            if self._unsuited:  # the model replaced the error of our hook
                raise UnsuitedError(self._unsuited) from error
            raise
        self._require(not self._unsuited, self._unsuited)

    # going on

    def _resume(self, forward: _Forward) -> None:
        forward.at, self._running = None, forward
        if forward.run is not None:
            forward.run.switch()
        self._running = None
        self._require(not self._unsuited, self._unsuited)

    def _enter(self, path: str, _: nn.Module, x: Tensor) -> None:
        """In a forward that may wait, measure the layer's input and wait."""
        forward = self._running
        if forward is None:
            return
        if self._is_ending:
            raise EndForward
        self._require_thread()
        if path in self._kept and not forward.digests:
            self._pass(forward, path)
            return
        self._require(path not in forward.digests, f"a forward enters {path!r} more than once")
        self._require(self._hooks.are_same(), "a forward attaches or removes hooks")
        self._require(path not in self._finished, _CONTRADICTION)
        forward.at, forward.part = path, InputMoments.of(x)
        forward.digests[path] = digest(x, forward.part) if forward.index < _BATCHES_CHECKED else ()
        with self._modes.on():
            self._loop.switch()
        if self._is_ending:
            raise EndForward

    def _pass(self, forward: _Forward, path: str) -> None:
        """Note that a forward enters a layer that an earlier run finished."""
        self._require(path not in forward.passed, f"a forward enters {path!r} more than once")
        is_later = not forward.passed or self._kept[path] > self._kept[forward.passed[-1]]
        self._require(is_later, _CONTRADICTION)
        forward.passed.append(path)

    def _go_on(self, finish: Finish) -> None:
        while (layer := self._next()) is not None:
            path, moments = layer
            self._view.require_variance(path, moments.moments)
            finish(path, moments)
            self._view.keep(path, moments)
            self._finished[path] = moments
            for forward in [each for each in self._forwards if each.at == path]:
                self._resume(forward)

    def _next(self) -> tuple[str, InputMoments] | None:
        """The layer to measure next and the moments of its inputs; None if no forward waits.

        Every forward, of all processes, that reaches this layer waits there, or will be restarted.
        """
        if self._order is None:
            own = self._places()
            places, moments = self._view.pooled(own, self._waiting_at(own[0]) if len(own) == 1 else InputMoments())
            if not places:
                return None
            if len(places) == 1 and places[0] is not None:
                return places[0], moments
            self._order = self._traced_order()
        path = next((path for path in self._order if path not in self._finished), None)
        if path is None:
            return None
        return path, self._view.pooled([path], self._with_rest(path, self._waiting_at(path)))[1]

    def _places(self) -> list[Place]:
        """The layers at which forwards wait; with None if some forwards do not wait."""
        waited_at: list[Place] = [forward.at for forward in self._forwards if forward.at is not None]
        return list(dict.fromkeys([*waited_at, None] if self._has_rest else waited_at))

    def _waiting_at(self, path: Place) -> InputMoments:
        """The moments of a layer's inputs from the forwards that wait there, in the order of the loader."""
        if self._view.finished.is_kept:
            self._prove(path)
        parts = [forward.part for forward in self._forwards if path is not None and forward.at == path]
        return reduce(add, parts, InputMoments())

    def _traced_order(self) -> list[str]:
        """The execution order over all forwards under the stored statistics, from one more pass."""
        current = Statistics.of(self._view.layers)
        self._stored.put(self._view.layers)
        with self._without_waiting():
            order = self._view.order(self._view.run(lambda *_: None))
        current.put(self._view.layers)
        return order

    def _with_rest(self, path: str, found: InputMoments) -> InputMoments:
        """Add the layer's input from batches whose forwards do not wait: they run again until they reach the layer."""
        if not self._has_rest:
            return found
        with self._without_waiting():
            return self._view.with_inputs_of(path, found, skip=len(self._forwards))

    # ending

    def _prove(self, until: Place = None) -> None:
        """Run the first two batches without waiting, and compare the inputs of the layers.

        Args:
            until: Only the forwards that wait at this layer run again, and end there, so that the layer can be kept;
                None: all run to their end.
        """
        for forward, batch in zip(self._forwards, self._copies, strict=False):
            if until is not None and forward.at != until:
                continue
            digests: dict[str, tuple[object, ...]] = {}

            def see(path: str, _: nn.Module, x: Tensor, digests: dict[str, tuple[object, ...]] = digests) -> None:
                if path not in self._kept:
                    digests[path] = digest(x, InputMoments.of(x))
                if path == until:
                    raise EndForward

            with preserve_random_state(), self._without_waiting(), seeing(self._view.layers, see, without_padding=True):
                self._view.end_early(self._view.batches.copy_of(batch))
            is_same = list(digests.items()) == list(forward.digests.items())
            self._require(is_same, "a layer receives other values from a forward that waits")

    def _end(self) -> None:
        """End the forwards that still wait."""
        self._is_ending = True
        for forward in self._forwards:
            while forward.run is not None and not forward.is_over:
                self._running = forward
                with suppress(Exception, EndForward):  # errors of a stopped model
                    forward.run.throw(EndForward)
        self._running = None

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        """A block in which forwards run without waiting."""
        running, self._running = self._running, None
        try:
            yield
        finally:
            self._running = running

    def _require_thread(self) -> None:
        self._require(threading.get_ident() == self._thread, "a layer runs in a different thread than the model")

    def _require(self, condition: bool, otherwise: str) -> None:
        if condition:
            return
        self._unsuited = otherwise  # in case the model catches the error
        raise UnsuitedError(otherwise)


def digest(x: Tensor, part: InputMoments) -> tuple[object, ...]:
    """A fingerprint of a layer's input: shape, type, moments and some values, bit for bit."""
    flat = x.detach().reshape(-1)
    sample = flat[:: max(1, len(flat) // _SAMPLE)]
    tensors = (part.moments.mean, part.moments.m2, part.moments.count, sample.double())
    return x.shape, x.dtype, *(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)
