"""What a batch norm layer computes in eval mode: an affine map of each channel, and operations on the result.

What torch.nn's layers and ours compute is known. For layers of other classes, the forward is traced as a graph. The
part of the graph that reads the layer's tensors must be an affine map of each channel, which is tested on numbers; the
rest is stored as code. If the forward cannot be traced, the whole forward must be an affine map of each channel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Interpreter, Node
from torch.fx.node import Argument, map_arg
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import LAYERS, OURS
from batchnorm.other_libraries import response, response_of
from batchnorm.surgery.dataflow import is_named_in_place, set_mode, traced
from batchnorm.surgery.folding.arithmetic import Affine
from batchnorm.surgery.patterns import is_watched, written_kind
from batchnorm.surgery.rewriting import Absorbed, Code

KINDS = {*OURS, *LAYERS, nn.SyncBatchNorm}  # classes whose forwards are known
_IDENTITIES = {
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    Absorbed,
}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_RANKS = (4, 2, 3, 5)  # numbers of axes of trial inputs, in the order in which they are tried
_CHECKS = ("_check_input_dim", "_check_non_zero_input_channels")


@final
@dataclass(frozen=True)
class Parts:
    """A layer in eval mode: the map ``affine``, then the operations ``then`` on its result.

    ``then`` is None if there are no such operations.
    """

    affine: Affine
    then: Graph | None = None

    @property
    def code(self) -> Code | None:
        """The operations ``then`` as a method for a module that has the layer's children; None if there are none."""
        return None if self.then is None else Code.of(self.then)


def parts_of(layer: _BatchNorm) -> Parts | str:
    """What a layer with stored statistics does in eval mode, or a text: why that is not known. Changes nothing."""
    if written_kind(layer) in KINDS:
        return Parts(Affine.of(layer))
    try:
        graph = graph_of_layer(layer, mode=False)
    except TraceError as error:
        whole = response_of(layer)
        affine = None if whole is None else _exact(layer, *whole)
        return _unknown(layer, f"cannot be traced: {error}") if affine is None else Parts(affine)
    split = _split(layer, graph)
    if split is None:
        return _unknown(layer, "uses its tensors for more than batch norm")
    core, then = split
    for dtype in (torch.float64, torch.float32):  # a forward that casts its input may run in only one type
        run = Interpreter(copy.deepcopy(layer).cpu().to(dtype), graph=core).run
        responses = (response(run, layer, rank, dtype) for rank in _RANKS)
        affine = next((_exact(layer, *each, dtype) for each in responses if each is not None), None)
        if affine is not None:
            return Parts(affine, then)
    return _unknown(layer, "does not multiply each channel by a number and add a number")


def graph_of_layer(layer: nn.Module, *, mode: bool) -> Graph:
    """The graph of a layer's own forward in train or eval mode; each call of a child is one node.

    Raises:
        TraceError: If no graph can be used.
    """
    flags = [(module, vars(module).get("training")) for module in layer.modules()]
    set_mode(layer, mode)
    try:
        with _unchecked(layer):
            return traced(layer)
    finally:
        for module, flag in flags:
            vars(module)["training"] = flag


def hands_on(module: nn.Module) -> bool:
    """Whether a module returns its input in eval mode, and has no hooks and no replaced forward."""
    return type(module) in _IDENTITIES and not is_watched(module) and "forward" not in vars(module)


def _unknown(layer: nn.Module, why: str) -> str:
    return f"is a {type(layer).__name__} with a forward that {why}"


def _exact(layer: Any, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype = torch.float64) -> Affine | None:
    """The map by the formula (``Affine.of``), which has all digits of float64, if the measured map agrees with it.

    If it does not agree, or if the layer has no eps: the measured map, or None if it was measured in float32.
    """
    measured = Affine(scale, shift) if dtype == torch.float64 else None
    if not isinstance(getattr(layer, "eps", None), (int, float)):
        return measured
    formula = Affine.of(layer)
    # a measured value is the difference of two results, which cancels digits: in float64, half of them must agree
    rounding = torch.finfo(torch.float64).eps ** 0.5 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    size = scale.abs() + shift.abs() + (scale * layer.running_mean.double().cpu()).abs()
    gaps = torch.maximum((formula.scale - scale).abs(), (formula.shift - shift).abs())
    return formula if bool((gaps <= rounding * size).all()) else measured


@contextmanager
def _unchecked(layer: nn.Module) -> Iterator[None]:
    """A block without torch.nn's checks of the input's shape, which a tracer cannot run."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        vars(layer).update(dict.fromkeys(_CHECKS, _no_check))
    try:
        yield
    finally:
        for name in _CHECKS:
            vars(layer).pop(name, None)


def _no_check(*_: torch.Tensor) -> None: ...


def _split(layer: nn.Module, graph: Graph) -> tuple[Graph, Graph | None] | None:
    """Split a graph behind the last node that combines the input with the layer's tensors.

    Returns the part up to this node, and the part behind it or None if that part does nothing. If the graph cannot be
    split, the whole result is None.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        return None
    of_input, of_tensors = _downstream(graph, set(inputs)), _downstream(graph, _read(graph))
    mixing = [
        node for node in graph.nodes
        if node in of_input and any(arg in of_tensors and arg not in of_input for arg in node.all_input_nodes)
    ]  # fmt: skip
    if not mixing or any(map(_writes_own, graph.nodes)):
        return None
    last = mixing[-1]
    behind = _downstream(graph, {last}) - {last}
    result = next(node for node in graph.nodes if node.op == "output")
    behind_all = [node for node in graph.nodes if node in behind and not _casts_back(node)]
    feeding = {arg for node in behind_all for arg in node.all_input_nodes if arg in of_input}
    if result not in behind or not feeding <= behind | {last} or not isinstance(result.args[0], Node):
        return None
    then = _behind(layer, graph, last, behind)
    return _up_to(graph, last), None if _is_empty(then) else then


def _read(graph: Graph) -> set[Node]:
    return {node for node in graph.nodes if node.op == "get_attr"}


def _downstream(graph: Graph, roots: set[Node]) -> set[Node]:
    reached = set(roots)
    for node in graph.nodes:
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    return reached


def _writes_own(node: Node) -> bool:
    """Whether a node changes a tensor of the layer in place, as its name says."""
    first = node.args[0] if node.args else None
    return isinstance(first, Node) and first.op == "get_attr" and is_named_in_place(node)


def _up_to(graph: Graph, last: Node) -> Graph:
    part, values = Graph(), {}
    for node in graph.nodes:
        values[node] = part.node_copy(node, values.__getitem__)
        if node is last:
            break
    part.output(values[last])
    part.eliminate_dead_code()
    return part


def _behind(layer: nn.Module, graph: Graph, last: Node, behind: set[Node]) -> Graph:
    """The operations behind the node ``last``, without those that return their input."""
    part = Graph()
    values: dict[Node, Argument] = {last: part.placeholder("input")}
    for node in graph.nodes:
        if node.op == "output":
            part.output(map_arg(node.args[0], values.__getitem__))
        elif node in behind and _returns_its_input(layer, node):
            values[node] = values[node.args[0]]  # pyrefly: ignore
        elif node in behind:
            values[node] = part.node_copy(node, values.__getitem__)
    return part


def _casts_back(node: Node) -> bool:
    """Whether a node casts a value to the type of the layer's input: a folded layer has this type anyway."""
    if node.op != "call_method" or node.target not in {"to", "type_as"} or len(node.args) != 2 or node.kwargs:
        return False
    like: Any = node.args[1]
    is_type = getattr(like, "target", None) is getattr and like.args[1] == "dtype"
    source = like.args[0] if is_type else like
    return isinstance(source, Node) and source.op == "placeholder"


def _returns_its_input(layer: nn.Module, node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if _casts_back(node):
        return True
    if node.op == "call_module":
        return len(node.args) == 1 and not node.kwargs and hands_on(layer.get_submodule(str(node.target)))
    options = dict(zip(("p", "training"), node.args[1:], strict=False)) | node.kwargs
    return node.op == "call_function" and node.target in _DROPOUTS and options.get("training") is False


def _is_empty(then: Graph) -> bool:
    first, *_, last = then.nodes
    return last.args[0] is first
