"""``padding``: a block in which every layer of a model knows the lengths of the batch, behind strided layers too.

A convolution or pooling with kernel k, stride s, dilation d and padding p on both sides makes of an example of length l

    floor((l + 2 p - d (k - 1) - 1) / s) + 1

positions, as many as it makes of the example alone; a transposed convolution makes

    (l - 1) s - 2 p + d (k - 1) + output_padding + 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd
from torch.utils.hooks import RemovableHandle

from batchnorm.argument_types import require_callable, require_module, require_whole_number
from batchnorm.call_types import Arguments, Keywords
from batchnorm.channel_axis import axis_of, channels_second
from batchnorm.layers import LAYERS, input_of, require_ours
from batchnorm.padded_batches import valid_by_lengths
from batchnorm.population.hooks import attached

# lengths behind a module, from the module and the lengths before it
Rule = Callable[[nn.Module, Tensor], Tensor]
_KNOWN = (_ConvNd, _MaxPoolNd, _AvgPoolNd)


@contextmanager
def padding(
    model: nn.Module, lengths: Tensor | Sequence[int], *, length_axis: int = 2, rule: Rule | None = None
) -> Iterator[None]:
    """A block in which the layers of this package leave out the padding of the batches that the model runs on.

    Every layer gets ``lengths=`` for the size that its input has along ``length_axis``. The first size is that of the
    first convolution, pooling or layer of this package. Convolutions and poolings change lengths as in the formula of
    this module, and read 0 in the padding; maximum pooling reads -infinity. So in eval mode the valid results of a
    padded batch are those of each example alone, to rounding. Average pooling with ``ceil_mode`` or
    ``count_include_pad=False`` is an exception at the last position of an example. The model is not changed.

    Args:
        model: A model with layers of this package, inside of any module.
        lengths: Number of valid positions of each example of the batch, (N,), before the first module.
        length_axis: The axis of inputs with channels on axis 1 along which examples end early: 2, or -1, for (N, C, L).
            For a layer with ``axis=-1`` this means axis 1 of its inputs (N, L, C). A layer with inputs (N, C) has no
            such axis, and counts all of them.
        rule: Called with a convolution, a pooling, or another module that changes the size along that axis, and the
            lengths before it; returns the lengths behind it, or None to use the formula. Only convolutions and poolings
            have a formula.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``length_axis`` no whole number, or ``rule`` not a function.
        ValueError: If the model has no layer of this package, or also has batch norm of others; in the block, if
            lengths are not known for the size of a layer's input, or do not fit it, or an input lacks ``length_axis``.

    Example:
        >>> import torch, batchnorm
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3, stride=2, padding=1), batchnorm.BatchNorm1d(3))
        >>> with batchnorm.padding(model, [8, 5]):
        ...     y = model(torch.randn(2, 2, 8))
        >>> y[1, :, 3:].abs().max().item()
        0.0
    """
    require_module(model, "padding")
    require_whole_number(length_axis, "length_axis", "Use 2 for inputs (N, C, L).")
    if rule is not None:
        require_callable(rule, "padding needs a function rule(module, lengths)", "Or leave it out.")
    layers = require_ours(model, "padding").values()
    by_size = _LengthsBySize(torch.as_tensor(lengths), length_axis, rule)

    def handles() -> Iterator[RemovableHandle]:
        yield model.register_forward_pre_hook(by_size.start)
        for layer in layers:
            yield layer.register_forward_pre_hook(by_size.give, with_kwargs=True, prepend=True)  # others see it
        for module in model.modules():
            if isinstance(module, _KNOWN):
                yield module.register_forward_pre_hook(by_size.clear, with_kwargs=True)
            if not isinstance(module, LAYERS):
                yield module.register_forward_hook(by_size.follow, with_kwargs=True)

    with attached(handles()):
        yield


@final
class _LengthsBySize:
    """Lengths of the examples, by the size of tensors along the length axis; the latest of a size counts."""

    def __init__(self, lengths: Tensor, axis: int, rule: Rule | None) -> None:
        self._lengths, self._axis, self._rule = lengths, axis, rule
        self._table: dict[int, Tensor] = {}

    def start(self, *_: Any) -> None:
        """Forget the sizes of the batch before."""
        self._table.clear()

    def give(self, layer: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        """Add the lengths to the arguments of a layer."""
        x = channels_second(layer, input_of(args, kwargs))
        if x.ndim == 2:
            return args, kwargs
        axis = self._axis_of(layer, x)
        return args, kwargs | {"lengths": self._of(x.shape[axis]), "length_axis": axis - (axis_of(layer) == -1)}

    def clear(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        """Let a convolution or pooling read in the padding what it reads outside of an example that is alone."""
        x = input_of(args, kwargs)
        axis = self._axis_of(module, x)
        valid = valid_by_lengths(type(module).__name__, x, self._of(x.shape[axis]), axis)
        cleared = torch.where(valid, x, -torch.inf if isinstance(module, _MaxPoolNd) else 0)
        return (
            tuple(cleared if value is x else value for value in args),
            {name: cleared if value is x else value for name, value in kwargs.items()},
        )

    def follow(self, module: nn.Module, args: Arguments, kwargs: Keywords, result: Any) -> None:
        """Compute the lengths behind a module from those before it."""
        x = input_of(args, kwargs)
        if not all(isinstance(t, Tensor) and 2 <= self._counted(t) < t.ndim for t in (x, result)):
            return
        before, behind = (t.shape[self._counted(t)] for t in (x, result))
        if isinstance(module, _KNOWN) or (before in self._table and before != behind):
            new = self._behind(module, before, self._counted(x))
            if new is not None:
                self._table[behind] = new

    def _behind(self, module: nn.Module, before: int, axis: int) -> Tensor | None:
        new = None if self._rule is None else self._rule(module, self._of(before))
        return _by_formula(module, self._of(before), axis - 2) if new is None else new

    def _counted(self, x: Tensor) -> int:
        """The length axis, counted from the first axis of ``x``, which may lack it."""
        return self._axis + x.ndim if self._axis < 0 else self._axis

    def _axis_of(self, module: nn.Module, x: Tensor) -> int:
        axis = self._counted(x)
        if not 2 <= axis < x.ndim:
            possible = " or ".join(map(str, range(2, x.ndim))) or "that of a batch (N, C, L)"
            raise ValueError(
                f"padding needs length_axis= to be {possible} for {type(module).__name__} with an input of shape "
                f"{tuple(x.shape)}, got {self._axis}. It is the axis along which an example ends early, with "
                "channels on axis 1."
            )
        return axis

    def _of(self, size: int) -> Tensor:
        """The lengths for a size; the first size of a batch has the lengths that the block was given."""
        if not self._table:
            self._table[size] = self._lengths
        if size not in self._table:
            raise ValueError(
                f"padding needs the lengths for each size of axis {self._axis}, knows them for "
                f"{', '.join(map(str, self._table))}, got an input of size {size}. Give rule=, which computes them for "
                "the module that changes the size."
            )
        return self._table[size]


def _by_formula(module: object, lengths: Tensor, axis: int) -> Tensor | None:
    """Lengths behind a convolution or pooling along one of its axes; None for other modules."""
    if not isinstance(module, _KNOWN):
        return None
    kernel, stride, dilation = (
        _along(getattr(module, name, 1), axis) for name in ("kernel_size", "stride", "dilation")
    )
    reach = dilation * (kernel - 1)
    if isinstance(module, _ConvTransposeNd):
        more = _along(module.output_padding, axis) - 2 * _along(module.padding, axis)
        return torch.where(lengths > 0, (lengths - 1) * stride + reach + 1 + more, 0)
    both = reach if module.padding == "same" else 0 if module.padding == "valid" else 2 * _along(module.padding, axis)
    is_ceil = getattr(module, "ceil_mode", False)
    found = (lengths + both - reach - 1 + (stride - 1 if is_ceil else 0)) // stride + 1
    if is_ceil:  # torch leaves out a last window that begins behind the example and its left padding
        found = found - ((found - 1) * stride >= lengths + both // 2).long()
    return torch.where(lengths > 0, found.clamp_min(0), 0)


def _along(value: Any, axis: int) -> int:
    return value if isinstance(value, int) else value[axis]
