"""Batch norm layers of an ONNX file: its BatchNormalization nodes. Layers that the exporter folded are not among them.

In ONNX, ``momentum`` is the weight of the old statistics; in torch, it is the weight of the new ones. They add up to 1.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, final

from google.protobuf.message import DecodeError
from onnx import FunctionProto, ModelProto, NodeProto

from batchnorm.checkpoint.formats.onnx_neighbours import Body, Neighbours, graphs_in
from batchnorm.checkpoint.formats.onnx_values import Scope, UnreadError, Value, value_of
from batchnorm.checkpoint.layers_in_file import in_pairs
from batchnorm.checkpoint.refusal import RefusalError, brief
from batchnorm.checkpoint.stored import Checkpoint, Shared, Stored, with_tensors

_INPUTS = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
# endings of the tensors' names, by torch's exporter and by others
_ENDINGS = (
    *(f".{name}" for name in ("running_mean", "running_var", "weight", "bias")),
    *(f"/{name}" for name in ("moving_mean", "moving_variance", "gamma", "beta")),
)
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_MOST_VALUES = 1 << 24  # of all layers together: 128 MiB of float64
_MOST_NODES = 1 << 20  # of all calls: functions that call functions may multiply the nodes of a small file
_TINY_VARIANCE = 1e-7  # a variance; eps = 1e-3 is 10,000 times as much


def read(path: str, file: BinaryIO) -> Checkpoint:
    """The Checkpoint of an ONNX file: layers in its graph, in graphs inside nodes, and in local functions it calls.

    A tensor that is not a constant in the file, or in a data file beside it, is in ``Stored.unread`` with the reason.
    """
    model = _parsed(file)
    layers = _Layers()
    for node, near, opset in _nodes(model, Path(path).parent):
        name = layers.add(node, near.scope)
        if _is_training(near.scope, node, opset):
            layers.training[name] = None
        layers.add_neighbours(name, node, near)
        layers.add_call(name, node, near.scope)
    return layers.checkpoint(path, model)


@final
class _Layers:
    """The layers of a file by name, and what their nodes say about them."""

    def __init__(self) -> None:
        self.layers: dict[str, Stored] = {}
        self.training: dict[str, None] = {}
        self.keys: dict[str, tuple[str, ...]] = {}
        self.used: set[str] = set()
        self.acts: dict[str, set[str]] = {}
        self.before: dict[str, list[tuple[bool, array[float] | None]]] = {}
        # for each scope and layer: the inputs on which nodes call the layer, with a name for each call. Scopes are
        # separate, because only one of two branches runs
        self.calls: dict[tuple[Scope, tuple[str, ...]], dict[tuple[Scope, str], str]] = {}
        self.called: set[str] = set()
        self.left = _MOST_VALUES

    def add(self, node: NodeProto, scope: Scope) -> str:
        """Read the layer of a node, and return its name."""
        inputs = {key: node.input[i] for key, i in _INPUTS.items() if i < len(node.input) and node.input[i]}
        actual = {key: scope.actual(name)[1] for key, name in inputs.items()}
        values, unread = _values(scope, inputs)
        origins = {key: value.origin for key, value in values.items()}
        name = _unused(_name(node, actual, origins), tuple(actual.values()), self.keys)
        self.left -= sum(value.numbers.size for value in values.values())
        if self.left < 0:
            raise RefusalError(
                f"at most {_MOST_VALUES:,} values in batch norm layers", "more", "Export a part of the model."
            )
        eps, momentum = _number(scope, node, "epsilon", 1e-5), _number(scope, node, "momentum", 0.9)
        self.layers[name] = _layer(name, values, unread, eps, momentum)
        self.keys[name] = tuple(actual.values())
        self.used.update(self.keys[name], origins.values())
        return name

    def add_neighbours(self, name: str, node: NodeProto, near: Neighbours) -> None:
        """Store the activation behind a node, and the norms of the weights before it if a variance is near 0."""
        self.acts.setdefault(name, set()).add(near.activation(node.output[0]) if node.output else "")
        if min(self.layers[name].running_var or (1.0,)) < _TINY_VARIANCE:
            self.before.setdefault(name, []).append(near.norms(node.input[0]))

    def add_call(self, name: str, node: NodeProto, scope: Scope) -> None:
        """Store the input of a node, to count the calls of its layer with different inputs."""
        if not self.layers[name].is_initial:  # an exporter may store equal initial tensors once
            inputs = self.calls.setdefault((scope, self.keys[name]), {})
            inputs.setdefault(scope.actual(node.input[0]), name if name not in self.called else _label(node))
            self.called.add(name)

    def checkpoint(self, path: str, model: ModelProto) -> Checkpoint:
        """The Checkpoint of all added layers."""
        acts, before = self.acts.items(), self.before.items()
        return Checkpoint(
            path,
            "onnx",
            self.layers,
            {"": self.layers} if self.layers else {},
            names=tuple(tensor.name for tensor in model.graph.initializer if tensor.name not in self.used),
            in_train_mode=tuple(self.training),
            keys=self.keys,
            activations={name: act for name, (act, *others) in acts if act and not others},
            filters={name: norms for name, ((is_known, norms), *others) in before if is_known and not others},
            shared=tuple(Shared(tuple(each.values()), is_called=True) for each in self.calls.values() if len(each) > 1),
        )


def _parsed(file: BinaryIO) -> ModelProto:
    file.seek(0)
    try:
        model = ModelProto.FromString(file.read())
    except DecodeError:
        raise RefusalError("an ONNX model", "other bytes: the file was cut off or changed") from None
    if not model.HasField("graph"):
        raise RefusalError("an ONNX model", "a model without a graph")
    return model


def _nodes(model: ModelProto, folder: Path) -> Iterator[tuple[NodeProto, Neighbours, int]]:
    """Every BatchNormalization node, the Neighbours of its graph, and the version of ONNX's operators that it uses."""
    functions = {(entry.domain, entry.name): entry for entry in model.functions}
    waiting: list[tuple[Body, Scope, int]] = [(model.graph, Scope.of(model.graph, folder), _opset(model))]
    left = _MOST_NODES
    while waiting:
        body, scope, opset = waiting.pop()
        left -= len(body.node)
        if left < 0:
            raise RefusalError(f"at most {_MOST_NODES:,} nodes", "more, by functions that call functions")
        near = Neighbours(body, scope)
        inner: list[tuple[Body, Scope, int]] = []
        for node in body.node:
            if node.op_type == "BatchNormalization" and node.domain in {"", "ai.onnx"}:
                yield node, near, opset
            elif (function := functions.get((node.domain, node.op_type))) is not None:
                inner.append((function, Scope.of_call(function, node, scope), _opset(function)))
            inner += [(graph, Scope.of(graph, folder, scope), opset) for graph in graphs_in(node)]
        waiting += reversed(inner)


def _opset(model: ModelProto | FunctionProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=1)


def _values(scope: Scope, inputs: Mapping[str, str]) -> tuple[dict[str, Value], dict[str, str]]:
    """The values of a node's tensors, and for tensors that cannot be read the reasons."""
    values, unread = {}, {}
    for key, name in inputs.items():
        try:
            value = value_of(scope, name)
            if str(value.numbers.dtype) not in _FLOATS:
                raise RefusalError(f"floats in {brief(value.origin)}", f"{value.numbers.dtype}")
            values[key] = value
        except UnreadError as error:
            unread[key] = str(error)
    unread = in_pairs(unread)
    return {key: value for key, value in values.items() if key not in unread}, unread


def _name(node: NodeProto, actual: Mapping[str, str], origins: Mapping[str, str]) -> str:
    """The name of the first tensor with a known ending, without this ending; else the node's name or first output."""
    for key in ("running_mean", "running_var", "weight", "bias"):
        for name in (actual.get(key, ""), origins.get(key, "")):
            ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
            if ending is not None:
                return name.removesuffix(ending)
    return _label(node)


def _label(node: NodeProto) -> str:
    return node.name or (node.output[0] if node.output else "")


def _unused(name: str, tensors: tuple[str, ...], keys: Mapping[str, tuple[str, ...]]) -> str:
    """The name, or the name with a number if a layer with other tensors has it. A layer called twice keeps its name."""
    candidate, number = name, 1
    while candidate in keys and keys[candidate] != tensors:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def _layer(name: str, values: Mapping[str, Value], unread: Mapping[str, str], eps: float, momentum: float) -> Stored:
    numbers = {key: array("d", value.numbers.ravel().astype("float64")) for key, value in values.items()}
    if len({len(array) for array in numbers.values()}) > 1:
        sizes = ", ".join(f"{key} {len(array)}" for key, array in numbers.items())
        raise RefusalError(f"tensors of one size in layer {brief(name)}", sizes)
    dtypes = {key: str(value.numbers.dtype) for key, value in values.items()}
    stored = Stored(name, dtypes=dtypes, eps=eps, momentum=round(1 - momentum, 7), unread=unread)
    return with_tensors(stored, numbers)


def _number(scope: Scope, node: NodeProto, name: str, default: float) -> float:
    """A float attribute, rounded to 7 digits: 1e-5, not 9.99999974e-06, which is the nearest float32."""
    attribute = scope.attribute(node, name)
    return float(f"{default if attribute is None else attribute.f:.7g}")


def _is_training(scope: Scope, node: NodeProto, opset: int) -> bool:
    """Whether a node is in training mode, in which it normalizes by its batch.

    ``opset`` is the version of ONNX's operators. From 14 on, the attribute training_mode shows it. From 7 to 13, more
    than one output shows it. Before 7, the attribute is_test is 0 or missing.
    """
    flags = {
        name: value.i for name in ("training_mode", "is_test") if (value := scope.attribute(node, name)) is not None
    }
    if opset >= 14:
        return flags.get("training_mode", 0) != 0
    if opset >= 7:
        return sum(bool(name) for name in node.output) > 1
    return flags.get("is_test", 0) == 0
