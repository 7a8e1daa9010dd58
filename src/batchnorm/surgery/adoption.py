"""Converts layers of other classes that compute batch norm, perhaps with an activation, and restores them.

An example is timm's ``BatchNormAct2d``, a subclass of torch.nn's layer with two children, a dropout and an activation.
What such a layer does is read from its forward (``layer_maps``). Our layer must give the same numbers in both modes,
with the same gradients and statistics. Its old class and children are stored outside of the model until ``revert``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from batchnorm.layers import OURS
from batchnorm.other_libraries import measures
from batchnorm.population.freezing import Frozen, freeze, has_stored_statistics
from batchnorm.surgery import comparison
from batchnorm.surgery.dataflow import Flow, name_of, traced
from batchnorm.surgery.frozen_layers import attributes_of, is_frozen_class, restore
from batchnorm.surgery.fusion import _MARK
from batchnorm.surgery.layer_maps import KINDS, graph_of_layer, parts_of
from batchnorm.surgery.patterns import FusedActivation, activation_of, written_kind

_ORIGIN = "_layer_of_others"
_SIZES = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 2, 2)}
_EXAMPLES = 5


@final
@dataclass(frozen=True)
class Origin:
    """The former class of a layer, the children that our layer does not use, and what a frozen layer stored."""

    kind: type
    children: dict[str, nn.Module]
    # of a class that is always frozen: its attributes, and its buffers' names; None for other classes
    attributes: dict[str, Any] | None = None
    buffers: tuple[str, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Origin:
        """The origin of a layer, before it becomes ours."""
        children: dict[str, Any] = dict(layer._modules)
        if not is_frozen_class(layer):
            return cls(written_kind(layer), children)
        return cls(written_kind(layer), children, attributes_of(layer), tuple(layer._buffers))


def is_of_another_class(layer: nn.Module) -> bool:
    """Whether a layer is neither of torch.nn's classes nor of ours."""
    return written_kind(layer) not in KINDS


def activation_in(layer: _BatchNorm) -> FusedActivation | str | None:
    """The activation that a layer of another class applies behind batch norm.

    None if it applies no activation; a text with the reason if our layers cannot replace it. Nothing is changed.
    """
    if reason := _about(layer):
        return reason
    parts = parts_of(layer)
    if isinstance(parts, str):
        return parts
    try:
        graph_of_layer(layer, mode=True)
    except TraceError as error:
        return f"is a {type(layer).__name__} with a forward that cannot be traced in train mode: {error}"
    if parts.then is None:
        return None
    act = _only_activation(layer, parts.then)
    return act or f"is a {type(layer).__name__} that applies what our layers do not: {_listed(layer, parts.then)}"


def base_of(layer: nn.Module) -> type | None:
    """The class of torch.nn that a layer is derived from; None if there is none."""
    return next((kind for kind in type(layer).__mro__ if kind in OURS), None)


def is_same(layer: _BatchNorm, new: nn.Module) -> bool:
    """Whether two layers compute the same on a random batch, in eval and in train mode. Neither is changed."""
    base: Any = base_of(layer)
    like = next((t for t in [*layer.parameters(), *layer.buffers()] if t.is_floating_point()), torch.zeros(()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(_EXAMPLES, layer.num_features, *_SIZES[base]).to(like.device, like.dtype)
    try:
        comparison.check(layer, new, 3 * x + 1)
    except (ValueError, RuntimeError):
        return False
    return True


def adopt(layer: Any, origin: Origin, act: FusedActivation | None) -> None:
    """Set the activation of a layer whose class is now ours, and store what it was before, in place."""
    vars(layer)[_ORIGIN] = origin
    for name in origin.children:
        layer._modules.pop(name, None)
    if act is not None:
        layer.act, layer.act_param = act.name, act.parameter
        vars(layer)[_MARK] = True


def origin_of(layer: nn.Module) -> Origin | None:
    """The former class and children of an adopted layer; None for other layers."""
    return vars(layer).get(_ORIGIN)


def give_back(layer: nn.Module) -> None:
    """Give an adopted layer its former class and children back, in place; ``revert`` has made it a torch.nn layer."""
    origin: Origin = vars(layer).pop(_ORIGIN)
    was_frozen, training = isinstance(layer, Frozen), vars(layer)["training"]
    if origin.attributes is not None:
        if was_frozen:  # a layer that was unfrozen stays a layer of torch.nn, which learns
            restore(layer, origin.kind, origin.attributes, origin.buffers)
        return
    layer.__class__ = origin.kind
    layer._modules.update({name: child.train(training) for name, child in origin.children.items()})
    if was_frozen:
        freeze(layer)


def _about(layer: _BatchNorm) -> str | None:
    name = type(layer).__name__
    if (measured := measures(layer)) != "its batch":
        return f"is a {name}, which measures {measured} in train mode"
    if base_of(layer) is None:
        return f"is a {name}, which is not derived from a layer of torch.nn"
    if parametrize.is_parametrized(layer) or any(map(is_lazy, [*layer.parameters(), *layer.buffers()])):
        return f"is a {name} whose parameters are parametrized or not initialized"
    if "forward" in vars(layer) or not has_stored_statistics(layer) or not layer.eps > 0:
        return f"is a {name} with a replaced forward, no stored statistics or an eps of 0"
    return None


def _only_activation(layer: nn.Module, then: Graph) -> FusedActivation | None:
    """The activation, if a graph only applies one activation of our table, also in a child's forward; else None."""
    nodes = [node for node in then.nodes if node.op not in {"placeholder", "output"}]
    if len(nodes) != 1 or not _is_result(nodes[0], then):
        return None
    if (act := activation_of(Flow(layer, {False: then}), nodes[0])) is not None or nodes[0].op != "call_module":
        return act
    child = layer.get_submodule(str(nodes[0].target))
    try:
        inner = traced(child)
    except TraceError:
        return None
    return None if any(node.op == "call_module" for node in inner.nodes) else _only_activation(child, inner)


def _is_result(node: Node, graph: Graph) -> bool:
    return next(each for each in graph.nodes if each.op == "output").args[0] is node


def _listed(layer: nn.Module, then: Graph) -> str:
    nodes = [node for node in then.nodes if node.op not in {"placeholder", "output", "get_attr"}]
    modules = (type(layer.get_submodule(str(n.target))).__name__ if n.op == "call_module" else None for n in nodes)
    return ", ".join(m or name_of(n) for m, n in zip(modules, nodes, strict=True))
