"""The names that a pickle may use, and the plain value that each of them stands for here.

Nothing is imported by name. Each call that a pickle asks for is looked up below and done by a function of this
file, or it is refused. What carries no tensor becomes ``Opaque``: there, but without a value. An object whose class is
not known is no call: it becomes an ``Object``, a dict of what the file gives it.
"""

from __future__ import annotations

import builtins
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from batchnorm.checkpoint.file_tensors import BYTES, Storage, Tensor, unreadable
from batchnorm.checkpoint.pickled import numpy_arrays
from batchnorm.checkpoint.pickled.unknown_classes import Object, Opaque
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief

if TYPE_CHECKING:
    from collections.abc import Callable

_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "QInt32": "qint32",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
_LOAD = "load it with torch.load(path, weights_only=False)"
_PLAIN = (str, int, float, bytes, type(None))
_LONGEST_KEY = 64  # values in a tuple that is a key: its hash is taken anew each time
_SHARDED = {"DTensor", "ShardedTensor", "LocalTensor"}
_WHOLE = (
    "Save whole tensors: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict, or tensor.full_tensor() for each."
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A name: what calling it gives, or what type of numbers it stands for; neither for one that is not known."""

    name: str
    call: Callable[..., Any] | None = None
    dtype: str = ""
    is_known: bool = True

    @property
    def is_class(self) -> bool:
        """Whether it is written like a class of somebody's own: one of Python's library or NumPy may do anything."""
        last = self.name.rpartition(".")[2].lstrip("_")
        return not self.is_known and self.package not in _POWERFUL and last[:1].isupper()

    @property
    def package(self) -> str:
        """The first word."""
        return self.name.partition(".")[0]


# the key under which a state dict's versions are kept: no name of the file's can be equal to it
VERSIONS = Opaque("versions")


def find(name: str) -> Name:
    """What a name, module and name with a dot, stands for."""
    return _TABLE.get(name) or Name(name, is_known=False)


def new(kind: object, arguments: object) -> Any:
    """An object of a class as a pickle makes one, without its ``__init__``; known names are called."""
    if not isinstance(kind, Name) or kind.dtype or type(arguments) is not tuple:
        raise RefusalError("a class and its arguments", told(kind))
    if kind.call is not None:
        return _called(kind, arguments)
    made = Object(kind.name)
    if arguments:
        made[0] = arguments  # not one by one: a pickle may use the same tuple again and again
    return made


def storage(identity: object) -> Storage:
    """The storage that a persistent id means: ("storage", type, key, location, number of elements)."""
    if not isinstance(identity, tuple) or len(identity) not in {5, 6} or identity[0] != "storage":
        raise RefusalError("a storage as persistent id", told(identity))
    _, kind, key, _, numel = identity[:5]
    if len(identity) == 6 and identity[5] is not None:
        raise RefusalError("storages of their own", "a view of another one, as torch wrote until 0.4", RESAVE)
    if not isinstance(kind, Name) or kind.dtype not in BYTES:
        raise RefusalError("a type of storage", brief(kind))
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 63:
        raise RefusalError("a storage's key and number of elements", f"{brief(key)} and {brief(numel)}")
    return Storage(key, kind.dtype, numel)


def key(value: object) -> Any:
    """The key that a dict here has for ``value``: an object's is one of its own, which leads to nothing."""
    if _is_plain(value) or isinstance(value, Opaque | Name):
        return value
    if type(value) is tuple and len(value) <= _LONGEST_KEY and all(map(_is_plain, value)):
        return value
    if isinstance(value, Tensor | Object | tuple | Storage):
        return Opaque("key")
    raise RefusalError("plain keys", told(value))


def _is_plain(value: object) -> bool:
    # larger integers all have hashes below 2^61: a dict of chosen ones takes quadratic time
    return isinstance(value, _PLAIN) and not (isinstance(value, int) and abs(value) >= 1 << 64)


def call(function: object, arguments: object) -> Any:
    """What a known name gives for ``arguments``.

    A class of somebody's own that gets nothing (a dict with its own methods) or one plain value (a member of an enum,
    a set, a dict of its own kind) gives an object. All else that is not known may run code.
    """
    if not isinstance(function, Name | Opaque | Object) or type(arguments) is not tuple:
        raise RefusalError("a known name and its arguments", told(function))
    if isinstance(function, Opaque) and function.makes and not arguments:
        return Object(function.makes)
    if isinstance(function, Name) and function.call is not None:
        return _called(function, arguments)
    if isinstance(function, Name) and function.is_class and _is_plain_call(function, arguments):
        return new(function, arguments)
    raise RefusalError(
        "tensors and plain values only",
        brief(function.name),
        f"Loading it would run its code, so nothing was loaded. If you trust its maker, {_LOAD}. {RESAVE}",
    )


def _called(function: Name, arguments: tuple[Any, ...]) -> Any:
    """What a known name gives; values that it does not know are no damage of the file."""
    try:
        return (function.call or _first)(*arguments)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RefusalError):
            raise
        given = ", ".join(map(told, arguments[:4])) or "nothing"
        raise RefusalError("tensors and plain values only", f"{brief(function.name)} of {given}", RESAVE) from error


def _is_plain_call(function: Name, arguments: tuple[Any, ...]) -> bool:
    if function.package == "torch":  # whose enums have numbers; a class of it that takes text may write files
        return len(arguments) == 1 and type(arguments[0]) is int
    if not arguments:
        return True
    value, *rest = arguments
    plain = type(value) in {tuple, list} and len(value) <= _LONGEST_KEY and all(map(_is_plain, value))
    if rest:  # what a deque has, and at most how many
        return plain and len(rest) == 1 and _is_plain(rest[0])
    return plain or _is_plain(value) or type(value) is dict or _makes_values(value)


def _makes_values(value: object) -> bool:
    """Whether it is what a defaultdict asks for values: a class that is a plain one, or somebody's own."""
    return isinstance(value, Name) and (value.name in _FACTORIES or value.is_class)


def told(value: object) -> str:
    """A value in a message: names and objects by their names."""
    return brief(value.name) if isinstance(value, Name | Opaque | Object) else brief(value)


def _tensor(base: object, offset: Any, size: Any, stride: Any, *rest: object) -> Tensor:
    """``rest`` is requires_grad, hooks, and bits that torch applies when the tensor is used."""
    if not isinstance(base, Storage) or not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise RefusalError("a tensor's storage, size and stride", f"{brief(base)}, {brief(size)} and {brief(stride)}")
    bits = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    why = "stored with the other sign. Save tensor.resolve_neg()." if bits.get("neg") else ""
    tensor = Tensor(base, base.dtype, offset, tuple(size), tuple(stride), why)
    is_empty = not base.numel and tensor.numel
    return replace(tensor, why=f"a tensor that had given its memory back. {_WHOLE}") if is_empty else tensor


def _tensor_v3(base: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Of a type that has no storage of its own; rest is requires_grad, hooks, dtype."""
    tensor = _tensor(base, offset, size, stride)
    if len(rest) < 3 or not isinstance(rest[2], Name) or rest[2].dtype not in BYTES:
        raise RefusalError("a tensor's type", brief(rest[2]) if len(rest) > 2 else "none")
    return replace(tensor, dtype=rest[2].dtype)


def _first(value: object, *_: object) -> object:
    return value


def _partial(function: object = None, *_: object) -> Opaque:
    """A function that waits for its call: of a class's ``__new__``, as protocol 2 makes an object by names."""
    owner = function.name.removesuffix(".__new__") if isinstance(function, Name) else ""
    is_new = isinstance(function, Name) and owner != function.name and Name(owner, is_known=False).is_class
    return Opaque("functools.partial", is_told=True, makes=owner if is_new else "")


def _pairs(pairs: Any = ()) -> dict[Any, Any]:
    if isinstance(pairs, Opaque):  # a set, or a range
        return {}
    if isinstance(pairs, dict):
        return pairs
    result = {key(name): value for name, value in pairs}
    if isinstance(pairs, list):
        pairs.clear()  # a pickle that asks for the same dict again and again fills no memory
    return result


def _of_type(function: object, kind: object, arguments: object, state: object = None, *_: object) -> object:
    """A tensor of a subclass. One that wraps others is its local part, where that is all of it."""
    tensor = call(function, arguments)
    local = _attributes(state).get("_local_tensor")
    if not isinstance(tensor, Tensor) or not tensor.why or not isinstance(local, Tensor):
        return tensor
    placements = _attributes(_attributes(state).get("_spec")).get("placements")
    partial = [value for value in placements if _is_partial(value)] if isinstance(placements, tuple) else []
    if local.size == tensor.size and not partial:
        return local
    part = "a summand" if partial else f"a part of {_shape(local)} out of {_shape(tensor)}"
    return replace(tensor, why=f"{part} of a {_last(kind)}. {_WHOLE}")


def _attributes(state: object) -> dict[Any, Any]:
    """Of an object's state: a dict, or one beside that of its slots."""
    if isinstance(state, tuple):
        return {name: value for part in state[:2] if isinstance(part, dict) for name, value in part.items()}
    return state if isinstance(state, dict) else {}


def _is_partial(placement: object) -> bool:
    return isinstance(placement, Object) and placement.name.endswith("Partial")


def _last(kind: object) -> str:
    return kind.name.rpartition(".")[2] if isinstance(kind, Name) else "tensor subclass"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(brief, tensor.size[:8])) or "1"


def _wrapper(kind: object, dtype: object, size: Any, *_: object) -> Tensor:
    remedy = _WHOLE if _last(kind) in _SHARDED else "Save a plain tensor in its place."
    return _without_numbers(dtype, size, f"a {_last(kind)} without numbers of its own. {remedy}")


def _meta(dtype: object, size: Any, *_: object) -> Tensor:
    return _without_numbers(dtype, size, "on the meta device, without values. Load the weights, then save the model.")


def _uninitialized(*_: object) -> Tensor:
    return unreadable("float32", (), "not initialized. Run one batch through the model, then save it.")


def _sparse(_: object, data: Any, *__: object) -> Tensor:
    size = next((part for part in reversed(data) if _is_size(part)), ()) if isinstance(data, tuple) else ()
    return unreadable("float32", tuple(size), "sparse. Save tensor.to_dense().")


def _nested(*_: object) -> Tensor:
    return unreadable("float32", (), "nested. Save a tensor for each of its parts.")


def _quantized(base: object, _: object, size: Any, *__: object) -> Tensor:
    dtype = base.dtype if isinstance(base, Storage) else "quint8"
    return unreadable(dtype, tuple(size) if _is_size(size) else (), "quantized. Save tensor.dequantize().")


def _without_numbers(dtype: object, size: Any, why: str) -> Tensor:
    if not isinstance(dtype, Name) or dtype.dtype not in BYTES or not _is_size(size):
        raise RefusalError("a tensor's type and size", f"{told(dtype)} and {brief(size)}")
    return unreadable(dtype.dtype, tuple(size), why)


def _is_size(value: object) -> bool:
    return isinstance(value, tuple | list) and all(type(length) is int for length in value)


def _of_numpy(data: object, dtype: object, *_: object) -> Any:
    """A tensor of a device that hands its numbers out as a NumPy array: float32 for types that NumPy has not."""
    if not isinstance(data, Tensor) or not isinstance(dtype, Name) or dtype.dtype not in BYTES:
        return Opaque("torch.Tensor of a device", is_told=True)
    return data


def _bytes(data: object = b"", encoding: object = "", *_: object) -> object:
    """Text is left as it is: what asks for bytes takes one from each character."""
    return data if encoding in {"", "latin1", "latin-1"} and isinstance(data, str | bytes) else Opaque("_codecs.encode")


def _member(owner: object, name: object = "", *_: object) -> object:
    """An attribute: of a class by its full name, which may be known; of an object without a value."""
    if not isinstance(owner, Name | Object | Opaque) or not isinstance(name, str):
        raise RefusalError("an attribute's owner and name", f"{told(owner)} and {brief(name)}")
    return find(f"{owner.name}.{name}") if isinstance(owner, Name) else Opaque(f"{owner.name}.{name}")


def _item(owner: object, *_: object) -> object:
    """A generic type, such as typing.Dict[str, int]."""
    if not isinstance(owner, Name) or owner.package not in {"typing", "collections", "builtins"}:
        raise RefusalError("tensors and plain values only", f"an item of {told(owner)}", RESAVE)
    return Opaque("typing")


def _reduced(function: object, values: object = (), *_: object) -> object:
    """A union of types."""
    is_union = isinstance(function, Name) and function.name in {"_operator.or_", "operator.or_"}
    if not is_union or not isinstance(values, tuple) or not all(isinstance(value, Name | Opaque) for value in values):
        raise RefusalError("tensors and plain values only", f"functools.reduce of {told(function)}", RESAVE)
    return Opaque("typing")


def _without_init(kind: object, *arguments: object) -> Any:
    return new(kind, arguments)


def _without_init_ex(kind: object, arguments: object = (), *_: object) -> Any:
    return new(kind, arguments)


def _reconstructed(kind: object, *base_and_state: object) -> Any:
    """As protocol 1 makes an object: of a class, the built-in one below it, and that one's value."""
    return new(kind, tuple(state for state in base_and_state[1:2] if state is not None))


def _compiled(module: object = None, *_: object) -> Object:
    """What torch.compile makes of a module: a module around it."""
    made = Object("torch._dynamo.eval_frame.OptimizedModule")
    made.update(_parameters={}, _buffers={}, _modules={"_orig_mod": module})
    return made


def _plain_list(*_: object) -> list[Any]:
    return []


def _sequence(values: object = (), *_: object) -> object:
    """A tuple or list of what is one already."""
    return values if isinstance(values, tuple) else Opaque("builtins.list")


def _opaque(name: str, *, is_told: bool = False) -> Name:
    return Name(name, lambda *_: Opaque(name, is_told))


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


_GETTERS = ("attrgetter", "itemgetter", "methodcaller")
_FACTORIES = {
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")),
    *(f"collections.{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
}
# of these no value is wanted
_OPAQUE = (
    *(f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "complex")),
    "torch.device",
    "torch.serialization._get_layout",
)
# nor of these, and it is told that they were left unread
_UNREAD = (
    *(
        f"pathlib{local}.{flavour}"
        for local in ("", "._local")
        for flavour in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "zoneinfo.ZoneInfo._unpickle",
    *(f"builtins.{name}" for name in ("range", "slice", "type")),
    "types.GenericAlias",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.SafeUUID",
    "http.HTTPStatus",
    "re._compile",
    "random.Random",
    "types.SimpleNamespace",
    "array.array",
    "decimal.Context",
    *(f"ipaddress.IPv{v}{name}" for v in (4, 6) for name in ("Address", "Network", "Interface")),
    "torch.Generator",
    "torch._C.Generator",
    "torch._dynamo.eval_frame.DisableContext",
    "torch._dynamo.eval_frame.OptimizeContext",
    *(f"itertools.{name}" for name in ("chain", "count", "cycle", "islice", "repeat")),
    *(f"builtins.{name}" for name in ("enumerate", "iter", "reversed", "zip")),
    *(f"{module}.{name}" for module in ("_operator", "operator") for name in _GETTERS),
    "logging.getLogger",
    *(f"builtins.{name}" for name, value in vars(builtins).items() if _is_exception(value)),
)
# functions that make such a value, and what they make
_MAKERS = {
    "array._array_reconstructor": "array.array",
    "numpy.random._pickle.__bit_generator_ctor": "numpy.random.BitGenerator",
    "numpy.random._pickle.__generator_ctor": "numpy.random.Generator",
    "numpy.random._pickle.__randomstate_ctor": "numpy.random.RandomState",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": "numpy.random.SeedSequence",
    "numpy.random._bit_generator.__pyx_unpickle_SeedSequence": "numpy.random.SeedSequence",
    "numpy.ma.core._mareconstruct": "numpy.ma.MaskedArray",
    "pandas._libs.internals._unpickle_block": "pandas.DataFrame",
    "pandas._libs.tslibs.timestamps._unpickle_timestamp": "pandas.Timestamp",
    "pandas._libs.tslibs.timedeltas._timedelta_unpickle": "pandas.Timedelta",
    "pandas.core.indexes.base._new_Index": "pandas.Index",
}
_MARKERS = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.per_channel_affine",
    "torch.per_channel_affine_float_qparams",
    "torch.per_channel_symmetric",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
)
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda *_: {},
    "collections.deque": _plain_list,
    "builtins.dict": _pairs,
    "builtins.list": lambda *values: _sequence(*values) if values else [],
    "builtins.tuple": _sequence,
    "builtins.bytes": _bytes,
    "_codecs.encode": _bytes,
    "builtins.getattr": _member,
    "operator.getitem": _item,
    "_operator.getitem": _item,
    "functools.partial": _partial,
    "functools.reduce": _reduced,
    "copyreg._reconstructor": _reconstructed,
    "copyreg.__newobj__": _without_init,
    "copyreg.__newobj_ex__": _without_init_ex,
    "numpy.dtype": numpy_arrays.Dtype,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in {
            "multiarray._reconstruct": numpy_arrays.Unbuilt,
            "multiarray.scalar": numpy_arrays.scalar,
            "numeric._frombuffer": numpy_arrays.from_buffer,
        }.items()
    },
    "torch.Size": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _of_numpy,
    "torch._utils._rebuild_xla_tensor": _of_numpy,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._dynamo.eval_frame.OptimizedModule": _compiled,
    "torch.nn.parameter.UninitializedParameter": _uninitialized,
    "torch.nn.parameter.UninitializedBuffer": _uninitialized,
}
# a class of these may do anything when it is called
_POWERFUL = sys.stdlib_module_names | {"numpy"}


def _table() -> dict[str, Name]:
    names = [_opaque(name) for name in _OPAQUE]
    names += [_opaque(name, is_told=True) for name in _UNREAD]
    names += [replace(_opaque(made, is_told=True), name=name) for name, made in _MAKERS.items()]
    names += [Name(name) for name in _MARKERS]
    names += [Name(name, function) for name, function in _CALLS.items()]
    names += [Name(f"torch.{dtype}", dtype=dtype) for dtype in BYTES]
    for module in ("torch", "torch.cuda"):
        names += [Name(f"{module}.{kind}Storage", dtype=dtype) for kind, dtype in _STORAGES.items()]
    names += [Name(f"{module}.UntypedStorage", dtype="uint8") for module in ("torch", "torch.storage")]
    return {name.name: name for name in names}


_TABLE = _table()
