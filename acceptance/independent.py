"""Batch norm layers of a file, read a second time: by torch.load, onnx and NumPy, not by the package that is judged.

``layers(path)`` gives one ``Layer`` for each batch norm of a torch or ONNX file, in float64, with what reads its result
where the file holds a graph. No code of a file runs: classes that torch's weights-only loader refuses become inert.
"""

from __future__ import annotations

import collections
import pickle
import sys
import types
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Layer:
    """One batch norm as its file has it; None for what the file lacks."""

    names: tuple[str, ...]  # what it may be called: dotted path, node, output, prefix of its tensors
    gamma: np.ndarray | None
    beta: np.ndarray | None
    mean: np.ndarray | None
    var: np.ndarray | None
    count: int | None = None
    dtype: str = "float32"  # of the variances
    eps: float | None = None
    training: bool = False
    readers: frozenset[str] = frozenset()  # operators that read its result, in a graph
    filters: np.ndarray | None = None  # of the convolution or matrix that feeds it, in a graph: one row a channel
    container: Any = None  # torch: the dictionary that holds its tensors
    keys: dict[str, str] = field(default_factory=dict)  # names of its tensors in that dictionary, or in the graph
    fed: str = ""  # by which value of the graph

    @property
    def channels(self) -> int:
        return len(self.tensors[0])

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation of each channel's result on the data that the statistics describe."""
        return self.gain * np.sqrt(np.maximum(self.var, 0))

    @property
    def gain(self) -> np.ndarray:
        """|gamma| / sqrt(var + eps)."""
        gamma = np.ones(self.channels) if self.gamma is None else np.abs(self.gamma)
        return gamma / np.sqrt(np.maximum(self.var, 0) + self.known_eps)

    @property
    def tensors(self) -> list[np.ndarray]:
        """What there is of mean, variance, gamma and beta."""
        return [values for values in (self.mean, self.var, self.gamma, self.beta) if values is not None]

    @property
    def known_eps(self) -> float:
        """Eps, or torch's default where a file does not tell."""
        return 1e-5 if self.eps is None else self.eps

    @property
    def offset(self) -> np.ndarray:
        return np.zeros(self.channels) if self.beta is None else self.beta


def layers(path: Path) -> list[Layer]:
    """Every batch norm layer of a file; raises what the reader raises for what is neither torch's nor ONNX."""
    return _of_onnx(path) if path.suffix == ".onnx" else _of_torch(path)


def loaded(path: Path) -> Any:
    """What torch.save wrote, without running anything in it."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(f"expected tensors, got a TorchScript program in {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_inert())


def _of_torch(path: Path) -> list[Layer]:
    found = []
    for where, state in _dictionaries(loaded(path), ""):
        stems = {key.rpartition(".")[0] for key in state if isinstance(key, str) and key.endswith("running_var")}
        found += [_torch_layer(where, stem, state) for stem in sorted(stems)]
    return found


def states(value: Any) -> list[dict]:
    """The dictionaries that hold tensors and nothing else."""
    import torch

    found = [state for _, state in _dictionaries(value, "")]
    return [state for state in found if state and all(isinstance(item, torch.Tensor) for item in state.values())]


def _dictionaries(value: Any, where: str):
    """Every dictionary within dictionaries, and inert objects' attributes, by its path."""
    if isinstance(value, _Inert):
        value = value.__dict__
    if isinstance(value, dict):
        yield where, value
        for key, item in list(value.items()):
            yield from _dictionaries(item, f"{where}.{key}".lstrip("."))


def _torch_layer(where: str, stem: str, state: dict) -> Layer:
    keys = {name: f"{stem}.{name}".lstrip(".") for name in TENSORS}
    tensors = {name: state.get(key) for name, key in keys.items()}
    gamma, beta, mean, var = (None if tensors[n] is None else tensors[n].double().numpy() for n in TENSORS[:4])
    count = tensors["num_batches_tracked"]
    return Layer(
        (f"{where}.{stem}".strip("."), stem),
        gamma, beta, mean, var,
        None if count is None else int(count),
        str(tensors["running_var"].dtype).removeprefix("torch."),
        container=state,
        keys={name: key for name, key in keys.items() if key in state},
    )  # fmt: skip


class _Inert:
    """Stands for an object whose class is not run."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _inert() -> types.ModuleType:
    """A pickle module for torch.load whose unpickler builds tensors and containers, and nothing else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name.endswith("Storage"):
                import torch

                return getattr(torch, name)
            if module == "torch._utils" and name in {"_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"}:
                return getattr(sys.modules[module], name)
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            return type(name, (_Inert,), {"__module__": module})

    made = types.ModuleType("inert")
    made.Unpickler, made.load = Unpickler, lambda file, **_: Unpickler(file).load()
    return made


def _of_onnx(path: Path) -> list[Layer]:
    import onnx

    graph = onnx.load(str(path)).graph
    constants = onnx_constants(graph)
    readers = collections.defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    for output in graph.output:
        readers[output.name].add("output")
    makers = {name: node for node in graph.node for name in node.output}
    return [
        replace(_onnx_layer(node, constants, readers), filters=_filters(makers.get(node.input[0]), constants))
        for node in graph.node
        if node.op_type == "BatchNormalization"
    ]


def _filters(node: Any, constants: dict[str, np.ndarray]) -> np.ndarray | None:
    """Weights of a Conv node, one row for each output channel."""
    weights = constants.get(node.input[1]) if node is not None and node.op_type == "Conv" else None
    return None if weights is None else weights.reshape(len(weights), -1).astype(np.float64)


def onnx_constants(graph: Any) -> dict[str, np.ndarray]:
    """Initializers, Constant nodes, and what Identity, Cast and DequantizeLinear make of them."""
    from onnx import numpy_helper

    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        attributes = {item.name: item for item in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            known[node.output[0]] = numpy_helper.to_array(attributes["value"].t)
        elif node.op_type in {"Identity", "Cast"} and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
        elif node.op_type == "DequantizeLinear" and node.input[0] in known:
            scale, *zero = (known[name] for name in node.input[1:])
            known[node.output[0]] = (known[node.input[0]].astype(float) - (zero[0] if zero else 0)) * scale
    return known


def _onnx_layer(node: Any, constants: dict[str, np.ndarray], readers: dict[str, set[str]]) -> Layer:
    values = [constants.get(name) for name in node.input[1:5]]
    attributes = {item.name: item for item in node.attribute}
    stems = (name.rpartition(sign)[0] for name in node.input[1:5] for sign in "./" if sign in name)
    return Layer(
        tuple(filter(None, (node.name, *node.output, *stems))),
        *(None if value is None else value.astype(np.float64) for value in values),
        dtype="float32" if values[3] is None else str(values[3].dtype),
        eps=attributes["epsilon"].f if "epsilon" in attributes else 1e-5,
        training=bool("training_mode" in attributes and attributes["training_mode"].i),
        readers=frozenset(readers[node.output[0]]),
        keys=dict(zip(TENSORS[:4], node.input[1:5], strict=True)),
        fed=node.input[0],
    )  # fmt: skip
