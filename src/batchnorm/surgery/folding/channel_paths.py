"""Which channels of two layers meet, through operations between them that only move values.

A view, a transposition or a concatenation does not compute. When it runs on channel numbers in place of values, its
result shows which channel of the other layer meets which channel of batch norm, whatever the axes are:

    before   every value of channel c of batch norm is made by partners' channels that only c receives
    behind   every value of channel j of the partner comes from one channel of batch norm, or from elsewhere

Sizes are those of one example, found by running the graph on tensors without values.
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
# what each node of a graph gives, with tensors without values
Sizes = dict[Node, Batch]

_MOVES = {
    "view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "permute", "transpose", "t", "movedim",
    "moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze", "contiguous", "clone", "cat", "concat", "concatenate",
    "chunk", "split", "getitem", "narrow", "select", "unbind", "stack",
}  # fmt: skip
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_COMPUTING = (*RANKS, _BatchNorm, *(each.module for each in activations.TABLE.values()), nn.Identity)
_LIKE = {"reshape_as", "view_as"}  # of whose second operand the shape alone counts
_QUESTIONS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "__len__", "len"}
_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "is_cuda", "requires_grad"}
_ELSEWHERE = -1


def moves(node: Node) -> bool:
    """Whether an operation returns values of its inputs, all in other places."""
    if node.op == "call_module":
        module: Any = node.meta.get("module")
        return type(module) in _MOVING_MODULES and not is_watched(module) and "forward" not in vars(module)
    return node.op in {"call_function", "call_method"} and _name(node) in _MOVES


def readers(node: Node) -> list[Node]:
    """The nodes that get a node's values, not only its shape."""
    return [user for user in node.users if not _asks(user, node)]


def sizes(graph: Graph, inputs: InputShapes) -> Sizes:
    """What each node of a graph gives, as tensors without values and plain numbers; empty if it does not run so."""
    try:
        root = next(node.meta["caller"] for node in graph.nodes if node.op == "placeholder")
        given = by_name(root, *inputs.of(root))
        values = iter(given.values())
        names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        run = _Sizes(nn.Module(), graph=graph)
        with inputs.mode, torch.no_grad():
            run.run(*[given[name] if name in given else next(values) for name in names])
    except Exception:  # noqa: BLE001 - then nothing is known of its sizes
        return {}
    return run.found


def before(node: Node, found: Sizes, axes: dict[Node, int]) -> dict[Node, Channels] | str:
    """For the nodes that make a layer's input, the layer's channel that each of their channels becomes.

    Args:
        node: The layer's.
        found: Sizes of all nodes.
        axes: The nodes that may be partners, and the axis of their channels.

    Returns:
        Channels by node, or why there are none.
    """
    source = node.args[0]
    assert isinstance(source, Node)  # noqa: S101 - a layer is called with the result of another node
    path = _path(source, found, axes)
    makers = [each for each in node.graph.nodes if each in axes and each in path]
    if not makers:
        return "no convolution or linear layer makes it"
    for each in path:
        others = [user for user in readers(each) if user is not node and user not in path]
        if others:
            return f"{_name(each)} goes elsewhere too"
    numbers, first = {}, 0
    for maker in makers:
        numbers[maker], first = (
            _numbered(found[maker].shape, axes[maker], first),
            first + found[maker].shape[axes[maker]],
        )
    ids = _moved(source, found, numbers)
    rows = ids.transpose(0, 1).flatten(1)  # (N, C, ...) -> (C, N...)
    owner = torch.full((first,), _ELSEWHERE)
    for channel, row in enumerate(rows):
        unique = row.unique()
        if (unique < 0).any():
            return "a part of what it normalizes is not made by a convolution or linear layer"
        if (owner[unique] >= 0).any():
            return "one channel of what makes it becomes several of its own"
        owner[unique] = channel
    return dict(
        zip(makers, map(tuple, _cut(owner, [found[maker].shape[axes[maker]] for maker in makers])), strict=True)
    )


def behind(node: Node, found: Sizes, axes: dict[Node, int]) -> tuple[Node, Channels] | str:
    """The node that takes a layer's result, and for each of its channels the layer's, or -1 for another value."""
    path, waiting, takers = [node], [node], set()
    while waiting:
        for user in readers(waiting.pop()):
            if user in axes:
                takers.add(user)
            elif not moves(user):
                return f"{_name(user)} is behind it"
            elif user not in path:
                path.append(user)
                waiting.append(user)
    if len(takers) != 1:
        return "its result goes to several layers" if takers else "nothing is behind it"
    [taker] = takers
    ids = _moved(taker.args[0], found, {node: _numbered(found[node].shape, 1, 0)})
    rows = ids.movedim(axes[taker], 0).flatten(1)
    if not torch.equal(rows, rows[:, :1].expand_as(rows)):
        return "one channel of what is behind it takes several of its own"
    return taker, tuple(rows[:, 0].tolist())


def path_between(node: Node, taker: Node) -> Iterable[Node]:
    """The nodes that run between two."""
    following = node.next
    while following is not taker:
        yield following
        following = following.next


def is_harmless(node: Node) -> bool:
    """Whether a node writes into nothing, as far as its name and its arguments say."""
    if node.op in {"get_attr", "placeholder"} or moves(node):
        return True
    if node.op == "call_module":
        module: Any = node.meta.get("module")
        return isinstance(module, _COMPUTING) and not getattr(module, "inplace", False)
    writes = node.target in IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return not writes and not (_name(node).endswith("_") and not _name(node).endswith("__"))


@final
class _Sizes(Interpreter):
    """Runs the modules that nodes call, wherever they are registered, and notes what each node gives."""

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


def _path(source: Node, found: Sizes, axes: dict[Node, int]) -> list[Node]:
    """What leads to a node through moves, as far as the nodes that may be partners and others."""
    path, waiting = [], [source]
    while waiting:
        node = waiting.pop()
        if node in path:
            continue
        path.append(node)
        if node not in axes and moves(node):
            waiting += [arg for arg in node.all_input_nodes if not _asks(node, arg)]
    return [node for node in path if node in axes or (moves(node) and _holds_tensors(found[node]))]


def _moved(node: Node, found: Sizes, numbers: dict[Node, Tensor]) -> Batch:
    """The numbers that a node's values have, -1 for what comes from elsewhere."""
    if node in numbers:
        return numbers[node]
    if not moves(node):
        return tree_map(_from_elsewhere, found[node])

    def moved(arg: Node) -> Batch:
        ids = _moved(arg, found, numbers)
        return ids.contiguous() if isinstance(ids, Tensor) else ids  # so that any view is one

    if node.op == "call_module":
        return node.meta["module"](*map(moved, node.all_input_nodes))
    args, kwargs = map_arg(node.args, moved), map_arg(node.kwargs, moved)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # pyrefly: ignore
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _from_elsewhere(leaf: Leaf) -> Leaf:
    return torch.full(leaf.shape, _ELSEWHERE) if isinstance(leaf, Tensor) else leaf


def _numbered(shape: torch.Size, axis: int, first: int) -> Tensor:
    """The number of its channel for every value."""
    spread = [1] * len(shape)
    spread[axis] = -1
    return torch.arange(first, first + shape[axis]).reshape(spread).expand(shape)


def _holds_tensors(value: Batch) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _cut(values: Tensor, lengths: list[int]) -> list[list[int]]:
    return [part.tolist() for part in values.split(lengths)]


def _asks(user: Node, node: Node) -> bool:
    """Whether a node reads the shape of another, and not its values."""
    if _name(user) in _LIKE:
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
