"""Whether two models compute the same: outputs, gradients and buffers on one example, in eval and in train mode.

Both run in float64 if the model can. A mistake in structure changes values by about their own size. Rounding changes
values far less than the limit: sqrt(eps), half of the type's digits, times the largest output, the largest gradient, or
for a buffer the larger of 1 and its largest value.

The example does not determine every value. If two inputs of a maximum are equal, if an input of ReLU is 0, or if a flat
image leaves a batch without variance, rounding alone decides the index, the slope or the sign. Such a tie explains a
difference if the original changes about as much when noise of eps^(3/4) of the example's size is added. This noise is
far above rounding and far below the limit. Every difference of outputs and buffers needs such an explanation. If
anything differs, gradients included, both models must then agree on noisy copies of the example: on these copies ties
have probability 0, unless the model makes them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_TRIES = 8  # noise changes a tie of two values with probability 1/2; 8 tries all miss it with probability 2^-8
_NOISY_COPIES = 2  # noisy copies on which both models must agree
_TINY, _NOISE = None, 0.1  # sizes of the noise relative to the example; None stands for eps^(3/4)
_EXPLAINED_SHARE = 0.25  # smallest ratio of a change by noise to the difference that it explains


def check(original: nn.Module, result: nn.Module, example: Batch) -> None:
    """Raise unless both models compute the same on ``example``. The models are not changed.

    Raises:
        ValueError: If the original does not run on ``example``.
        RuntimeError: If the results differ, with the largest relative difference of the first group that differs
            (outputs, gradients, buffers); or if ``result`` does not run.
    """
    for mode in (False, True):
        expected, widen, gradients = _measure_widest(original, example, mode)
        pair = _Pair(
            original, result, lambda model, at, mode=mode, w=widen, g=gradients: _measure(w(model), at, mode, g)
        )
        wide_example = widen(example)
        try:
            gaps = _differences(expected, pair.measure(duplicate(result, "convert"), wide_example))
        except Exception as error:
            raise RuntimeError(_message(mode, f"{type(error).__name__} on the example: {error}")) from error
        values = [each for each in gaps if each.what != GRADIENTS]
        if gaps and not (pair.explains(values, expected, wide_example) and pair.agrees_near(wide_example, expected)):
            worst = gaps[0]
            raise RuntimeError(
                _message(
                    mode,
                    f"a relative difference of {worst.gap:.3g} in {worst.what} ({worst.name}), where rounding explains "
                    f"{worst.line:.2g}",
                )
            )


@final
@dataclass(frozen=True)
class _Difference:
    """A difference ``gap`` that is larger than the limit ``line``, and the name of the values that differ."""

    gap: float
    line: float
    what: str
    name: str


@final
@dataclass(frozen=True)
class _Pair:
    """Two models, and a function that measures a copy of one of them on an example, and changes that copy."""

    original: nn.Module
    result: nn.Module
    measure: Callable[[nn.Module, Batch], Measured]

    def explains(self, differences: list[_Difference], expected: Measured, example: Batch) -> bool:
        """Whether tiny noise on the example changes the original's values by about as much as the models differ."""
        unexplained = {(each.what, each.name): each.gap for each in differences}
        for seed in range(_TRIES if unexplained else 0):
            moved = self.measure(duplicate(self.original, "convert"), _moved(example, seed, _TINY))
            for each in _differences(expected, moved):
                if each.gap >= unexplained.get((each.what, each.name), torch.inf) * _EXPLAINED_SHARE:
                    del unexplained[each.what, each.name]
            if not unexplained:
                break
        return not unexplained

    def agrees_near(self, example: Batch, expected: Measured) -> bool:
        """Whether both models agree on noisy copies of the example; copies on which the original fails do not count."""
        agreed = 0
        for seed in range(_TRIES):
            near = _moved(example, seed, _NOISE if seed < _TRIES // 2 else _NOISE**2)
            with suppress(Exception):
                measured = self.measure(duplicate(self.original, "convert"), near)
                if _are_as_finite(measured, expected):
                    try:
                        differences = _differences(measured, self.measure(duplicate(self.result, "convert"), near))
                    except Exception:  # noqa: BLE001 - the original did run
                        return False
                    if not self.explains(differences, measured, near):
                        return False
                    agreed += 1
            if agreed == _NOISY_COPIES:
                return True
        return False


def _moved(example: Batch, seed: int, by: float | None) -> Batch:
    """The example plus normal noise of ``by`` times the root mean square of each tensor (1 for a tensor of zeros).

    If no tensor has floats, the values of each tensor are permuted instead, unless ``by`` is None.

    Args:
        example: A tensor, or nested containers of tensors.
        seed: Seed of the noise.
        by: Relative size of the noise; None stands for eps^(3/4).
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


def _are_as_finite(measured: Measured, expected: Measured) -> bool:
    """Whether all outputs that were finite still are; noise may lead out of a domain, such as that of a logarithm."""
    pairs = ((a, measured[OUTPUTS].get(name)) for name, a in expected[OUTPUTS].items())
    return all(b is not None and bool(b.isfinite().all()) >= bool(a.isfinite().all()) for a, b in pairs)


def _message(mode: bool, got: str) -> str:
    return (
        f"convert needs a result that computes the same as the model, got in {'train' if mode else 'eval'} mode {got}. "
        "Convert without fuse=True: then forwards are not rewritten."
    )


def _measure_widest(model: nn.Module, example: Batch, mode: bool) -> tuple[Measured, Widen, bool]:
    """The results, in float64 and with gradients if possible; the cast that was used; whether there are gradients."""
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
        f"convert needs an example on which the model runs in train and eval mode, got {type(reason).__name__} in "
        f"{'train' if mode else 'eval'} mode: {reason} Pass a batch of two or more examples, as a loader for "
        "recalibrate returns it."
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
    """Outputs, gradients of a fixed weighted sum of the outputs, and buffers. ``model`` is changed."""
    model.train(mode)
    model.zero_grad()
    leaves: list[Tensor] = []

    def own(leaf: Leaf) -> Leaf:
        if not _is_real(leaf):
            return copied(leaf)
        leaves.append(leaf.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a clone, which the model may change in place

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
        BUFFERS: {name: part for own, buffer in _fixed(model) for name, part in _plain(own, buffer)},
    }


def _fixed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers, and the parameters without gradient, which are buffers in frozen layers of other libraries."""
    yield from model.named_buffers()
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _dense(output: Tensor) -> list[Tensor]:
    """An output as dense tensors, with its autograd graph: a nested tensor becomes its values or its parts."""
    if not output.is_nested:
        return [output]
    return [output.values()] if output.layout == torch.jagged else list(output.unbind())


def _plain(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The values of a tensor of any kind as plain tensors by name; [] if they cannot be read."""
    if tensor.is_nested and tensor.layout != torch.jagged:
        return [(f"{name}.{i}", part) for i, part in enumerate(tensor.unbind())]
    if (plain := whole(tensor)) is not None:
        return [(name, bits_of(plain))]
    return [pair for i, part in enumerate(parts_of(tensor)) for pair in _plain(f"{name}.{i}", part)]


def _weights(y: Tensor) -> Tensor:
    """Weights of both signs for the sum of outputs: the plain sum of a normalized batch has no gradient."""
    return torch.arange(y.numel(), device=y.device, dtype=y.dtype).cos().reshape(y.shape)


def _differences(expected: Measured, got: Measured) -> list[_Difference]:
    """The values that differ by more than rounding: by group, in each group the largest difference first."""
    differences: list[_Difference] = []
    for group, tensors in expected.items():
        others = got[group]
        if tensors.keys() != others.keys():
            name = min(tensors.keys() ^ others.keys())
            differences.append(_Difference(torch.inf, 0.0, group, f"{name} is in one of them only"))
            continue
        # relative to the largest value of the group: some gradients, as of a bias before batch norm, are near 0
        scale = 1.0 if group == BUFFERS else max((_size(t) for t in tensors.values()), default=1.0)
        types = [t.dtype for t in [*tensors.values(), *others.values()] if t.is_floating_point()]
        line = max((torch.finfo(dtype).eps ** 0.5 for dtype in types), default=0.0)
        gaps = (_Difference(_gap(t, others[name], scale), line, group, name) for name, t in tensors.items())
        differences += sorted((each for each in gaps if not each.gap <= line), key=lambda each: -each.gap)
    return differences


def _size(tensor: Tensor) -> float:
    tensor = _wide_numbers(tensor)
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _wide_numbers(tensor: Tensor) -> Tensor:
    """The tensor in float64 or complex128, because float8 and similar types have no arithmetic."""
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
