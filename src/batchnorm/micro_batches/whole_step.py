"""step: stored statistics move once for all micro-batches of a step, towards the moments of all their values.

Without it a step of k micro-batches moves running statistics k times, so that their average forgets k times as fast,
and the variance between the micro-batches is missing in each of them. The moments of the step are those of the union
of its micro-batches (Chan, Golub and LeVeque 1979). Each micro-batch is still normalized by its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm import kernels
from batchnorm.argument_types import require_module
from batchnorm.kernels import Layer, Measured, Running, Sample
from batchnorm.kernels.choice import is_plain
from batchnorm.layers import require_ours
from batchnorm.micro_batches.added_moments import AddedMoments
from batchnorm.population.freezing import Frozen, has_stored_statistics

if TYPE_CHECKING:
    from batchnorm.batch_statistics import StepStatistics


@contextmanager
def step(model: nn.Module) -> Iterator[nn.Module]:
    """A block whose micro-batches move the stored statistics once, when the block ends.

    Each call of a layer in train mode is normalized by its own batch, as outside of the block. When the block ends,
    every layer that was called moves its stored statistics towards the mean and the unbiased variance of all values of
    all its calls: the variance between micro-batches counts, ``num_batches_tracked`` grows by 1, and masks and weights
    count as in a call. A layer that was not called, or only in eval mode or frozen, stays as it is. Calls that
    activation checkpointing repeats count once. If some channel's moments are NaN or infinite they are not stored, and
    ``skipped_updates`` grows by 1. Buffers that ``torch.func.functional_call`` passes move once too, in place of the
    layer's own. Forwards in a block of ``preserve_state``, as tools make them, do not count. After an exception in the
    block nothing is stored. One value per channel of a layer with ``single_element="population"`` counts too. Gradients
    are those of the micro-batches: see ``step_backward``.

    Args:
        model: A model whose batch norm layers are layers of this package; it may be wrapped or compiled.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If the model has no batch norm layer, or one that is not of this package, or a lazy layer that has
            not run, or only layers in eval mode that are not frozen.
        RuntimeError: If the model is already inside such a block.

    Example:
        >>> import torch, batchnorm
        >>> model = batchnorm.BatchNorm1d(1, momentum=1.0)
        >>> with step(model):
        ...     for micro in ([[0.0], [2.0]], [[4.0], [6.0]]):
        ...         y = model(torch.tensor(micro))
        >>> model.running_mean.item(), round(model.running_var.item(), 3), model.num_batches_tracked.item()
        (3.0, 6.667, 1)
    """
    require_module(model, "step")
    require_train_mode(require_ours(model, "step"), "step")
    opened = OpenStep(model)
    try:
        yield model
    except BaseException:
        opened.discard()
        raise
    opened.store()


@final
class OpenStep:
    """A step that is open from its construction until ``store`` or ``discard``; for training loops without a block."""

    def __init__(self, model: nn.Module) -> None:
        layers = require_ours(model, "step")
        require_channels(layers, "step")
        self._parts = {path: _LayerStep(each) for path, each in layers.items() if has_stored_statistics(each)}
        self._attached = Attached(layers, self._parts)

    def store(self) -> None:
        """End the step and store its statistics; nothing if it has ended."""
        if self._attached.detach():
            for part in self._parts.values():
                part.end()

    def discard(self) -> None:
        """End the step without storing anything; nothing if it has ended."""
        self._attached.detach()


@final
class Attached:
    """Parts of a step, attached to their layers as ``layer._step``.

    Raises:
        RuntimeError: If a layer already has one.
    """

    def __init__(self, layers: Mapping[str, nn.Module], parts: Mapping[str, StepStatistics]) -> None:
        open_one = next((path for path, layer in layers.items() if vars(layer).get("_step") is not None), None)
        if open_one is not None:
            raise RuntimeError(
                f"step and step_backward need a model outside of such a block, got layer {open_one!r} inside one. "
                "Leave out the inner block: the outer block has all micro-batches."
            )
        self._layers = [layers[path] for path in parts]
        for path, part in parts.items():
            vars(layers[path])["_step"] = part

    def detach(self) -> bool:
        """Take the parts from the layers; False if that was done before."""
        layers, self._layers = self._layers, []
        for layer in layers:
            vars(layer).pop("_step", None)
        return bool(layers)


def require_channels(layers: Mapping[str, nn.Module], who: str) -> None:
    """Refuse lazy layers that do not know their number of channels yet."""
    for path, layer in layers.items():
        if any(map(is_lazy, (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))):
            raise ValueError(
                f"{who} needs layers that know their number of channels, got {type(layer).__name__} at {path!r}. Run "
                "the model on one batch first."
            )


def require_train_mode(layers: Mapping[str, nn.Module], who: str) -> None:
    """Refuse a model whose layers are all in eval mode, unless all of these are frozen."""
    if any(layer.training or isinstance(layer, Frozen) for layer in layers.values()):
        return
    raise ValueError(
        f"{who} needs a model in train mode, got all its batch norm layers in eval mode. Call model.train() first, or "
        "leave the call out: in eval mode no statistics change."
    )


@final
class _LayerStep:
    """The batches of one layer during a step; those of buffers that torch.func.functional_call passes apart."""

    is_joined = False

    def __init__(self, layer: Any) -> None:
        self._layer, self._moments, self._is_used = layer, AddedMoments(layer.running_mean), False
        self._own: Tensor = layer.running_mean
        self._passed: dict[int, tuple[Running, AddedMoments]] = {}

    def train(
        self, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, **options: Any
    ) -> tuple[Tensor, Measured]:
        """As ``kernels.train_sample``; a whole batch is read as often as outside of a step."""
        if sample.is_whole and not any(options.values()):
            return kernels.train_measured(x, layer, residual, save=self._layer._memory is not None)
        return kernels.train_sample(x, sample, layer, residual, **options)

    def store(self, running: Running, measured: Measured) -> None:
        """Add the moments of a batch."""
        if torch.compiler.is_compiling() or running.mean is self._own:
            self._moments.add(measured)
            self._is_used = True
            return
        if not is_plain(*running[:4]):
            raise RuntimeError(
                "step needs buffers that stay when a function of torch.func ends, got buffers inside of one. Pass "
                "buffers that are no arguments of torch.func.grad or vmap, or leave out step."
            )
        passed = id(running.mean)
        self._passed.setdefault(passed, (running, AddedMoments(running.mean)))[1].add(measured)

    def end(self) -> None:
        """Move the stored statistics towards the moments of all batches."""
        used = [(stored_by(self._layer), self._moments)] if self._is_used else []
        with torch.no_grad():
            for running, moments in (*used, *self._passed.values()):
                self._move(running, moments.measured)

    def _move(self, running: Running, measured: Measured) -> None:
        if self._layer._single_element != "population" or bool((measured.count > 1).any()):
            kernels.store(running, measured)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None: a copy of the layer is not inside the block."""
        return type(None), ()


def stored_by(layer: Any) -> Running:
    """The stored statistics of a layer, in whatever mode it is."""
    batches, skipped = layer._counters()
    return Running(layer.running_mean, layer.running_var, batches, skipped, layer.momentum)
