"""replace: turns batch norm layers into other modules, and keeps the layer objects.

The layer object stays and becomes the new module: it gets the new module's class and attributes, and keeps its own
training flag, hooks, tensors of the same name and shape, and attributes that its owner set. So names, lists and hooks
that refer to the layer now refer to the new module, and a shared layer stays shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.nn.utils import parametrize

from batchnorm.argument_types import kind_of, require_callable, require_flag, require_module
from batchnorm.layer_settings import RULES
from batchnorm.layers import LAYERS, BatchNorm1d, batch_norms
from batchnorm.other_libraries import layers_of_others
from batchnorm.ownership import claim
from batchnorm.population.tensor_memory import emptiness, is_fake, require
from batchnorm.surgery.patterns import activation_name
from batchnorm.surgery.rewriting import MARK, applied_by

Model = TypeVar("Model", bound=nn.Module)

_TENSORS = ("_parameters", "_buffers")
_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_WITHOUT_STORAGE = _SPARSE | {torch._mkldnn}  # type: ignore[attr-defined]


def find(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm layer of a model by its dotted path: ours, torch.nn's and SyncBatchNorm, subclasses of them too.

    Modules of other libraries with the same four tensors, such as frozen layers of torchvision and detectron2, are
    included, although they are not instances of torch.nn's classes. A layer under several names is listed under the
    first name. A model that is itself a layer has the path "".

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.

    Example:
        >>> list(find(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        ['1']
    """
    layers: dict[str, Any] = {**batch_norms(model), **layers_of_others(model)}
    return {path: layers[path] for path, _ in model.named_modules() if path in layers}


def replace(model: Model, make: Callable[[str, _BatchNorm], nn.Module | None], *, inplace: bool = False) -> Model:
    """A copy of the model in which the result of ``make(path, layer)`` replaces each batch norm layer.

    The new module gets from the layer: the training flag, hooks of every kind, parameters and buffers that both have in
    the same shape, with their ``requires_grad``, and attributes that were set on the layer from outside. The other
    tensors of the new module are moved to the layer's device and floating type. A layer under several names is
    replaced once and stays shared; parameters that are tied to others stay tied. The replacement of a frozen layer is
    frozen only if ``make`` freezes it.

    A new layer of ours gets the activation, ``memory`` and ``single_element`` of an old layer of ours, except those
    that it sets itself. A layer that ``convert`` fused can be replaced by any other module: the activation is then
    applied at its original place. A layer constructed with ``act`` can be replaced by a layer of ours, by torch.nn's
    module of this activation, by a module whose attribute ``act`` is not None, or by a module that contains one of the
    last two. Other modules are refused.

    Args:
        model: Not changed, unless ``inplace``.
        make: Called once for each layer; returns a new module, or None to keep the layer. The new module must not
            contain the layer. Layers of other libraries may have no ``num_features``; all have ``running_mean``, whose
            length is the number of channels.
        inplace: Change ``model`` itself and return it. Layers and parameters stay the same objects, so optimizers
            go on working.

    Raises:
        TypeError: If ``model`` or a result of ``make`` is not an ``nn.Module``, ``make`` is not a function, or
            ``inplace`` is not True or False.
        ValueError: If a result of ``make`` contains the layer, was returned before, or would lose the activation that
            the layer was constructed with; or if the layer is parametrized or lazy. The model is then unchanged.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> replace(model, lambda path, layer: nn.GroupNorm(4, layer.num_features))[1].weight.equal(model[1].weight)
        True
    """
    require_module(model, "replace")
    require_callable(make, "replace needs a function make(path, layer)", "It returns a new module, or None.")
    require_flag(inplace, "inplace")
    if inplace:
        check_memory(model, "replace")
    model = model if inplace else duplicate(model, "replace")
    pairs: list[tuple[_BatchNorm, nn.Module]] = []
    for path, layer in find(model).items():
        new = make(path, layer)
        if new is not None and new is not layer:
            _check(path, layer, new, [made for _, made in pairs])
            _check_activation(path, layer, new)
            pairs.append((layer, new))
    for layer, new in pairs:
        _become(layer, new)
    return model


def duplicate(model: Model, caller: str, remedy: str = "Pass inplace=True") -> Model:
    """A deep copy of the model; an error with the reason if it cannot be copied."""
    require_module(model, caller)
    check_memory(model, caller)
    tensors = [*model.parameters(), *model.buffers()]
    try:
        copies: dict[int, object] = {id(t): _copied(t) for t in tensors if _is_not_copied(t)}
        copies |= {id(group): group for group in _process_groups(model)}
        return copy.deepcopy(model, copies)
    except Exception as error:
        raise RuntimeError(
            f"{caller} needs a model that copy.deepcopy can copy, got {type(error).__name__}: {error} "
            f"{remedy} to change the model itself."
        ) from error


def check_memory(model: nn.Module, caller: str) -> None:
    """Raise if the memory of some tensors was freed: a copy would have arbitrary values, or crash the process."""
    tensors = chain(model.named_parameters(), model.named_buffers()) if isinstance(model, nn.Module) else ()
    require({name: tensor for name, tensor in tensors if _ends_the_process(tensor)}, caller)


def _ends_the_process(tensor: Tensor) -> bool:
    return bool(emptiness(tensor)) and not tensor.is_meta and not is_fake(tensor)


def _is_not_copied(tensor: Tensor) -> bool:
    """Whether ``copy.deepcopy`` cannot copy a tensor: uninitialized buffers, and tensors without a single storage."""
    if is_lazy(tensor):
        return not isinstance(tensor, nn.Parameter)
    return tensor.layout in _WITHOUT_STORAGE or (tensor.is_nested and tensor.layout == torch.strided)


def _process_groups(model: nn.Module) -> Iterator[object]:
    """The process groups that are attributes of modules, as of SyncBatchNorm: copies of the model have the same."""
    if distributed.is_available():
        values = chain.from_iterable(vars(module).values() for module in model.modules())
        yield from (value for value in values if isinstance(value, distributed.ProcessGroup))


def _copied(tensor: Tensor) -> Tensor:
    if is_lazy(tensor):
        new: Any = UninitializedBuffer
        return new(device=tensor.device, dtype=tensor.dtype)
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


def _check(path: str, layer: _BatchNorm, new: nn.Module, made: list[nn.Module]) -> None:
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"replace needs a module or None for {path!r}, got {kind_of(new)}. Return an nn.Module from make."
        )
    if any(part is layer for part in new.modules()):
        raise ValueError(
            f"replace needs a new module for {path!r}, got a {type(new).__name__} that contains the old layer. Make it "
            "of new parts: the layer's own tensors are carried over."
        )
    if any(new is other for other in made):
        raise ValueError(
            f"replace needs a new module for each layer, got the same {type(new).__name__} again for {path!r}. "
            "Construct it inside of make."
        )
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"replace needs layers without parametrizations, got a parametrized layer at {path!r}. Call "
            "torch.nn.utils.parametrize.remove_parametrizations first."
        )
    if any(is_lazy(tensor) for tensor in [*layer.parameters(), *layer.buffers()]):
        raise ValueError(
            f"replace needs layers whose number of channels is known, got {type(layer).__name__} at {path!r}. Run the "
            "model on a batch first."
        )


def _check_activation(path: str, layer: _BatchNorm, new: nn.Module) -> None:
    act = applied_by(layer)
    if act is None or MARK in vars(layer) or isinstance(new, LAYERS):
        return
    shown = [new, *new.modules()]
    if any(getattr(part, "act", None) is not None or activation_name(part) == act for part in shown):
        return
    raise ValueError(
        f"replace needs a module that applies {act!r} as the layer at {path!r} does, got {type(new).__name__}. Return "
        "an nn.Sequential of this module and the activation, or replace in the model from batchnorm.for_export, whose "
        "activations are separate modules."
    )


def _carry_settings(layer: nn.Module, new: nn.Module) -> None:
    """Give a new layer of ours the activation and settings of the old layer of ours, if its own are the defaults."""
    if not (isinstance(layer, LAYERS) and isinstance(new, LAYERS)):
        return
    if new._act is None and layer._act is not None:
        new._activate(layer._act, layer._act_param)
    defaults = (name for name, rule in RULES.items() if getattr(new, f"_{name}") == rule.default)
    new._set(**{name: getattr(layer, f"_{name}") for name in defaults})


def _become(layer: nn.Module, new: nn.Module) -> None:
    """Turn ``layer`` into the module ``new``; it keeps what belongs to its owner. Do not use ``new`` afterwards."""
    act = applied_by(layer)
    _carry_settings(layer, new)
    if act is not None:
        claim(layer, [*vars(layer)["_parameters"].values(), *vars(layer)["_buffers"].values()], None)
    old, made = vars(layer), vars(new)
    like = next((t for t in [*layer.parameters(), *layer.buffers()] if t.is_floating_point()), None)
    new.train(old["training"])
    if like is not None:
        for child in new.children():
            child.to(like.device, like.dtype)
    merged = _merged(old, made, like)
    owners = {name: value for name, value in old.items() if name not in made and name not in _own_names()}
    if act is None or applied_by(new) != act:
        owners.pop(MARK, None)
    layer.__class__ = type(new)
    old.clear()
    old.update(made | owners | merged)
    if isinstance(layer, LAYERS):
        layer._claim()


def _merged(old: dict[str, Any], made: dict[str, Any], like: Tensor | None) -> dict[str, Any]:
    """The dicts of tensors, children and hooks that the layer has after it became the new module."""
    merged: dict[str, Any] = {name: _merged_tensors(old, made, name, like) for name in _TENSORS}
    for name, tensor in old["_buffers"].items():  # a frozen layer of another library keeps gamma and beta there
        if name in made["_parameters"] and _fits(tensor, made["_parameters"][name]):
            merged["_parameters"][name] = nn.Parameter(tensor.detach(), made["_parameters"][name].requires_grad)
    for name, tensor in old["_parameters"].items():
        if name in made["_buffers"] and tensor is not None and _fits(tensor, made["_buffers"][name]):
            merged["_buffers"][name] = tensor.detach()
    kept = {name for name, t in merged["_buffers"].items() if name in old["_buffers"] and t is old["_buffers"][name]}
    unsaved = "_non_persistent_buffers_set"
    merged[unsaved] = (old[unsaved] & kept) | (made[unsaved] - kept)
    merged["_modules"] = old["_modules"] | made["_modules"]
    for name in _names_of_hooks():
        old[name].update(made[name])  # the same dict: handles that remove a hook refer to it
        merged[name] = old[name]
    if made["_is_full_backward_hook"] is None:
        merged["_is_full_backward_hook"] = old["_is_full_backward_hook"]
    return merged


def _merged_tensors(
    old: dict[str, Any], made: dict[str, Any], table: str, like: Tensor | None
) -> dict[str, Tensor | None]:
    """The layer's tensors that fit the new module or that its owner added, then the new module's other tensors."""
    carried = {
        name: tensor
        for name, tensor in old[table].items()
        if name not in _own_names() or (name in made[table] and _fits(tensor, made[table][name]))
    }
    rest = {
        name: _moved(tensor, like)
        for name, tensor in made[table].items()
        if name not in carried and name not in old  # pruning stores the weight as a plain attribute
    }
    return carried | rest


def _fits(tensor: Tensor | None, other: Tensor | None) -> bool:
    if tensor is None or other is None:
        return tensor is other
    return tensor.shape == other.shape


def _moved(tensor: Tensor | None, like: Tensor | None) -> Tensor | None:
    if tensor is None or like is None:
        return tensor
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    moved = tensor.detach().to(like.device, dtype)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


@cache
def _names_of_hooks() -> list[str]:
    return [name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hook" in name]


@cache
def _own_names() -> set[str]:
    """The names of all attributes and tensors of a new layer of torch.nn or ours; all others are set by the owner."""
    names = {"_compiled_call_impl", "process_group"}  # compiled code of the old layer, and of a SyncBatchNorm
    for layer in (nn.BatchNorm1d(1, device="meta"), BatchNorm1d(1, device="meta")):
        names |= {*vars(layer), *layer._parameters, *layer._buffers}
    return names
