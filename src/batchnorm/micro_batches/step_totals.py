"""The moments of a whole step at every site, while the sites before it are normalized by the moments of the step.

The forwards of all micro-batches wait at a site until its moments are known, each in its own greenlet, as in
``population.lock_step``. Where forwards may not wait they are run again for each site, and end there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from batchnorm.micro_batches.added_moments import AddedMoments
from batchnorm.micro_batches.joined_layers import JoinedModel, LayerCall, OwnMoments, StepMoments
from batchnorm.population.lock_step import UnsuitedError, greenlets, why_not
from batchnorm.population.model_marks import HookMarks, ModelMarks
from batchnorm.population.observation import EndForward
from batchnorm.population.state_shield import random_state, random_states
from batchnorm.population.stored_statistics import put
from batchnorm.population.torch_modes import Modes, shared_settings
from batchnorm.processes.exchange import TooFewValuesError

if TYPE_CHECKING:
    from batchnorm.kernels import Measured

    PutBack = Callable[[], None]  # puts random states back
    # moments of a micro-batch at the first site without a total
    Forwards = AbstractContextManager[Callable[[int], Measured | None]]


@final
class RandomStarts:
    """The random states with which the forwards of a step begin, as in a loop over the micro-batches.

    Attributes:
        before: For each micro-batch, a function that puts back the states before its forward.
        behind: Puts back the states behind the last forward.
        are_drawn: Whether the forwards draw random numbers.
    """

    def __init__(self, joined: JoinedModel) -> None:
        before = random_state()
        self.before = [random_states()]
        self.why_not = _survey(joined)
        self.are_drawn = random_state() != before
        for micro in range(1, len(joined.micros)):
            self.before.append(random_states() if self.are_drawn else self.before[0])
            if self.are_drawn:
                joined.forward(micro, OwnMoments())
        self.behind = random_states()


def measure_step(joined: JoinedModel) -> RandomStarts:
    """Measure the moments of the step at every site; the model's buffers are as before.

    Raises:
        ValueError: If some site has fewer than 2 values in a channel, or micro-batches have different sites.
    """
    with torch.no_grad(), _kept_buffers(joined):
        starts = RandomStarts(joined)
        if not _is_measured_waiting(joined, starts):
            _measure(joined, _restarted(joined, starts))
    torch.clear_autocast_cache()  # its casts of parameters were made without gradients
    return starts


def _is_measured_waiting(joined: JoinedModel, starts: RandomStarts) -> bool:
    """Measure all sites by forwards that wait; False if they may not, also if a later one shows it."""
    if starts.why_not:
        return False
    try:
        with _kept_buffers(joined):
            _measure(joined, _waiting(joined, starts))
    except UnsuitedError:
        return False
    return True


def _measure(joined: JoinedModel, forwards: Forwards) -> None:
    for site in joined.sites:
        site.total = None
    with forwards as advance:
        for site in joined.sites:
            site.total = _sum_of(site, [advance(micro) for micro in range(len(joined.micros))])


def _survey(joined: JoinedModel) -> str:
    """Find the sites by the first micro-batch; why its forward may not wait, or ""."""
    marks, settings = ModelMarks(joined.model), shared_settings()
    seen: list[bool] = []  # at each site and behind the last: whether all is as before

    def look() -> None:
        seen.append(marks.are_same() and shared_settings() == settings)

    joined.forward(0, OwnMoments(look))
    look()
    if not all(seen):
        return "the model changes its own attributes or hooks, or settings of the process, in a forward"
    return why_not(joined.model)


def _sum_of(site: LayerCall, parts: list[Measured | None]) -> Measured:
    """The moments of all micro-batches together, and of all processes if the layer belongs to a group of them."""
    if any(part is None for part in parts):
        raise ValueError(f"step_backward needs every micro-batch to reach layer {site.path!r}. Use batchnorm.step.")
    moments = AddedMoments(parts[0].statistics.mean)  # type: ignore[union-attr] - none is None
    for part in parts:
        moments.add(part)  # type: ignore[arg-type]
    try:
        total = moments.measured if site.group is None else site.group.union(moments.measured)
    except TooFewValuesError as few:
        total = few.measured
    _require_values(site, total.count)
    return total


def _require_values(site: LayerCall, count: Tensor) -> None:
    if not bool((count > 1).all()):
        raise ValueError(
            f"step_backward needs more than 1 value per channel in a step, got {float(count.min()):g} at layer "
            f"{site.path!r}: one value has no variance. Give more examples, or call model.eval()."
        )


@contextmanager
def _kept_buffers(joined: JoinedModel) -> Iterator[None]:
    """A block after which the model's buffers have the values from before: forwards run several times."""
    before = [(buffer, buffer.detach().clone()) for buffer in joined.model.buffers()]
    try:
        yield
    finally:
        put(before)


@contextmanager
def _restarted(joined: JoinedModel, starts: RandomStarts) -> Iterator[Callable[[int], Measured | None]]:
    """Moments of a micro-batch at the first site without a total, by a forward that ends there."""

    def end(_: StepMoments) -> None:
        raise EndForward

    def advance(micro: int) -> Measured | None:
        run = StepMoments(end)
        starts.before[micro]()
        with suppress(EndForward):
            joined.forward(micro, run)
        return run.own

    yield advance


@contextmanager
def _waiting(joined: JoinedModel, starts: RandomStarts) -> Iterator[Callable[[int], Measured | None]]:
    """Moments of a micro-batch at the first site without a total, by a forward that waits there."""
    waiting = [_WaitingForward(joined, micro, starts) for micro in range(len(joined.micros))]
    try:
        yield lambda micro: waiting[micro].advance()
    finally:
        for forward in waiting:
            forward.end()


@final
class _WaitingForward:
    """The forward of one micro-batch, in a greenlet that waits at sites."""

    def __init__(self, joined: JoinedModel, micro: int, starts: RandomStarts) -> None:
        self._joined, self._micro, self._starts = joined, micro, starts
        self._hooks, self._is_suited = HookMarks(joined.model), True
        self._run, self._modes = StepMoments(self._wait), Modes.now()
        self._loop: Any = greenlets().getcurrent()
        self._greenlet: Any = greenlets().greenlet(partial(joined.forward, micro, self._run))
        self._greenlet.gr_context = copy_context()
        self._put_back, self._passed = starts.before[micro], -1

    def advance(self) -> Measured | None:
        """Run until the next site without a total; None if the forward ends before.

        Raises:
            UnsuitedError: If hooks of this forward would work in the others too.
        """
        self._run.own = None
        if self._greenlet.dead:
            return None
        if self._starts.are_drawn:
            self._put_back()
        self._passed += 1
        self._joined.resume(self._micro, self._run, self._passed)
        self._greenlet.switch()
        if not self._is_suited:
            raise UnsuitedError("a forward attaches or removes hooks")
        if self._starts.are_drawn:
            self._put_back = random_states()
        return self._run.own

    def end(self) -> None:
        """End a forward that waits."""
        if self._greenlet and not self._greenlet.dead:
            with suppress(Exception, EndForward):  # errors of a stopped model
                self._greenlet.throw(EndForward)

    def _wait(self, _: StepMoments) -> None:
        self._is_suited = self._hooks.are_same()
        with self._modes.on():
            self._loop.switch()
