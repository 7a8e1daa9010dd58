"""Pickled NumPy arrays: a type, a shape, an order of axes, and bytes.

In a pickle, ``_reconstruct`` makes an empty array, and the opcode BUILD fills it with (version, shape, dtype,
is_fortran, bytes). In protocol 2 the bytes are text with one character for each byte. Protocol 5 may call
``_frombuffer`` instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from batchnorm.checkpoint.file_tensors import BYTES, Held, Storage, Tensor, contiguous, fortran
from batchnorm.checkpoint.pickled.unknown_classes import Opaque
from batchnorm.checkpoint.refusal import RefusalError, brief

_TYPES = {
    "b1": "bool",
    "i1": "int8",
    "u1": "uint8",
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"i{size}": f"int{8 * size}" for size in (2, 4, 8)},
    **{f"u{size}": f"uint{8 * size}" for size in (2, 4, 8)},
}
_ORDERS = {"<": "little", ">": "big", "|": "little", "=": "little"}


@final
class Dtype:
    """The type of an array's numbers, which the constructor sets, and their byte order, which BUILD sets.

    ``name`` is "" for types that are not in ``_TYPES``, such as complex numbers.
    """

    __slots__ = ("byteorder", "name")

    def __init__(self, code: object = "", *_: object) -> None:
        self.name = _TYPES.get(code, "") if isinstance(code, str) else ""
        self.byteorder = "little"

    def build(self, state: object) -> Dtype:
        """The type with the byte order in ``state``: (version, order, ...)."""
        if isinstance(state, tuple) and len(state) > 1:
            self.byteorder = _ORDERS.get(str(state[1]), "little")
        return self


@final
class Unbuilt:
    """An array that BUILD has not filled yet. ``place`` is its index in the pickle's memo; None if it has no index."""

    __slots__ = ("place",)

    def __init__(self, *_: object) -> None:
        self.place: int | None = None

    def build(self, state: object) -> Tensor | Opaque:
        """The array; an Opaque if its type is not in ``_TYPES``, such as objects, records and complex numbers."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusalError("a NumPy array's shape, type, order and bytes", brief(state))
        _, shape, dtype, is_fortran, data = state
        return _array(data, dtype, shape, is_fortran=bool(is_fortran))


def from_buffer(data: object, dtype: object, shape: object, order: object = "C", *_: object) -> Tensor | Opaque:
    """An array in protocol 5; an Opaque if its type is not in ``_TYPES``."""
    return _array(data, dtype, shape, is_fortran=order == "F")


def scalar(dtype: object = None, data: object = None, *_: object) -> int | Opaque:
    """A whole number as an int, since it may be a layer's counter; an Opaque for other scalars."""
    if isinstance(dtype, Dtype) and "int" in dtype.name and isinstance(data, str | bytes) and len(data) <= 8:
        raw = data.encode("latin-1") if isinstance(data, str) else data
        order = "big" if dtype.byteorder == "big" else "little"
        return int.from_bytes(raw, order, signed=not dtype.name.startswith("u"))
    return Opaque("numpy.generic")


def _array(data: object, dtype: object, shape: object, *, is_fortran: bool) -> Tensor | Opaque:
    if not isinstance(dtype, Dtype) or not dtype.name or isinstance(data, list):
        return Opaque("numpy.ndarray of a type that is not read", is_reported=True)
    held = Held.of(data, dtype.byteorder)
    size = tuple(shape) if isinstance(shape, tuple | list) else ()
    if held is None or not all(type(length) is int and 0 <= length < 1 << 63 for length in size):
        raise RefusalError("a NumPy array's shape and bytes", f"{brief(shape)} and {brief(data)}")
    numel = _numel(size)
    if numel * BYTES[dtype.name] != held.size:
        raise RefusalError(
            f"{brief(numel)} numbers of {BYTES[dtype.name]} bytes in a NumPy array", f"{held.size} bytes"
        )
    storage = Storage("", dtype.name, numel, held)
    return fortran(storage, size) if is_fortran else contiguous(storage, size)


def _numel(size: Sequence[int]) -> int:
    # a file may claim any number of axes: only 64 are multiplied, because Tensor refuses more
    return math.prod(size[:64])
