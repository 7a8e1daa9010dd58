"""for_export: a copy of the model with torch.nn's layers and activations, for tools that look at classes of modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from batchnorm.argument_types import require_flag, require_module
from batchnorm.layer_settings import is_subclass
from batchnorm.layers import LAYERS
from batchnorm.population.freezing import Frozen, unfreeze
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery import fusion
from batchnorm.surgery.conversion import revert
from batchnorm.surgery.folding.fold_and_unfold import fold as fold_layers
from batchnorm.surgery.folding_placeholder import FoldedAway
from batchnorm.surgery.group_norm import GroupNormAct
from batchnorm.surgery.patterns import activation_module, is_ours
from batchnorm.surgery.replacement import duplicate, find
from batchnorm.surgery.rewriting import applied_by
from batchnorm.surgery.standalone import Remaining, make_standalone

Model = TypeVar("Model", bound=nn.Module)


def for_export(model: Model, *, fold: bool = False, example: Batch = None, remaining: Remaining | None = None) -> Model:
    """A copy of the model made of torch.nn's layers, for tools that look at the classes of modules.

    Call it before such a tool: quantization by modules or by torch.fx, fusion of convolution and batch norm, conversion
    to SyncBatchNorm or to oneDNN, validators. In the copy, modules have their original forwards, activations are
    modules behind their layers, and frozen layers are torch.nn's layers in eval mode. The copy computes the same as the
    model, except that in train mode torch.nn's layers lack what ours add: see ``revert``. Tools that trace or export a
    model do not need this copy: in eval mode our layers call torch's own operator.

    A layer that was constructed with ``act`` becomes a module with two children, ``norm`` and ``act``, so its
    state_dict keys get ``norm.`` in front of their last part. All other keys stay, except those of folded layers.

    Three kinds of modules in the copy are still not of torch.nn's classes: the module with ``norm`` and ``act``; layers
    whose class is derived from our layers; and with ``fold`` the module in the place of a folded layer, if it runs code
    of that layer's class or makes its input contiguous.

    Args:
        model: Not changed.
        fold: Whether layers are folded into their neighbours first, where ``fold`` can. The copy is then in eval mode.
        example: A batch for ``fold``; required with ``fold=True``.
        remaining: What becomes of batch norm layers that are not folded. None: they stay batch norm. "depthwise": a
            convolution with one group for each channel and a kernel of one position; if a layer has inputs (N, C),
            channels on the last axis, or inputs of several kinds, a multiplication and an addition. "mul_add": a
            multiplication and an addition. Both compute with the stored statistics and round as folding does; the copy
            is in eval mode, and not for training. A layer that is no such map stays, and a warning says why.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or ``fold`` is not True or False; with ``fold``, also if
            ``example`` is no batch or ``model`` is a program of TorchScript.
        ValueError: If ``fold`` is True without an example, or if folding raises it; if ``remaining`` is another text,
            or "depthwise" needs an example to see the shape of a layer's input; or if a scale does not fit the type of
            the layer's parameters.
        RuntimeError: If the model cannot be copied.

    Warns:
        UserWarning: If the class of a layer is derived from our layers. Such layers stay as they are, and the warning
            lists their paths.

    Example:
        >>> from batchnorm import BatchNorm2d
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), BatchNorm2d(8, act="relu"))
        >>> [type(part).__name__ for part in for_export(model)[1].children()]
        ['BatchNorm2d', 'ReLU']
    """
    require_module(model, "for_export")
    require_flag(fold, "fold")
    if fold and example is None:
        raise ValueError("for_export(fold=True) needs an example, got none. Pass one batch of inputs as example=.")
    if remaining not in {None, "depthwise", "mul_add"}:
        raise ValueError(
            f"remaining must be None, 'depthwise' or 'mul_add', got {remaining!r}. Leave it out to keep them."
        )
    model = fold_layers(model, example, report=None) if fold else duplicate(model, "for_export")
    fusion.unfuse(model)
    _thaw(model)
    model = _rebuilt(model, _separate)
    _warn_of_subclasses(model)
    if remaining is not None:
        make_standalone(model, remaining, example)
    return revert(model, inplace=True)


class Separate(nn.Module):
    """A layer and the activation behind it; a residual, if given, is added between them."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.train(norm.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 - torch.nn's name
        """``act(norm(input) + residual)``."""
        y = self.norm(input)
        return self.act(y if residual is None else y + residual)


def _separate(module: Any) -> nn.Module:
    """The module that replaces a folded layer, or a module that applies an activation; any other module itself.

    One of our layers loses its activation in place.
    """
    act = applied_by(module)
    param = 0.0 if act is None else module.act_param
    norm = module
    if isinstance(module, FoldedAway) and (module._then is not None or module._moved):
        return module  # it also makes its input contiguous or runs the layer's code: these are torch's operations
    if isinstance(module, FoldedAway):
        norm = nn.Identity().train(module.training)
    elif act is None or not (is_ours(module) or isinstance(module, GroupNormAct)):
        return module
    elif isinstance(module, GroupNormAct):
        norm = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, module.affine, device="meta")
        vars(norm).update({name: vars(module)[name] for name in vars(norm)})
    else:
        module._activate(None, 0.0)
    return norm if act is None else Separate(norm, activation_module(act, param))


def _rebuilt(model: Model, make: Callable[[nn.Module], nn.Module]) -> Any:
    """The model with each module replaced by the result of ``make``, which is called once for each module."""
    replacements: dict[nn.Module, nn.Module] = {module: make(module) for module in list(model.modules())}
    for module in list(replacements):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replacements[child]
    return replacements[model]


def _thaw(model: nn.Module) -> None:
    frozen = [layer for layer in find(model).values() if isinstance(layer, Frozen)]
    unfreeze(model)
    for layer in frozen:
        layer.eval()


def _warn_of_subclasses(model: nn.Module) -> None:
    subclassed = [path for path, layer in find(model).items() if isinstance(layer, LAYERS) and is_subclass(layer)]
    if subclassed:
        warnings.warn(
            "for_export does not change layers whose classes are derived from this package's layers, because they may "
            f"do more than batch norm: {', '.join(subclassed)}. Choose their replacements with batchnorm.replace.",
            UserWarning,
            stacklevel=3,
        )
