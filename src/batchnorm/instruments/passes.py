"""Passes: what the running averages were between the forward passes of one step.

After a step with several passes the running averages hold a mean over their batches. Four micro-batches are four
independent draws. Two passes of one batch (SAM, activation checkpointing, two views, a closure that is evaluated again)
are one draw. The mean alone cannot say which. So the averages are copied before the second pass of a step and before
each later one: every pass gets its own statistics back, and is compared only with the same pass of other steps.

A layer's forward pre-hook takes the copies; it also runs when autograd computes activations again. Compiled code does
not call the hooks of inner modules; there the call of the outermost module is the moment to copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.instruments.snapshots import STORED, Layers, Snapshot, joined, readable
from batchnorm.layers import is_compiled
from batchnorm.population.hooks import Hook, detach

State = tuple[Tensor, Tensor, Tensor]  # running_mean, running_var, num_batches_tracked


@final
@dataclass(frozen=True, slots=True, eq=False)
class End:
    """The end of a step.

    Args:
        snapshot: What the layers stored then.
        between: Of each layer what it stored before the second pass of this step and each later one.
        taker: The id of the optimizer that took the step.
    """

    snapshot: Snapshot
    between: tuple[tuple[State, ...], ...]
    taker: int = 0

    @classmethod
    def alone(cls, snapshot: Snapshot) -> End:
        """One of which no pass was seen."""
        return cls(snapshot, ((),) * len(snapshot.updates))

    def cpu(self) -> End:
        """The same in float64 on the CPU."""
        states = [state for states in self.between for state in states]
        if not states:
            return End(self.snapshot.cpu(), self.between, self.taker)
        sizes = [len(mean) for mean, _, _ in states]
        means, variances = (joined([state[i] for state in states], sizes).cpu().double() for i in (0, 1))
        counts = torch.stack([count.to(means.device) for _, _, count in states])
        rows = iter(zip(means.split(sizes), variances.split(sizes), counts, strict=True))
        return End(self.snapshot.cpu(), tuple(tuple(next(rows) for _ in each) for each in self.between), self.taker)


@final
class Passes:
    """The passes of a model while it is on.

    Args:
        outer: What the training calls, compiled or wrapped or not.
        layers: Of which states are copied.
        guarded: Runs what may not disturb the training.
    """

    def __init__(self, outer: nn.Module, layers: Layers, guarded: Callable[[Callable[[], None]], None]) -> None:
        self._outer, self._layers, self._guarded = outer, layers, guarded
        self._calls = [0] * len(layers.names)  # since the last step
        self._states: list[list[State]] = [[] for _ in layers.names]
        self._handles: list[RemovableHandle] = []

    def on(self) -> None:
        """Begin to watch passes; a second call does nothing."""
        if self._handles:
            return
        if any(map(is_compiled, self._outer.modules())):
            self._handles = [self._outer.register_forward_pre_hook(Hook(self._enter))]
            return
        self._handles = [
            layer.register_forward_pre_hook(Hook(partial(self._pass, index)))
            for index, layer in enumerate(self._layers.layers)
        ]

    def off(self) -> None:
        """Stop watching passes."""
        detach(self._handles)
        self.taken()

    def taken(self) -> tuple[tuple[State, ...], ...]:
        """The copies since the last step; counting begins again."""
        found = tuple(map(tuple, self._states))
        self._calls = [0] * len(found)
        self._states = [[] for _ in found]
        return found

    def _enter(self, module: nn.Module, _: tuple[Tensor, ...]) -> None:
        if module.training:
            for index in range(len(self._calls)):
                self._note(index)

    def _pass(self, index: int, module: nn.Module, _: tuple[Tensor, ...]) -> None:
        if module is self._layers.layers[index] and module.training:  # a replica of DataParallel is another one
            self._note(index)

    def _note(self, index: int) -> None:
        self._calls[index] += 1
        if self._calls[index] > 1:  # before the first pass it is what it was at the end of the last step
            self._guarded(partial(self._copy, index))

    def _copy(self, index: int) -> None:
        held = self._layers.layers[index]._buffers
        mean, var, count = (readable(held.get(name)) for name in STORED)
        if mean is not None and var is not None and count is not None:
            with torch.no_grad():
                self._states[index].append((mean.clone(), var.clone(), count.clone()))
