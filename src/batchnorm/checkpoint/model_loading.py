"""Loads a state of a checkpoint into a model, strictly, and finds the states of the checkpoint that fit a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from batchnorm import checkpoint
from batchnorm.checkpoint.states_in_file import apart, dicts, with_state
from batchnorm.checkpoint.stored import Checkpoint, State, below, is_below

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def load_weights(network: nn.Module, path: str, state: str = "") -> str:
    """Load a state of a checkpoint into a model, strictly.

    Args:
        network: The model.
        path: The checkpoint.
        state: Path of a state in the checkpoint. By default the first state with the model's batch norm layers; if no
            state has them, the first state.

    Returns:
        The state's name; "" if the file has no batch norm layers.

    Raises:
        ValueError: If the file is not a checkpoint of torch.save or safetensors, has no state named ``state``, or a
            name or shape does not fit. The message has at most two of these differences.
        Exception: FileNotFoundError, PermissionError and ModuleNotFoundError as ``checkpoint.read``.
    """
    file, name = chosen(network, path, state)
    part = file.states[name] if name else None
    beside = tuple(_prefixes_beside(file, part))
    own = network.state_dict()
    tensors = {k: v for k, v in _tensors(file, part).items() if k in own or not k.startswith(beside)}
    try:
        network.load_state_dict(tensors)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        which = f"{name!r} of {path}" if state else path
        raise ValueError(
            f"{which} does not fit {type(network).__name__}: {' '.join(lines[1:3] or lines)[:300]} "
            "Use the weights of this model, or give its arguments by --set."
        ) from error
    return name


def chosen(network: nn.Module, path: str, state: str = "") -> tuple[Checkpoint, str]:
    """The checkpoint, split into the states that a model can load, and the name of the state that is loaded.

    Raises:
        ValueError: If the file has no state named ``state``, or is not a checkpoint.
    """
    file = states(network, checkpoint.read(path))
    return with_state(file, state) if state else (file, _first_that_fits(network, file))


def choice(network: nn.Module, path: str, state: str = "") -> tuple[str, str]:
    """The name of the state that is loaded, and a sentence that says so; "" and "" for fewer than two states."""
    file, name = chosen(network, path, state)
    if len(file.states) < 2:
        return "", ""
    return name, f"{path}: loaded {name!r}; it has the states {', '.join(map(repr, file.states))}"


def states(network: nn.Module, file: Checkpoint) -> Checkpoint:
    """The checkpoint, split into the states that a model can load.

    The checkpoint is returned unchanged in three cases: a state has exactly the model's layers, the model has no batch
    norm layers, or the file is an ONNX file. A dict with exactly the model's layers is one state, even if its names
    look like those of several states. Otherwise each module in the file that has exactly the model's tensors becomes a
    state, if there are several such modules.
    """
    layers = _layers(network)
    if not layers or file.format == "onnx" or any(state.layers.keys() == layers for state in file.states.values()):
        return file
    names_by_dict = dicts(file)
    keys_of_model = next((keys for keys, names in names_by_dict.items() if names.keys() == layers), None)
    if keys_of_model is not None:
        return apart(file, keys_of_model, "") or file
    shapes = _shapes(network.state_dict())
    modules = [
        (keys, prefix)
        for keys, names in names_by_dict.items()
        for prefix in _modules(file, keys, names, layers, shapes)
    ]
    for keys, prefix in modules if len(modules) > 1 else ():
        file = apart(file, keys, prefix) or file
    return file


def _layers(network: nn.Module) -> set[str]:
    statistics = (key for key in network.state_dict() if key.endswith(("running_mean", "running_var")))
    return {key.rpartition(".")[0] for key in statistics}


def _modules(
    file: Checkpoint,
    keys: tuple[str | int, ...],
    names: Iterable[str],
    layers: set[str],
    wanted: Mapping[str, torch.Size | None],
) -> Iterator[str]:
    """Paths of the modules in a dict that have exactly the layers and tensors of a model."""
    first = min(layers)
    ends = [name.removesuffix(f".{first}") for name in names if name.endswith(f".{first}")] if first else list(names)
    paths = [path for path in ends if {below(path, layer) for layer in layers} == set(filter(_inside(path), names))]
    tensors = _shapes(_tensors(file, State(keys, "", {}))) if len(paths) > 1 else {}
    for path in paths:
        if wanted == {k.removeprefix(f"{path}."): shape for k, shape in tensors.items() if k.startswith(f"{path}.")}:
            yield path


def _inside(path: str) -> Callable[[str], bool]:
    return lambda name: is_below(path, name)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size | None]:
    """Shapes of the tensors that a state must have; not those of counters, because torch adds missing counters."""
    without_counters = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    return {name: getattr(value, "shape", None) for name, value in without_counters.items()}


def _first_that_fits(network: nn.Module, file: Checkpoint) -> str:
    """The first state with the model's batch norm layers, by name; else the first state; "" if there is none."""
    layers = _layers(network)
    fitting = (name for name, state in file.states.items() if state.layers.keys() == layers)
    return next(fitting, next(iter(file.states), ""))


def _prefixes_beside(file: Checkpoint, state: State | None) -> Iterator[str]:
    """The prefixes of other states in the same dict that begin with this state's prefix, without this beginning."""
    for other in file.states.values():
        if state and other is not state and other.keys == state.keys and other.prefix.startswith(state.prefix):
            yield other.prefix.removeprefix(state.prefix)


def state_dict_of(file: Checkpoint, name: str) -> dict[str, Any]:
    """A state of a file as a model would load it: without its prefix, and with the versions of its modules.

    Args:
        file: A file of torch.save or safetensors.
        name: A name in ``file.states``; "" if the file has no batch norm layers.

    Raises:
        ValueError: If torch or safetensors cannot read the file, or it has no dict of tensors there.
        ModuleNotFoundError: If torch or safetensors is missing.
    """
    state = file.states[name] if name else None
    nested, prefix = _dict(file, state), state.prefix if state else ""
    result: Any = OrderedDict(_below(nested, prefix))
    if isinstance(versions := getattr(nested, "_metadata", None), dict):
        result._metadata = OrderedDict(_below({"": {}, **versions}, prefix))
    return result


def _tensors(file: Checkpoint, state: State | None) -> dict[str, Tensor]:
    return _below(_dict(file, state), state.prefix if state else "")


def _below(nested: Mapping[str, object], prefix: str) -> dict[str, Any]:
    """The values whose names begin with a prefix, by the rest of their names."""
    names = (name for name in nested if isinstance(name, str) and name.startswith(prefix))
    return {name.removeprefix(prefix): nested[name] for name in names}


def _dict(file: Checkpoint, state: State | None) -> Mapping[str, Any]:
    if file.format == "onnx":
        raise ValueError(f"{file.path} is an ONNX model, expected a checkpoint. Pass it without a model.")
    from batchnorm.checkpoint import tensor_loading

    by_library = tensor_loading.by_safetensors if file.format == "safetensors" else tensor_loading.by_torch
    nested: Any = by_library(file.path)
    for key in state.keys if state else ():
        nested = nested[key]
    if state is None and isinstance(nested, Mapping):  # the place of the tensors is unknown
        nested = next((nested[key] for key in ("state_dict", "model") if key in nested), nested)
    if not isinstance(nested, Mapping):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not an argument
            f"expected a dict of tensors, got a {type(nested).__name__} in {file.path}. "
            "Save a state dict: torch.save(model.state_dict(), path)."
        )
    return nested
