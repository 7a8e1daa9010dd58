"""for_export: the model as tools that go by class know it, of torch.nn's layers and activations alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from batchnorm.argument_types import require_flag, require_module
from batchnorm.layers import LAYERS
from batchnorm.population.freezing import Frozen, unfreeze
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery import fusion
from batchnorm.surgery.conversion import revert
from batchnorm.surgery.folding.fold_and_unfold import fold as folded
from batchnorm.surgery.folding_placeholder import FoldedAway
from batchnorm.surgery.group_norm import GroupNormAct
from batchnorm.surgery.patterns import activation_module, is_ours
from batchnorm.surgery.replacement import duplicate, find
from batchnorm.surgery.rewriting import applied_by

Model = TypeVar("Model", bound=nn.Module)


def for_export(model: Model, *, fold: bool = False, example: Batch = None) -> Model:
    """A copy of the model made of torch.nn's layers, for tools that look at the classes of modules.

    Call it before them: quantization by modules or by torch.fx, fusion of convolution and batch norm, conversion to
    SyncBatchNorm or to oneDNN, validators. Forwards are the written ones, activations are modules behind their layers,
    and frozen layers are plain ones in eval mode. The model computes what it did, except that in train mode torch.nn's
    layers lack what ours add: see ``revert``. Tools that trace or export a model need no such copy: they see torch's
    own operator in eval mode.

    A layer that was constructed with ``act`` becomes a small module of two, ``norm`` and ``act``, so its state_dict
    keys get ``norm.`` in front of their last part. All other keys stay, but for those of folded layers.

    Args:
        model: Not changed.
        fold: Whether layers are folded into their neighbours first, where ``fold`` can. The copy is then in eval mode.
        example: A batch for ``fold``, which needs it.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If ``fold`` is asked for without an example, or refuses.
        RuntimeError: If the model cannot be copied.

    Warns:
        UserWarning: If layers of subclasses of ours are left as they are, with their paths.

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
    model = folded(model, example, report=None) if fold else duplicate(model, "for_export")
    fusion.unfuse(model)
    _thaw(model)
    model = _rebuilt(model, _separate)
    _warn_of_subclasses(model)
    return revert(model, inplace=True)


class Separate(nn.Module):
    """A layer and the activation behind it, with the sum of a residual in between where one is given."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.train(norm.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 - torch.nn's name
        """``act(norm(input) + residual)``."""
        y = self.norm(input)
        return self.act(y if residual is None else y + residual)


def _separate(module: Any) -> nn.Module:
    """What stands for a module that applies an activation of its own, or for the place of a folded layer."""
    act = applied_by(module)
    param = 0.0 if act is None else module.act_param
    norm = module
    if isinstance(module, FoldedAway) and (module._then is not None or module._moved):
        return module  # it does more than an activation, in torch's own operations
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
    """The model with other modules in the places of its own; one under several names is made once."""
    made: dict[nn.Module, nn.Module] = {module: make(module) for module in list(model.modules())}
    for module in list(made):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = made[child]
    return made[model]


def _thaw(model: nn.Module) -> None:
    frozen = [layer for layer in find(model).values() if isinstance(layer, Frozen)]
    unfreeze(model)
    for layer in frozen:
        layer.eval()


def _warn_of_subclasses(model: nn.Module) -> None:
    left = [path for path, layer in find(model).items() if isinstance(layer, LAYERS) and not is_ours(layer)]
    if left:
        warnings.warn(
            "for_export leaves layers of subclasses as they are, which may do more than batch norm: "
            f"{', '.join(left)}. Say with replace what comes in their place.",
            UserWarning,
            stacklevel=3,
        )
