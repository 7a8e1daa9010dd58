"""``padding``: a block in which every layer of a model knows the lengths of the batch, behind strided layers too.

A convolution or pooling with kernel k, stride s, dilation d and padding p on both sides makes of an example of length l

    floor((l + 2 p - d (k - 1) - 1) / s) + 1

positions, as many as it makes of the example alone; a transposed convolution makes

    (l - 1) s - 2 p + d (k - 1) + output_padding + 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, final
from warnings import warn

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from batchnorm.argument_types import require_callable, require_module, require_whole_number
from batchnorm.call_types import Arguments, Keywords
from batchnorm.channel_axis import axis_of
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.repeated_forwards import is_repeated
from batchnorm.layers import LAYERS, input_of, require_ours
from batchnorm.padded_batches import valid_by_lengths
from batchnorm.population.eager import uncompiled
from batchnorm.population.hooks import attached

# lengths behind a module, from the module and the lengths before it
Rule = Callable[[nn.Module, Tensor], Tensor]
_KNOWN = (_ConvNd, _MaxPoolNd, _AvgPoolNd)
# modules that change the number of features on the last axis
_FEATURES = (nn.Linear, nn.Bilinear, nn.RNNBase)
# modules that count or average the padding
_MIXING = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
# arguments of a layer's call, in order
_ARGUMENTS = ("input", "residual", "mask", "lengths", "length_axis", "weight")


@contextmanager
def padding(
    model: nn.Module, lengths: Tensor | Sequence[int], *, length_axis: int = 2, rule: Rule | None = None
) -> Iterator[None]:
    """A block in which the layers of this package leave out the padding of the batches that the model runs on.

    Every layer gets ``lengths=`` for the size that its input has along ``length_axis``. The first size is that of the
    first convolution, pooling or layer of this package, or of a module in front that changes the size along that axis.
    Convolutions and poolings change lengths as in the formula of this module, and read 0 in the padding; maximum
    pooling reads -infinity. So in eval mode the valid results of a padded batch are those of each example alone, to
    rounding, if nothing else mixes positions: group and instance norm, attention, adaptive pooling, recurrent layers
    backwards in time, and functions such as ``torch.nn.functional.conv1d`` in a forward do. Average pooling with
    ``ceil_mode`` or ``count_include_pad=False`` is an exception at the last position of an example. An input (N, C),
    such as that of a head behind a pooling, has no padding. The model is not changed.

    Compiled models run uncompiled inside the block, since their programs do not see the lengths. What activation
    checkpointing repeats in a backward pass has the lengths of its first forward, also behind the block.

    Args:
        model: A model with layers of this package, inside of any module.
        lengths: Number of valid positions of each example of the batch, (N,), before the first module.
        length_axis: The axis of inputs with channels on axis 1 along which examples end early: 2 for (N, C, L). For a
            layer with ``axis=-1`` this means axis 1 of its inputs (N, L, C).
        rule: Called with a convolution, a pooling, or another module that changes the size along that axis, and the
            lengths before it; returns the lengths behind it, or None to use the formula. Only convolutions and poolings
            have a formula.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``length_axis`` no whole number, or ``rule`` not a function.
        ValueError: If the model has no layer of this package, or also has batch norm of others, or a convolution that
            pads with something else than zeros; in the block, if lengths are not known for the size of a layer's
            input, or do not fit it, or if a layer is called with a mask or lengths of its own.

    Warns:
        RuntimeWarning: If the model has group or instance norm, whose statistics count the padding.

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
    if length_axis < 2:
        raise ValueError(
            f"padding needs a length_axis of 2 or more, got {length_axis}. It is the axis along which an example ends "
            "early, with channels on axis 1: 2 for inputs (N, C, L)."
        )
    if rule is not None:
        require_callable(rule, "padding needs a function rule(module, lengths)", "Or leave it out.")
    layers = require_ours(model, "padding").values()
    by_size = _LengthsBySize(torch.as_tensor(lengths), length_axis, rule)
    _check_modules(model, length_axis)

    def handles() -> Iterator[RemovableHandle]:
        yield model.register_forward_pre_hook(by_size.start)
        for layer in layers:
            yield layer.register_forward_pre_hook(by_size.give, with_kwargs=True, prepend=True)  # others see it
        for module in model.modules():
            if isinstance(module, _KNOWN):
                yield module.register_forward_pre_hook(by_size.clear, with_kwargs=True)
            if not isinstance(module, LAYERS):
                yield module.register_forward_hook(by_size.follow, with_kwargs=True)

    watch = _Repetitions(by_size, handles).watch
    token = _blocks.set((*_blocks.get(), by_size))
    try:
        with uncompiled(), attached(handles()), attached([model.register_forward_hook(watch)]):
            yield
    finally:
        by_size.is_after = True
        _blocks.reset(token)


@final
class _Repetitions:
    """The hooks of a block once more, in a backward pass behind it: activation checkpointing repeats modules."""

    def __init__(self, lengths: _LengthsBySize, handles: Callable[[], Iterator[RemovableHandle]]) -> None:
        self._lengths, self._handles, self._attached = lengths, handles, ExitStack()

    def watch(self, _model: nn.Module, _args: Arguments, result: Any) -> None:
        """Attach the hooks when a backward pass reaches a result of the model."""
        for y in _pytree.tree_leaves(result):
            if isinstance(y, Tensor) and y.requires_grad and is_plain(y):
                y.register_hook(self._attach)

    def _attach(self, _gradient: Tensor) -> None:
        if not self._lengths.is_after:
            return
        self._attached.close()  # a backward pass that failed left them, at rest
        self._attached.enter_context(attached(self._handles()))
        Variable._execution_engine.queue_callback(self._attached.close)


@final
class _LengthsBySize:
    """Lengths of the examples, by the size of tensors along the length axis; the latest of a size counts."""

    def __init__(self, lengths: Tensor, axis: int, rule: Rule | None) -> None:
        self._lengths, self._axis, self._rule = lengths, axis, rule
        self._table: dict[int, Tensor] = {}
        self.is_after = False  # the block has ended
        self._first: dict[tuple[nn.Module, int], Tensor] = {}  # of the latest forward, for its repetition

    def start(self, *_: Any) -> None:
        """Forget the sizes of the batch before."""
        if not self._rests():
            self._table.clear()

    def give(self, layer: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
        """Add the lengths to the arguments of a layer."""
        x = input_of(args, kwargs)
        if self._rests() or self._has_no_positions(layer, x):
            return None
        axis = self._axis - (axis_of(layer) == -1)
        lengths = self._for(layer, x.shape[axis])
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        own = [name for name in ("mask", "lengths", "length_axis") if given.get(name) is not None]
        if own and not (own[0] == "lengths" and _are_equal(given["lengths"], lengths)):
            raise ValueError(
                f"a block of padding gives lengths to every layer, got a call of {type(layer).__name__} that has "
                f"{own[0]}= of its own, or another block inside. Leave one of the two out."
            )
        return args, kwargs | {"lengths": lengths, "length_axis": axis}

    def clear(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
        """Let a convolution or pooling read in the padding what it reads outside of an example that is alone."""
        x = input_of(args, kwargs)
        if self._rests() or self._has_no_positions(module, x):
            return None
        valid = valid_by_lengths(type(module).__name__, x, self._for(module, x.shape[self._axis]), self._axis)
        cleared = torch.where(valid, x, -torch.inf if isinstance(module, _MaxPoolNd) else 0)
        return (
            tuple(cleared if value is x else value for value in args),
            {name: cleared if value is x else value for name, value in kwargs.items()},
        )

    def follow(self, module: nn.Module, args: Arguments, kwargs: Keywords, result: Any) -> None:
        """Compute the lengths behind a module from those before it."""
        x = input_of(args, kwargs)
        if self._rests() or not all(isinstance(t, Tensor) and t.ndim > self._axis for t in (x, result)):
            return
        before, behind = x.shape[self._axis], result.shape[self._axis]
        if isinstance(module, _KNOWN) or (
            before != behind and (before in self._table or self._begins(module, x, result))
        ):
            new = self._behind(module, before)
            if new is not None:
                self._table[behind] = new

    def _has_no_positions(self, module: nn.Module, x: Any) -> bool:
        """Whether an input (N, C), such as that of a head behind a pooling, has no axis for lengths."""
        if not isinstance(x, Tensor) or x.ndim > self._axis:
            return False
        if x.ndim and x.shape[0] != len(self._lengths):
            raise ValueError(
                f"padding needs an input of {type(module).__name__} with {len(self._lengths)} examples, one for each "
                f"length, got shape {tuple(x.shape)}. Normalize positions before they become examples."
            )
        return True

    def _begins(self, module: nn.Module, x: Tensor, result: Tensor) -> bool:
        """Whether a module, before every convolution, pooling and layer, changes the size along the length axis alone.

        A linear layer changes the last axis, which has its features; a size below the lengths is no size of positions.
        """
        others = [axis for axis in range(x.ndim) if axis != self._axis]
        is_first = not self._table and not any(isinstance(part, _FEATURES) for part in module.modules())
        is_same = x.ndim == result.ndim and all(x.shape[axis] == result.shape[axis] for axis in others)
        return is_first and is_same and bool((self._lengths <= x.shape[self._axis]).all())

    def _rests(self) -> bool:
        """Whether a forward is neither in the block nor the repetition of one that was.

        Forwards that wait for each other, as in ``recalibrate``, have blocks of their own, which are open together.
        """
        blocks = _blocks.get()
        return self not in blocks if blocks else self.is_after and not is_repeated()

    def _behind(self, module: nn.Module, before: int) -> Tensor | None:
        new = None if self._rule is None else self._rule(module, self._of(before))
        return _by_formula(module, self._of(before), self._axis - 2) if new is None else new

    def _for(self, module: nn.Module, size: int) -> Tensor:
        """The lengths for a module's input; in a repetition, those of its latest forward."""
        if not is_repeated() or (module, size) not in self._first:
            self._first[module, size] = self._of(size)
        return self._first[module, size]

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


# the open blocks of this thread or waiting forward
_blocks: ContextVar[tuple[_LengthsBySize, ...]] = ContextVar("batchnorm_blocks_of_padding", default=())


def _check_modules(model: nn.Module, axis: int) -> None:
    """Refuse convolutions that read something else than 0 outside of an example; warn of norms over positions."""
    for path, module in model.named_modules():
        name = f"{type(module).__name__} at {path!r}"
        if isinstance(module, _ConvNd) and module.padding_mode != "zeros" and _reads_outside(module, axis - 2):
            raise ValueError(
                f"padding needs convolutions that pad with zeros, got {name} with padding_mode="
                f"{module.padding_mode!r}: it would read padding at the end of an example. Use padding_mode='zeros'."
            )
        if isinstance(module, _MIXING):
            warn(
                f"padding does not reach {name}: its means and variances count the padding. Results of an example "
                "depend on the lengths of its batch. Convert it to batch norm, or do without it.",
                RuntimeWarning,
                stacklevel=4,
            )


def _are_equal(given: Any, lengths: Tensor) -> bool:
    """Whether a call has a block's lengths already: recalibrate repeats calls of layers."""
    return torch.as_tensor(given).tolist() == lengths.tolist()


def _reads_outside(module: _ConvNd, axis: int) -> bool:
    return module.padding != "valid" and (module.padding == "same" or _along(module.padding, axis) != 0)


def _by_formula(module: Any, lengths: Tensor, axis: int) -> Tensor | None:
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
