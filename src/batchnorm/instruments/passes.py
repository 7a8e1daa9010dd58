"""Passes: copies of the running averages between the forward passes of one step.

After a step with several passes, the running averages contain a mean over the batches of these passes. Four
micro-batches are four independent samples, but two passes of one batch (SAM, activation checkpointing, two views, a
closure that is evaluated again) are one sample. The mean alone does not show which is the case. So the averages are
copied before the second and each later pass of a step. From the copies the statistics of every pass are computed. They
are compared only with the statistics of the same pass in other steps.

A forward pre-hook of each layer makes the copies; it also runs when autograd recomputes activations. Compiled code does
not call the hooks of inner modules, so for a compiled model the hook of the outermost module makes the copies.
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
from batchnorm.model_wrappers import is_compiled
from batchnorm.population.hooks import Hook, detach

State = tuple[Tensor, Tensor, Tensor]  # running_mean, running_var, num_batches_tracked


@final
@dataclass(frozen=True, slots=True, eq=False)
class End:
    """The end of a step.

    Args:
        snapshot: The statistics that the layers stored at the end of the step.
        between: For each layer, copies from before the second and each later pass of this step.
        taker: The id of the optimizer that made the step.
    """

    snapshot: Snapshot
    between: tuple[tuple[State, ...], ...]
    taker: int = 0

    @classmethod
    def alone(cls, snapshot: Snapshot) -> End:
        """An end without copies between passes."""
        return cls(snapshot, ((),) * len(snapshot.updates))

    def cpu(self) -> End:
        """The same numbers in float64 on the CPU."""
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
    """Copies the layers' states between the passes of a step, from ``on`` to ``off``.

    Args:
        outer: The module that the training calls; it may be compiled or wrapped.
        layers: The layers whose states are copied.
        guarded: Called with a function that makes a copy; must catch its errors, so that the training goes on.
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
        """Return the copies since the last step, and begin to count passes from 0."""
        copies = tuple(map(tuple, self._states))
        self._calls = [0] * len(copies)
        self._states = [[] for _ in copies]
        return copies

    def _enter(self, module: nn.Module, _: tuple[Tensor, ...]) -> None:
        if module.training:
            for index in range(len(self._calls)):
                self._note(index)

    def _pass(self, index: int, module: nn.Module, _: tuple[Tensor, ...]) -> None:
        if module is self._layers.layers[index] and module.training:  # not for replicas of DataParallel
            self._note(index)

    def _note(self, index: int) -> None:
        self._calls[index] += 1
        if self._calls[index] > 1:  # the state before the first pass is the end of the last step
            self._guarded(partial(self._copy, index))

    def _copy(self, index: int) -> None:
        buffers = self._layers.layers[index]._buffers
        mean, var, count = (readable(buffers.get(name)) for name in STORED)
        if mean is not None and var is not None and count is not None:
            with torch.no_grad():
                self._states[index].append((mean.clone(), var.clone(), count.clone()))
