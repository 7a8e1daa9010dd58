"""The arguments for a model's forward, chosen from a batch by signature, annotations and code of the forward.

A batch with names (mapping, named tuple, dataclass) is passed by name or whole, other tuples and lists in part or
whole. If the signature is ambiguous there are two call forms, the likelier one first; a run of the model decides.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import chain
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.model_wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType

    from batchnorm.call_types import Arguments, Batch, Keywords

    Way = tuple[Arguments, Keywords]

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call_forms(model: nn.Module, batch: Batch) -> list[Way]:
    """One or two call forms (positional and keyword arguments) of a model for a batch, the likelier one first."""
    named = names_in(batch)
    if named is not None:
        return _by_name(model, batch, named)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return _in_part(model, batch)
    return [((batch,), {})]


def names_in(batch: Batch) -> dict[str, Batch] | None:
    """The parts of a mapping, named tuple or dataclass by name; None for a batch without names."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_asdict") and not isinstance(batch, PackedSequence):
        return batch._asdict()
    return fields_of(batch) if is_dataclass(batch) and not isinstance(batch, type) else None


def fields_of(value: Batch) -> dict[str, Batch]:
    """The fields of a dataclass that have a value."""
    return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}


def code_of(model: nn.Module) -> object:
    """An object that identifies a forward; None if it is not a Python function."""
    return getattr(inspect.unwrap(unwrapped(model).forward), "__code__", None)


def _by_name(model: nn.Module, batch: Batch, named: dict[str, Batch]) -> list[Way]:
    needed, whole = _needed(model), ((batch,), {})
    if len(needed) == 1 and _takes_whole(model, needed[0], batch, named):
        return [whole]
    is_tuple, is_mapping = isinstance(batch, tuple), isinstance(batch, Mapping)
    if is_mapping and _accepts(model, named):
        return [((), named)] if not _takes_any_name(model) else [((), named), whole]
    if needed and set(needed) <= set(named):
        known = needed if is_tuple else [name for name in named if name in _names(model)]
        return [((), {name: named[name] for name in known}), whole]
    if is_tuple:
        return [(tuple(batch[: max(1, len(needed))]), {}), whole]
    return [whole]


def _in_part(model: nn.Module, batch: tuple | list) -> list[Way]:
    needed = _needed(model)
    inner = batch[0] if len(batch) else None
    # index 0 may mean the first element, or the first example of one tensor
    if len(needed) == 1 and (_is_taken_apart(model, needed[0], [1]) or _is_declared(model, needed[0], batch, inner)):
        whole: list[Way] = [((batch,), {})]
        # a tuple of inputs next to its target
        return [((inner,), {}), *whole] if isinstance(inner, (tuple, list)) and names_in(inner) is None else whole
    if len(needed) > 1 and isinstance(inner, (tuple, list)) and len(inner) >= len(needed):
        return [(tuple(inner[: len(needed)]), {})]
    named = names_in(inner)
    if named is not None and len(batch) >= len(needed) > 1 and not (named.keys() >= set(needed)):
        named = None  # ``inner`` is the first of several inputs
    if named is not None:
        return _by_name(model, inner, named)
    return [(tuple(batch[: max(1, len(needed))]), {})]


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(unwrapped(model).forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _needed(model: nn.Module) -> list[str]:
    """The required arguments of a model's forward that can be positional; empty if its signature is unknown."""
    return [p.name for p in _parameters(model) if p.kind in _BY_PLACE and p.default is p.empty]


def _names(model: nn.Module) -> set[str]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in _parameters(model) if p.kind in by_name}


def _takes_any_name(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(model))


def _accepts(model: nn.Module, named: dict[str, Batch]) -> bool:
    try:
        inspect.signature(unwrapped(model).forward).bind(**named)
    except (TypeError, ValueError):
        return False
    return True


def _takes_whole(model: nn.Module, parameter: str, batch: Batch, named: dict[str, Batch]) -> bool:
    """Whether an argument is the whole batch: by its annotation, or because the code reads the parts by their names."""
    declared = _annotation(model, parameter)
    first = next(iter(named.values()), None)
    if _allows(declared, batch) and not _allows(declared, first):
        return True
    places = range(len(named)) if isinstance(batch, tuple) else ()
    return _is_taken_apart(model, parameter, places, named)


def _is_declared(model: nn.Module, parameter: str, batch: Batch, inner: Batch) -> bool:
    """Whether the annotation of an argument allows the whole tuple or list, but not its first part."""
    declared = _annotation(model, parameter)
    return _allows(declared, batch) and not _allows(declared, inner)


def _annotation(model: nn.Module, parameter: str) -> object:
    try:
        return get_type_hints(inspect.unwrap(unwrapped(model).forward)).get(parameter)
    except Exception:  # noqa: BLE001 - names that exist for type checkers only
        return None


def _allows(declared: object, value: Batch) -> bool:
    """Whether an annotation allows the value's type."""
    if get_origin(declared) in {Union, UnionType}:
        return any(_allows(each, value) for each in get_args(declared))
    kind = get_origin(declared) or declared
    return isinstance(kind, type) and kind is not object and isinstance(value, kind)


def _is_taken_apart(model: nn.Module, parameter: str, keys: Iterable[object], names: Iterable[str] = ()) -> bool:
    """Whether the code of a forward takes an argument apart: by one of the keys, by an attribute, or by unpacking.

    Keys and attributes that a tensor supports too prove nothing.
    """
    code: Any = code_of(model)
    return code is not None and not _read_parts(code, parameter).isdisjoint({*keys, *names, _UNPACKED})


@cache
def _read_parts(code: CodeType, parameter: str) -> frozenset[object]:
    """Keys and attributes that code reads from a variable, except those of a tensor."""
    steps = list(dis.get_instructions(code))
    after = zip(steps, steps[1:], [*steps[2:], steps[-1]], strict=False)
    return frozenset(
        chain.from_iterable(_parts_read(two, three) for one, two, three in after if _is_of(one, parameter))
    )


def _is_of(step: dis.Instruction, parameter: str) -> bool:
    """Whether a step puts the argument on top of the stack; some Python versions load two variables in one step."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return False
    return step.argval == parameter or (isinstance(step.argval, tuple) and step.argval[-1] == parameter)


def _parts_read(step: dis.Instruction, then: dis.Instruction) -> list[object]:
    """What two steps read from the value on top of the stack."""
    if step.opname in {"LOAD_ATTR", "LOAD_METHOD"} and not hasattr(Tensor, step.argval):
        return [step.argval]
    if step.opname in _CONSTANTS and _is_subscript(then) and isinstance(step.argval, (str, int)):
        return [step.argval]
    return [_UNPACKED] if step.opname == "UNPACK_SEQUENCE" else []


def _is_subscript(step: dis.Instruction) -> bool:
    """Whether a step is value[key]; newer Python versions count it among operators such as ``+=``."""
    return step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr == "[]")


_CONSTANTS = {"LOAD_CONST", "LOAD_SMALL_INT"}
_UNPACKED = object()
