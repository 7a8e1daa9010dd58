"""Few rows of many channels, (N, C), such as ghost batches of rows: the reference, for a block of channels at a time.

The native kernels jump through memory there. The reference alone writes temporary tensors of the size of x, while those
of a block stay in the cache. No channel depends on another, so the results have the reference's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Gradients, Layer

LEAST = 4096  # channels from which on the native kernels are slower
_BLOCK = 8192  # channels: of 32 rows in float32, 1 MB

Found = TypeVar("Found")


def supports(x: Tensor) -> bool:
    """Whether ``x`` has so many channels, in rows in the memory of the CPU."""
    return x.is_cpu and x.ndim == 2 and x.shape[1] >= LEAST


def train_forward(x: Tensor, layer: Layer, residual: Tensor | None = None) -> tuple[Tensor, ChannelStatistics]:
    """As reference.train_forward."""
    found = _of_blocks(
        x, lambda block: reference.train_forward(x[:, block], _cut(layer, block), _columns(residual, block))
    )
    return _joined([y for y, _ in found]), _statistics([statistics for _, statistics in found])


def train_backward(grad: Tensor, forward: ForwardPass) -> Gradients:
    """As reference.train_backward."""
    found = _of_blocks(grad, lambda block: reference.train_backward(grad[:, block], _part(forward, block)))
    d_x, d_weight, d_bias, d_residual = zip(*found, strict=True)
    return _joined(d_x), torch.cat(d_weight), torch.cat(d_bias), None if None in d_residual else _joined(d_residual)


def measure(x: Tensor) -> ChannelStatistics:
    """As reference.measure."""
    return _statistics(_of_blocks(x, lambda block: reference.measure(x[:, block])))


def normalize(x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None) -> Tensor:
    """As reference.normalize."""

    def of(block: slice) -> Tensor:
        return reference.normalize(x[:, block], _cut(statistics, block), _cut(layer, block), _columns(residual, block))

    return _joined(_of_blocks(x, of))


def sum_gradients(grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
    """As reference.sum_gradients."""
    found = _of_blocks(grad, lambda block: reference.sum_gradients(grad[:, block], _part(forward, block)))
    sums, g = zip(*found, strict=True)
    return _joined(sums), None if None in g else _joined(g)


def input_gradient(grad: Tensor, forward: ForwardPass, means: Tensor | None, g: Tensor | None = None) -> Tensor:
    """As reference.input_gradient."""

    def of(block: slice) -> Tensor:
        return reference.input_gradient(
            grad[:, block], _part(forward, block), _columns(means, block), _columns(g, block)
        )

    return _joined(_of_blocks(grad, of))


def _of_blocks(x: Tensor, function: Callable[[slice], Found]) -> list[Found]:
    return [function(slice(start, start + _BLOCK)) for start in range(0, x.shape[1], _BLOCK)]


def _part(forward: ForwardPass, block: slice) -> ForwardPass:
    x, residual, y = (_columns(t, block) for t in (forward.x, forward.residual, forward.y))
    assert x is not None  # noqa: S101 - a forward pass has an input
    statistics, layer = _cut(forward.statistics, block), _cut(forward.layer, block)
    return forward._replace(x=x, statistics=statistics, layer=layer, residual=residual, y=y)


def _cut(values: Found, block: slice) -> Found:
    """The tensors (C,) of a layer or of statistics, for a block of channels."""
    cut: dict[str, Tensor] = {name: t[block] for name, t in values._asdict().items() if isinstance(t, Tensor)}  # type: ignore[attr-defined] - a NamedTuple
    return values._replace(**cut)  # type: ignore[attr-defined] - a NamedTuple


def _columns(t: Tensor | None, block: slice) -> Tensor | None:
    return None if t is None else t[:, block]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)


def _statistics(parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
    return ChannelStatistics(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
