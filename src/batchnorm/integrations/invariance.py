"""Invariance: whether a model's output for one example depends on the other examples in its batch.

In eval mode it must not depend on them: an example runs alone and inside a batch, and the two outputs are compared.
The allowed difference is the largest that rounding explains. A sum of n products, in any order and in a format with
unit roundoff u, has an error of at most n u times the sum of the products' magnitudes (Higham 2002, section 3.1). The
sums of successive layers are applied one after another, so n is the total over the layers. Between D layers values are
rounded to the model's own format with unit u'; independent errors add in squares. So the bound is n u + sqrt(D + 1) u',
where torch.finfo(...).eps, which is twice the unit roundoff, is used for u and u'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from batchnorm.call_types import Batch
from batchnorm.layers import batch_norms
from batchnorm.population import preserve_state
from batchnorm.population.batches import Batches, call, device_of
from batchnorm.population.eager import uncompiled
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensor_trees import tensors_in

_MOST = 8  # number of examples that run alone


def dependence(model: nn.Module, examples: Batch, *, rtol: float | None = None, atol: float | None = None) -> str:
    """How an output for one example depends on the batch, in words; "" if no output does.

    The model does not change, bit for bit. The first eight examples are compared, in every floating-point output whose
    first axis has the examples.

    Raises:
        ValueError: If there are fewer than two examples, or no floating-point output has one row for each.
    """
    size = _count(examples)
    if size < 2:
        raise ValueError(f"assert_batch_invariant needs a batch of 2 examples or more, got {size}. Pass more examples.")
    batches = Batches(
        [examples], None, device_of(model)
    )  # a new copy each time, because a model may overwrite its input
    with preserve_state(model), torch.no_grad(), uncompiled():
        model.eval()
        together = _answers(model, next(iter(batches)), size)
        for i in range(min(size, _MOST)):
            try:
                alone = _answers(model, _example(next(iter(batches)), i, size), 1)
            except (ValueError, RuntimeError) as error:
                return f"one example cannot be answered alone in eval mode: {error}{_suspects(model)}"
            fault = _difference(model, [y[i : i + 1] for y in together], alone, together, rtol, atol)
            if fault:
                return f"the answer to example {i} depends on its batch of {size}: {fault}{_suspects(model)}"
    return ""


def rounding(model: nn.Module, dtype: torch.dtype) -> float:
    """The largest relative difference between two outputs that rounding explains, if sums have another order.

    Args:
        model: The model; every weight with at least two axes is assumed to be used for the output, one after another.
        dtype: Dtype of the output.
    """
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    terms = sum(weight[0].numel() for weight in weights)
    unit, stored = (torch.finfo(kind).eps for kind in (torch.promote_types(dtype, torch.float32), dtype))
    return terms * unit + math.sqrt(len(weights) + 1) * stored


def _difference(
    model: nn.Module, expected: list[Tensor], alone: list[Tensor], together: list[Tensor],
    rtol: float | None, atol: float | None,
) -> str:  # fmt: skip
    """The first difference above its limit, in words; "" if there is none."""
    if [y.shape for y in expected] != [y.shape for y in alone]:
        return f"the answer has shapes {_shapes(expected)} in the batch and {_shapes(alone)} alone."
    for a, b, whole in zip(alone, expected, together, strict=True):
        relative = rounding(model, b.dtype) if rtol is None else rtol
        scale = float(whole[whole.isfinite()].double().square().mean().sqrt())
        absolute = relative * (0.0 if math.isnan(scale) else scale) if atol is None else atol
        if not torch.allclose(a.double(), b.double(), rtol=relative, atol=absolute, equal_nan=True):
            off = (a.double() - b.double()).abs()
            return f"it changes by up to {off.max():.2g} (rms of the output {scale:.2g}, limit {absolute:.2g})."
    return ""


def _suspects(model: nn.Module) -> str:
    """A line that names the layers without stored statistics, which normalize by the batch; "" if there are none."""
    names = [name for name, layer in batch_norms(model).items() if not has_stored_statistics(layer)]
    if not names:
        return ""
    return (
        f"\n  without stored statistics, layers normalize by the batch in eval mode: {', '.join(map(repr, names))}. "
        "Construct them with track_running_stats=True, and train or recalibrate the model."
    )


def _answers(model: nn.Module, batch: Batch, size: int) -> list[Tensor]:
    answers = [y for y in tensors_in(call(model, batch)) if y.is_floating_point() and y.ndim and len(y) == size]
    if not answers:
        raise ValueError(
            f"assert_batch_invariant needs an output with a first axis of {size} examples, got none. "
            "Wrap the model so that it returns such a tensor."
        )
    return answers


def _count(examples: Batch) -> int:
    return next((len(tensor) for tensor in tensors_in(examples) if tensor.ndim), 0)


def _example(value: Batch, i: int, size: int) -> Batch:
    """The part of a batch that belongs to example i. Values without one row for each example stay as they are."""
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _example(part, i, size) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_example(part, i, size) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_example(part, i, size) for part in value)
    return value


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(y.shape)) for y in tensors)
