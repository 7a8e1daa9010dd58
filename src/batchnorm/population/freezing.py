"""Freezing: makes a batch norm layer normalize by its stored statistics in every mode.

``layer.eval()`` is undone by the next ``model.train()``. A frozen layer has a subclass whose ``training`` always reads
False; the mode that was set is remembered and returns when the layer is unfrozen. The layer stays the same object with
the same parameters, buffers and state_dict keys.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.argument_types import require_flag
from batchnorm.layers import batch_norms
from batchnorm.other_libraries import as_sentence, live_layers, out_of_reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from torch.nn.modules.batchnorm import _BatchNorm

Model = TypeVar("Model", bound=nn.Module)

_BEFORE = "_requires_grad_before_freeze"
# the flag was set to False, the value that a frozen layer shows: a tool may have restored the value that it had read
_READ_BACK = "_training_may_be_read_back"


class Frozen(nn.Module):
    """Mixed into the class of a frozen layer; test with ``isinstance(layer, Frozen)``."""

    __jit_unused_properties__ = ("training",)  # torch.jit.script takes the flag's value, not the property

    @property
    def training(self) -> bool:
        """False; the mode that was set is kept for the time after the freeze."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        vars(self)["training"] = mode
        vars(self)[_READ_BACK] = not mode

    def train(self, mode: bool = True) -> Self:
        """Store the mode for the time after the freeze, and return the layer."""
        super().train(mode)
        vars(self).pop(_READ_BACK, None)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time, so pickle and deepcopy get the original class
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty_layer, (_thawed_class(type(self)),), *state


@cache
def _frozen_class(kind: type) -> Any:
    # keep the module's name: torch.fx uses it to recognize leaves
    return type(f"Frozen{kind.__name__}", (Frozen, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _thawed_class(kind: type) -> type:
    return kind.__bases__[1]


def _empty_layer(kind: type) -> object:
    frozen_kind = _frozen_class(kind)
    return frozen_kind.__new__(frozen_kind)


def freeze(model: Model, affine: bool = False) -> Model:
    """The same model, changed in place: its batch norm layers use their stored statistics and keep them.

    This holds through ``model.train()``, ``layer.train()``, ``layer.training = True`` and tools that set training
    flags, for the layers of torch.nn, SyncBatchNorm and ours, until ``unfreeze``. It survives pickle, deepcopy
    and ``torch.save`` of the whole model; its state_dict does not change. A frozen layer is an instance of its
    former class, and its type is named ``FrozenBatchNorm2d`` and so on; only tools that compare types exactly
    see a difference. Freezing twice is harmless, and a model without batch norm layers stays as it is. Layers of other
    libraries are frozen too if they measure batches in train mode; layers that never measure batches stay as they are.

    Args:
        model: The model, which is changed in place.
        affine: Also set ``requires_grad`` of gamma and beta to False, so that they are not trained.

    Raises:
        TypeError: If ``affine`` is not True or False.
        ValueError: If a layer has no stored statistics; then no layer is changed.

    Warns:
        RuntimeWarning: If there is no layer and the model's code calls batch norm in a way that cannot be frozen.

    Example:
        >>> import torch
        >>> model = freeze(torch.nn.Sequential(torch.nn.BatchNorm1d(2))).train()
        >>> model[0].training, unfreeze(model)[0].training
        (False, True)
    """
    require_flag(affine, "affine")
    layers = _layers(model)
    for path, layer in layers.items():
        if not has_stored_statistics(layer):
            raise ValueError(
                f"freeze needs layers with stored statistics, got none in {path!r} "
                f"({type(layer).__name__}). Construct it with track_running_stats=True and train it, or freeze the "
                "other layers one by one."
            )
    if not layers:
        _warn_of_nothing(model)
    for layer in layers.values():
        if not isinstance(layer, Frozen):
            layer.__class__ = _frozen_class(type(layer))
        if affine:
            _hold_affine(layer)
    return model


def unfreeze(model: Model) -> Model:
    """The same model, changed in place: the effects of ``freeze`` are undone, bit for bit.

    Classes are as before, ``requires_grad`` of gamma and beta is as before ``affine=True``, and each layer has the mode
    that was last set. If False was assigned to a layer's flag, the layer gets the mode of its parent module, because a
    tool may have restored the False that it read from the frozen layer. Layers that are not frozen do not change.

    Raises:
        RuntimeError: If a frozen layer's class was changed later, such as by a parametrization.
    """
    layers, parents = _layers(model), _holders(model)
    for path, layer in reversed(layers.items()):
        _thaw(layer, parents.get(path))
    return model


def _holders(model: nn.Module) -> dict[str, nn.Module]:
    """The parent of each module below the model."""
    modules = dict(model.named_modules())
    return {path: modules[path.rpartition(".")[0]] for path in modules if path}


@contextmanager
def frozen(model: Model, affine: bool = False) -> Iterator[Model]:
    """The model, frozen by ``freeze`` inside the block; layers that were frozen before stay frozen."""
    require_flag(affine, "affine")
    layers = _layers(model)
    were_open = {path: layer for path, layer in layers.items() if not isinstance(layer, Frozen)}
    were_free = [layer for layer in layers.values() if _BEFORE not in vars(layer)]
    try:
        yield freeze(model, affine)
    finally:
        for layer in reversed(were_free):
            _release_affine(layer)
        parents = _holders(model)
        for path, layer in were_open.items():
            _thaw(layer, parents.get(path))


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that measure batches in train mode; a frozen layer of another library has nothing to freeze."""
    return {**batch_norms(model), **live_layers(model)}


def _warn_of_nothing(model: nn.Module) -> None:
    if reasons := out_of_reach(model):
        warnings.warn(f"freeze found no layer: {as_sentence(reasons)}.", RuntimeWarning, stacklevel=3)


def has_stored_statistics(layer: _BatchNorm) -> bool:
    """Whether a layer has a running mean and variance with a known shape."""
    statistics = [layer.running_mean, layer.running_var]
    return not any(buffer is None or is_lazy(buffer) for buffer in statistics)


def statistics_of(layers: Mapping[str, nn.Module]) -> dict[str, Tensor | None]:
    """Running means, variances and counters of layers, by their state_dict names; None if missing."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {
        f"{path}.{name}".lstrip("."): getattr(layer, name, None) for path, layer in layers.items() for name in names
    }


def _thaw(layer: _BatchNorm, holder: nn.Module | None) -> None:
    if isinstance(layer, Frozen):
        if Frozen not in type(layer).__bases__:
            raise RuntimeError(
                f"unfreeze needs the class that freeze made, got {type(layer).__name__} derived from it. "
                "First undo later changes to the layer, such as a parametrization."
            )
        layer.__class__ = _thawed_class(type(layer))
        if vars(layer).pop(_READ_BACK, False) and holder is not None:
            layer.training = holder.training
    _release_affine(layer)


def _hold_affine(layer: _BatchNorm) -> None:
    parameters = dict(layer.named_parameters())
    vars(layer).setdefault(_BEFORE, {name: parameter.requires_grad for name, parameter in parameters.items()})
    layer.requires_grad_(False)


def _release_affine(layer: _BatchNorm) -> None:
    before = vars(layer).pop(_BEFORE, {})
    parameters = dict(layer.named_parameters()) if before else {}
    for name in parameters.keys() & before.keys():
        parameters[name].requires_grad_(before[name])
