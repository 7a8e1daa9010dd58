"""FrozenBatchNorm2d of torchvision and detectron2, and other such classes, as frozen layers of ours, and back.

Such a class is not derived from torch.nn's layers and never measures a batch. Its four tensors are buffers. Our layer
gets gamma and beta as parameters that need no gradient until it is unfrozen, and no counter, so the keys of the
state_dict stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.other_libraries import channels_of, eps_of, is_of_others, measures, responses_of
from batchnorm.population.freezing import Frozen, freeze

_KINDS = {4: BatchNorm2d, 2: BatchNorm1d, 3: BatchNorm1d, 5: BatchNorm3d}  # by the number of axes of the input
# a scale or shift of a layer that is batch norm differs by a few roundings of float64
_ROUNDING = 64 * torch.finfo(torch.float64).eps


def is_frozen_class(layer: nn.Module) -> bool:
    """Whether a layer's class never measures batches, and is not derived from a layer of torch.nn."""
    return is_of_others(layer) and measures(layer) == "nothing" and not isinstance(layer, Frozen)


def as_ours(layer: nn.Module) -> _BatchNorm | None:
    """A frozen layer of ours with the same settings; None if the layer is not batch norm with these tensors alone."""
    eps = eps_of(layer)
    kind = _kind_of(layer, eps)
    if kind is None or any(layer._modules.values()) or layer._parameters or not eps > 0:
        return None
    like = layer.running_mean
    new = kind(channels_of(layer), eps, device=like.device, dtype=like.dtype)
    for key in ("weight", "bias"):
        if getattr(layer, key) is None:
            setattr(new, key, None)
    new.num_batches_tracked = None
    new._register_load_state_dict_pre_hook(without_counter)  # the public form keeps a reference to ``new``
    return freeze(new, affine=True)


def without_counter(state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """A hook of ``load_state_dict``: removes the counter that torch's layers add to states of older versions."""
    state_dict.pop(f"{prefix}num_batches_tracked", None)


def why_not(layer: nn.Module) -> str:
    """Why no layer of ours replaces a frozen layer, after "'path' "."""
    return (
        f"is a {type(layer).__name__}, which measures nothing in train mode and computes something else than batch "
        "norm with its four tensors"
    )


def _kind_of(layer: nn.Module, eps: float) -> type | None:
    """The class for the inputs that the layer accepts; None if it does not compute batch norm with its tensors."""
    for rank, coefficients in responses_of(layer).items():
        if _is_batch_norm(layer, eps, *coefficients):
            return _KINDS[rank]
    return None


def _is_batch_norm(layer: nn.Module, eps: float, scale: Tensor, shift: Tensor) -> bool:
    mean, var = (getattr(layer, name).detach().double().cpu() for name in ("running_mean", "running_var"))
    gamma, beta = (
        None if (t := getattr(layer, key)) is None else t.detach().double().cpu() for key in ("weight", "bias")
    )
    expected = (var + eps).rsqrt() * (1.0 if gamma is None else gamma)
    moved = (0.0 if beta is None else beta) - mean * expected
    # eps that was computed from the results has their rounding
    line = _ROUNDING if isinstance(getattr(layer, "eps", None), float) else 1e-9
    sizes = (expected.abs(), (mean * expected).abs() + (0.0 if beta is None else beta.abs()))
    pairs = zip((scale, shift), (expected, moved), sizes, strict=True)
    return all(bool(((found - right).abs() <= line * size).all()) for found, right, size in pairs)


def attributes_of(layer: nn.Module) -> dict[str, Any]:
    """The attributes that a layer's class and its owner set, without what every module has."""
    return {name: value for name, value in vars(layer).items() if name not in vars(nn.Module())}


def restore(layer: nn.Module, kind: type, attributes: Mapping[str, Any], buffers: tuple[str, ...]) -> None:
    """Give a layer its former frozen class, attributes and buffers back, in place, with the present numbers."""
    own, tensors = vars(layer), {**layer._parameters, **layer._buffers}
    ours = {*vars(nn.BatchNorm2d(1, device="meta")), *vars(freeze(nn.BatchNorm2d(1, device="meta"), affine=True))}
    set_since = {name: own[name] for name in own if name not in ours}
    module = {name: own[name] for name in vars(nn.Module())}
    layer.__class__ = kind
    own.clear()
    own.update(module | set_since | dict(attributes))
    hooks = own["_load_state_dict_pre_hooks"]
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is without_counter]:
        del hooks[key]
    own["_parameters"] = {}
    own["_buffers"] = {name: None if (t := tensors[name]) is None else t.detach() for name in buffers}
