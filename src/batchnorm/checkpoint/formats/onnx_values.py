"""Values of the names in an ONNX graph that are constants in the file or in a data file beside it.

Each name belongs to a scope: a graph, a graph inside a node (which can use the names around it), or the body of a local
function (which can use its parameters only). Its value comes from an initializer or a Constant node. Nodes that change
its type or shape, and the arithmetic of quantization and of folded constants, are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, final

import numpy as np
import onnx
from numpy import ndarray
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, numpy_helper

from batchnorm.checkpoint.refusal import RefusalError, brief

# what a name is in a scope: a tensor, what makes it, or why there is none
Named: TypeAlias = "str | TensorProto | Made"
Compute = Callable[..., ndarray]

_EXTERNAL = 1  # TensorProto.DataLocation
_MOST_VALUES = 1 << 22
_LONGEST_CHAIN = 64  # functions in functions from a name to where it comes from
_MOST_NODES = 256  # from a name to its values
_PACKED = {21, 22, 23}  # 4-bit types: UINT4, INT4, FLOAT4E2M1
# fields in which a tensor's values may be, with the types of each; other types have theirs in int32_data
_FIELDS = {1: "float_data", 11: "double_data", 7: "int64_data", 12: "uint64_data", 13: "uint64_data"}


class UnreadError(Exception):
    """Why a name has no value that can be read, and what to do."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """The names that a node sees, with what each of them is; ``given`` are the parameters of a local function."""

    folder: Path
    names: dict[str, Named]
    outer: Scope | None = None
    given: Mapping[str, tuple[Scope, str]] = field(default_factory=dict)
    attributes: Mapping[str, AttributeProto | None] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: GraphProto, folder: Path, outer: Scope | None = None) -> Scope:
        """Of a graph, inside the scope of the node that has it."""
        kind = "an input of the graph" if outer is None else "an input of a graph inside a node"
        names: dict[str, Named] = {value.name: f"{brief(value.name)} is {kind}" for value in graph.input}
        names.update((tensor.name, tensor) for tensor in graph.initializer)
        sparse = (tensor.values.name for tensor in graph.sparse_initializer)
        names.update((name, f"{brief(name)} is stored sparse") for name in sparse)
        names.update(_made(graph.node))
        return cls(folder, names, outer, attributes=outer.attributes if outer else {})

    @classmethod
    def of_call(cls, function: FunctionProto, node: NodeProto, caller: Scope) -> Scope:
        """Of a local function that a node calls."""
        own = {attribute.name: caller.attribute(node, attribute.name) for attribute in node.attribute}
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        names: dict[str, Named] = {name: f"{brief(name)} is left out by the call" for name in function.input}
        made = _made(function.node)
        pairs = zip(function.input, node.input, strict=False)
        given = {name: (caller, actual) for name, actual in pairs if actual and name not in made}
        return cls(caller.folder, {**names, **made}, outer=None, given=given, attributes=defaults | own)

    def attribute(self, node: NodeProto, name: str) -> AttributeProto | None:
        """An attribute of a node, or None; in a function it may be one of the call's."""
        found = next((item for item in node.attribute if item.name == name), None)
        return self.attributes.get(found.ref_attr_name) if found is not None and found.ref_attr_name else found

    def actual(self, name: str) -> tuple[Scope, str]:
        """Where a name comes from: parameters are followed to what the calls give.

        Raises:
            RefusalError: If the calls are in more than 64 of each other.
        """
        scope = self
        for _ in range(_LONGEST_CHAIN):
            while name not in scope.names and scope.outer is not None:
                scope = scope.outer
            if name not in scope.given:
                return scope, name
            scope, name = scope.given[name]
        raise RefusalError(f"at most {_LONGEST_CHAIN} functions in functions", f"more, for {brief(name)}")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A tensor that a node makes, as its output of this number."""

    node: NodeProto
    output: int


def _made(nodes: Iterable[NodeProto]) -> dict[str, Made]:
    return {name: Made(node, i) for node in nodes for i, name in enumerate(node.output) if name}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A name's numbers, as a NumPy array of their type, and the name of the tensor that they come from."""

    numbers: ndarray
    origin: str


def value_of(scope: Scope, name: str) -> Value:
    """A name's numbers.

    Raises:
        UnreadError: If they are no constants, or lie in a file that is not there.
        RefusalError: If they contradict what the file says of them.
    """
    return _value_of(scope, name, iter(range(_MOST_NODES)))


def _value_of(scope: Scope, name: str, left: Iterator[int]) -> Value:
    scope, name = scope.actual(name)
    found = scope.names.get(name, f"nothing in the file is called {brief(name)}")
    if isinstance(found, str):
        raise UnreadError(f"{found}. {_REMEDY}")
    if not isinstance(found, Made):
        return Value(_numbers(found, scope.folder), name)
    node = found.node
    compute = _NODES.get(node.op_type) if node.domain in _DOMAINS and not found.output else None
    if compute is None or next(left, None) is None:
        raise UnreadError(f"{brief(name)} is computed by a {brief(node.op_type)} node. {_REMEDY}")
    inputs = [_value_of(scope, other, left) if other else None for other in node.input]
    with np.errstate(all="ignore"):
        try:
            numbers = compute(_Node(node, scope), *(value.numbers if value else None for value in inputs))
        except RefusalError:
            raise
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            why = f"is computed by a {brief(node.op_type)} node that cannot be followed ({brief(str(error))})"
            raise UnreadError(f"{brief(name)} {why}. {_REMEDY}") from None
    return Value(numbers, inputs[0].origin if inputs and inputs[0] else name)


_REMEDY = "Export with the weights as constants, or examine the checkpoint that it was made from."
_DOMAINS = {"", "ai.onnx", "com.microsoft"}


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """A node's attributes."""

    node: NodeProto
    scope: Scope

    def __getitem__(self, name: str) -> AttributeProto | None:
        return self.scope.attribute(self.node, name)

    def integer(self, name: str, default: int) -> int:
        found = self[name]
        return default if found is None else found.i

    def integers(self, name: str) -> list[int] | None:
        found = self[name]
        return None if found is None else list(found.ints)


def _numbers(tensor: TensorProto, folder: Path) -> ndarray:
    """A TensorProto's values, once their number has been compared with its shape."""
    if any(size < 0 for size in tensor.dims) or (count := math.prod(tensor.dims)) > _MOST_VALUES:
        raise UnreadError(f"{brief(tensor.name)} has more than {_MOST_VALUES:,} values. {_REMEDY}")
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        raise RefusalError(f"numbers in {brief(tensor.name)}", f"ONNX data type {tensor.data_type}") from None
    if tensor.data_location == _EXTERNAL:
        tensor = _beside(tensor, folder, count * kind.itemsize)
    there = _count(tensor, kind.itemsize)
    if there != count and tensor.data_type not in _PACKED:
        raise RefusalError(f"{brief(count)} values in {brief(tensor.name)}", f"{there}")
    return numpy_helper.to_array(tensor)


def _count(tensor: TensorProto, size: int) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data) // size if len(tensor.raw_data) % size == 0 else -1
    return len(getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data")))


def _beside(tensor: TensorProto, folder: Path, size: int) -> TensorProto:
    """The tensor with its values from the data file beside the model."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    place = Path(told.get("location", "another file"))
    lies = f"the values of {brief(tensor.name)} lie in {brief(str(place))}"
    if place.is_absolute() or ".." in place.parts:
        raise UnreadError(f"{lies}, which is not beside the model. Put it there, under a name without folders above.")
    path = folder / place
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise UnreadError(f"{lies}, which is not there. Put it beside the model.")
    start, length = int(told.get("offset", 0) or 0), int(told.get("length", size) or size)
    if start < 0 or length != size:
        raise RefusalError(f"{size} bytes of {brief(tensor.name)} in {brief(str(place))}", f"{length} at {start}")
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise UnreadError(f"{lies}, which is too short. Copy it again.")
    whole = type(tensor)()
    whole.CopyFrom(tensor)
    whole.ClearField("external_data")
    whole.ClearField("data_location")
    whole.raw_data = data
    return whole


def _constant(node: _Node) -> ndarray:
    if (value := node["value"]) is not None:
        return _numbers(value.t, node.scope.folder)
    for name, field_, kind in _PLAIN:
        if (value := node[name]) is not None:
            return np.array(getattr(value, field_), kind)
    raise UnreadError(f"a Constant node holds no numbers. {_REMEDY}")


_PLAIN = (
    ("value_float", "f", "float32"),
    ("value_floats", "floats", "float32"),
    ("value_int", "i", "int64"),
    ("value_ints", "ints", "int64"),
)


def _cast(node: _Node, x: ndarray) -> ndarray:
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(node.integer("to", 0)))


def _dequantized(node: _Node, x: ndarray, scale: ndarray, zero: ndarray | None = None) -> ndarray:
    """(x - zero) * scale, in the scale's type; one scale, or one for each index of an axis."""
    axis = node.integer("axis", 1)
    scale = _along(scale, x, axis)
    shifted = x.astype("float64") - (0 if zero is None else _along(zero, x, axis).astype("float64"))
    return (shifted * scale.astype("float64")).astype(scale.dtype)


def _quantized(node: _Node, x: ndarray, scale: ndarray, zero: ndarray | None = None) -> ndarray:
    """x / scale + zero, rounded to even, as far as the type goes."""
    axis = node.integer("axis", 1)
    kind = np.dtype("uint8") if zero is None else zero.dtype
    limits = np.iinfo(kind)
    shifted = np.rint(x.astype("float64") / _along(scale, x, axis)) + (0 if zero is None else _along(zero, x, axis))
    return np.clip(shifted, limits.min, limits.max).astype(kind)


def _along(values: ndarray, x: ndarray, axis: int) -> ndarray:
    """One value, or one for each index of an axis of x, in a shape that x takes."""
    if values.size == 1:
        return values.reshape(())
    # a vector has one axis only: the default is 1 also where x has no axis 1
    axis = 0 if x.ndim == 1 else axis % x.ndim
    if values.ndim != 1 or values.size != x.shape[axis]:
        raise ValueError(f"{values.shape} scales for {x.shape}")
    return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _reshaped(node: _Node, x: ndarray, shape: ndarray | None = None) -> ndarray:
    sizes = node.integers("shape") if shape is None else shape.ravel().tolist()
    keeps = not node.integer("allowzero", 0)
    return x.reshape([x.shape[i] if size == 0 and keeps else size for i, size in enumerate(sizes or [])])


def _flat(node: _Node, x: ndarray) -> ndarray:
    axis = node.integer("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _squeezed(node: _Node, x: ndarray, axes: ndarray | None = None) -> ndarray:
    chosen = node.integers("axes") if axes is None else axes.ravel().tolist()
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueezed(node: _Node, x: ndarray, axes: ndarray | None = None) -> ndarray:
    chosen = node.integers("axes") if axes is None else axes.ravel().tolist()
    return np.expand_dims(x, tuple(chosen or ()))


def _filled(node: _Node, shape: ndarray) -> ndarray:
    """ConstantOfShape."""
    sizes = _bounded(shape.ravel().tolist())
    value = node["value"]
    return np.full(sizes, np.float32(0) if value is None else _numbers(value.t, node.scope.folder).ravel()[0])


def _expanded(_: _Node, x: ndarray, shape: ndarray) -> ndarray:
    return np.broadcast_to(x, _bounded(np.broadcast_shapes(x.shape, tuple(shape.ravel().tolist()))))


def _joined(node: _Node, *parts: ndarray) -> ndarray:
    _bounded([sum(part.size for part in parts)])
    return np.concatenate(parts, node.integer("axis", 0))


def _bounded(shape: Sequence[int]) -> Sequence[int]:
    if math.prod(shape) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    return shape


def _elementwise(name: str) -> Compute:
    """A NumPy function of one or two arrays, in their type."""

    def compute(_: _Node, *arrays: ndarray) -> ndarray:
        _bounded(np.broadcast_shapes(*(array.shape for array in arrays)))
        return getattr(np, name)(*arrays).astype(arrays[0].dtype)

    return compute


_NODES: dict[str, Compute] = {
    "Cast": _cast,
    "CastLike": lambda _, x, like: x.astype(like.dtype),
    "Concat": _joined,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "DequantizeLinear": _dequantized,
    "Expand": _expanded,
    "Flatten": _flat,
    "Identity": lambda _, x: x,
    "QuantizeLinear": _quantized,
    "Reciprocal": lambda _, x: (1 / x).astype(x.dtype),
    "Reshape": _reshaped,
    "Squeeze": _squeezed,
    "Transpose": lambda node, x: x.transpose(node.integers("perm")),
    "Unsqueeze": _unsqueezed,
    **{name: _elementwise(function) for name, function in {
        "Abs": "absolute", "Add": "add", "Div": "true_divide", "Exp": "exp", "Max": "maximum", "Min": "minimum",
        "Mul": "multiply", "Neg": "negative", "Sqrt": "sqrt", "Sub": "subtract",
    }.items()},
}  # fmt: skip
