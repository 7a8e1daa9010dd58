"""Batch norm's arithmetic behind three functions: train, normalize, update_running.

On plain tensors, the kernels that ``choice`` selects are called directly. If a transform, a compiler, a tracer or a
dispatch mode has to see what is computed, registered operators (``operators``) run instead. ``torch.func.grad``,
``vjp``, ``jvp`` and forward-mode differentiation accept no such operator: inside them the specification
(``reference``) runs as plain PyTorch. ``interface`` describes the arguments of all kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from batchnorm.kernels import autograd_node, choice, operators, reference, running_operators, samples, torch_batch_norm
from batchnorm.kernels.choice import is_plain, is_recorded, is_torchs
from batchnorm.kernels.interface import ChannelStatistics, Group, Layer, Measured
from batchnorm.kernels.operators import train_backward, train_forward
from batchnorm.kernels.running_statistics import Running
from batchnorm.kernels.samples import Adjust, Sample
from batchnorm.kernels.shapes import check_layout, values_per_channel

__all__ = [
    "Adjust",
    "ChannelStatistics",
    "Group",
    "Layer",
    "Measured",
    "Running",
    "Sample",
    "measure_sample",
    "normalize",
    "normalize_sample",
    "snapshot",
    "store",
    "train",
    "train_backward",
    "train_forward",
    "train_measured",
    "train_sample",
    "update_running",
]

Function = TypeVar("Function", bound="Callable[..., object]")


def train(
    x: Tensor, layer: Layer, residual: Tensor | None = None, running: Running | None = None, *, save: bool = False
) -> Tensor:
    """The batch normalized by its own statistics; then the residual is added and the layer's activation applied.

    Running statistics move towards those of the batch; they carry no gradient. The result can be differentiated any
    number of times in x, weight, bias and residual. An empty batch has gradients 0. ``save`` needs less memory until
    the backward pass: see ``autograd_node.train``.
    """
    stored = (None, None) if running is None else running[:2]
    if is_plain(x, residual, layer.weight, layer.bias, *stored):
        if is_torchs(x):
            return torch_batch_norm.train(x, layer, residual, running)
        return autograd_node.train(x, layer, residual, running, save=save)
    check_layout(x)
    y, statistics = _watched_forward(x, layer, residual, moves=running is not None)
    if running is not None:
        if torch.compiler.is_exporting() or (is_recorded(running.batches) and not torch.compiler.is_compiling()):
            # a recorded program keeps parameters and buffers only, and the counter of skipped batches is neither
            running = running._replace(skipped=torch.zeros_like(running.batches))
        update_running(running, ChannelStatistics(*(t.detach() for t in statistics)), values_per_channel(x))
    return y


def train_measured(
    x: Tensor, layer: Layer, residual: Tensor | None = None, *, save: bool = False
) -> tuple[Tensor, Measured]:
    """As ``train`` without running statistics, and the batch's moments, as constants; the input is read as often."""
    if not is_plain(x, residual, layer.weight, layer.bias):
        check_layout(x)
        y, statistics = _watched_forward(x, layer, residual, moves=False)
    elif is_torchs(x):
        y, statistics = torch_batch_norm.train_measured(x, layer, residual)
    else:
        y, statistics = autograd_node.train_measured(x, layer, residual, None, save=save)
    count = x.new_full((), values_per_channel(x), dtype=reference.exact_dtype(x.device))
    return y, Measured(statistics, count).detached()


def _watched_forward(
    x: Tensor, layer: Layer, residual: Tensor | None, *, moves: bool
) -> tuple[Tensor, ChannelStatistics]:
    """y and the batch's statistics, when a compiler, tracer, mode or transform has to see what is computed."""
    if moves and _exports_to_onnx():
        raise RuntimeError(
            "ONNX export needs batch norm layers in eval mode, got one in train mode, which no ONNX operator computes. "
            "Call model.eval() first, and leave out training=TrainingMode.TRAINING."
        )
    if _inside_derivative() or (not moves and _exports_to_onnx()):
        return reference.train_forward(x, layer, residual)
    y, mean, var = train_forward(x, *layer, residual)
    return y, ChannelStatistics(mean, var)


def normalize(x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None) -> Tensor:
    """``x`` normalized by the given statistics, value by value: an example's result does not depend on its batch.

    Compilers, exporters and tracers record torch's own operator, because later passes over the program know it. It has
    torch's rounding: if the mean is far from 0, digits are lost.
    """
    if is_plain(x, residual, layer.weight, layer.bias, *statistics):
        return autograd_node.normalize(x, statistics, layer, residual)
    check_layout(x)
    # torch's operator has no gradient in the statistics, which an example's own weight makes functions of x
    is_torchs_case = not x.is_complex() and not any(t.requires_grad for t in statistics)
    kernel = torch_batch_norm if is_recorded(x) and is_torchs_case else reference
    return kernel.normalize(x, statistics, layer, residual)


def train_sample(
    x: Tensor,
    sample: Sample,
    layer: Layer,
    residual: Tensor | None = None,
    *,
    group: Group | None = None,
    adjust: Adjust | None = None,
) -> tuple[Tensor, Measured]:
    """As ``train``, by the moments of a sample of the batch, and these moments; padding is 0 in result and gradients.

    Args:
        x: The batch (N, C, ...).
        sample: The values that count, and the padding.
        layer: The layer's parameters and settings.
        residual: Added before the activation.
        group: Further batches whose moments count too.
        adjust: Changes the layer's parameters once the moments are known.
    """
    check_layout(x)
    return samples.train(x, sample, layer, residual, group=group, adjust=adjust)


def measure_sample(x: Tensor, sample: Sample) -> Measured:
    """The moments of a sample of the batch, with a gradient if ``x`` has one."""
    check_layout(x)
    return samples.measure(x, sample)


def normalize_sample(
    x: Tensor, sample: Sample, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None
) -> Tensor:
    """As ``normalize``; padding is 0 in the result and in gradients."""
    if sample.is_whole:
        return normalize(x, statistics, layer, residual)
    check_layout(x)
    return samples.normalize(x, sample, statistics, layer, residual)


def update_running(running: Running, statistics: ChannelStatistics, count: int) -> None:
    """Move running statistics in place towards those of a batch with ``count`` values per channel, at least 2."""
    if is_plain(running.mean, statistics.mean):
        choice.update_running(running, statistics, count)
    elif _inside_derivative():
        running_operators.update_running(*running_operators.flat_update(running, statistics, count))
    else:
        running_operators.move(running, statistics, count)


def store(running: Running, measured: Measured) -> None:
    """Move running statistics in place towards moments of any count; a channel of count 1 or less keeps its own."""
    update_running(running, measured.for_count_2(), 2)


def snapshot(values: Tensor) -> Tensor:
    """Values of a buffer before this batch moves it; in a compiled program also for the backward pass."""
    return operators.snapshot(values) if torch.compiler.is_compiling() else values


def _constant(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without its import of the compiler, which takes seconds."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@_constant
def _exports_to_onnx() -> bool:
    return (torch.compiler.is_exporting() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


# the transforms around a compiled function are part of its graph, so the result at compile time stays right
@_constant
def _inside_derivative() -> bool:
    """Whether this runs inside torch.func.grad, vjp or jvp, or forward-mode differentiation."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    derivatives = {torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp}
    return forward_mode._current_level >= 0 or any(level.key() in derivatives for level in stack)
