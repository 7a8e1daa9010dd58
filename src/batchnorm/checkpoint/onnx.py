"""Batch norm layers of an ONNX file: each BatchNormalization node that no convolution has taken in.

ONNX keeps old statistics with weight ``momentum``, torch's momentum is the new ones' weight: one minus the other.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from batchnorm.checkpoint.refusal import RefusalError, brief
from batchnorm.checkpoint.stored import Checkpoint, Stored
from batchnorm.checkpoint.tensors import BYTES, decoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

# of TensorProto.DataType: our name, and the field that has the values where raw_data has not
_TYPES = {
    1: ("float32", "float_data"),
    10: ("float16", "int32_data"),
    11: ("float64", "double_data"),
    16: ("bfloat16", "int32_data"),
}
_EXTERNAL = 1  # TensorProto.DataLocation
_INPUTS = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
# what other exporters call them
_ENDINGS = (
    *(f".{name}" for name in ("running_mean", "running_var", "weight", "bias")),
    *(f"/{name}" for name in ("moving_mean", "moving_variance", "gamma", "beta")),
)
_MOST_VALUES = 1 << 22
_LONGEST_CHAIN = 16  # Identity nodes from a tensor to its values


def read(path: str, file: BinaryIO) -> Checkpoint:
    """What the graph and the graphs inside it hold that concerns batch norm."""
    model = _parsed(file)
    opset = max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=1)
    layers: dict[str, Stored] = {}
    training: dict[str, None] = {}
    keys: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for node, tensors in _nodes(model.graph):
        name = _unused(_name(node), node, keys)
        layers[name] = _layer(name, node, tensors)
        keys[name] = tuple(node.input[i] for i in _INPUTS.values() if i < len(node.input))
        used.update(keys[name])
        if _is_training(node, opset):
            training[name] = None
    names = tuple(tensor.name for tensor in model.graph.initializer if tensor.name not in used)
    copies = {"": layers} if layers else {}
    return Checkpoint(path, "onnx", layers, copies, names=names, in_train_mode=tuple(training), keys=keys)


def _parsed(file: BinaryIO) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading an ONNX file needs {error.name}, which is not installed. Run: pip install 'batchnorm[onnx]'",
            name=error.name,
        ) from None
    file.seek(0)
    try:
        model = onnx.ModelProto.FromString(file.read())
    except DecodeError:
        raise RefusalError("an ONNX model", "bytes that are no model: it was cut off or changed") from None
    if not model.HasField("graph"):
        raise RefusalError("an ONNX model", "one without a graph")
    return model


def _nodes(graph: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Every BatchNormalization node with the tensors that it can see: constants by their name."""
    waiting: list[tuple[Any, Mapping[str, Any]]] = [(graph, {})]
    while waiting:
        graph, outer = waiting.pop()
        tensors = {**outer, **_constants(graph)}
        for node in graph.node:
            if node.op_type == "BatchNormalization" and node.domain in {"", "ai.onnx"}:
                yield node, tensors
            waiting += [(attribute.g, tensors) for attribute in node.attribute if attribute.HasField("g")]


def _constants(graph: Any) -> dict[str, Any]:
    """Initializers, Constant nodes' values, and for an Identity node the name of what it repeats."""
    constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.input and node.output:
            constants[node.output[0]] = node.input[0]
        if node.op_type == "Constant" and node.output:
            constants.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
    return constants


def _name(node: Any) -> str:
    """The layer's, which its tensors tell, or the node's."""
    for i in (3, 4, 1, 2):
        name = node.input[i] if i < len(node.input) else ""
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is not None:
            return name.removesuffix(ending)
    return node.name or (node.output[0] if node.output else "")


def _unused(name: str, node: Any, keys: Mapping[str, tuple[str, ...]]) -> str:
    """A layer that is called twice is one layer; other layers of the same name get a number."""
    inputs = tuple(node.input[i] for i in _INPUTS.values() if i < len(node.input))
    candidate, number = name, 1
    while candidate in keys and keys[candidate] != inputs:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def _layer(name: str, node: Any, tensors: Mapping[str, Any]) -> Stored:
    found = {
        key: tensor
        for key, i in _INPUTS.items()
        if i < len(node.input) and (tensor := _resolved(node.input[i], tensors)) is not None
    }
    values: dict[str, Any] = {key: _values(tensor) for key, tensor in found.items()}
    if len({len(array) for array in values.values()}) > 1:
        sizes = ", ".join(f"{key} {len(array)}" for key, array in values.items())
        raise RefusalError(f"one size of all tensors of layer {brief(name)}", sizes)
    return Stored(
        name,
        **values,
        dtypes={key: _TYPES[tensor.data_type][0] for key, tensor in found.items()},
        eps=_attribute(node, "epsilon", 1e-5),
        momentum=round(1 - _attribute(node, "momentum", 0.9), 7),
    )


def _resolved(name: str, tensors: Mapping[str, Any]) -> Any:
    for _ in range(_LONGEST_CHAIN):
        value = tensors.get(name)
        if not isinstance(value, str):
            return value
        name = value
    return None


def _values(tensor: Any) -> array:
    """Values of a TensorProto, in float64."""
    if tensor.data_location == _EXTERNAL:
        raise RefusalError(
            "tensors inside the file",
            f"{brief(tensor.name)} in a file beside it",
            "Save it in one file: onnx.save(onnx.load(path), path, save_as_external_data=False).",
        )
    if tensor.data_type not in _TYPES:
        raise RefusalError(f"floats in {brief(tensor.name)}", f"ONNX data type {tensor.data_type}")
    dtype, field = _TYPES[tensor.data_type]
    values = decoded(tensor.raw_data, dtype) if tensor.raw_data else _typed(getattr(tensor, field), dtype)
    count = 1
    for size in tensor.dims:
        count *= size
    if count != len(values):
        raise RefusalError(f"{brief(count)} values in {brief(tensor.name)}", f"{len(values)}")
    return array("d", values)


def _typed(values: Any, dtype: str) -> array:
    """Values of a typed field: half precision has its bits in integers."""
    if BYTES[dtype] > 2:
        return array("d", values)
    return decoded(b"".join((value & 0xFFFF).to_bytes(2, "little") for value in values), dtype)


def _attribute(node: Any, name: str, default: float) -> float:
    """A float as it was written: 1e-5, not the nearest float32's 9.99999974e-06."""
    value = next((item.f for item in node.attribute if item.name == name), default)
    return float(f"{value:.7g}")


def _is_training(node: Any, opset: int) -> bool:
    """Whether a node normalizes by its batch.

    Since version 14 training_mode says so, from 7 on the outputs of training do, before that is_test.
    """
    flags = {item.name: item.i for item in node.attribute if item.name in {"training_mode", "is_test"}}
    if opset >= 14:
        return flags.get("training_mode", 0) != 0
    if opset >= 7:
        return sum(bool(name) for name in node.output) > 1
    return flags.get("is_test", 0) == 0
