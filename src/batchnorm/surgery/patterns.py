"""Places in a graph with act(bn(x)) or act(bn(x) + residual) whose intermediate results nothing else reads.

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
_MAKE_NEW = (nn.modules.conv._ConvNd, nn.Linear)  # whose result is no view of anything


@final
@dataclass(frozen=True)
class FusedActivation:
    """An activation as a layer applies it."""

    name: str
    parameter: float


@final
@dataclass(frozen=True)
class Site:
    """One place in one graph: ``activation`` of ``call``, or of ``addition`` of ``call`` and something else.

    ``chain`` has the modules that return the layer's result, from the one that is called down to the layer.
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
        """Change the graph: the layer's call stands where the activation was, and gets the other operand."""
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
    """Every site of a graph, whatever else the layer and the activation are used for."""
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
    """Whether a module made a node's input for it alone, and no hook sees it."""
    source, *others = node.args or (None,)
    if not isinstance(source, Node) or set(source.users) != {node} or source in others:
        return False
    maker = flow.called(source)
    return isinstance(maker, _MAKE_NEW) and not is_watched(maker)


def is_ours(layer: nn.Module) -> bool:
    """Whether a module is exactly one of our layers, frozen or not."""
    return written_kind(layer) in LAYERS


def written_kind(layer: nn.Module) -> type:
    """The class of a layer as it was written: that under a freeze."""
    kind = type(layer)
    return kind.__bases__[1] if Frozen in kind.__bases__ else kind


def activation_name(module: nn.Module) -> str | None:
    """Our name of the activation that a module of torch.nn is, or None."""
    return next((name for kind, name in _MODULES.items() if type(module) is kind), None)


def activation_module(act: str, param: float) -> nn.Module:
    """An activation as a module of torch.nn."""
    row = activation(act)
    return row.module(param) if row.parameter else row.module()


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what goes into a module and comes out of it."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name) for name in names)


def _chain(flow: Flow, node: Node) -> tuple[nn.Module, ...]:
    """The modules from the one that a node calls down to a layer whose result is the node's; or nothing."""
    module = flow.called(node)
    if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node):
        return ()
    chain = [module]
    while is_chain(chain[-1]) and chain[-1]._modules and not is_watched(chain[-1]):
        chain.append([*chain[-1].children()][-1])
    layer: Any = chain[-1]
    takes_one = is_ours(layer) and layer._act is None and not is_watched(layer) and "forward" not in vars(layer)
    return tuple(chain) if takes_one else ()


def activation_of(flow: Flow, node: Node) -> FusedActivation | None:
    """The activation that a node applies, if our layers have it."""
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


def _with_parameter(name: str, given: Mapping[str, Argument]) -> FusedActivation | None:
    """The activation with these options, unless it is one that a layer does not have."""
    row = TABLE[name]
    values = {**row.options, **given}
    parameter = 0.0 if row.parameter is None else values[row.parameter]
    if values.get("approximate", "none") != "none" or not isinstance(parameter, (int, float)):
        return None
    return FusedActivation(name, float(parameter))


def _input(node: Node) -> Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, Node) else None


def _operands(node: Node) -> list[Node]:
    """The operands of an addition that a layer may have made; of an addition in place, the first one only."""
    in_place = node.target in _ADDITIONS_IN_PLACE
    if node.op not in {"call_function", "call_method"} or not (in_place or node.target in _ADDITIONS):
        return []
    operands = [arg for arg in node.args if isinstance(arg, Node)]
    plain = len(operands) == len(node.args) == 2 and operands[0] is not operands[1]
    if not plain or node.kwargs.keys() - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        return []
    return operands[:1] if in_place else operands


def _may_move(flow: Flow, call: Node, place: Node, order: dict[Node, int]) -> bool:
    """Whether a layer may run as late as ``place``: nothing between could write its input."""
    if order[place] == order[call] + 1:
        return True
    return has_input_of_its_own(flow, call)


def _writes(flow: Flow, node: Node) -> bool:
    """Whether an operation changes its input in place, as far as its name or its arguments say."""
    if node.op == "call_module":
        return bool(getattr(flow.called(node), "inplace", False))
    if node.target in IN_PLACE or node.kwargs.get("inplace"):
        return True
    return is_named_in_place(node)
