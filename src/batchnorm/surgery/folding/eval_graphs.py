"""The eval-mode graphs of a model's forwards, put together as far as that is certain.

Where a module is called at one place, its graph stands in the place of the call, and what hands its input on in eval
mode is left out. Then a layer's neighbours are those of its node, whatever modules they are registered in, and nodes
are in the order in which they run. The targets of nodes are those of before; ``meta`` has the module that a node calls
and the one whose forward calls it.
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

_WHOLE = (*RANKS, _BatchNorm)  # also with children: activations, or what a parametrization adds


def graphs(known: dict[nn.Module, Flow], registered: Counter, callers: Callers) -> list[Graph]:
    """The eval-mode graphs of all forwards that run, those of modules that are called at one place inside of others."""
    inner = {
        child
        for flow in known.values()
        for child, node in _sole_calls(flow, callers, registered)
        if child in known and not isinstance(child, _WHOLE) and not is_of_others(child) and not is_watched(child)
        if _is_plain_call(node, known[child])
    }

    made = []
    for module, flow in known.items():
        if callers.get(module) and module not in inner:
            made.append(Graph())
            made[-1].output(_copied(made[-1], flow, None, {child: known[child] for child in inner}))
    return made


def _copied(graph: Graph, flow: Flow, inputs: tuple | None, inner: Mapping[nn.Module, Flow]) -> Any:
    """The result of a forward whose nodes are copied into a graph, with those of inner modules in place of calls."""
    values: dict[Node, Any] = {}
    given = iter(inputs or ())
    for node in flow.graphs[False].nodes:
        child = flow.called(node)
        if node.op == "output":
            return map_arg(node.args[0], values.__getitem__)
        if node.op == "placeholder" and inputs is not None:
            values[node] = next(given)
        elif child in inner:
            inside = tuple(values[arg] for arg in node.args if isinstance(arg, Node))
            values[node] = _copied(graph, inner[child], inside, inner)
        elif child is not None and _hands_on(child) and len(node.args) == 1 and isinstance(node.args[0], Node):
            values[node] = values[node.args[0]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = {"caller": flow.module, "module": child}
    return None


def _sole_calls(flow: Flow, callers: Callers, registered: Counter) -> Iterator[tuple[nn.Module, Node]]:
    """The modules that this forward calls once and nothing else does."""
    nodes = [node for node in flow.graphs[False].nodes if node.op == "call_module"]
    count = Counter(flow.called(node) for node in nodes)
    for node in nodes:
        child = flow.called(node)
        if child is not None and count[child] == registered[child] == 1 and callers.get(child) == {flow.module}:
            yield child, node


def _is_plain_call(node: Node, flow: Flow) -> bool:
    """Whether a call gives values by position to all inputs, and gets one value; those of bound ones are known."""
    graph = flow.graphs[False]
    inputs = sum(inner.op == "placeholder" for inner in graph.nodes)
    result = next(inner.args[0] for inner in graph.nodes if inner.op == "output")
    given = [arg for arg in node.args if isinstance(arg, Node)]
    others = len(node.args) - len(given) + len(node.kwargs)
    named = any(isinstance(value, Node) for value in node.kwargs.values())
    return len(given) == inputs and not named and (flow.is_bound or not others) and isinstance(result, Node)


def _hands_on(module: nn.Module) -> bool:
    """Whether a module in eval mode returns its input, and nothing looks at it there."""
    return hands_on(module) or (isinstance(module, FoldedAway) and module.is_empty and not is_watched(module))
