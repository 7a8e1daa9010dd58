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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from batchnorm.checkpoint.model_loading import load_weights

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
def as_address_errors(name: str) -> Iterator[None]:
    """A block in which an error of the user's code becomes an `AddressError`.

    Ctrl-C stays the same, and so does a ValueError, OSError or ModuleNotFoundError that this package raises.
    ``sys.exit`` in the user's code becomes an `AddressError` too: otherwise exit code 0 could report success.
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
        ValueError: If ``address`` has neither of the two forms, or the module has no such name.
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
    """The model at an address, or the model that the function there makes from ``settings``.

    ``weights`` is the path of a checkpoint, which must fit the model exactly; None loads no weights. ``state`` selects
    a state of the checkpoint, as in ``load_weights``.

    Raises:
        AddressError: If the code raises an error, or returns an object that is not a model.
        ValueError: If the settings do not fit the function, or the weights do not fit the model.
        Exception: Any error of ``load``, and any error of ``load_weights``.
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
    """The loader at an address, or the loader that the function or class there returns.

    Raises:
        AddressError: If the code raises an error, or returns an object that is not an iterable of batches.
        ValueError: If the function needs arguments.
        Exception: Any error of ``load``.
    """
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


def refuse_state(target: str, weights: str | None, state: str) -> None:
    """Refuse ``state`` if there is no checkpoint."""
    if state and not weights:
        raise ValueError(f"--state selects a state of a checkpoint, got {target} alone. Add --weights FILE.")


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


def _called(address: str, factory: object, settings: Mapping[str, object]) -> object:
    if not callable(factory):
        raise AddressError(f"{address} is a {type(factory).__name__}, expected a function that makes the model.")
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise ValueError(
            f"{address} cannot be called with {dict(settings) or 'no arguments'}: {error}. "
            "Give a model's arguments by --set; a function that returns data must need no arguments."
        ) from error
    except ValueError:  # builtins may have no signature
        pass
    return _run(address, lambda: factory(**settings))


def _run(name: str, code: Callable[[], Any]) -> object:
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
    """Whether the user's code is in an error's traceback, or code outside of this package raised the error."""
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
