"""Finds act(bn(x)) and act(bn(x) + residual) in graphs, where no other node reads the intermediate results.

Activations are those of ``batchnorm.kernels.activations.TABLE``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import Argument

from batchnorm.kernels.activations import TABLE, activation
from batchnorm.layers import LAYERS
from batchnorm.population.freezing import Frozen
from batchnorm.surgery.dataflow import IN_PLACE, Flow, is_chain, is_named_in_place

# how torch writes each activation
_MODULES = {row.module: name for name, row in TABLE.items()}
_FUNCTIONS = {function: name for name, row in TABLE.items() for function in row.functions}
_METHODS = {method: name for name, row in TABLE.items() for method in row.methods}
_ADDITIONS = {operator.add, torch.add, "add"}
_ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
_NEW_TENSOR_MODULES = (nn.modules.conv._ConvNd, nn.Linear)  # modules whose result is a new tensor, never a view


@final
@dataclass(frozen=True)
class FusedActivation:
    """An activation that our layers can apply; ``parameter`` is 0 if it has none."""

    name: str
    parameter: float


@final
@dataclass(frozen=True)
class Site:
    """A place in a graph where ``activation`` is applied to the layer's ``call``, or to its sum with another tensor.

    ``addition`` is this sum; None if there is none. ``chain`` lists the modules that return the layer's result, from
    the module that ``call`` calls to the layer.
    """

    chain: tuple[nn.Module, ...]
    act: FusedActivation
    call: Node
    addition: Node | None
    activation: Node

    @property
    def layer(self) -> Any:
        """The batch norm layer."""
        return self.chain[-1]

    def fuse(self) -> None:
        """Change the graph: the layer's call replaces addition and activation, and gets the other summand."""
        graph, call = self.activation.graph, self.call
        if self.addition is not None:
            a, b = self.addition.args
            with graph.inserting_before(self.addition):
                call = graph.call_module(str(call.target), (call.args[0], b if a is call else a))
        self.activation.replace_all_uses_with(call)
        for node in (self.activation, self.addition, self.call):
            if node is not None and node is not call:
                graph.erase_node(node)


def sites(flow: Flow, graph: Graph) -> Iterator[Site]:
    """All sites of a graph. Whether a layer or an activation module is also used elsewhere is not checked."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        act = activation_of(flow, node)
        if act is None or any(_writes(flow, user) for user in node.users):
            continue
        source = _input(node)
        if source is None or set(source.users) != {node}:
            continue
        for call in sorted(_operands(source), key=order.__getitem__, reverse=True):
            chain = _chain(flow, call) if set(call.users) == {source} else ()
            if len(chain) == 1 and _may_move(flow, call, source, order):
                yield Site(chain, act, call=call, addition=source, activation=node)
                break
        else:
            if chain := _chain(flow, source):
                yield Site(chain, act, call=source, addition=None, activation=node)


def has_input_of_its_own(flow: Flow, node: Node) -> bool:
    """Whether a node's input is the result of a convolution or linear layer, and no other node or hook reads it."""
    source, *others = node.args or (None,)
    if not isinstance(source, Node) or set(source.users) != {node} or source in others:
        return False
    maker = flow.called(source)
    return isinstance(maker, _NEW_TENSOR_MODULES) and not is_watched(maker)


def is_ours(layer: nn.Module) -> bool:
    """Whether a module is exactly one of our layers, frozen or not."""
    return written_kind(layer) in LAYERS


def written_kind(layer: nn.Module) -> type:
    """The class of a layer; for a frozen layer, its class before ``freeze``."""
    kind = type(layer)
    return kind.__bases__[1] if Frozen in kind.__bases__ else kind


def activation_name(module: nn.Module) -> str | None:
    """Our name for an activation module of torch.nn; None for other modules."""
    return next((name for kind, name in _MODULES.items() if type(module) is kind), None)


def activation_module(act: str, param: float) -> nn.Module:
    """An activation as a module of torch.nn."""
    row = activation(act)
    return row.module(param) if row.parameter else row.module()


def is_watched(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name) for name in names)


def _chain(flow: Flow, node: Node) -> tuple[nn.Module, ...]:
    """The modules from the one that a node calls down to the layer that makes its result; () if it cannot be fused."""
    module = flow.called(node)
    if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node):
        return ()
    chain = [module]
    while is_chain(chain[-1]) and chain[-1]._modules and not is_watched(chain[-1]):
        chain.append([*chain[-1].children()][-1])
    layer: nn.Module = chain[-1]
    can_fuse = is_ours(layer) and layer._act is None and not is_watched(layer) and "forward" not in vars(layer)
    return tuple(chain) if can_fuse else ()


def activation_of(flow: Flow, node: Node) -> FusedActivation | None:
    """The activation that a node applies; None if it applies none that our layers have."""
    if node.op == "call_module":
        module: Any = flow.called(node)
        name = _MODULES.get(type(module))
        if name is None or is_watched(module) or "forward" in vars(module):
            return None
        options = TABLE[name].options
        return _with_parameter(name, {key: getattr(module, key, value) for key, value in options.items()})
    if node.op == "call_method":
        name = _METHODS.get(str(node.target))
    else:
        name = _FUNCTIONS.get(node.target) if node.op == "call_function" and callable(node.target) else None
    if name is None:
        return None
    options = TABLE[name].options
    named = dict(zip(options, node.args[1:], strict=False)) | node.kwargs
    named.pop("input", None)
    return _with_parameter(name, named) if named.keys() <= options.keys() else None


def _with_parameter(name: str, options_in_code: Mapping[str, Argument]) -> FusedActivation | None:
    """The activation with these options; None if our layers cannot apply it with them."""
    row = TABLE[name]
    values = {**row.options, **options_in_code}
    parameter = 0.0 if row.parameter is None else values[row.parameter]
    if values.get("approximate", "none") != "none" or not isinstance(parameter, (int, float)):
        return None
    return FusedActivation(name, float(parameter))


def _input(node: Node) -> Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, Node) else None


def _operands(node: Node) -> list[Node]:
    """The two operands of an addition; for an addition in place, only the first operand; [] for other nodes.

    A layer that makes one of these operands can do the addition itself.
    """
    in_place = node.target in _ADDITIONS_IN_PLACE
    if node.op not in {"call_function", "call_method"} or not (in_place or node.target in _ADDITIONS):
        return []
    operands = [arg for arg in node.args if isinstance(arg, Node)]
    adds_two = len(operands) == len(node.args) == 2 and operands[0] is not operands[1]
    if not adds_two or node.kwargs.keys() - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        return []
    return operands[:1] if in_place else operands


def _may_move(flow: Flow, call: Node, place: Node, order: dict[Node, int]) -> bool:
    """Whether a layer may run as late as ``place``: no node in between could overwrite its input."""
    if order[place] == order[call] + 1:
        return True
    return has_input_of_its_own(flow, call)


def _writes(flow: Flow, node: Node) -> bool:
    """Whether the name or the arguments of an operation say that it changes its input in place."""
    if node.op == "call_module":
        return bool(getattr(flow.called(node), "inplace", False))
    if node.target in IN_PLACE or node.kwargs.get("inplace"):
        return True
    return is_named_in_place(node)
