"""The algebra of folding: batch norm in eval mode is an affine map of each channel, and its neighbours are linear maps.

With the stored mean and variance (Ioffe and Szegedy 2015, algorithm 2):

    y = scale x + shift        scale = gamma / sqrt(var + eps)        shift = beta - mean scale

A convolution or linear layer with weight w and bias b, before or behind batch norm, gets values w' and b' with which it
does the work of both (for a layer before batch norm: Jacob et al. 2018, "Quantization and Training of Neural
Networks", section 3.2):

    before   w' = w scale by output channel    b' = b scale + shift
    behind   w' = w scale by input channel     b' = b + sum w shift, over the inputs and the positions of the kernel

The sum is the same at all positions only if every output uses the whole kernel on shifted values. Zeros that pad the
input are not shifted, and an output of a transposed convolution uses only a part of the kernel. In these cases the
shift must be 0.

Weights have the shape (outputs, inputs per group, *kernel) in a convolution and a linear layer, and (inputs, outputs
per group, *kernel) in a transposed convolution. Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.population.tensor_memory import absence, whole

Position = Literal["before", "behind"]
LinearLayer = nn.Linear | _ConvNd

# the layers that batch norm is folded into, and the number of axes of their input batches
RANKS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@final
@dataclass(frozen=True)
class Affine:
    """A batch norm layer in eval mode: scale and shift of each channel."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, layer: Any) -> Affine:
        """The map of a layer by its stored statistics.

        It is NaN if they are NaN or a variance is below -eps, and infinite if a variance is -eps.
        """
        scale = 1 / (wide(layer.running_var) + layer.eps).sqrt()  # in torch's order of operations
        if layer.weight is not None:
            scale = scale * wide(layer.weight)
        shift = -wide(layer.running_mean) * scale
        return cls(scale, shift if layer.bias is None else shift + wide(layer.bias))

    def spread(self, channels: tuple[int, ...] | None) -> Affine:
        """The map for the channels of another layer, whose channel i meets channel ``channels[i]`` of this one.

        A channel with the number -1 is not changed: its scale is 1 and its shift 0.
        """
        if channels is None:
            return self
        index = torch.tensor(channels)
        met = index >= 0
        return Affine(torch.where(met, self.scale[index], 1.0), torch.where(met, self.shift[index], 0.0))


@final
@dataclass(frozen=True)
class Linear:
    """The weight and bias of a convolution or linear layer, and how they are laid out."""

    weight: Tensor
    bias: Tensor
    groups: int
    transposed: bool

    @classmethod
    def of(cls, layer: Any) -> Linear:
        """The map of a layer in ``RANKS``; a missing bias is 0."""
        weight = wide(layer.weight)
        bias = weight.new_zeros(channels(layer, "before")) if layer.bias is None else wide(layer.bias)
        return cls(weight, bias, getattr(layer, "groups", 1), isinstance(layer, _TRANSPOSED))

    def joined(self, norm: Affine, position: Position) -> Linear:
        """The map of this layer and batch norm together; ``position`` is this layer's, seen from batch norm."""
        if position == "before":
            weight = self.weight * self._laid_out(norm.scale, on_first_axis=not self.transposed)
            return Linear(weight, self.bias * norm.scale + norm.shift, self.groups, self.transposed)
        scale, shift = (self._laid_out(values, on_first_axis=self.transposed) for values in (norm.scale, norm.shift))
        sums = (self.weight * shift).reshape(*self.weight.shape[:2], -1).sum(2)  # (O, I, *) -> (O, I)
        if self.transposed:
            sums = sums.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)  # (I, O / g) -> (O, I / g)
        return Linear(self.weight * scale, self.bias + sums.sum(1), self.groups, self.transposed)

    def _laid_out(self, values: Tensor, *, on_first_axis: bool) -> Tensor:
        """The values of channels, (C), in a shape that broadcasts along the weight's axis of these channels."""
        if on_first_axis:
            spread = values[:, None]  # (C) -> (C, 1)
        else:
            times = self.weight.shape[0] // self.groups
            spread = values.reshape(self.groups, -1).repeat_interleave(times, 0)  # (C) -> (rows, C / groups)
        return spread.reshape(*spread.shape, *[1] * (self.weight.ndim - 2))


def wide(tensor: Tensor) -> Tensor:
    """The values in float64 on the CPU, complex ones in complex128: not every device has these types.

    Raises:
        ValueError: If the values cannot be read.
    """
    if (plain := whole(tensor)) is None:
        raise ValueError(f"fold needs the numbers of every layer, got a tensor that {absence(tensor)}.")
    return plain.to("cpu", torch.complex128 if plain.is_complex() else torch.float64)


def channels(layer: nn.Module, position: Position) -> int:
    """The number of output channels of a layer before batch norm, or of input channels of a layer behind it."""
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    return getattr(layer, f"{'out' if position == 'before' else 'in'}_{kind}")


def shifts_evenly(layer: LinearLayer) -> bool:
    """Whether adding a constant to a channel of the input adds a constant to each channel of the result."""
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, _TRANSPOSED):
        return all(size == 1 for size in (*layer.kernel_size, *layer.stride)) and not any(layer.output_padding)
    return layer.padding_mode != "zeros" or not _is_padded(layer)


def _is_padded(layer: _ConvNd) -> bool:
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return layer.padding != "valid" and any(layer.padding)
