"""The constant values of names in an ONNX graph; they are in the file or in a data file beside it.

Each name belongs to a scope: a graph, a graph inside a node (which can use the names around it), or the body of a local
function (which can use its parameters only). A value comes from an initializer or a Constant node. Nodes that change
its type or shape are computed, and so is the arithmetic of quantization and of folded constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TypeAlias, final

import numpy as np
import onnx
from numpy import ndarray
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, numpy_helper

from batchnorm.checkpoint.refusal import RefusalError, brief

# what a name is in a scope: a tensor, the node that makes it, or a text that says why it has no value
Named: TypeAlias = "str | TensorProto | Made"
Compute = Callable[..., ndarray]

_EXTERNAL = 1  # TensorProto.DataLocation
_MOST_VALUES = 1 << 22  # of one tensor
_LONGEST_CHAIN = 64  # nested calls of functions through which a parameter is followed
_MOST_NODES = 256  # nodes that are computed for one value
_PACKED = {21, 22, 23}  # 4-bit types: UINT4, INT4, FLOAT4E2M1
# for each data type of ONNX, the field with a tensor's values; int32_data for other types
_FIELDS = {1: "float_data", 11: "double_data", 7: "int64_data", 12: "uint64_data", 13: "uint64_data"}


class UnreadError(Exception):
    """Raised with the reason why the value of a name cannot be read, and what to do."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """The names that a node can use, and what each is; ``given`` has the arguments for parameters of a function."""

    folder: Path
    names: dict[str, Named]
    outer: Scope | None = None
    given: Mapping[str, tuple[Scope, str]] = field(default_factory=dict)
    attributes: Mapping[str, AttributeProto | None] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: GraphProto, folder: Path, outer: Scope | None = None) -> Scope:
        """The scope of a graph; ``outer`` is the scope of the node that contains it."""
        kind = "an input of the graph" if outer is None else "an input of a graph inside a node"
        names: dict[str, Named] = {value.name: f"{brief(value.name)} is {kind}" for value in graph.input}
        names.update((tensor.name, tensor) for tensor in graph.initializer)
        sparse = (tensor.values.name for tensor in graph.sparse_initializer)
        names.update((name, f"{brief(name)} is stored sparse") for name in sparse)
        names.update(_made(graph.node))
        return cls(folder, names, outer, attributes=outer.attributes if outer else {})

    @classmethod
    def of_call(cls, function: FunctionProto, node: NodeProto, caller: Scope) -> Scope:
        """The scope of a local function that a node calls."""
        own = {attribute.name: caller.attribute(node, attribute.name) for attribute in node.attribute}
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        names: dict[str, Named] = {name: f"{brief(name)} is left out by the call" for name in function.input}
        made = _made(function.node)
        pairs = zip(function.input, node.input, strict=False)
        given = {name: (caller, actual) for name, actual in pairs if actual and name not in made}
        return cls(caller.folder, {**names, **made}, outer=None, given=given, attributes=defaults | own)

    def attribute(self, node: NodeProto, name: str) -> AttributeProto | None:
        """An attribute of a node, None if the node lacks it. In a function it may refer to an attribute of the call."""
        own = next((item for item in node.attribute if item.name == name), None)
        return self.attributes.get(own.ref_attr_name) if own is not None and own.ref_attr_name else own

    def actual(self, name: str) -> tuple[Scope, str]:
        """The scope and name behind a name: a parameter is followed to the argument of the call.

        Raises:
            RefusalError: If more than 64 calls are nested.
        """
        scope = self
        for _ in range(_LONGEST_CHAIN):
            while name not in scope.names and scope.outer is not None:
                scope = scope.outer
            if name not in scope.given:
                return scope, name
            scope, name = scope.given[name]
        raise RefusalError(f"at most {_LONGEST_CHAIN} nested calls of functions", f"more, for {brief(name)}")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A tensor that a node makes; ``output`` is the index of the node's output."""

    node: NodeProto
    output: int


def _made(nodes: Iterable[NodeProto]) -> dict[str, Made]:
    return {name: Made(node, i) for node in nodes for i, name in enumerate(node.output) if name}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A name's numbers as a NumPy array, and the name of the tensor that they come from."""

    numbers: ndarray
    origin: str


def value_of(scope: Scope, name: str) -> Value:
    """A name's numbers.

    Raises:
        UnreadError: If the numbers are not constant, too many, or not in the data file that should have them.
        RefusalError: If they contradict the type or shape that the file gives, or if more than 64 calls are nested.
    """
    return _value_of(scope, name, iter(range(_MOST_NODES)))


def _value_of(scope: Scope, name: str, left: Iterator[int]) -> Value:
    scope, name = scope.actual(name)
    entry = scope.names.get(name, f"nothing in the file is called {brief(name)}")
    if isinstance(entry, str):
        raise UnreadError(f"{entry}. {_REMEDY}")
    if not isinstance(entry, Made):
        return Value(_numbers(entry, scope.folder), name)
    node = entry.node
    compute = _NODES.get(node.op_type) if node.domain in _DOMAINS and not entry.output else None
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
    """The attributes of a node, by name; None for a name that the node does not have."""

    node: NodeProto
    scope: Scope

    def __getitem__(self, name: str) -> AttributeProto | None:
        return self.scope.attribute(self.node, name)

    def integer(self, name: str, default: int) -> int:
        attribute = self[name]
        return default if attribute is None else attribute.i

    def integers(self, name: str) -> list[int] | None:
        attribute = self[name]
        return None if attribute is None else list(attribute.ints)


def _numbers(tensor: TensorProto, folder: Path) -> ndarray:
    """The values of a TensorProto, after their number was compared with its shape."""
    if any(size < 0 for size in tensor.dims) or (count := math.prod(tensor.dims)) > _MOST_VALUES:
        raise UnreadError(f"{brief(tensor.name)} has a negative size or more than {_MOST_VALUES:,} values. {_REMEDY}")
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        raise RefusalError(f"numbers in {brief(tensor.name)}", f"ONNX data type {tensor.data_type}") from None
    if tensor.data_location == _EXTERNAL:
        tensor = _beside(tensor, folder, count * kind.itemsize)
    stored = _count(tensor, kind.itemsize)
    if stored != count and tensor.data_type not in _PACKED:
        raise RefusalError(f"{brief(count)} values in {brief(tensor.name)}", f"{stored}")
    return numpy_helper.to_array(tensor)


def _count(tensor: TensorProto, size: int) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data) // size if len(tensor.raw_data) % size == 0 else -1
    return len(getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data")))


def _beside(tensor: TensorProto, folder: Path, size: int) -> TensorProto:
    """A copy of the tensor with its values from the data file beside the model."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    place = Path(external.get("location", "another file"))
    where = f"the values of {brief(tensor.name)} are in {brief(str(place))}"
    if place.is_absolute() or ".." in place.parts:
        raise UnreadError(f"{where}, which is not in the model's folder. Export the model and its data to one folder.")
    path = folder / place
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise UnreadError(f"{where}, which is missing or a link to another folder. Put the file beside the model.")
    start, length = int(external.get("offset", 0) or 0), int(external.get("length", size) or size)
    if start < 0 or length != size:
        raise RefusalError(f"{size} bytes of {brief(tensor.name)} in {brief(str(place))}", f"{length} at {start}")
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise UnreadError(f"{where}, which is too short. Copy it again.")
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
    raise UnreadError(f"a Constant node contains no numbers. {_REMEDY}")


_PLAIN = (
    ("value_float", "f", "float32"),
    ("value_floats", "floats", "float32"),
    ("value_int", "i", "int64"),
    ("value_ints", "ints", "int64"),
)


def _cast(node: _Node, x: ndarray) -> ndarray:
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(node.integer("to", 0)))


def _dequantized(node: _Node, x: ndarray, scale: ndarray, zero: ndarray | None = None) -> ndarray:
    """(x - zero) * scale, in the scale's type; ``scale`` is one number, or one number for each index of an axis."""
    axis = node.integer("axis", 1)
    scale = _along(scale, x, axis)
    shifted = x.astype("float64") - (0 if zero is None else _along(zero, x, axis).astype("float64"))
    return (shifted * scale.astype("float64")).astype(scale.dtype)


def _quantized(node: _Node, x: ndarray, scale: ndarray, zero: ndarray | None = None) -> ndarray:
    """x / scale, rounded to even, plus zero; limited to the range of the type."""
    axis = node.integer("axis", 1)
    kind = np.dtype("uint8") if zero is None else zero.dtype
    limits = np.iinfo(kind)
    shifted = np.rint(x.astype("float64") / _along(scale, x, axis)) + (0 if zero is None else _along(zero, x, axis))
    return np.clip(shifted, limits.min, limits.max).astype(kind)


def _along(values: ndarray, x: ndarray, axis: int) -> ndarray:
    """``values``, one number or one for each index of an axis of x, in a shape that broadcasts with x."""
    if values.size == 1:
        return values.reshape(())
    # for a vector the axis is 0: the attribute's default is 1 for vectors too
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
    """The result of ConstantOfShape: a tensor of this shape, filled with one value."""
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
    """A NumPy function of arrays, in the type of the first; "Max" and "Min" accept any number of arrays."""
    function = getattr(np, name)

    def compute(_: _Node, *arrays: ndarray) -> ndarray:
        _bounded(np.broadcast_shapes(*(array.shape for array in arrays)))
        result = function(arrays[0]) if function.nin == 1 else reduce(function, arrays)
        return result.astype(arrays[0].dtype)

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
