"""Which channels of two layers meet, through operations between them that only move values.

Views, transpositions and concatenations move values and compute nothing. They are run on channel numbers in place of
values. The result shows which channel of the other layer (the partner) meets which channel of batch norm, on any axes.
Folding requires:

    before   a partner's channel goes to one channel of batch norm only, and batch norm has no other input values
    behind   all values of a partner's channel come from the same channel of batch norm, or all from elsewhere

Sizes are those of one example: the graph is run on tensors without values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.kernels import activations
from batchnorm.population.tensor_trees import Batch, Leaf
from batchnorm.surgery.dataflow import IN_PLACE, name_of
from batchnorm.surgery.folding.arithmetic import RANKS
from batchnorm.surgery.patterns import is_watched
from batchnorm.surgery.shape_tracing import InputShapes, by_name

Channels = tuple[int, ...]
# the result of each node of a graph; its tensors have sizes and no values
Sizes = dict[Node, Batch]

_MOVING_OPERATIONS = {
    "view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "permute", "transpose", "t", "movedim",
    "moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze", "contiguous", "clone", "cat", "concat", "concatenate",
    "chunk", "split", "getitem", "narrow", "select", "unbind", "stack",
}  # fmt: skip
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_COMPUTING_MODULES = (*RANKS, _BatchNorm, *(each.module for each in activations.TABLE.values()), nn.Identity)
_SHAPE_READERS = {"reshape_as", "view_as"}  # only the shape of the second operand counts
_QUESTIONS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "__len__", "len"}
_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "is_cuda", "requires_grad"}
_ELSEWHERE = -1


def moves(node: Node) -> bool:
    """Whether an operation only moves values: it returns values of its inputs in other places."""
    if node.op == "call_module":
        module: Any = node.meta.get("module")
        return type(module) in _MOVING_MODULES and not is_watched(module) and "forward" not in vars(module)
    return node.op in {"call_function", "call_method"} and _name(node) in _MOVING_OPERATIONS


def readers(node: Node) -> list[Node]:
    """The nodes that read a node's values, not only its shape."""
    return [user for user in node.users if not _asks(user, node)]


def sizes(graph: Graph, inputs: InputShapes) -> Sizes:
    """The result of each node of a graph, with tensors without values; {} if the graph does not run on such tensors."""
    try:
        root = next(node.meta["caller"] for node in graph.nodes if node.op == "placeholder")
        arguments = by_name(root, *inputs.of(root))
        values = iter(arguments.values())
        names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        run = _Sizes(nn.Module(), graph=graph)
        with inputs.mode, torch.no_grad():
            run.run(*[arguments[name] if name in arguments else next(values) for name in names])
    except Exception:  # noqa: BLE001 - the sizes stay unknown
        return {}
    return run.found


def before(node: Node, results: Sizes, axes: dict[Node, int]) -> dict[Node, Channels] | str:
    """For each node that makes a part of a layer's input: the layer's channel for each of the node's channels.

    A channel that is not in the layer's input has the number -1.

    Args:
        node: The node that calls the layer.
        results: The results of all nodes, from ``sizes``.
        axes: For each node that calls a possible partner, the axis of its channels.

    Returns:
        Channels by node, or a text with the reason why the layer cannot be folded into these nodes.
    """
    source = node.args[0]
    assert isinstance(source, Node)  # noqa: S101 - a layer is called with the result of another node
    path = _path(source, results, axes)
    makers = [each for each in node.graph.nodes if each in axes and each in path]
    if not makers:
        return "no convolution or linear layer makes its input"
    for each in path:
        others = [user for user in readers(each) if user is not node and user not in path]
        if others or each in node.args[1:]:  # a residual of the layer is not normalized
            return f"the result of {_name(each)} also goes elsewhere"
    numbers, first = {}, 0
    for maker in makers:
        numbers[maker], first = (
            _numbered(results[maker].shape, axes[maker], first),
            first + results[maker].shape[axes[maker]],
        )
    ids = _moved(source, results, numbers)
    rows = ids.transpose(0, 1).flatten(1)  # (N, C, ...) -> (C, N...)
    owner = torch.full((first,), _ELSEWHERE)
    for channel, row in enumerate(rows):
        unique = row.unique()
        if (unique < 0).any():
            return "a part of its input is not made by a convolution or linear layer"
        if (owner[unique] >= 0).any():
            return "one channel of the layer before it becomes several of its channels"
        owner[unique] = channel
    return dict(
        zip(makers, map(tuple, _cut(owner, [results[maker].shape[axes[maker]] for maker in makers])), strict=True)
    )


def behind(node: Node, results: Sizes, axes: dict[Node, int]) -> tuple[Node, Channels] | str:
    """The node that reads a layer's result, and for each of the node's channels the layer's channel (-1: no channel).

    If the layer cannot be folded into that node, the result is a text with the reason.
    """
    path, waiting, partners = [node], [node], set()
    while waiting:
        for user in readers(waiting.pop()):
            if user in axes:
                partners.add(user)
            elif not moves(user):
                return f"{_name(user)} is behind it"
            elif user not in path:
                path.append(user)
                waiting.append(user)
    if len(partners) != 1:
        return "its result goes to several layers" if partners else "nothing is behind it"
    [partner] = partners
    ids = _moved(partner.args[0], results, {node: _numbered(results[node].shape, 1, 0)})
    rows = ids.movedim(axes[partner], 0).flatten(1)
    if not torch.equal(rows, rows[:, :1].expand_as(rows)):
        return "one channel of the layer behind it reads several of its channels"
    return partner, tuple(rows[:, 0].tolist())


def path_between(node: Node, taker: Node) -> Iterable[Node]:
    """The nodes that run after ``node`` and before ``taker``."""
    following = node.next
    while following is not taker:
        yield following
        following = following.next


def is_harmless(node: Node) -> bool:
    """Whether a node changes no tensor in place, as its module or its name and arguments show."""
    if node.op in {"get_attr", "placeholder"} or moves(node):
        return True
    if node.op == "call_module":
        module: Any = node.meta.get("module")
        return isinstance(module, _COMPUTING_MODULES) and not getattr(module, "inplace", False)
    writes = node.target in IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return not writes and not (_name(node).endswith("_") and not _name(node).endswith("__"))


@final
class _Sizes(Interpreter):
    """Runs a graph with the modules in the nodes' ``meta``, and stores the result of each node."""

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.found: Sizes = {}
        self.extra_traceback = False

    def run_node(self, n: Node) -> Batch:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            result = n.meta["module"](*args, **kwargs)
        elif n.op == "get_attr":
            result = n.meta["caller"]
            for name in str(n.target).split("."):
                result = getattr(result, name)
        else:
            result = getattr(self, n.op)(n.target, args, kwargs)
        self.found[n] = result
        return result


def _path(source: Node, results: Sizes, axes: dict[Node, int]) -> list[Node]:
    """The nodes that lead to ``source``: back through moves, up to possible partners, which are included."""
    path, waiting = [], [source]
    while waiting:
        node = waiting.pop()
        if node in path:
            continue
        path.append(node)
        if node not in axes and moves(node):
            waiting += [arg for arg in node.all_input_nodes if not _asks(node, arg)]
    return [node for node in path if node in axes or (moves(node) and _holds_tensors(results[node]))]


def _moved(node: Node, results: Sizes, numbers: dict[Node, Tensor]) -> Batch:
    """The result of a node with channel numbers as values, -1 for values from elsewhere."""
    if node in numbers:
        return numbers[node]
    if not moves(node):
        return tree_map(_from_elsewhere, results[node])

    def moved(arg: Node) -> Batch:
        ids = _moved(arg, results, numbers)
        return ids.contiguous() if isinstance(ids, Tensor) else ids  # so that ``view`` works

    if node.op == "call_module":
        return node.meta["module"](*map(moved, node.all_input_nodes))
    args, kwargs = map_arg(node.args, moved), map_arg(node.kwargs, moved)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # pyrefly: ignore
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _from_elsewhere(leaf: Leaf) -> Leaf:
    return torch.full(leaf.shape, _ELSEWHERE) if isinstance(leaf, Tensor) else leaf


def _numbered(shape: torch.Size, axis: int, first: int) -> Tensor:
    """A tensor of this shape that has at each place the number of its channel, counted from ``first``."""
    spread = [1] * len(shape)
    spread[axis] = -1
    return torch.arange(first, first + shape[axis]).reshape(spread).expand(shape)


def _holds_tensors(value: Batch) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _cut(values: Tensor, lengths: list[int]) -> list[list[int]]:
    return [part.tolist() for part in values.split(lengths)]


def _asks(user: Node, node: Node) -> bool:
    """Whether the node ``user`` reads only the shape of ``node``, not its values."""
    if _name(user) in _SHAPE_READERS:
        return user.args[0] is not node and user.args[1:] == (node,)
    return _is_question(user)


def _is_question(node: Node) -> bool:
    name = _name(node)
    if node.op == "call_function" and name == "getattr":
        return node.args[1] in _ATTRIBUTES
    return node.op in {"call_function", "call_method"} and name in _QUESTIONS


def _name(node: Node) -> str:
    if node.op == "call_module":
        return type(node.meta.get("module")).__name__
    name = name_of(node)
    return "getitem" if name == "__getitem__" else name
