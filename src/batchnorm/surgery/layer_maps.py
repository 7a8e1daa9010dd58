"""What a batch norm layer computes in eval mode: an affine map of each channel, and operations on the result.

Layers of torch.nn and ours are known. Layers of other classes are read from the graph of their forward. The part that
reads the layer's tensors must be such a map, which is tested on numbers; the rest is kept as code. If the forward
cannot be read, all of it must be such a map.
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

KINDS = {*OURS, *LAYERS, nn.SyncBatchNorm}  # whose forwards are known
_HAND_ON = {
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
_RANKS = (4, 2, 3, 5)
_CHECKS = ("_check_input_dim", "_check_non_zero_input_channels")


@final
@dataclass(frozen=True)
class Parts:
    """A layer in eval mode: ``affine``, and ``then`` with its result; None where that is all."""

    affine: Affine
    then: Graph | None = None

    @property
    def code(self) -> Code | None:
        """What is done with the result, as a method of a module that has the layer's children."""
        return None if self.then is None else Code.of(self.then)


def parts_of(layer: _BatchNorm) -> Parts | str:
    """What a layer with stored statistics does in eval mode, or why that is not known. The layer is not changed."""
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
        return _unknown(layer, "does other things with its tensors than batch norm")
    core, then = split
    for dtype in (torch.float64, torch.float32):  # a forward that casts its input runs in one of them
        run = Interpreter(copy.deepcopy(layer).cpu().to(dtype), graph=core).run
        found = (response(run, layer, rank, dtype) for rank in _RANKS)
        affine = next((_exact(layer, *each, dtype) for each in found if each is not None), None)
        if affine is not None:
            return Parts(affine, then)
    return _unknown(layer, "does not multiply each channel by a number and add one")


def graph_of_layer(layer: nn.Module, *, mode: bool) -> Graph:
    """The graph of a layer's own forward in train or eval mode, around its children.

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
    """Whether a module in eval mode returns its input, and nothing looks at it there."""
    return type(module) in _HAND_ON and not is_watched(module) and "forward" not in vars(module)


def _unknown(layer: nn.Module, why: str) -> str:
    return f"is a {type(layer).__name__} with a forward that {why}"


def _exact(layer: Any, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype = torch.float64) -> Affine | None:
    """The map by the formula, which has all digits, if the measured map agrees with it; else the measured map."""
    found = Affine(scale, shift) if dtype == torch.float64 else None
    if not isinstance(getattr(layer, "eps", None), (int, float)):
        return found
    formula = Affine.of(layer)
    # found by subtracting two results; those of float64 have more digits than are asked for
    rounding = torch.finfo(torch.float64).eps ** 0.5 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    size = scale.abs() + shift.abs() + (scale * layer.running_mean.double().cpu()).abs()
    gaps = torch.maximum((formula.scale - scale).abs(), (formula.shift - shift).abs())
    return formula if bool((gaps <= rounding * size).all()) else found


@contextmanager
def _unchecked(layer: nn.Module) -> Iterator[None]:
    """A block in which torch.nn's checks of the input's shape, which a tracer cannot answer, are left out."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        vars(layer).update(dict.fromkeys(_CHECKS, _no_check))
    try:
        yield
    finally:
        for name in _CHECKS:
            vars(layer).pop(name, None)


def _no_check(*_: torch.Tensor) -> None: ...


def _split(layer: nn.Module, graph: Graph) -> tuple[Graph, Graph | None] | None:
    """The part of a graph up to the last node that reads the layer's tensors, and the part behind it."""
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
    found = set(roots)
    for node in graph.nodes:
        if any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def _writes_own(node: Node) -> bool:
    """Whether a node changes a tensor of the layer's in place, by its name."""
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
    """The operations on the value of a node, without those that return their input."""
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
    """Whether a node casts a value back to the type of the layer's input, which a folded layer never changes."""
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
    given = dict(zip(("p", "training"), node.args[1:], strict=False)) | node.kwargs
    return node.op == "call_function" and node.target in _DROPOUTS and given.get("training") is False


def _is_empty(then: Graph) -> bool:
    first, *_, last = then.nodes
    return last.args[0] is first
