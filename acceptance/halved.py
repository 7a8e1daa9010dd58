"""The same networks in half precision: a torch state as .safetensors, an ONNX graph with float16 statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from independent import loaded, states

FIRST_OPSET = 14  # from which mean and variance may have a type of their own


def halved(path: Path, folder: Path) -> Path | None:
    """A copy in ``folder``; None where the file's format has no such copy, or its numbers do not fit float16."""
    return _halved_graph(path, folder) if path.suffix == ".onnx" else _halved_state(path, folder)


def _halved_state(path: Path, folder: Path) -> Path | None:
    from safetensors.torch import save_file

    state = next((state for state in states(loaded(path)) if any(str(k).endswith("running_var") for k in state)), {})
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if not tensors or not all(bool(value.isfinite().all()) for value in tensors.values()):
        return None
    new = folder / f"{path.stem}.safetensors"
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, str(new))
    return new


def _halved_graph(path: Path, folder: Path) -> Path | None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    names = {name for node in norms for name in node.input[3:5]}
    if not norms or max(item.version for item in model.opset_import if not item.domain) < FIRST_OPSET:
        return None
    for tensor in model.graph.initializer:
        if tensor.name in names:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    new = folder / path.name
    onnx.save(model, str(new))
    return new
