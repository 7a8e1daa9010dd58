"""Parameter groups for optimizers: weight decay on weights, and none on gamma and beta.

Weight decay pulls gamma and beta towards 0, which switches channels off. The scale of a weight in front of batch norm
has no effect on the output, so there weight decay only changes the step size (van Laarhoven 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from batchnorm.argument_types import require_flag, require_module, require_number
from batchnorm.layers import batch_norms
from batchnorm.other_libraries import layers_of_others

# torch.nn's other layers that normalize and then multiply by a parameter
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_biases: bool = False, frozen: bool = True
) -> list[dict[str, Any]]:
    """Two groups of a model's parameters for an optimizer of torch: the first with weight decay, the second without.

    The second group has gamma and beta of all batch norm layers (those that ``find`` lists), weight and bias of
    torch.nn's layer, group, instance and RMS norm, and biases. Every parameter is in exactly one group, in the order
    of ``model.parameters()``. A parameter with several names gets no weight decay if one of its names asks for none.
    The model is not changed. A group may be empty.

    Args:
        model: A model before or after ``convert``; wrapped by DistributedDataParallel or compiled, too.
        weight_decay: Weight decay of the first group, 0 or more.
        decay_biases: Whether biases of other layers are in the first group: parameters named "bias", and vectors whose
            names have that word, such as "in_proj_bias" and "bias_ih_l0". Goyal et al. 2017 decay
            them, He et al. 2019 ("Bag of Tricks", section 3.1) do not.
        frozen: Whether parameters with ``requires_grad=False`` are in the groups too. An optimizer skips a parameter
            without gradient, and continues with it when it is unfrozen. False leaves them out.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If ``weight_decay`` is negative, NaN or infinite; or if FSDP has flattened several parameters into
            one.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> groups = parameter_groups(model, weight_decay=0.05)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.05, 1), (0.0, 3)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    _check(model, weight_decay, decay_biases, frozen)
    spared = {id(parameter) for parameter in _spared(model, decay_biases=decay_biases)}
    parameters = [parameter for parameter in model.parameters() if frozen or parameter.requires_grad]
    return [
        {"params": [each for each in parameters if id(each) not in spared], "weight_decay": float(weight_decay)},
        {"params": [each for each in parameters if id(each) in spared], "weight_decay": 0.0},
    ]


def _check(model: nn.Module, weight_decay: float, decay_biases: bool, frozen: bool) -> None:
    require_module(model, "parameter_groups")
    require_number(weight_decay, "weight_decay", "Use a number such as 0.05.")
    require_flag(decay_biases, "decay_biases")
    require_flag(frozen, "frozen")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and 0 or more, got {weight_decay:g}. Use 0 for no weight decay.")
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "FlatParameter":
            raise ValueError(
                f"parameter_groups needs separate parameters, got {name!r}, into which FSDP flattened several. Wrap "
                "the model with use_orig_params=True, or use fully_shard."
            )


def _spared(model: nn.Module, *, decay_biases: bool) -> Iterator[nn.Parameter]:
    """The parameters without weight decay."""
    layers = {id(layer) for layer in [*batch_norms(model).values(), *layers_of_others(model).values()]}
    for module in model.modules():
        is_norm = id(module) in layers or isinstance(module, _NORMS)
        for name, parameter in _own(module):
            if (is_norm and name in {"weight", "bias"}) or (not decay_biases and _is_bias(name, parameter)):
                yield parameter


def _is_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias: "bias", "in_proj_bias" of attention, "bias_ih_l0" and such of recurrent layers."""
    return name == "bias" or (parameter.ndim == 1 and "bias" in name.split("_"))


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters by name; a parametrized tensor's original parameters under the tensor's name."""
    yield from module.named_parameters(recurse=False)
    parametrized = module._modules.get("parametrizations")
    for name, originals in parametrized.named_children() if parametrized is not None else ():
        yield from ((name, parameter) for parameter in originals.parameters())
