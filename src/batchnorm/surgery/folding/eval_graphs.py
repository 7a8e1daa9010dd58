"""The eval-mode graphs of a model's forwards, merged where a module is called at one place only.

The graph of such a module replaces the call, and modules that return their input in eval mode are left out. Then the
neighbours of a layer are the neighbours of its node, in whatever module they are registered, and nodes are in the order
in which they run. A node's ``meta`` has the called module ("module") and the module whose forward calls it ("caller").
A node's target is the path in that caller, also if the caller's graph was merged into another graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.other_libraries import is_of_others
from batchnorm.surgery.dataflow import Callers, Flow
from batchnorm.surgery.folding.arithmetic import RANKS
from batchnorm.surgery.folding_placeholder import FoldedAway
from batchnorm.surgery.layer_maps import hands_on
from batchnorm.surgery.patterns import is_watched

_SINGLE_NODES = (*RANKS, _BatchNorm)  # never merged, even if such a layer has children, for example an activation


def graphs(known: dict[nn.Module, Flow], registered: Counter, callers: Callers) -> list[Graph]:
    """The eval-mode graphs of all forwards that run; modules that are called at one place are merged into callers.

    Not merged: convolutions, linear layers, batch norm layers (of other libraries too), modules with hooks, modules
    without a flow, and modules whose call is not plain (``_is_plain_call``).
    """
    inner = {
        child
        for flow in known.values()
        for child, node in _sole_calls(flow, callers, registered)
        if child in known and not isinstance(child, _SINGLE_NODES) and not is_of_others(child) and not is_watched(child)
        if _is_plain_call(node, known[child])
    }

    merged = []
    for module, flow in known.items():
        if callers.get(module) and module not in inner:
            merged.append(Graph())
            merged[-1].output(_copy_into(merged[-1], flow, None, {child: known[child] for child in inner}))
    return merged


def _copy_into(graph: Graph, flow: Flow, inputs: tuple | None, inner: Mapping[nn.Module, Flow]) -> Any:
    """Copy the nodes of a forward into ``graph``, and return the forward's result as nodes of ``graph``.

    A call of a module in ``inner`` is replaced by the nodes of that module's forward.
    """
    values: dict[Node, Any] = {}
    arguments = iter(inputs or ())
    for node in flow.graphs[False].nodes:
        child = flow.called(node)
        if node.op == "output":
            return map_arg(node.args[0], values.__getitem__)
        if node.op == "placeholder" and inputs is not None:
            values[node] = next(arguments)
        elif child in inner:
            inside = tuple(values[arg] for arg in node.args if isinstance(arg, Node))
            values[node] = _copy_into(graph, inner[child], inside, inner)
        elif child is not None and _returns_its_input(child) and len(node.args) == 1 and isinstance(node.args[0], Node):
            values[node] = values[node.args[0]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = {"caller": flow.module, "module": child}
    return None


def _sole_calls(flow: Flow, callers: Callers, registered: Counter) -> Iterator[tuple[nn.Module, Node]]:
    """The modules with one name that this forward calls once and no other module calls, each with the calling node."""
    nodes = [node for node in flow.graphs[False].nodes if node.op == "call_module"]
    count = Counter(flow.called(node) for node in nodes)
    for node in nodes:
        child = flow.called(node)
        if child is not None and count[child] == registered[child] == 1 and callers.get(child) == {flow.module}:
            yield child, node


def _is_plain_call(node: Node, flow: Flow) -> bool:
    """Whether a call passes one node by position for each input of the called graph, and the graph returns one node.

    Other arguments than nodes are allowed only if the graph was traced with their values (``is_bound``).
    """
    graph = flow.graphs[False]
    inputs = sum(inner.op == "placeholder" for inner in graph.nodes)
    result = next(inner.args[0] for inner in graph.nodes if inner.op == "output")
    nodes = [arg for arg in node.args if isinstance(arg, Node)]
    others = len(node.args) - len(nodes) + len(node.kwargs)
    nodes_by_name = any(isinstance(value, Node) for value in node.kwargs.values())
    return len(nodes) == inputs and not nodes_by_name and (flow.is_bound or not others) and isinstance(result, Node)


def _returns_its_input(module: nn.Module) -> bool:
    """Whether a module returns its input in eval mode and has no hooks; also true of an empty ``FoldedAway``."""
    return hands_on(module) or (isinstance(module, FoldedAway) and module.is_empty and not is_watched(module))
