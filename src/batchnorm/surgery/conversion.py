"""convert and revert: exchange torch.nn's batch norm layers for ours and back; convert can also fuse activations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.argument_types import require_flag, require_module
from batchnorm.layer_checks import check_sync
from batchnorm.layer_settings import COMPLEX, RULES, lost_in_torch
from batchnorm.layers import OURS, _Layer
from batchnorm.lazy_layers import OURS_LAZY
from batchnorm.other_libraries import as_sentence, out_of_reach
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.batches import require_examples
from batchnorm.population.freezing import Frozen, freeze
from batchnorm.population.tensor_trees import Batch
from batchnorm.processes import alone, check_process_group
from batchnorm.surgery import adoption, comparison, frozen_layers, fusion
from batchnorm.surgery.patterns import is_ours, written_kind
from batchnorm.surgery.replacement import duplicate, find, replace
from batchnorm.surgery.saving import save_memory, stop_saving
from batchnorm.surgery.synchronization import Groups, give_back, groups_of, kinds_for, synchronize, take_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)

_REMEDY = "Pass inplace=True, and neither fuse nor example,"
_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_THEIRS_LAZY = {ours: theirs for theirs, ours in OURS_LAZY.items()}


def convert(
    model: Model,
    *,
    fuse: bool = False,
    example: Batch = None,
    memory: Literal["save"] | None = None,
    sync: bool | None = None,
    process_group: ProcessGroup | None = None,
    inplace: bool = False,
) -> Model:
    """A copy of the model with our layers in the place of ``torch.nn.BatchNorm1d``, ``2d`` and ``3d``.

    The copy computes the same as the model in train and in eval mode. Everything about a layer is carried over: names
    and sharing, parameters and statistics, training flag, device, types, ``requires_grad``, hooks, freezing. The
    state_dict has the same keys. torch.nn's lazy layers become ours. A SyncBatchNorm becomes a layer of ours with
    ``sync=True`` and the same process group. These layers are left as they are: layers of classes derived from ours,
    parametrized layers, layers whose ``forward`` was replaced, and layers with ``eps=0``.

    A subclass of torch.nn's layers, such as timm's ``BatchNormAct2d``, becomes ours if its forward can be traced in
    both modes and computes only batch norm and at most one activation that our layers have. Our layer must also give
    the same numbers on a random batch, in eval and in train mode. A frozen layer of another library, such as
    torchvision's and detectron2's ``FrozenBatchNorm2d``, becomes a layer of ours that is frozen by
    ``freeze(affine=True)``, if it computes batch norm. ``revert`` restores the class of both kinds, but a frozen layer
    that was unfrozen becomes torch.nn's. Other layers of other libraries stay, and a warning names them.

    With ``fuse`` a layer also applies the activation behind it (ReLU, LeakyReLU, ELU, SiLU, exact GELU, Hardswish, as
    module, function or method). If the code adds a tensor between layer and activation, the layer adds it too. If the
    activation is a module, a module that returns its input takes its place. Otherwise the module that calls the layer
    gets a new ``forward``, which torch.fx makes from the present one; the module stays an instance of its class.
    Attributes that the present forward reads, except ``training``, are constants in the new one. A layer is fused only
    if

    - it is called at one place of the code, and nothing else reads its result;
    - neither it nor the activation has forward or backward hooks: they would see other values;
    - the added tensor has the shape and type of the layer's result when the model runs on ``example``: without an
      example, no addition is fused;
    - the ``forward`` that calls it can be traced: no optional arguments, no branches that depend on values, no
      ``no_grad`` or other context, no side effects. A forward that cannot be traced does not affect other modules.

    The copy is meant for forward passes of the whole model. Other code that calls a fused layer, such as a method
    other than ``forward``, gets the activated result.

    With an ``example`` the original and the result are compared on it: outputs, gradients and buffers, in eval and in
    train mode, in float64 if the model can run in float64. If rounding may explain a difference, as at ties of a max
    pooling, both must agree on noisy copies of the example. The model's hooks run each time.
    Without an example nothing is run or checked, and a layer is not fused if it is in a ``Sequential`` below code that
    cannot be traced: that code might call the parts of the ``Sequential`` one by one.

    Args:
        model: Not changed, unless ``inplace``.
        fuse: Whether layers take over activations and additions.
        example: One batch of at least two examples, in any form that ``recalibrate`` accepts: a tensor is passed to
            the model; of a tuple or list the first element is passed.
        memory: "save": all our layers store less for the backward pass, in forward passes of the whole model (two
            hooks on the model switch this on and off). A layer with leaky ReLU is left out unless its input is the
            result of a convolution or linear layer that nothing else reads. None: layers keep their settings.
        sync: True: in train mode all our layers, also those of classes derived from ours, are normalized by the batches
            of all processes (see ``BatchNorm1d``). False: by their own. None: as in the model.
        process_group: Synchronize the processes of this group only; every layer gets it.
        inplace: Change ``model`` itself and return it; parameters stay the same objects. If an error is raised, the
            model is unchanged.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or is a program of TorchScript; if ``example`` is no batch; if
            ``fuse``, ``sync`` or ``inplace`` is not True or False; if ``process_group`` is no process group.
        ValueError: If ``memory`` is neither None nor "save"; if ``sync`` is False with a process group, or this process
            is not in the group; if the model does not run on ``example`` in both modes; or
            with ``fuse``, if nothing can be fused because code around batch norm layers cannot be traced, or if the
            model is compiled.
        RuntimeError: If the comparison fails, with the largest relative difference; or if the model cannot be copied.

    Warns:
        UserWarning: If some of the code around batch norm layers cannot be traced, or if layers of other classes stay,
            also because they cannot be synchronized; the warning says why.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert(model, fuse=True, example=torch.randn(4, 3, 5, 5))[1].act
        'relu'
    """
    _check(model, fuse=fuse, example=example, memory=memory, inplace=inplace)
    _check_synchronization(sync, process_group)
    original, model = model, model if inplace else duplicate(model, "convert", _REMEDY)
    groups = _to_ours(model)
    with alone():  # one process may convert by itself
        if fuse:
            fusion.fuse(model, example)
        if memory == "save":
            save_memory(model)
        if example is not None and not inplace:
            comparison.check(_without_torchs_synchronization(original), model, example)
    synchronize(model, groups, sync, process_group)
    return model


def _check(model: nn.Module, *, fuse: bool, example: Batch, memory: object, inplace: bool) -> None:
    """Raise for arguments that ``convert`` cannot work with, before anything changes."""
    require_module(model, "convert")
    require_flag(fuse, "fuse")
    require_flag(inplace, "inplace")
    if example is not None:
        require_real(model, "convert")
        require_examples(example, "convert")
    if memory is not None and memory != "save":
        raise ValueError(f"memory must be None or 'save', got {memory!r}. Leave it out to keep the layers' settings.")
    if inplace and (fuse or example is not None):
        convert(model, fuse=fuse, example=example, memory=memory)  # on a copy, whose errors are raised first
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "convert needs a model of modules, got a program of TorchScript. Pass the model from before torch.jit."
        )


def _check_synchronization(sync: object, process_group: object) -> None:
    if sync is not None:
        check_sync(sync)
    check_process_group(process_group)
    if process_group is not None and sync is not None and not sync:
        raise ValueError(
            "convert needs sync=True with a process_group, got sync=False. Leave one out: a group switches sync on."
        )


def _without_torchs_synchronization(model: nn.Module) -> nn.Module:
    """The model; with a process group, a copy without SyncBatchNorm, which would wait for others or refuse a CPU."""
    kinds = kinds_for(model)
    if not (kinds and distributed.is_available() and distributed.is_initialized()):
        return model
    model = duplicate(model, "convert")
    kinds = kinds_for(model)
    return replace(model, lambda _, layer: _remade(layer, kinds.get(layer)), inplace=True)


def revert(model: Model, *, inplace: bool = False) -> Model:
    """A copy of the model with torch.nn's layers in the place of ours, and activations where ``convert`` found them.

    Rewritten modules get their original forward back. Everything is carried over as by ``convert``, except what
    torch.nn's layers lack: ``memory``, ``single_element``, ``padding``, ``sync``, the count of skipped updates, and
    statistics in a wider type than the parameters. ``renorm`` and ``ghost_batch_size`` are lost with a warning. A layer
    with a setting that changes results in eval mode, ``axis=-1`` or ``own_weight``, is refused. A layer that was a
    SyncBatchNorm becomes one again, with the process group that it has now. Subclasses of our layers are left as they
    are.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or ``inplace`` is not True or False.
        ValueError: If a layer was constructed with an activation (``act``), or has a setting that torch.nn's layers
            lack and that changes results in eval mode.
        RuntimeError: If the model cannot be copied.

    Warns:
        UserWarning: If layers have settings that torch.nn's layers lack and that change results in train mode.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        >>> revert(convert(model, fuse=True))[2]
        ReLU()
    """
    require_module(model, "revert")
    require_flag(inplace, "inplace")
    own = [path for path, layer in find(model).items() if _is_reverted(layer) and fusion.applies_its_own(layer)]
    if own:
        raise ValueError(
            f"revert needs layers whose activation convert fused, got layers constructed with one: {', '.join(own)}. "
            "Use batchnorm.for_export: it puts the activation into a module behind the layer."
        )
    _check_settings(model)
    model = model if inplace else duplicate(model, "revert")
    fusion.unfuse(model)
    stop_saving(model)
    _change_lazy(model, _THEIRS_LAZY)
    layers: dict[_BatchNorm, Any] = {layer: layer._process_group for layer in find(model).values() if is_ours(layer)}
    replace(model, lambda _, layer: _remade(layer, _THEIRS.get(written_kind(layer))), inplace=True)
    for layer, group in layers.items():
        _narrow_statistics(layer)
        if adoption.origin_of(layer) is not None:
            adoption.give_back(layer)
        if written_kind(layer) is nn.SyncBatchNorm:
            give_back(layer, group)
    return model


def _remedy_for(settings: list[str]) -> str:
    """A complex dtype has no default that a layer could be set to."""
    if COMPLEX in settings:
        return "A complex layer has no counterpart there:"
    return "Set the default on the layer if results may change, or"


def _check_settings(model: nn.Module) -> None:
    """Raise if torch.nn's layers would give other results in eval mode; warn if they would in train mode."""
    lost = []
    for path, layer in find(model).items():
        if _is_reverted(layer) and (settings := lost_in_torch(layer, "eval")):
            raise ValueError(
                f"revert and for_export need layers that torch.nn has too, got {' and '.join(settings)} at {path!r}. "
                f"{_remedy_for(settings)} use torch.export, which needs no other layers."
            )
        if _is_reverted(layer):
            lost += [f"{setting} at {path!r}" for setting in lost_in_torch(layer, "train")]
    if lost:
        warnings.warn(
            f"torch.nn's layers train without these settings: {', '.join(lost)}. In eval mode nothing changes.",
            UserWarning,
            stacklevel=3,
        )


def _is_reverted(layer: nn.Module) -> bool:
    return is_ours(layer) or type(layer) in _THEIRS_LAZY


def _change_lazy(model: nn.Module, kinds: Mapping[Any, type]) -> None:
    """Change the classes of lazy layers in place; an attribute that only our layers have is removed."""
    ours = {"_skipped", "_reported", *(f"_{name}" for name in RULES), "_act", "_act_param", "_is_composed"}
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if type(layer) in kinds and "forward" not in vars(layer) and layer.eps > 0:
            layer.__class__ = kinds[type(layer)]
            for name in ours & vars(layer).keys():
                del vars(layer)[name]
            if isinstance(layer, _Layer):
                layer._widen_statistics({})


def _to_ours(model: nn.Module) -> Groups:
    """Exchange the layers in place; returns the process groups of those that were SyncBatchNorm."""
    _change_lazy(model, OURS_LAZY)
    groups, kinds = groups_of(model), kinds_for(model)
    layers: dict[str, Any] = find(model)
    others = {path: layer for path, layer in layers.items() if adoption.is_of_another_class(layer)}
    answers = {path: _adoptable(layer) for path, layer in others.items()}
    origins = {path: adoption.Origin.of(layer) for path, layer in others.items()}
    replace(
        model,
        lambda path, layer: None if isinstance(answers.get(path), str) else _as_ours(layer, kinds.get(layer)),
        inplace=True,
    )
    take_over(groups)
    for path, layer in layers.items():
        if path in others and not isinstance(act := answers[path], str):
            adoption.adopt(layer, origins[path], act)
        if is_ours(layer):
            layer._widen_statistics({})
    _warn_of_others(model, layers, answers)
    return groups


def _adoptable(layer: _BatchNorm) -> Any:
    """The activation of a layer that ours can replace, None if it has none; a text with the reason if ours cannot."""
    if frozen_layers.is_frozen_class(layer):
        return None if frozen_layers.as_ours(layer) is not None else frozen_layers.why_not(layer)
    act = adoption.activation_in(layer)
    if isinstance(act, str):
        return act
    new: Any = _as_ours(layer)
    if act is not None:
        new.act, new.act_param = act.name, act.parameter
    if not adoption.is_same(layer, new):
        return f"is a {type(layer).__name__} that computes something else than our layer"
    return act


def _as_ours(layer: _BatchNorm, synchronized_kind: type | None = None) -> _BatchNorm | None:
    if frozen_layers.is_frozen_class(layer):
        return frozen_layers.as_ours(layer)
    kind: Any = adoption.base_of(layer) if adoption.is_of_another_class(layer) else written_kind(layer)
    kind = kind if synchronized_kind is None else synchronized_kind
    return _remade(layer, OURS.get(kind))


def _warn_of_others(model: nn.Module, layers: dict[str, _BatchNorm], answers: dict[str, object]) -> None:
    reasons = {
        path: reason
        for path, reason in answers.items()
        if isinstance(reason, str) and not isinstance(layers[path], _Layer) and not _is_torchs(layers[path])
    }
    reasons |= out_of_reach(model)
    if reasons:
        message = f"convert left layers of other classes as they are: {as_sentence(reasons)}"
        warnings.warn(message, UserWarning, stacklevel=4)


def _is_torchs(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer) or type(layer).__module__.startswith("torch.")


def _remade(layer: _BatchNorm, kind: type | None) -> _BatchNorm | None:
    """A layer of class ``kind`` with the same tensors; None if no such layer does the same."""
    if kind is None or "forward" in vars(layer) or not layer.eps > 0:
        return None
    device = next((t.device for t in [*layer.parameters(), *layer.buffers()]), None)
    new = kind(layer.num_features, layer.eps, layer.momentum, device=device)
    for name in ("affine", "track_running_stats"):
        setattr(new, name, getattr(layer, name))
    for table in ("_parameters", "_buffers"):
        vars(new)[table].update(vars(layer)[table])
    return freeze(new) if isinstance(layer, Frozen) else new


def _narrow_statistics(layer: nn.Module) -> None:
    """Cast statistics to the type of the parameters: torch.nn's layers fail with other types."""
    if isinstance(weight := layer._parameters.get("weight"), torch.Tensor):
        for name in ("running_mean", "running_var"):
            if (statistic := layer._buffers.get(name)) is not None:
                layer._buffers[name] = statistic.to(weight.dtype)
