"""The weights before a node of an ONNX graph, and the activation behind it, by our name for it ("relu").

A tensor has no activation behind it if it is also an output of a graph, if a graph inside a node reads it, or if
several kinds of nodes read it. Clip with the minimum 0 is ReLU, and with 0 and 6 ReLU6; its limits must be constants.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cached_property
from typing import final

import numpy as np
from numpy import ndarray
from onnx import FunctionProto, GraphProto, NodeProto

from batchnorm.checkpoint.formats.onnx_values import Made, Scope, UnreadError, value_of
from batchnorm.checkpoint.refusal import RefusalError, brief

Body = GraphProto | FunctionProto

# operators whose name is the activation's; not HardSigmoid, whose slope differs from torch's
_NAMES = {name: name.lower() for name in ("Relu", "Elu", "Gelu", "HardSwish", "Mish", "Sigmoid", "Softplus", "Tanh")}
_CLIPS: dict[tuple[float | None, float | None], str] = {(0.0, None): "relu", (0.0, 6.0): "relu6"}
_UNBOUNDED = 1e30
_DOMAINS = {"", "ai.onnx"}
_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_PRODUCTS = ("Conv", "Gemm", "MatMul", "Einsum")  # in the names of other linear operators, such as QLinearConv
# operators that keep each channel's values, up to rounding or an added constant
_KEEPING_OPERATORS = {"Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Add", "Sub"}
_MOVING_OPERATORS = {"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_LONGEST_CHAIN = 16


@final
class Neighbours:
    """Answers what is before and behind the tensors of one graph or local function."""

    def __init__(self, body: Body, scope: Scope) -> None:
        self._body, self.scope = body, scope

    def activation(self, tensor: str) -> str:
        """The activation that all readers of a tensor apply; "" if there is none."""
        kind, *others = self._readers.get(tensor) or {""}
        return "" if others else kind

    def norms(self, tensor: str) -> tuple[bool, array[float] | None]:
        """Whether it is known which weights make a tensor, and the norm of each row of these weights.

        The norms are None if the tensor is an input or another kind of node makes it, and if the weights are unknown.
        """
        try:
            node, scope, is_moved = self._maker(tensor)
            if node is None or node.domain not in _DOMAINS:
                return node is None, None
            if is_moved or node.op_type not in _LINEAR:
                return not any(name in node.op_type for name in _PRODUCTS), None
            weights = value_of(scope, node.input[1]).numbers
        except (UnreadError, RefusalError, IndexError):
            return False, None
        kind = node.op_type
        is_grouped = kind == "ConvTranspose" and _integer(scope, node, "group", 1) != 1
        if is_grouped or weights.ndim < 2 or (kind == "MatMul" and weights.ndim > 2):
            return False, None
        by_row = kind == "Conv" or (kind == "Gemm" and _integer(scope, node, "transB", 0) != 0)
        return True, _norms(weights, 0 if by_row else 1)

    @cached_property
    def _readers(self) -> dict[str, set[str]]:
        """For each tensor the activations that read it; "" stands for other readers."""
        outputs = (output if isinstance(output, str) else output.name for output in self._body.output)
        readers: dict[str, set[str]] = {name: {""} for name in outputs}
        for node in self._body.node:
            for place, name in enumerate(node.input):
                readers.setdefault(name, set()).add(self._activation(node) if place == 0 else "")
            for name in _read_inside(node):
                readers.setdefault(name, set()).add("")
        return readers

    def _maker(self, tensor: str) -> tuple[NodeProto | None, Scope, bool]:
        """The node that makes a tensor's values (None for an input), its scope, and whether other nodes moved them."""
        scope, name = self.scope.actual(tensor)
        is_moved = False
        for _ in range(_LONGEST_CHAIN):
            made = scope.names.get(name)
            if not isinstance(made, Made):
                return None, scope, is_moved
            if not (kept := _kept(made.node, scope)):
                return made.node, scope, is_moved
            is_moved |= made.node.op_type in _MOVING_OPERATORS
            scope, name = scope.actual(kept)
        raise UnreadError(f"{brief(tensor)} is passed on more than {_LONGEST_CHAIN} times")

    def _activation(self, node: NodeProto) -> str:
        if node.domain not in _DOMAINS:
            return ""
        if node.op_type == "Clip":
            return self._clip(node)
        if node.op_type == "Elu" and (alpha := self.scope.attribute(node, "alpha")) is not None and alpha.f != 1:
            return ""
        return _NAMES.get(node.op_type, "")

    def _clip(self, node: NodeProto) -> str:
        # the limits are attributes until version 10 of the operators, then inputs
        limits = [None if (limit := self.scope.attribute(node, name)) is None else limit.f for name in ("min", "max")]
        for place, name in enumerate(node.input[1:3]):
            if name and (constant := self._constant(name)) is None:
                return ""
            limits[place] = constant if name else limits[place]
        low, high = limits
        return _CLIPS.get((low, None if high is None or high > _UNBOUNDED else high), "")

    def _constant(self, name: str) -> float | None:
        try:
            numbers = value_of(self.scope, name).numbers
        except (UnreadError, RefusalError):
            return None
        return float(numbers.ravel()[0]) if numbers.size == 1 else None


def graphs_in(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node: branches and bodies of loops."""
    for item in node.attribute:
        yield from (*([item.g] if item.HasField("g") else ()), *item.graphs)


def _read_inside(node: NodeProto) -> Iterator[str]:
    """Names that graphs inside a node read or return. Some of them may belong to this graph."""
    waiting = list(graphs_in(node))
    while waiting:
        graph = waiting.pop()
        yield from (output.name for output in graph.output)
        for inner in graph.node:
            yield from inner.input
            waiting += graphs_in(inner)


def _kept(node: NodeProto, scope: Scope) -> str:
    """The input whose values a node passes on; for a sum, the input that is not constant.

    "" if the node makes new values, or if not exactly one input of a sum is not constant.
    """
    if node.domain not in _DOMAINS or node.op_type not in _KEEPING_OPERATORS | _MOVING_OPERATORS:
        return ""
    if node.op_type not in {"Add", "Sub"}:
        return next(iter(node.input), "")
    made = [name for name in node.input if not _is_constant(scope, name)]
    return made[0] if len(made) == 1 else ""


def _is_constant(scope: Scope, name: str) -> bool:
    try:
        value_of(scope, name)
    except (UnreadError, RefusalError):
        return False
    return True


def _norms(weights: ndarray, axis: int) -> array[float]:
    """For each index of ``axis``, the root of the sum of the squared weights."""
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype("float64")
    with np.errstate(over="ignore"):
        return array("d", np.sqrt((rows**2).sum(1)).tolist())


def _integer(scope: Scope, node: NodeProto, name: str, default: int) -> int:
    attribute = scope.attribute(node, name)
    return default if attribute is None else attribute.i
