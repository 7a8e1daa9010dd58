"""Whether two models compute the same: outputs, gradients and buffers on one example, in eval and in train mode.

Both are run in float64 where the model can be: there a mistake in structure is of the size of the values, and what
rounding leaves is far below the line at half of the format's digits, sqrt(eps) of the largest value.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.population.batches import call
from batchnorm.population.shield import preserve_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

    Measured = dict[str, dict[str, Tensor]]


def check(original: nn.Module, result: nn.Module, example: Any) -> None:
    """Return if both models, which are not changed, do the same with ``example``.

    Raises:
        ValueError: If the original does not run on ``example``.
        RuntimeError: If the two differ, with the largest difference.
    """
    for mode in (False, True):
        expected, widen, gradients = _measure_widest(original, example, mode)
        try:
            got = _measure(widen(copy.deepcopy(result)), widen(example), mode, gradients)
        except Exception as error:
            raise RuntimeError(_message(mode, f"{type(error).__name__} on the example: {error}")) from error
        for what, (gap, line, name) in _gaps(expected, got).items():
            if not gap <= line:
                raise RuntimeError(
                    _message(mode, f"a difference of {gap:.3g} in {what} ({name}), where rounding explains {line:.2g}")
                )


def _message(mode: bool, got: str) -> str:
    return (
        f"convert needs a result that computes what the model does, got in {'train' if mode else 'eval'} mode {got}. "
        "Convert without fuse=True, and please report the model."
    )


def _measure_widest(model: nn.Module, example: Any, mode: bool) -> tuple[Measured, Callable[[Any], Any], bool]:
    """What the model does, with gradients and in float64 if it can; what casts others so; whether with gradients."""
    reason: Exception | None = None
    for gradients, widen in product((True, False), (_wide, _as_it_is)):
        try:
            return _measure(widen(copy.deepcopy(model)), widen(example), mode, gradients), widen, gradients
        except Exception as error:  # noqa: BLE001 - raised again if nothing works
            reason = error
    raise ValueError(
        f"convert needs an example that the model takes in train and eval mode, got {type(reason).__name__} in "
        f"{'train' if mode else 'eval'} mode: {reason} Pass a batch of two or more, as recalibrate would get it "
        "from a loader."
    ) from reason


def _as_it_is(value: Any) -> Any:
    return value


def _wide(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.double()
    return tree_map(lambda leaf: leaf.double() if _is_real(leaf) else leaf, value)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _measure(model: nn.Module, example: Any, mode: bool, gradients: bool) -> Measured:
    """Outputs, gradients of a fixed sum of them, and buffers. ``model`` is used up."""
    model.train(mode)
    model.zero_grad()
    leaves: list[Tensor] = []

    def own(leaf: Any) -> Any:
        if not _is_real(leaf):
            return leaf.clone() if isinstance(leaf, Tensor) else leaf
        leaves.append(leaf.detach().clone().requires_grad_())
        return leaves[-1].clone()  # no leaf, so that the model may write to it in place

    with preserve_random_state(), torch.set_grad_enabled(gradients):
        outputs = [leaf for leaf in tree_leaves(call(model, tree_map(own, example))) if isinstance(leaf, Tensor)]
        ends = [y for y in outputs if y.requires_grad and y.is_floating_point()]
        if ends:
            torch.autograd.backward(ends, [_weights(y) for y in ends])
    inputs = {f"input {index}": leaf.grad for index, leaf in enumerate(leaves)}
    parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "the output": {str(index): y.detach() for index, y in enumerate(outputs)},
        "the gradients": {name: grad for name, grad in (inputs | parameters).items() if grad is not None},
        "the buffers": dict(model.named_buffers()),
    }


def _weights(y: Tensor) -> Tensor:
    """Of both signs and all sizes: the plain sum of a normalized batch has no gradient."""
    return torch.arange(y.numel(), device=y.device, dtype=y.dtype).cos().reshape(y.shape)


def _gaps(expected: Measured, got: Measured) -> dict[str, tuple[float, float, str]]:
    """For each group the largest difference, relative to the largest value, what is allowed, and where it is."""
    gaps = {}
    for group, tensors in expected.items():
        others = got[group]
        if tensors.keys() != others.keys():
            odd = sorted(tensors.keys() ^ others.keys())
            gaps[group] = torch.inf, 0.0, f"{odd[0]} is in one of them only"
            continue
        # a gradient that is 0 but for rounding, as of a bias before batch norm, is measured by all; a buffer by 1
        scale = 1.0 if group == "the buffers" else max((_size(t) for t in tensors.values()), default=1.0)
        found = [(_gap(t, others[name], scale), name) for name, t in tensors.items()]
        gap, name = max(found, default=(0.0, "none"))
        types = [t.dtype for t in [*tensors.values(), *others.values()] if t.is_floating_point()]
        gaps[group] = gap, max((torch.finfo(dtype).eps ** 0.5 for dtype in types), default=0.0), name
    return gaps


def _size(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs().double()
    return finite.max().item() if finite.numel() else 0.0


def _gap(a: Tensor, b: Tensor, scale: float) -> float:
    if a.shape != b.shape:
        return torch.inf
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if not differ.any():
        return 0.0
    gap = (a - b)[differ].abs().max().item() / max(scale, _size(a) if scale == 1.0 else 0.0, 1e-300)
    return torch.inf if gap != gap else gap
