"""The names that a pickle may use, and the plain value that stands for each of them.

Nothing is imported by name. Each call in a pickle is looked up in the tables below. If a table has a function of this
package for it, that function is called instead; otherwise the call is refused. Values of known types that say nothing
about batch norm, such as dates, paths and sets, become ``Opaque``, without their content. An object of an unknown class
is made without a call: it becomes an ``Object``, a dict of the attributes in the file.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import replace

from batchnorm.checkpoint.file_tensors import BYTES, Storage, Tensor
from batchnorm.checkpoint.pickled import numpy_arrays, rebuilt_tensors
from batchnorm.checkpoint.pickled.name import Name, in_words
from batchnorm.checkpoint.pickled.unknown_classes import Object, Opaque, Saved
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief

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
_LONGEST_KEY = 64  # values in a tuple as dict key or argument: tuples do not store their hash, so long ones are slow


# the key for the version numbers of a state dict's modules (``_metadata``); no key in a file can equal it
VERSIONS = Opaque("versions")


def find(name: str) -> Name:
    """The entry for a full name, such as "torch.Size"; a Name with ``is_known=False`` if there is no entry."""
    return _TABLE.get(name) or Name(name, is_known=False)


def new(kind: object, arguments: object) -> Saved:
    """An Object for a class, made without ``__init__``; for a known name, the result of its function."""
    if not isinstance(kind, Name) or kind.dtype or type(arguments) is not tuple:
        raise RefusalError("a class and its arguments", in_words(kind))
    if kind.call is not None:
        return _called(kind, arguments)
    result = Object(kind.name)
    if arguments:
        result[0] = arguments  # the tuple, not its values: a pickle that reuses one tuple would fill the memory
    return result


def storage(identity: object) -> Storage:
    """The storage that a persistent id means: ("storage", type, key, location, number of elements)."""
    if not isinstance(identity, tuple) or len(identity) not in {5, 6} or identity[0] != "storage":
        raise RefusalError("a storage as persistent id", in_words(identity))
    _, kind, key, _, numel = identity[:5]
    if len(identity) == 6 and identity[5] is not None:
        raise RefusalError("a storage", "a view of another storage, as torch saved until version 0.4", RESAVE)
    if not isinstance(kind, Name) or kind.dtype not in BYTES:
        raise RefusalError("a type of storage", brief(kind))
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 63:
        raise RefusalError("a storage's key and number of elements", f"{brief(key)} and {brief(numel)}")
    return Storage(key, kind.dtype, numel)


def key(value: object) -> Saved:
    """The dict key for ``value``.

    Plain values, tuples of at most 64 plain values, names and Opaque values are their own keys; integers from 2^64 are
    not plain. Tensors, objects, other tuples and storages get a new key that equals no other key. Any other value is
    refused.
    """
    if _is_plain(value) or isinstance(value, Opaque | Name):
        return value
    if type(value) is tuple and len(value) <= _LONGEST_KEY and all(map(_is_plain, value)):
        return value
    if isinstance(value, Tensor | Object | tuple | Storage):
        return Opaque("key")
    raise RefusalError("plain keys", in_words(value))


def _is_plain(value: object) -> bool:
    # all integers have hashes below 2^61: a dict of large ones with equal hashes would take quadratic time
    return isinstance(value, _PLAIN) and not (isinstance(value, int) and abs(value) >= 1 << 64)


def call(function: object, arguments: object) -> Saved:
    """The result of a call in a pickle; refused unless it is known to be harmless.

    An unknown class becomes an Object if it is called without arguments (a subclass of dict), with one plain value, one
    dict or one short sequence (an enum, a subclass of set), with a default_factory, or with the values and the maxlen
    of a deque. A class of torch must be called with one int, as its enums are. Any other unknown call is refused: it
    might run code.
    """
    if not isinstance(function, Name | Opaque | Object) or type(arguments) is not tuple:
        raise RefusalError("a known name and its arguments", in_words(function))
    if isinstance(function, Opaque) and function.makes and not arguments:
        return Object(function.makes)
    if isinstance(function, Name) and function.call is not None:
        return _called(function, arguments)
    if isinstance(function, Name) and function.is_class and _is_plain_call(function, arguments):
        return new(function, arguments)
    raise RefusalError(
        "tensors and plain values only",
        brief(function.name),
        "Loading the file would run that code, so nothing was loaded. If you trust where the file comes from, "
        f"{_LOAD}. {RESAVE}",
    )


def _called(function: Name, arguments: tuple[Saved, ...]) -> Saved:
    """The result of a known name. For unexpected arguments the error says to save again, not that a file is damaged."""
    try:
        return (function.call or _first)(*arguments)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RefusalError):
            raise
        words = ", ".join(map(in_words, arguments[:4])) or "nothing"
        raise RefusalError("tensors and plain values only", f"{brief(function.name)} of {words}", RESAVE) from error


def _is_plain_call(function: Name, arguments: tuple[Saved, ...]) -> bool:
    if function.package == "torch":  # its enums are called with an int; a class called with a text may write files
        return len(arguments) == 1 and type(arguments[0]) is int
    if not arguments:
        return True
    value, *rest = arguments
    is_short_sequence = type(value) in {tuple, list} and len(value) <= _LONGEST_KEY and all(map(_is_plain, value))
    if rest:  # the values and the maxlen of a deque
        return is_short_sequence and len(rest) == 1 and _is_plain(rest[0])
    return is_short_sequence or _is_plain(value) or type(value) is dict or _makes_values(value)


def _makes_values(value: object) -> bool:
    """Whether ``value`` can be a default_factory: a built-in container or number class, or an unknown class."""
    return isinstance(value, Name) and (value.name in _FACTORIES or value.is_class)


def _first(value: object, *_: object) -> object:
    return value


def _partial(function: object = None, *_: object) -> Opaque:
    """functools.partial; a call of the partial of a class's ``__new__`` (as in protocol 2) makes an object."""
    owner = function.name.removesuffix(".__new__") if isinstance(function, Name) else ""
    is_new = isinstance(function, Name) and owner != function.name and Name(owner, is_known=False).is_class
    return Opaque("functools.partial", is_reported=True, makes=owner if is_new else "")


def _pairs(pairs: Saved = ()) -> dict[Saved, Saved]:
    if isinstance(pairs, Opaque):  # a set, or a range
        return {}
    if isinstance(pairs, dict):
        return pairs
    result = {key(name): value for name, value in pairs}
    if isinstance(pairs, list):
        pairs.clear()  # emptied, so that a pickle that makes many dicts from one list does not fill the memory
    return result


def _of_type(function: object, kind: object, arguments: object, state: object = None, *_: object) -> Saved:
    return rebuilt_tensors.local_part(call(function, arguments), kind, state)


def _bytes(data: object = b"", encoding: object = "", *_: object) -> object:
    """Bytes, or the Latin-1 text that stands for them in protocol 2: its reader makes one byte of each character."""
    return data if encoding in {"", "latin1", "latin-1"} and isinstance(data, str | bytes) else Opaque("_codecs.encode")


def _member(owner: object, name: object = "", *_: object) -> object:
    """getattr: for a name the entry of its attribute, for an object an Opaque, because its attributes are not read."""
    if not isinstance(owner, Name | Object | Opaque) or not isinstance(name, str):
        raise RefusalError("an attribute's owner and name", f"{in_words(owner)} and {brief(name)}")
    return find(f"{owner.name}.{name}") if isinstance(owner, Name) else Opaque(f"{owner.name}.{name}")


def _item(owner: object, *_: object) -> object:
    """A generic type, such as typing.Dict[str, int]."""
    if not isinstance(owner, Name) or owner.package not in {"typing", "collections", "builtins"}:
        raise RefusalError("tensors and plain values only", f"an item of {in_words(owner)}", RESAVE)
    return Opaque("typing")


def _reduced(function: object, values: object = (), *_: object) -> object:
    """A union of types."""
    is_union = isinstance(function, Name) and function.name in {"_operator.or_", "operator.or_"}
    if not is_union or not isinstance(values, tuple) or not all(isinstance(value, Name | Opaque) for value in values):
        raise RefusalError("tensors and plain values only", f"functools.reduce of {in_words(function)}", RESAVE)
    return Opaque("typing")


def _without_init(kind: object, *arguments: object) -> Saved:
    return new(kind, arguments)


def _without_init_ex(kind: object, arguments: object = (), *_: object) -> Saved:
    return new(kind, arguments)


def _reconstructed(kind: object, *base_and_state: object) -> Saved:
    """copyreg._reconstructor(class, base, value): an object of the class with the value of its built-in base."""
    return new(kind, tuple(state for state in base_and_state[1:2] if state is not None))


def _compiled(module: object = None, *_: object) -> Object:
    """The module that torch.compile puts around a module."""
    result = Object("torch._dynamo.eval_frame.OptimizedModule")
    result.update(_parameters={}, _buffers={}, _modules={"_orig_mod": module})
    return result


def _plain_list(*_: object) -> list[Saved]:
    return []


def _sequence(values: object = (), *_: object) -> object:
    """tuple(x) or list(x): a tuple unchanged, an Opaque for other values."""
    return values if isinstance(values, tuple) else Opaque("builtins.list")


def _opaque(name: str, *, is_reported: bool = False) -> Name:
    return Name(name, lambda *_: Opaque(name, is_reported))


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


_GETTERS = ("attrgetter", "itemgetter", "methodcaller")
_FACTORIES = {
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")),
    *(f"collections.{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
}
# the values of these are not used
_OPAQUE = (
    *(f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "complex")),
    "torch.device",
    "torch.serialization._get_layout",
)
# the values of these are not used either, and the report names them as unread
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
# functions that make an unread value: function -> type of the value
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
_CALLS: dict[str, Callable[..., Saved]] = {
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
    "torch._utils._rebuild_tensor": rebuilt_tensors.tensor,
    "torch._utils._rebuild_tensor_v2": rebuilt_tensors.tensor,
    "torch._utils._rebuild_tensor_v3": rebuilt_tensors.tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": rebuilt_tensors.of_numpy,
    "torch._utils._rebuild_xla_tensor": rebuilt_tensors.of_numpy,
    "torch._utils._rebuild_meta_tensor_no_storage": rebuilt_tensors.meta,
    "torch._utils._rebuild_wrapper_subclass": rebuilt_tensors.wrapper,
    "torch._utils._rebuild_sparse_tensor": rebuilt_tensors.sparse,
    "torch._utils._rebuild_nested_tensor": rebuilt_tensors.nested,
    "torch._utils._rebuild_qtensor": rebuilt_tensors.quantized,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._dynamo.eval_frame.OptimizedModule": _compiled,
    "torch.nn.parameter.UninitializedParameter": rebuilt_tensors.uninitialized,
    "torch.nn.parameter.UninitializedBuffer": rebuilt_tensors.uninitialized,
}


def _table() -> dict[str, Name]:
    names = [_opaque(name) for name in _OPAQUE]
    names += [_opaque(name, is_reported=True) for name in _UNREAD]
    names += [replace(_opaque(made, is_reported=True), name=name) for name, made in _MAKERS.items()]
    names += [Name(name) for name in _MARKERS]
    names += [Name(name, function) for name, function in _CALLS.items()]
    names += [Name(f"torch.{dtype}", dtype=dtype) for dtype in BYTES]
    for module in ("torch", "torch.cuda"):
        names += [Name(f"{module}.{kind}Storage", dtype=dtype) for kind, dtype in _STORAGES.items()]
    names += [Name(f"{module}.UntypedStorage", dtype="uint8") for module in ("torch", "torch.storage")]
    return {name.name: name for name in names}


_TABLE = _table()
