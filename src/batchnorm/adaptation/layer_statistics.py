"""Statistics: what a model's batch norm layers normalize by, as one value, put in and taken out bit for bit.

New statistics (mean m_t, variance v_t, of n examples) are mixed into stored ones (m_s, v_s) as if the stored ones were
N examples more. With w = N / (N + n),

    m = w m_s + (1 - w) m_t,      v = w v_s + (1 - w) v_t + w (1 - w) (m_s - m_t)^2.

The last term is the spread between the two means. Schneider et al. 2020, "Improving robustness against common
corruptions by covariate shift adaptation", section 3, leave it out, and so the mixture's variance comes out too small
where the means are apart, which is where adaptation is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from batchnorm.layers import batch_norms, input_of
from batchnorm.moments import Moments
from batchnorm.other_libraries import layers_of_others, unreached
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.freezing import Frozen, has_stored_statistics, statistics_of
from batchnorm.population.tensor_memory import require, same_bits
from batchnorm.population.tensor_memory import write as write_tensor

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

# what happens to a layer's input on its way in: path, layer, input
See = Callable[[str, "_BatchNorm", Tensor], None]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Mean and variance of every layer by its dotted path, as ``running_mean`` and ``running_var`` hold them.

    Args:
        mean: By path, a layer's own type and device.
        var: Likewise; unbiased, torch's convention.
    """

    mean: dict[str, Tensor]
    var: dict[str, Tensor]

    @classmethod
    def of(cls, layers: dict[str, _BatchNorm]) -> Statistics:
        """A copy of what the layers store now."""
        pairs = {path: [buffer.detach().clone() for buffer in buffers(layer)] for path, layer in layers.items()}
        return cls({path: mean for path, (mean, _) in pairs.items()}, {path: var for path, (_, var) in pairs.items()})

    def put(self, layers: dict[str, _BatchNorm]) -> None:
        """Write them into the layers, in place: all of them or, on an exception, none.

        A buffer that has these bits already is not written, so that autograd graphs which used it stay valid.
        """
        before = [(buffer, buffer.clone()) for path in self.mean for buffer in buffers(layers[path])]
        try:
            for path in self.mean:
                write(layers[path], self.mean[path], self.var[path])
        except BaseException:
            for buffer, value in before:
                write_tensor(buffer, value)
            raise

    def are_in(self, layers: dict[str, _BatchNorm]) -> bool:
        """Whether the layers hold exactly these bits."""
        pairs = (zip(buffers(layers[path]), (self.mean[path], self.var[path]), strict=True) for path in self.mean)
        return all(same_bits(buffer, value) for pair in pairs for buffer, value in pair)


def adaptable(model: nn.Module, name: str) -> dict[str, _BatchNorm]:
    """The layers whose statistics may be exchanged, by path.

    Frozen layers, and layers in eval mode inside a model in train mode, were told to keep what they have: they do, and
    go on normalizing by it. Layers of other libraries that never measure a batch were not: their class knows nothing
    else, so they are among those returned. Layers without stored statistics have nothing to exchange.

    Raises:
        ValueError: If there is none, or one's statistics cannot be read here; ``name`` is who asks.
    """
    require_real(model, name)
    layers: dict[str, Any] = {**batch_norms(model), **layers_of_others(model)}
    found = {
        path: layer
        for path, layer in layers.items()
        if has_stored_statistics(layer) and not isinstance(layer, Frozen) and (layer.training or not model.training)
    }
    if not found:
        raise ValueError(
            f"{name} needs batch norm layers that store statistics and are not frozen, got {type(model).__name__} "
            f"without one. Unfreeze its layers, or use the model before they are folded.{unreached(model)}"
        )
    require(statistics_of(found), name)
    return found


def buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a layer that has them."""
    return cast("tuple[Tensor, Tensor]", (layer.running_mean, layer.running_var))


def mixed(layer: tuple[Tensor, Tensor], weight: float, new: Moments, new_weight: Tensor | float) -> Moments:
    """Statistics of ``weight`` stored examples and ``new_weight`` new ones, the spread between their means included.

    ``mean`` and ``var`` are what a layer should store: the variance of ``new`` counts as an unbiased one, since stored
    variances are. One value alone has no spread: it counts with variance 0.
    """
    mean, var = (buffer.detach().double() for buffer in layer)
    spread = torch.where(new.count > 1, new.unbiased_var, 0.0)
    return Moments.from_var(weight, mean, var) + Moments.from_var(new_weight, new.mean, spread)


def write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Store a mean and a variance in a layer, in place."""
    for buffer, value in zip(buffers(layer), (mean, var), strict=True):
        if not same_bits(buffer, value):
            write_tensor(buffer, value)


@contextmanager
def seeing(layers: dict[str, _BatchNorm], see: See) -> Iterator[None]:
    """A block in which ``see`` is told of each input of a layer before the layer normalizes it."""

    def hook(path: str, layer: _BatchNorm, args: tuple, kwargs: dict) -> None:
        see(path, layer, input_of(args, kwargs))

    handles = [
        layer.register_forward_pre_hook(partial(hook, path), with_kwargs=True)  # type: ignore[arg-type]
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
