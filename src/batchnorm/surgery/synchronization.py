"""Synchronization in conversions: torch's SyncBatchNorm becomes a layer of ours with ``sync``, and back.

A SyncBatchNorm accepts inputs of any number of axes. The layer of ours that replaces it does too; its class is the one
for as many axes as the convolution or linear layer before it has.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.layer_checks import SHAPES
from batchnorm.layers import OURS, _Layer
from batchnorm.population.freezing import Frozen
from batchnorm.surgery import adoption
from batchnorm.surgery.patterns import written_kind
from batchnorm.surgery.replacement import find

# the layers of torch.nn, by the number of axes behind the channels of a convolution
_BY_AXES = dict(enumerate(OURS, start=1))
_ALL_SHAPES = {ndim: shape for shapes in SHAPES.values() for ndim, shape in shapes.items()}
# the process groups of SyncBatchNorm layers
Groups = dict[nn.Module, Any]


def groups_of(model: nn.Module) -> Groups:
    """The process group of each SyncBatchNorm of a model; None for all processes."""
    return {layer: layer.process_group for layer in find(model).values() if written_kind(layer) is nn.SyncBatchNorm}


def kinds_for(model: nn.Module) -> dict[nn.Module, type]:
    """For each SyncBatchNorm the layer of torch.nn for its inputs, by the layer before it; BatchNorm2d without one."""
    kind, kinds = nn.BatchNorm2d, {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kind = nn.BatchNorm1d
        elif isinstance(module, _ConvNd):
            kind = _BY_AXES[len(module.kernel_size)]
        elif written_kind(module) is nn.SyncBatchNorm:
            kinds[module] = kind
    return kinds


def take_over(groups: Groups) -> None:
    """Remember on layers of ours that they were SyncBatchNorm, in place; those that are not ours stay."""
    for layer in groups:
        if isinstance(layer, _Layer):
            adoption.adopt(layer, adoption.Origin(nn.SyncBatchNorm, {}), None)
            vars(layer)["_shapes"] = _ALL_SHAPES


def give_back(layer: Any, group: object) -> None:
    """Complete a SyncBatchNorm that ``adoption.give_back`` made of a layer of ours, in place."""
    vars(layer).pop("_shapes", None)
    layer.process_group = group


def synchronize(model: nn.Module, groups: Groups, sync: bool | None, process_group: object) -> None:
    """Set ``sync`` and the process group of our layers, in place.

    Args:
        model: The converted model.
        groups: The process groups of layers that were SyncBatchNorm.
        sync: None: those that were SyncBatchNorm are synchronized, and the others stay as they are.
        process_group: None: layers keep their groups.

    Warns:
        UserWarning: If layers are to be synchronized that are not of this package.
    """
    layers = find(model)
    for layer in layers.values():
        if isinstance(layer, _Layer) and (settings := _settings(layer, groups, sync, process_group)):
            layer._set(**settings)
    rest = [path for path, layer in layers.items() if not isinstance(layer, (_Layer, nn.SyncBatchNorm, Frozen))]
    if rest and (sync or process_group is not None):
        warnings.warn(
            f"convert synchronizes layers of this package only, and left {', '.join(map(repr, rest))} local, as "
            "it leaves their classes. Make them layers of this package, or freeze them.",
            UserWarning,
            stacklevel=4,
        )


def _settings(layer: nn.Module, groups: Groups, sync: bool | None, process_group: object) -> dict[str, object]:
    if sync is not None and not sync:
        return {"sync": False}
    if process_group is not None:
        return {"process_group": process_group}
    if layer in groups:
        return {"sync": True, "process_group": groups[layer]}
    return {"sync": True} if sync else {}
