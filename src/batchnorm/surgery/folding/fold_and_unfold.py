"""fold and unfold: batch norm layers of a trained model become part of the layers next to them, and come back.

``plan`` reads from the model's code which layer each batch norm layer is folded into, ``arithmetic`` computes the new
weights, and ``folding_placeholder`` stores what ``unfold`` needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.argument_types import require_flag, require_module
from batchnorm.other_libraries import out_of_reach
from batchnorm.population import preserve_state
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.batches import call, require_examples
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery.dataflow import set_mode
from batchnorm.surgery.folding.arithmetic import Linear
from batchnorm.surgery.folding.model_facts import fresh
from batchnorm.surgery.folding.plan import Partner, plan
from batchnorm.surgery.folding_placeholder import FoldedAway, own_tensors, set_tensors
from batchnorm.surgery.layer_maps import Parts
from batchnorm.surgery.replacement import check_memory, duplicate, find

Model = TypeVar("Model", bound=nn.Module)


@final
@dataclass(frozen=True)
class Folding:
    """Which layers were folded, why others were not, and how much the outputs on the example changed.

    ``layers`` maps the path of each batch norm layer to its partner, or to the reason why it stays. ``error`` is the
    largest absolute difference of an output, ``largest`` the largest absolute output of the original.
    """

    layers: Mapping[str, Partner | str]
    error: float
    largest: float

    def __str__(self) -> str:
        reasons = {path: reason for path, reason in self.layers.items() if isinstance(reason, str)}
        count = len(self.layers)
        lines = [
            f"folded {count - len(reasons)} of {count} batch norm layers; "
            f"outputs differ by at most {self.error:.2g}; the largest output is {self.largest:.2g}"
        ]
        return "\n".join(lines + [f"  left {path!r}: {reason}" for path, reason in reasons.items()])


def foldable(model: nn.Module, example: Batch = None) -> dict[str, Partner | str]:
    """For each batch norm layer by path: the layer that ``fold`` would fold it into, or why it would not be folded.

    The model is not changed, and it is run only on the example. Without an example, only the code is examined. Then
    every module that the code can call is assumed to run, convolutions are assumed to get batches, and a batch norm
    layer next to a linear layer is not foldable, since inputs (N, C) and (N, C, L) cannot be distinguished.

    Args:
        model: In train or eval mode; it is examined in eval mode.
        example: A batch, as for ``fold``.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If the model is compiled or does not run on ``example``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> for path, partner in foldable(model).items():
        ...     print(path, partner)
        1 '0' before it
        3 no convolution or linear layer is next to it: '2' before it, the output behind it
    """
    answers, _ = plan(model, example)
    return {path: answers[path] for path in find(model)} | out_of_reach(model)


def fold(
    model: Model, example: Batch, *, inplace: bool = False, report: Callable[[Folding], object] | None = print
) -> Model:
    """A copy of the model in eval mode, whose batch norm layers are folded into the layers next to them.

    A batch norm layer in eval mode multiplies each channel by a number and adds a number. A convolution, a transposed
    convolution or a linear layer before or behind it can do the same with other weights. Folding uses the stored
    statistics: in train mode the copy does not compute batch norm, and it cannot be trained as the model was.

    Neighbours are read from the forwards, not from the order of registration. ``Identity``, dropout, modules that run
    inside of others, and operations that only move values, such as ``view``, ``transpose`` and ``cat``, may be between
    two neighbours. A forward that torch.fx cannot trace is run on tensors with the example's sizes and without values;
    branches that depend on sizes are then valid for these sizes only. Layers of torch.nn, SyncBatchNorm, ours and
    frozen layers are folded. So are layers of other classes and libraries, if a trial shows that the part of their
    forward that reads their tensors multiplies each channel by a number and adds a number. In the place of a folded
    layer, its activation is still applied and its residual added. Layers without a bias get a bias in the copy. Of the
    state_dict keys of folded layers, only those of their activations remain.

    A layer is left as it is, and ``report`` says why, if

    - no convolution or linear layer is next to it in the code, or that code has branches that depend on values, sets
      attributes or runs in a context such as ``no_grad``;
    - the layer or its neighbour is called at several places or not at all, has several names, or shares a tensor with
      another module;
    - the value between them also goes elsewhere, or hooks see it;
    - the layer or its neighbour is parametrized, or its forward does something else than layers of its kind do;
    - batch norm is not a layer but an operation of an exported program or a call of torch's function;
    - the layer belongs to quantization;
    - it stores no statistics, a variance is negative, or weights would be NaN, infinite or too large for their type;
    - the channels are on different axes: a linear layer makes (N, L, C), and batch norm expects (N, C, L);
    - its shift is not 0, and the layer behind it would not add it evenly: that layer pads with zeros, or is a
      transposed convolution with a kernel or a stride above 1.

    The weights are computed in float64 and rounded once. Model and copy are then compared on the example, in their own
    type and, if they run in float64, also in float64. An error is raised if outputs differ by more than sqrt(eps) times
    the largest output, which is half of the type's digits: rounding does not explain such a difference. On a GPU,
    float32 outputs are compared with the eps of float16, because their factors may be rounded to TF32.

    Args:
        model: Not changed, unless ``inplace``. Its mode does not matter.
        example: A batch. A tensor is passed to the model; of a tuple or list, the first element; a mapping is passed as
            keyword arguments if ``model.forward`` accepts its keys, else as it is. A layer that does not run on the
            example is not folded.
        inplace: Change ``model`` itself and return it; parameters stay the same objects. If an error is raised, the
            model has its weights and layers as before.
        report: Called with a ``Folding``: the result for each layer, and the measured difference. None: no report.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or is a program of TorchScript; if ``example`` is no batch; if
            ``inplace`` is not True or False.
        ValueError: If the model does not run on ``example``, also because its tensors have no values (fake, or on the
            meta device); if it returns no tensors or is compiled; or if the comparison fails, with the difference.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(4, 3, 8, 8)
        >>> folded = fold(model, x, report=None)
        >>> torch.allclose(folded(x), model(x), atol=1e-5), list(folded.state_dict())
        (True, ['0.weight', '0.bias'])

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", section 3.2.
    """
    _check(model, example, inplace=inplace)
    result = model if inplace else duplicate(model, "fold")
    answers, parts = plan(result, example)
    layers = {path: answers[path] for path in find(result)} | out_of_reach(result)
    expected = _outputs(result, example)
    wide = _in_float64(result, example)
    _put_in(result, answers, parts)
    try:
        error, largest = _difference(expected, result, example)
        if wide is not None:
            wide_model, wide_example, wide_expected = wide
            _put_in(wide_model, answers, parts)
            _difference(wide_expected, wide_model, wide_example)
    except ValueError:
        if inplace:
            unfold(result, inplace=True)
        raise
    if report is not None:
        report(Folding(layers, error, largest))
    return result.eval()


def _check(model: nn.Module, example: Batch, *, inplace: bool) -> None:
    """Raise for arguments that ``fold`` cannot work with."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "fold needs a model of modules, got a program of TorchScript. Pass the model from before torch.jit."
        )
    require_real(model, "fold")
    require_examples(example, "fold")
    require_flag(inplace, "inplace")
    if inplace:
        check_memory(model, "fold")


def unfold(model: Model, *, inplace: bool = False) -> Model:
    """A copy of the model with the batch norm layers and weights from before ``fold``, bit for bit.

    Changes to the folded weights since then are lost. The layers are in the mode that the model had in their places:
    eval mode, unless ``train()`` was called. A model without folded layers is only copied.

    Args:
        model: Not changed, unless ``inplace``.
        inplace: Change ``model`` itself and return it.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or ``inplace`` is not True or False.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8))
        >>> back = unfold(fold(model, torch.randn(4, 3), report=None))
        >>> type(back[1]).__name__, back[0].bias, torch.equal(back[0].weight, model[0].weight)
        ('BatchNorm1d', None, True)
    """
    require_module(model, "unfold")
    require_flag(inplace, "inplace")
    model = model if inplace else duplicate(model, "unfold")
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, FoldedAway):
                module._modules[name] = child.restored()
    return model


def _put_in(model: nn.Module, answers: Mapping[str, Partner | str], parts: Mapping[str, Parts]) -> None:
    """Fold the layers of the model in place, as planned."""
    folded = [m for m in model.modules() if isinstance(m, FoldedAway)]
    before = {id(p): tensors for m in folded for p, tensors in zip(m.partners, m._tensors, strict=True)}
    joined: dict[nn.Module, Linear] = {}
    for path, answer in answers.items():
        if not isinstance(answer, Partner):
            continue
        layer: Any = model.get_submodule(path)
        partners = {each.path: model.get_submodule(each.path) for each in (answer, *answer.others)}
        for each, partner in zip((answer, *answer.others), partners.values(), strict=True):
            affine = parts[path].affine.spread(each.channels)
            joined[partner] = joined.get(partner, Linear.of(partner)).joined(affine, each.position)
        tensors = [dict(before.setdefault(id(partner), own_tensors(partner))) for partner in partners.values()]
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = FoldedAway(
            layer, partners, tensors, then=parts[path].code, moved=answer.channels is not None
        )
    for partner, new in joined.items():
        like: Any = partner.weight
        weight = torch.empty_like(like, requires_grad=False).copy_(new.weight)  # keeps the memory format
        set_tensors(partner, {"weight": weight, "bias": new.bias.to(like.device, like.dtype)})


def _in_float64(model: nn.Module, example: Batch) -> tuple[nn.Module, Batch, list[Tensor]] | None:
    """A copy of the model in float64, its example and its outputs; None if it does not run in float64."""
    try:
        wide = copy.deepcopy(model).double()
        wide_example = tree_map(
            lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, example
        )
        return wide, wide_example, _outputs(wide, wide_example)
    except Exception:  # noqa: BLE001 - then only the comparison in the model's own type is made
        return None


def _outputs(model: nn.Module, example: Batch) -> list[Tensor]:
    """The real and complex tensors that a model returns in eval mode. The model is not changed."""
    with preserve_state(model), torch.no_grad():
        set_mode(model, False)
        returned = call(model, fresh(example))
        leaves = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
        leaves = [leaf.clone() for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
    if not leaves:
        raise ValueError(
            f"fold needs a model whose results can be compared, got {type(returned).__name__} without floating-point "
            "tensors. Fold the part of the model that returns such tensors."
        )
    return leaves


def _difference(expected: list[Tensor], folded: nn.Module, example: Batch) -> tuple[float, float]:
    """The largest absolute difference of the outputs, and the largest absolute output of the original."""
    try:
        got = _outputs(folded, example)
    except Exception as error:
        raise ValueError(
            f"fold needs a model that runs without its batch norm layers, got {type(error).__name__}: {error} "
            "Change code that reads attributes of a batch norm layer: folded layers do not have them."
        ) from error
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise ValueError(
            "fold needs results of the same shapes in each run, got others after folding. Fold parts of the model."
        )
    error = max(_largest(a, b) for a, b in zip(expected, got, strict=True))
    largest = max(_largest(t) for t in expected)
    line = max(map(_eps, expected)) ** 0.5 * largest
    if not error <= line:
        raise ValueError(
            f"fold needs the same outputs up to rounding, got outputs that differ by {error:.3g}, where rounding "
            f"explains {line:.2g}. A variance near 0 or a mean far from 0 costs digits: recalibrate the model."
        )
    return error, largest


def _eps(tensor: Tensor) -> float:
    """The relative precision of a tensor's computation: GPUs may round float32 factors to the 10 bits of TF32."""
    is_short = tensor.dtype == torch.float32 and tensor.device.type != "cpu"
    return torch.finfo(torch.float16 if is_short else tensor.dtype).eps


def _largest(a: Tensor, b: Tensor | None = None) -> float:
    """The largest finite absolute value of ``a``; with ``b``, the largest absolute difference (NaN equals NaN)."""
    a = a.to("cpu", torch.complex128 if a.is_complex() else torch.float64)
    if b is None:
        a = a[a.isfinite()]
    else:
        b = b.to("cpu", a.dtype)
        a = (a - b)[~((a == b) | (a.isnan() & b.isnan()))]
    return a.abs().max().item() if a.numel() else 0.0
