"""Stored statistics: running_mean and running_var of batch norm layers, read and written bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

from torch import Tensor, nn

from batchnorm.population.freezing import Frozen, has_stored_statistics
from batchnorm.population.tensor_memory import same_bits, write

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

    Layers = dict[str, _BatchNorm]  # by dotted path


def open_layers(model: nn.Module, layers: Mapping[str, nn.Module], who: str) -> Layers:
    """Layers with stored statistics that may change: not frozen, and not in eval mode inside a model in train mode.

    Raises:
        TypeError: If the statistics of such a layer are complex; ``who`` begins the error.
    """
    like_ours = cast("Layers", layers)
    found = {path: each for path, each in like_ours.items() if has_stored_statistics(each) and _is_open(model, each)}
    for path, layer in found.items():
        if buffers(layer)[0].is_complex():
            raise TypeError(
                f"{who} needs layers with real statistics, got the complex {type(layer).__name__} at {path!r}. Measure "
                "them in train mode: set layer.momentum = None, call layer.reset_running_stats(), and run the data "
                "through the model in large batches."
            )
    return found


def _is_open(model: nn.Module, layer: _BatchNorm) -> bool:
    return not isinstance(layer, Frozen) and (layer.training or not model.training)


def buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a layer that has them."""
    return cast("tuple[Tensor, Tensor]", (layer.running_mean, layer.running_var))


def store(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Store a mean and a variance in a layer, in place, in the types of its buffers."""
    put(zip(buffers(layer), (mean, var), strict=True))


def put(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write a value into each tensor, in place; after an exception all tensors are as before.

    A tensor that already has these bits is not written, so that autograd graphs that used it stay valid.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, value in values:
            if not same_bits(tensor, new := value.to(tensor.dtype)):
                before.append((tensor, tensor.clone()))
                write(tensor, new)
    except BaseException:
        for tensor, value in before:
            write(tensor, value)
        raise


@final
@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Mean and variance of every layer by its dotted path: the values of ``running_mean`` and ``running_var``.

    Args:
        mean: Means by path, in the layer's dtype, on its device.
        var: Variances, like ``mean``; unbiased, torch's convention.
    """

    mean: dict[str, Tensor]
    var: dict[str, Tensor]

    @classmethod
    def of(cls, layers: Layers) -> Statistics:
        """A copy of the layers' current statistics."""
        pairs = {path: [buffer.detach().clone() for buffer in buffers(layer)] for path, layer in layers.items()}
        return cls({path: mean for path, (mean, _) in pairs.items()}, {path: var for path, (_, var) in pairs.items()})

    def put(self, layers: Layers) -> None:
        """Write the statistics into the layers, in place; after an exception all layers are as before."""
        put(self.pairs(layers))

    def pairs(self, layers: Layers) -> list[tuple[Tensor, Tensor]]:
        """Each buffer of the layers with its value in these statistics."""
        values = {path: (self.mean[path], self.var[path]) for path in self.mean}
        return [pair for path, two in values.items() for pair in zip(buffers(layers[path]), two, strict=True)]

    def are_in(self, layers: Layers) -> bool:
        """Whether the layers store these statistics, bit for bit."""
        return all(same_bits(buffer, value) for buffer, value in self.pairs(layers))
