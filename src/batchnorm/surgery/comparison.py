"""Whether two models compute the same: outputs, gradients and buffers on one example, in eval and in train mode.

Both run in float64 if the model can. There a mistake in structure changes values by their own size, while rounding
stays far below the limit: sqrt(eps) of the largest value, which is half of the format's digits.

The example does not determine every value. If two inputs of a maximum are equal, if an input of ReLU is 0, or if a flat
image leaves a batch without variance, rounding alone decides the index, the slope or the sign. Such a tie explains a
difference if the original changes as much when the example moves by eps^(3/4) of its size, which is far above rounding
and far below the limit. Gradients that differ are compared again on noisy copies of the example: there ties have
probability 0, unless the model makes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.population.batches import call
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.tensor_memory import AbsenceError, bits_of, parts_of, whole
from batchnorm.population.tensor_trees import Batch, Leaf, copied
from batchnorm.surgery.replacement import duplicate

Measured = dict[str, dict[str, Tensor]]
Value = Batch | nn.Module
Widen = Callable[[Value], Value]

OUTPUTS, GRADIENTS, BUFFERS = "the output", "the gradients", "the buffers"
_TRIES = 8  # a tie of two that moves by chance stays as it is in one of 2^8
_NEARBY = 2  # examples that must agree
_TINY, _NOISE = None, 0.1  # how far examples move: by eps^(3/4), and near
_ALIKE = 0.25  # of a difference: the sizes of two draws from one spread are seldom farther apart


def check(original: nn.Module, result: nn.Module, example: Batch) -> None:
    """Return if both models, which are not changed, do the same with ``example``.

    Raises:
        ValueError: If the original does not run on ``example``.
        RuntimeError: If the two differ, with the largest difference.
    """
    for mode in (False, True):
        expected, widen, gradients = _measure_widest(original, example, mode)
        pair = _Pair(
            original, result, lambda model, at, mode=mode, w=widen, g=gradients: _measure(w(model), at, mode, g)
        )
        there = widen(example)
        try:
            odd = _odd(expected, pair.measure(duplicate(result, "convert"), there))
        except Exception as error:
            raise RuntimeError(_message(mode, f"{type(error).__name__} on the example: {error}")) from error
        values = [each for each in odd if each.what != GRADIENTS]
        if odd and not (pair.explains(values, expected, there) and pair.agrees_near(there, expected)):
            worst = odd[0]
            raise RuntimeError(
                _message(
                    mode,
                    f"a difference of {worst.gap:.3g} in {worst.what} ({worst.name}), where rounding explains "
                    f"{worst.line:.2g}",
                )
            )


@final
@dataclass(frozen=True)
class _Odd:
    """A difference, the part of it that rounding explains, and the values that differ."""

    gap: float
    line: float
    what: str
    name: str


@final
@dataclass(frozen=True)
class _Pair:
    """Two models, and a function that measures one of them on an example; it changes the copy that it gets."""

    original: nn.Module
    result: nn.Module
    measure: Callable[[nn.Module, Batch], Measured]

    def explains(self, odd: list[_Odd], expected: Measured, example: Batch) -> bool:
        """Whether a tiny move of the example changes the original's values by about as much as they differ."""
        left = {(each.what, each.name): each.gap for each in odd}
        for seed in range(_TRIES if left else 0):
            moved = self.measure(duplicate(self.original, "convert"), _moved(example, seed, _TINY))
            for each in _odd(expected, moved):
                if each.gap >= left.get((each.what, each.name), torch.inf) * _ALIKE:
                    del left[each.what, each.name]
            if not left:
                break
        return not left

    def agrees_near(self, example: Batch, expected: Measured) -> bool:
        """Whether both agree on examples nearby; examples on which the original fails do not count."""
        seen = 0
        for seed in range(_TRIES):
            near = _moved(example, seed, _NOISE if seed < _TRIES // 2 else _NOISE**2)
            with suppress(Exception):
                there = self.measure(duplicate(self.original, "convert"), near)
                if _are_as_finite(there, expected):
                    try:
                        odd = _odd(there, self.measure(duplicate(self.result, "convert"), near))
                    except Exception:  # noqa: BLE001 - the original did run
                        return False
                    if not self.explains(odd, there, near):
                        return False
                    seen += 1
            if seen == _NEARBY:
                return True
        return False


def _moved(example: Batch, seed: int, by: float | None) -> Batch:
    """The example plus normal noise, ``by`` times the root mean square of each tensor, or 1 where all of it is 0.

    Where no tensor is of floats, the numbers of each change their places instead.

    Args:
        example: Batch nest of tensors.
        seed: Of the noise.
        by: A share; None for eps^(3/4).
    """
    leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    are_whole = by is not None and not any(map(_is_real, leaves))

    def moved(leaf: Leaf) -> Leaf:
        if not isinstance(leaf, Tensor) or not (are_whole or _is_real(leaf)):
            return leaf
        generator = torch.Generator().manual_seed(seed)
        if are_whole:
            order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
            return leaf.flatten()[order].reshape(leaf.shape)
        size = leaf.detach().double().square().mean().sqrt().item() or 1.0
        share = torch.finfo(leaf.dtype).eps ** 0.75 if by is None else by
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device, leaf.dtype)
        return leaf.detach() + size * share * noise

    return tree_map(moved, example)


def _are_as_finite(there: Measured, expected: Measured) -> bool:
    """Whether the outputs are as finite as before; noise may lead out of the domain, as of a logarithm."""
    pairs = ((a, there[OUTPUTS].get(name)) for name, a in expected[OUTPUTS].items())
    return all(b is not None and bool(b.isfinite().all()) >= bool(a.isfinite().all()) for a, b in pairs)


def _message(mode: bool, got: str) -> str:
    return (
        f"convert needs a result that computes what the model does, got in {'train' if mode else 'eval'} mode {got}. "
        "Convert without fuse=True: that replaces layers one by one."
    )


def _measure_widest(model: nn.Module, example: Batch, mode: bool) -> tuple[Measured, Widen, bool]:
    """Results with gradients and in float64 if possible, the cast that was used, and whether gradients are included."""
    reason: Exception | None = None
    for gradients, widen in product((True, False), (_wide, _as_it_is)):
        try:
            return _measure(widen(duplicate(model, "convert")), widen(example), mode, gradients), widen, gradients
        except AbsenceError:  # another example would not help
            raise
        except Exception as error:  # noqa: BLE001 - raised again if nothing works
            reason = error
    raise ValueError(example_needed(mode, reason)) from reason


def example_needed(mode: bool, reason: Exception | None) -> str:
    """The error message for an example on which the model fails in train mode (True) or eval mode."""
    return (
        f"convert needs an example that the model takes in train and eval mode, got {type(reason).__name__} in "
        f"{'train' if mode else 'eval'} mode: {reason} Pass a batch of two or more, as recalibrate would get it "
        "from a loader."
    )


def _as_it_is(value: Value) -> Value:
    return value


def _wide(value: Value) -> Value:
    if isinstance(value, nn.Module):
        return value.double()
    return tree_map(lambda leaf: leaf.double() if _is_real(leaf) else leaf, value)


def _is_real(value: Leaf) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _measure(model: nn.Module, example: Batch, mode: bool, gradients: bool) -> Measured:
    """Outputs, gradients of a fixed sum of them, and buffers. ``model`` is used up."""
    model.train(mode)
    model.zero_grad()
    leaves: list[Tensor] = []

    def own(leaf: Leaf) -> Leaf:
        if not _is_real(leaf):
            return copied(leaf)
        leaves.append(leaf.detach().clone().requires_grad_())
        return leaves[-1].clone()  # no leaf, so that the model may write to it in place

    with preserve_random_state(), torch.set_grad_enabled(gradients):
        leaves_out = [leaf for leaf in tree_leaves(call(model, tree_map(own, example))) if isinstance(leaf, Tensor)]
        outputs = [part for leaf in leaves_out for part in _dense(leaf)]
        ends = [y for y in outputs if y.requires_grad and y.is_floating_point()]
        if ends:
            torch.autograd.backward(ends, [_weights(y) for y in ends])
    inputs = {f"input {index}": leaf.grad for index, leaf in enumerate(leaves)}
    parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        OUTPUTS: {str(index): y.detach() for index, y in enumerate(outputs)},
        GRADIENTS: dict(
            part for name, grad in (inputs | parameters).items() if grad is not None for part in _plain(name, grad)
        ),
        BUFFERS: {name: part for name, buffer in model.named_buffers() for name, part in _plain(name, buffer)},
    }


def _dense(output: Tensor) -> list[Tensor]:
    """An output with its graph; of sequences in one tensor each, or all in a row where they are kept so."""
    if not output.is_nested:
        return [output]
    return [output.values()] if output.layout == torch.jagged else list(output.unbind())


def _plain(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What a tensor of any kind holds as plain tensors by name; nothing where it cannot be read."""
    if tensor.is_nested and tensor.layout != torch.jagged:
        return [(f"{name}.{i}", part) for i, part in enumerate(tensor.unbind())]
    if (plain := whole(tensor)) is not None:
        return [(name, bits_of(plain))]
    return [found for i, part in enumerate(parts_of(tensor)) for found in _plain(f"{name}.{i}", part)]


def _weights(y: Tensor) -> Tensor:
    """Of both signs and all sizes: the plain sum of a normalized batch has no gradient."""
    return torch.arange(y.numel(), device=y.device, dtype=y.dtype).cos().reshape(y.shape)


def _odd(expected: Measured, got: Measured) -> list[_Odd]:
    """What differs by more than rounding: of each group the largest difference first."""
    odd: list[_Odd] = []
    for group, tensors in expected.items():
        others = got[group]
        if tensors.keys() != others.keys():
            name = min(tensors.keys() ^ others.keys())
            odd.append(_Odd(torch.inf, 0.0, group, f"{name} is in one of them only"))
            continue
        # a gradient that is 0 but for rounding, as of a bias before batch norm, is measured by all; a buffer by 1
        scale = 1.0 if group == BUFFERS else max((_size(t) for t in tensors.values()), default=1.0)
        types = [t.dtype for t in [*tensors.values(), *others.values()] if t.is_floating_point()]
        line = max((torch.finfo(dtype).eps ** 0.5 for dtype in types), default=0.0)
        gaps = (_Odd(_gap(t, others[name], scale), line, group, name) for name, t in tensors.items())
        odd += sorted((each for each in gaps if not each.gap <= line), key=lambda each: -each.gap)
    return odd


def _size(tensor: Tensor) -> float:
    tensor = _wide_numbers(tensor)
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _wide_numbers(tensor: Tensor) -> Tensor:
    """In a type that arithmetic is there for, which is not so of float8 and the like."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _gap(a: Tensor, b: Tensor, scale: float) -> float:
    if a.shape != b.shape:
        return torch.inf
    a, b = _wide_numbers(a), _wide_numbers(b)
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if not differ.any():
        return 0.0
    gap = (a - b)[differ].abs().max().item() / max(scale, _size(a) if scale == 1.0 else 0.0, 1e-300)
    return torch.inf if gap != gap else gap
