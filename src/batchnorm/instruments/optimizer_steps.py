"""Steps: which calls of optimizers are a step of a model.

Every torch.optim optimizer with one of the model's parameters counts, also an optimizer made during the training. A
call inside another optimizer's call (``super().step()``, SAM around its base optimizer, a wrapper around several) is
part of the outer call. Several optimizers may share the parameters of one backward pass; together they make one step. A
new step begins when a parameter is updated a second time, or when a pass in train mode ran since the last call. If an
optimizer steps inside the backward pass, passes do not begin a new step, because activation checkpointing runs passes
there too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from batchnorm.population.hooks import detach


@final
class Steps:
    """Reports the steps of a model's optimizers, from ``on`` to ``off``.

    Args:
        model: The model whose optimizers count.
        layers: The batch norm layers; a write to their statistics shows a pass in train mode.
        taken: Called after each step with the id of the optimizer that made the step.
        foreign: Called after each outermost call of an optimizer with none of the model's parameters.
        broken: Called with an error of the counting, for example if an optimizer's parameters cannot be read.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[_BatchNorm], taken: Callable[[int], None],
        foreign: Callable[[torch.optim.Optimizer], None], broken: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self._model, self._layers = model, list(layers)
        self._taken, self._foreign, self._broken = taken, foreign, broken
        self._inner: dict[int, set[int]] = {}  # thread -> parameters updated by inner calls of its present outer call
        self._own: set[int] = set()
        self._misses = 0
        self._moved: set[int] = set()  # parameters updated since the last step began
        self._versions = -1
        self._handles: list[RemovableHandle] = []

    def on(self) -> None:
        """Begin to count steps."""
        self._handles = [register_optimizer_step_post_hook(self._after)]
        self.refresh()
        self._moved, self._versions = set(), _versions(self._layers)

    def off(self) -> None:
        """Stop counting steps."""
        detach(self._handles)
        self._inner = {}

    def refresh(self) -> None:
        """Read the model's parameters again, since parameters may have been replaced."""
        self._own = {id(parameter) for parameter in self._model.parameters()}

    def saw_passes(self) -> bool:
        """Whether statistics were written to since the last step, or since ``on``; False if all layers are frozen."""
        return self._versions != _versions(self._layers)

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling():  # a step inside of compiled code cannot be counted
            return
        is_inner = _is_inside_of_another()
        try:
            self._tell(optimizer, is_inner=is_inner)
        except Exception as error:  # noqa: BLE001 - any optimizer may raise anything, and the training must go on
            self._broken(error)

    def _tell(self, optimizer: torch.optim.Optimizer, *, is_inner: bool) -> None:
        held = self._held(optimizer) | self._inner.pop(threading.get_ident(), set())
        if is_inner:
            self._inner[threading.get_ident()] = held
        elif held:
            self._end(optimizer, held)
        else:
            self._foreign(optimizer)

    def _held(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """Ids of the model's parameters in an optimizer; after 1, 2, 4, ... calls without any, read the model again."""
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if parameters.isdisjoint(self._own):
            self._misses += 1
            if not self._misses & (self._misses - 1):
                self.refresh()
        return parameters & self._own

    def _end(self, optimizer: torch.optim.Optimizer, held: set[int]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        is_next = not self._moved.isdisjoint(held) or (not in_backward and self.saw_passes())
        if self._moved and not is_next:  # another part of the same step
            self._moved |= held
            return
        self._moved = held
        self._misses = 0
        try:
            self._taken(id(optimizer))
        finally:
            self._versions = _versions(self._layers)  # also counts writes by the measurement itself


def _versions(layers: Iterable[_BatchNorm]) -> int:
    """How often stored statistics with a shape were written to; the count is read without waiting for a device."""
    buffers = (buffer for layer in layers for buffer in layer._buffers.values())
    return sum(b._version for b in buffers if b is not None and not is_lazy(b) and not b.is_inference())


def _is_inside_of_another() -> bool:
    """Whether the reported ``step`` was called inside of another ``step``; the hook reports the outer call later."""
    call = sys._getframe(2)  # torch's wrapper of ``step``, one function for all optimizers
    frame = call.f_back
    while frame is not None and frame.f_code is not call.f_code:
        frame = frame.f_back
    return frame is not None
