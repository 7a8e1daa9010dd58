"""Tensors without values in a forward pass: an error that names the tensor, instead of torch's unclear error.

A tensor without values may still get values for a pass (FSDP, offloading). Only fake tensors cannot, so before a pass
only a model with fake tensors is refused. During a pass, a module of torch.nn or ours raises an error if one of its
tensors still has no values when its forward begins, because such a forward fetches nothing. If the pass continued, some
operators would end the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from batchnorm.argument_types import require_module
from batchnorm.population.hooks import attached
from batchnorm.population.tensor_memory import AbsenceError, emptiness, is_distributed, is_fake, is_freed, require

if TYPE_CHECKING:
    from collections.abc import Iterable

# words in torch's errors about tensors without values
_ABSENCE_WORDS = re.compile(
    r"not allocated|storage|data pointer|\bmeta\b|fake|DataDependent|DynamicOutputShape", re.IGNORECASE
)
_MIXED_TYPES = re.compile(r"mixed torch\.Tensor and DTensor")


def require_real(model: nn.Module, who: str) -> None:
    """Refuse a model with fake tensors: nothing fetches their values, and a pass would return meaningless numbers.

    Raises:
        TypeError: If ``model`` is not a module.
        AbsenceError: If one of its tensors is fake.
    """
    require_module(model, who)
    tensors = chain(model.named_parameters(), model.named_buffers())
    require({name: tensor for name, tensor in tensors if is_fake(tensor)}, who)


def require_batch(tensors: Iterable[Tensor], who: str) -> None:
    """Refuse a batch that contains a tensor without values.

    Raises:
        AbsenceError: If a tensor is fake, on the meta device, inside of a transform of torch.func, or freed.
    """
    if why := next(filter(None, map(emptiness, tensors)), ""):
        raise AbsenceError(f"{who} needs batches with numbers, got a tensor that {why}.")


@contextmanager
def named_absences(model: nn.Module) -> Iterator[None]:
    """A block that runs a model: an error about missing values names the tensor and a remedy.

    Raises:
        AbsenceError: Instead of the error that missing values caused.
    """
    try:
        with refusing_absences(model):
            yield
    except AbsenceError:
        raise
    except Exception as error:
        if why := _missing_values(model, error):
            raise AbsenceError(f"a pass {why}") from error
        raise


def note_absence(model: nn.Module, error: BaseException | None) -> None:
    """Add a note to the error of a user's pass if a tensor of the model without values caused it."""
    if isinstance(error, Exception) and not isinstance(error, AbsenceError) and (why := _missing_values(model, error)):
        error.add_note(f"batchnorm: the pass {why}")


@contextmanager
def refusing_absences(model: nn.Module) -> Iterator[None]:
    """A block that raises an error when a module of torch.nn or ours begins while its tensors have no values yet.

    Raises:
        AbsenceError: When such a module begins, with the tensor's name and a remedy.
    """
    lacking = [module for module in model.modules() if any(map(emptiness, _own(module)))]
    named = model.named_modules() if lacking else ()
    refusing = ((path, module) for path, module in named if module in lacking and _fetches_nothing(module))
    with attached(module.register_forward_pre_hook(partial(_refuse, path)) for path, module in refusing):
        yield


def _refuse(path: str, module: nn.Module, _: object) -> None:
    absent = {name: tensor for name, tensor in _named(path, module).items() if emptiness(tensor)}
    require({name: absent[name] for name in absent if _is_used(module, name, absent[name])}, "a pass")


def _is_used(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a module of torch.nn reads this tensor; users may attach tensors that it does not read."""
    name = name.rpartition(".")[2]
    if name == "num_batches_tracked":  # only a counter whose memory was freed is missed, and only in train mode
        return module.training and is_freed(tensor)
    return name.startswith(_READ)


_READ = ("weight", "bias", "running_", "in_proj_", "q_proj_", "k_proj_", "v_proj_")


def _fetches_nothing(module: nn.Module) -> bool:
    home = type(module).__module__
    return (home.startswith("torch.nn.modules.") or home == "batchnorm.layers") and "forward" not in vars(module)


def _own(module: nn.Module) -> list[Tensor]:
    attributes = vars(module)  # a scripted module has no tensors among its attributes
    tensors = [*attributes.get("_parameters", {}).values(), *attributes.get("_buffers", {}).values()]
    return [tensor for tensor in tensors if tensor is not None]


def _named(path: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors by their full names in the model."""
    tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {f"{path}.{name}".lstrip("."): tensor for name, tensor in tensors}


def _missing_values(model: nn.Module, error: BaseException) -> str:
    """The cause of a failed pass, as the end of a sentence: a tensor without values, or a DTensor with plain inputs.

    "" if neither caused it.
    """
    names = {module: path for path, module in model.named_modules()}
    module = _innermost(error, names)
    own = _named(names[module], module)
    if _MIXED_TYPES.search(str(error)) and (kind := next((name for name in own if is_distributed(own[name])), "")):
        return (
            f"needs inputs of the kind of {kind!r}, a DTensor, got others. Distribute the inputs, or use the "
            "tensor's full_tensor()."
        )
    below = chain(module.named_parameters(prefix=names[module]), module.named_buffers(prefix=names[module]))
    is_about_absence = _ABSENCE_WORDS.search(f"{type(error).__name__} {error}")  # code may use submodules' tensors
    for name, tensor in chain(own.items(), below if is_about_absence else ()):
        if why := emptiness(tensor):
            return f"needs the numbers of {name!r}, got a tensor that {why}."
    return ""


def _innermost(error: BaseException, paths: dict[nn.Module, str]) -> nn.Module:
    """The innermost module of the model whose code raised the error; the model itself if there is none."""
    return next(iter([module for module in modules_behind(error) if module in paths][::-1]), next(iter(paths)))


def modules_behind(error: BaseException) -> Iterator[nn.Module]:
    """Modules whose code was running when the error was raised, outermost first."""
    trace = error.__traceback__
    while trace is not None:
        if isinstance(owner := trace.tb_frame.f_locals.get("self"), nn.Module):
            yield owner
        trace = trace.tb_next
