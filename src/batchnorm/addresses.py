"""Addresses of the user's code for the command line: ``model.py:make_model`` or ``package.module:factory``.

The user's module is imported, and its function called. If that code raises an error, the message names the line in it,
without the rest of the traceback.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm import checkpoint
from batchnorm.checkpoint.states_in_file import apart, dicts, with_state
from batchnorm.checkpoint.stored import State, below, is_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

    import torch
    from torch import Tensor, nn

    from batchnorm.checkpoint import Checkpoint


# code in these folders is not the user's: a message names the last line of a traceback that is outside these folders
_OTHERS_FOLDERS = (
    str(Path(__file__).parent) + os.sep,
    sysconfig.get_path("stdlib") + os.sep,
    sysconfig.get_path("purelib") + os.sep,
    sysconfig.get_path("platlib") + os.sep,
    "<frozen importlib",
)


class AddressError(ValueError):
    """The code at an address raised an error, or returned an object of a wrong type."""


def is_address(target: str) -> bool:
    """Whether a target is the address of code, not the path of a file."""
    return ":" in target and not os.path.exists(target)  # noqa: PTH110 - no error for a name that is too long


def refuse_code(target: str) -> None:
    """Refuse the path of a Python file that no function's name follows.

    Raises:
        ValueError: If ``target`` is an existing Python file.
    """
    if target.endswith(".py") and Path(target).is_file():
        raise ValueError(f"expected a function, got the file {target}. Add its name, for example {target}:make_model")


@contextmanager
def told(name: str) -> Iterator[None]:
    """A block in which an error of the user's code becomes an `AddressError`; our own errors and Ctrl-C stay the same.

    ``sys.exit`` in the user's code becomes one too: otherwise exit code 0 could report success.
    """
    try:
        yield
    except (AddressError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, (ValueError, OSError, ModuleNotFoundError)) and not _is_of_user(error):
            raise
        raise AddressError(_error_text(name, error)) from error


def load(address: str) -> Any:
    """The object that an address names; it is not called.

    Raises:
        ValueError: If ``address`` has another form, or the module has no such name.
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If the module does not exist.
        AddressError: If importing the module raises an error.
    """
    where, _, name = address.rpartition(":")
    is_file = where.endswith(".py")
    if not where or not name or (not is_file and (":" in where or "" in where.split("."))):
        raise ValueError(f"an address is file.py:name or package.module:name, got {address!r}. Add a function's name.")
    module = _from_file(Path(where)) if is_file else _from_module(where)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{where} has no {name!r}. {_offers(module, name)}")
        value = getattr(value, part)
    return value


def model(address: str, settings: Mapping[str, Any] | None = None, weights: str | None = None, state: str = "") -> Any:
    """The model at an address, or the one that the function there makes from ``settings``.

    ``weights`` is the path of a checkpoint, which must fit the model exactly; None loads no weights.
    """
    from torch import nn

    result = load(address)
    if not isinstance(result, nn.Module):
        result = _called(address, result, settings or {})
    elif settings:
        raise ValueError(f"--set needs a function or class, got the model {address}. Leave --set out.")
    if not isinstance(result, nn.Module):
        raise AddressError(f"{address} gives {type(result).__name__}, expected an nn.Module. Return the model itself.")
    if weights is not None:
        load_weights(result, weights, state)
    return result


def data(address: str) -> Any:
    """The loader at an address, or the one that the function or class there returns."""
    from torch import Tensor

    loader = load(address)
    if inspect.isclass(loader) or (callable(loader) and not hasattr(loader, "__iter__")):
        loader = _called(address, loader, {})
    kind = type(loader).__name__
    if isinstance(loader, Tensor):
        raise AddressError(f"{address} gives one {kind}, expected batches. Return a list of batches: [x].")
    if hasattr(loader, "__getitem__") and not hasattr(loader, "__iter__"):
        raise AddressError(
            f"{address} gives {kind}, whose items are examples, expected batches. "
            f"Return DataLoader({kind.lower()}, batch_size=32)."
        )
    if not hasattr(loader, "__iter__") or isinstance(loader, (str, bytes, Mapping)):
        raise AddressError(f"{address} gives {kind}, expected batches. Return a DataLoader or a list.")
    return loader


def parsed(settings: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs as a dict; a value that is no Python literal stays text.

    Raises:
        ValueError: If a pair has no "=", or no valid name before it.
    """
    arguments = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--set needs key=value, got {setting!r}. For example --set width=64.")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments


def states(network: nn.Module, file: Checkpoint) -> Checkpoint:
    """The checkpoint, split into the states that a model can load.

    If a state has exactly the model's layers, the checkpoint is returned unchanged. A dict with exactly the model's
    layers is one state, even if its names look like those of several. Otherwise each module in the file that has
    exactly the model's tensors becomes a state, if there are several such modules.
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
        ValueError: If the file is not a checkpoint, or a name or shape does not fit; the message has the first of
            these differences.
    """
    file, name = chosen(network, path, state)
    part = file.states[name] if name else None
    beside = tuple(_prefixes_beside(file, part))
    model_state = network.state_dict()
    tensors = {k: v for k, v in _tensors(file, part).items() if k in model_state or not k.startswith(beside)}
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


def refuse_state(target: str, weights: str | None, state: str) -> None:
    """Refuse ``state`` if there is no checkpoint."""
    if state and not weights:
        raise ValueError(f"--state selects a state of a checkpoint, got {target} without one. Add --weights FILE.")


def chosen(network: nn.Module, path: str, state: str = "") -> tuple[Checkpoint, str]:
    """The checkpoint, split into the states that a model can load, and the name of the state that is loaded.

    Raises:
        ValueError: If the file has no state named ``state``, or is not a checkpoint.
    """
    file = states(network, checkpoint.read(path))
    return with_state(file, state) if state else (file, _first_that_fits(network, file))


def choice(network: nn.Module, path: str, state: str = "") -> tuple[str, str]:
    """The name of the state that is loaded, and a sentence that says so; "" and "" if there is only one state."""
    file, name = chosen(network, path, state)
    if len(file.states) < 2:
        return "", ""
    return name, f"{path}: loaded {name!r}; it has the states {', '.join(map(repr, file.states))}"


def _tensors(file: Checkpoint, state: State | None) -> dict[str, Tensor]:
    if file.format == "onnx":
        raise ValueError(f"{file.path} is an ONNX model, expected a checkpoint. Pass it without a model.")
    nested: Any = _safetensors(file.path) if file.format == "safetensors" else _torch(file.path)
    for key in state.keys if state else ():
        nested = nested[key]
    if state is None and isinstance(nested, Mapping):  # the place of the tensors is unknown
        nested = next((nested[key] for key in ("state_dict", "model") if key in nested), nested)
    if not isinstance(nested, Mapping):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not an argument
            f"expected a dict of tensors, got a {type(nested).__name__} in {file.path}. "
            "Save a state dict: torch.save(model.state_dict(), path)."
        )
    prefix = state.prefix if state else ""
    names = (name for name in nested if isinstance(name, str) and name.startswith(prefix))
    return {name.removeprefix(prefix): nested[name] for name in names}


def _first_that_fits(network: nn.Module, file: Checkpoint) -> str:
    """The first state with the model's batch norm layers, by name; else the first state; "" if there is none."""
    layers = _layers(network)
    fitting = (name for name, state in file.states.items() if state.layers.keys() == layers)
    return next(fitting, next(iter(file.states), ""))


def _prefixes_beside(file: Checkpoint, state: State | None) -> Iterator[str]:
    """Prefixes of the other states in the same dict whose names begin with this state's prefix, without it."""
    for other in file.states.values():
        if state and other is not state and other.keys == state.keys and other.prefix.startswith(state.prefix):
            yield other.prefix.removeprefix(state.prefix)


def _torch(path: str) -> Any:
    import torch

    try:
        with Path(path).open("rb") as opened:  # with a path, torch would choose the format by the suffix
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: torch.load(weights_only=True) raises {type(error).__name__}. "
            "Save the state dict alone: torch.save(model.state_dict(), path)."
        ) from error


def _safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--weights with a .safetensors file needs safetensors. Run: pip install 'batchnorm[torch]'"
        ) from error
    try:
        return load_file(path)
    except Exception as error:
        message = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path}: safetensors cannot read it: {message}. Copy or save it again.") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give the path of a Python file, as in model.py:make_model.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec: Any = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that pickle and inspect find its classes
    _run(str(path), lambda: spec.loader.exec_module(module))
    return module


def _from_module(name: str) -> ModuleType:
    with suppress(FileNotFoundError):  # the current folder may be gone
        if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds text
            sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise AddressError(_error_text(name, error)) from error
        raise ModuleNotFoundError(
            f"no module {error.name!r} for {name}. "
            f"Run in the project's folder, or give the file: {name.replace('.', '/')}.py:name"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise AddressError(_error_text(name, error)) from error


def _called(address: str, factory: Any, settings: Mapping[str, Any]) -> Any:
    if not callable(factory):
        raise AddressError(f"{address} is a {type(factory).__name__}, expected a function that makes the model.")
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise ValueError(
            f"{address} cannot be called with {dict(settings) or 'no arguments'}: {error}. Give arguments by --set."
        ) from error
    except ValueError:  # builtins may have no signature
        pass
    return _run(address, lambda: factory(**settings))


def _run(name: str, code: Callable[[], Any]) -> Any:
    try:
        return code()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise AddressError(_error_text(name, error)) from error


def _error_text(name: str, error: BaseException) -> str:
    """A sentence about an error, with the line of the user's code that raised it."""
    frames = _of_user(error)
    line = f" at {_shown(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        line = f" at {_shown(error.filename)}:{error.lineno}"
    try:
        message = str(error).partition("\n")[0][:300].rstrip(". ")
    except Exception:  # noqa: BLE001 - the user's error class may fail
        message = ""
    return f"{name} raised {type(error).__name__}{line}{message and f': {message}'}. --debug shows where."


def _shown(path: str) -> str:
    """The path relative to the current folder; unchanged if that cannot be computed."""
    try:
        return os.path.relpath(path)
    except (OSError, ValueError):
        return path


def _of_user(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an error's traceback that are in the user's code, neither in ours nor in installed code."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith(_OTHERS_FOLDERS)]


def _is_of_user(error: BaseException) -> bool:
    """Whether the user's code, or installed code that it called, raised the error, and not this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(_of_user(error)) or not frames[-1].filename.startswith(_OTHERS_FOLDERS[0])


def _offers(module: ModuleType, wanted: str) -> str:
    """A sentence with names in a module that the user may have meant instead of a missing name."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own = [n for n, v in public.items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
    close = difflib.get_close_matches(wanted, public, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"It has {', '.join(sorted(own)[:8])}." if own else "It has no functions."
