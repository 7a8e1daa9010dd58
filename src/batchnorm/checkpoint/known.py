"""The names that a pickle may use, and the plain value that each of them stands for here.

Nothing is imported by name. Each call that a pickle asks for is looked up below and done by a function of this
file, or it is refused. What carries no tensor becomes ``Opaque``: there, but without a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief
from batchnorm.checkpoint.tensors import BYTES, Storage, Tensor

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


@final
@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A value of a known kind that says nothing about batch norm: a device, a numpy scalar, a sparse tensor."""

    name: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A known name: what calling it gives, or what type of numbers it stands for."""

    name: str
    call: Callable[..., Any] | None = None
    dtype: str = ""


def find(name: str, *, whole: bool) -> Name:
    """The known name, or the refusal that names it.

    Args:
        name: Module and name, with a dot.
        whole: The file is this one object.
    """
    if name in _TABLE:
        return _TABLE[name]
    expected, got = ("a state dict", "a whole pickled object, ") if whole else ("tensors and plain values only", "")
    raise RefusalError(
        expected,
        got + brief(name),
        f"Loading it would run its code, so nothing was loaded. If you trust its maker, {_LOAD}. {RESAVE}",
    )


def storage(identity: object) -> Storage:
    """The storage that a persistent id means: ("storage", type, key, location, number of elements)."""
    if not isinstance(identity, tuple) or len(identity) not in {5, 6} or identity[0] != "storage":
        raise RefusalError("a storage as persistent id", brief(identity))
    _, kind, key, _, numel = identity[:5]
    if len(identity) == 6 and identity[5] is not None:
        raise RefusalError("storages of their own", "a view of another one, as torch wrote until 0.4", RESAVE)
    if not isinstance(kind, Name) or kind.dtype not in BYTES:
        raise RefusalError("a type of storage", brief(kind))
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 63:
        raise RefusalError("a storage's key and number of elements", f"{brief(key)} and {brief(numel)}")
    return Storage(key, kind.dtype, numel)


def is_key(value: object) -> bool:
    """Whether ``value`` may be a key of a dict: nothing that hashes by its contents without end."""
    return _is_plain(value) or isinstance(value, Opaque | Name) or (type(value) is tuple and all(map(_is_plain, value)))


def _is_plain(value: object) -> bool:
    # larger integers all have hashes below 2^61: a dict of chosen ones takes quadratic time
    return isinstance(value, _PLAIN) and not (isinstance(value, int) and abs(value) >= 1 << 64)


def call(function: object, arguments: object) -> Any:
    """What a known name gives for ``arguments``."""
    if not isinstance(function, Name) or function.call is None or type(arguments) is not tuple:
        raise RefusalError("a known name and its arguments", f"{brief(getattr(function, 'name', function))}")
    return function.call(*arguments)


def _tensor(base: object, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
    if not isinstance(base, Storage) or not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise RefusalError("a tensor's storage, size and stride", f"{brief(base)}, {brief(size)} and {brief(stride)}")
    return Tensor(base, base.dtype, offset, tuple(size), tuple(stride))


def _tensor_v3(base: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Of a type that has no storage of its own; rest is requires_grad, hooks, dtype."""
    tensor = _tensor(base, offset, size, stride)
    if len(rest) < 3 or not isinstance(rest[2], Name) or rest[2].dtype not in BYTES:
        raise RefusalError("a tensor's type", brief(rest[2]) if len(rest) > 2 else "none")
    return Tensor(tensor.storage, rest[2].dtype, tensor.offset, tensor.size, tensor.stride)


def _first(value: object, *_: object) -> object:
    return value


def _pairs(pairs: Any = ()) -> dict[Any, Any]:
    if isinstance(pairs, dict):
        return pairs
    result = {}
    for key, value in pairs:
        if not is_key(key):
            raise RefusalError("plain keys", brief(key))
        result[key] = value
    if isinstance(pairs, list):
        pairs.clear()  # a pickle that asks for the same dict again and again fills no memory
    return result


def _of_type(function: object, _: object, arguments: object, *__: object) -> object:
    return call(function, arguments)


def _opaque(name: str) -> Name:
    return Name(name, lambda *_: Opaque(name))


_OPAQUE = (
    "builtins.set",
    "builtins.frozenset",
    "builtins.bytearray",
    "builtins.complex",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
)
_MARKERS = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.per_channel_affine",
    "torch.per_channel_affine_float_qparams",
    "torch.per_channel_symmetric",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
)
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "torch.Size": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}


def _table() -> dict[str, Name]:
    names = [_opaque(name) for name in _OPAQUE]
    names += [Name(name) for name in _MARKERS]
    names += [Name(name, function) for name, function in _CALLS.items()]
    names += [Name(f"torch.{dtype}", dtype=dtype) for dtype in BYTES]
    for module in ("torch", "torch.cuda"):
        names += [Name(f"{module}.{kind}Storage", dtype=dtype) for kind, dtype in _STORAGES.items()]
    names += [Name(f"{module}.UntypedStorage", dtype="uint8") for module in ("torch", "torch.storage")]
    return {name.name: name for name in names}


_TABLE = _table()
