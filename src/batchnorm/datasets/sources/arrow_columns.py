"""Arrow arrays as columns of NumPy arrays, without a copy where the memory has the same form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.datasets.blocks import NO_GROUP, Column
from batchnorm.datasets.sources.schemas import Feature, Shape
from batchnorm.datasets.sources.stored_files import FilePiece

if TYPE_CHECKING:
    import pyarrow as pa

# above this, float64 has no longer every whole number; and 10^22 is the largest power of ten that it has
_WHOLE, _TENS = 1 << 53, 22


@dataclass(frozen=True, slots=True)
class TablePiece(FilePiece):
    """A range of what a file of tables consists of: row groups of Parquet, record batches of Arrow.

    Args:
        first: The first of them.
        last: The one after the last; -1 for all of a stream.
        size: Bytes of the file in this piece.
        shapes: Shapes of columns of lists, whose type does not say their lengths.
    """

    first: int
    last: int
    size: int
    shapes: tuple[tuple[str, Shape], ...] = ()


def features_of(schema: pa.Schema) -> dict[str, Feature]:
    """The columns of a schema; fields of a struct are columns ``struct.field``.

    Raises:
        ValueError: If two columns have the same name.
    """
    found: dict[str, Feature] = {}
    for field in schema:
        for name, feature in _features(field.name, field.type):
            if name in found:
                raise ValueError(f"expected one column {name!r}, got two of this name. Rename one of them")
            found[name] = feature
    return found


def _features(name: str, kind: pa.DataType) -> Iterator[tuple[str, Feature]]:
    from pyarrow import types

    if types.is_struct(kind):
        for field in kind:
            yield from _features(f"{name}.{field.name}", field.type)
        return
    base, shape = _base(kind)
    number = types.is_integer(base) or types.is_floating(base) or types.is_boolean(base) or types.is_decimal(base)
    what = "number" if number else "null" if types.is_null(base) else "other"
    yield name, Feature(what, shape, str(kind), _names_groups(base) and shape == ())


def _base(kind: pa.DataType) -> tuple[pa.DataType, Shape | None]:
    """The type of single values, and the shape of the features; None if the type does not say it."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.value_type, _logical(kind)
    if isinstance(kind, pa.BaseExtensionType):
        return _base(kind.storage_type)
    if types.is_dictionary(kind):
        return kind.value_type, ()
    if types.is_fixed_size_list(kind):
        base, shape = _base(kind.value_type)
        return base, None if shape is None else (kind.list_size, *shape)
    if _is_list(kind):
        return _base(kind.value_type)[0], None
    return kind, ()


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    views = types.is_list_view(kind) or types.is_large_list_view(kind)
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or views


def _logical(kind: pa.FixedShapeTensorType) -> Shape:
    order = kind.permutation or range(len(kind.shape))
    return tuple(kind.shape[axis] for axis in order)


def _names_groups(kind: pa.DataType) -> bool:
    from pyarrow import types

    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    times = types.is_date(kind) or types.is_timestamp(kind)
    return text or times or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind)


def shape_in(array: pa.Array) -> Shape | None:
    """The shape of the features of an array; None if the array has no list that tells it."""
    if hasattr(array.type, "storage_type"):
        return _base(array.type)[1] or shape_in(array.storage)
    if not _is_list(array.type):
        return ()
    lists = array.drop_null()
    if not len(lists):
        return _base(array.type)[1]
    inner = shape_in(lists.flatten())
    return None if inner is None else (len(lists[0]), *inner)


def columns_in(batch: pa.RecordBatch, shapes: Mapping[str, Shape]) -> dict[str, Column]:
    """The columns named by ``shapes``, each with features of its shape.

    Raises:
        ValueError: If a list has another length than its shape says.
    """
    arrays = dict(leaves(batch))
    return {name: column_of(arrays[name], shape, name) for name, shape in shapes.items()}


def leaves(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.Array]]:
    """All columns of a batch by name; fields of a struct are columns ``struct.field``, null where the struct is."""
    from pyarrow import types

    waiting: Iterable[tuple[str, pa.Array]] = zip(batch.schema.names, batch.columns, strict=True)
    for name, array in waiting:
        if types.is_struct(array.type):
            yield from _fields(name, array)
        else:
            yield name, array


def _fields(name: str, array: pa.StructArray) -> Iterator[tuple[str, pa.Array]]:
    import pyarrow as pa

    names = [f"{name}.{array.type.field(i).name}" for i in range(array.type.num_fields)]
    yield from leaves(pa.RecordBatch.from_arrays(array.flatten(), names))


def column_of(array: pa.Array, shape: Shape, name: str) -> Column:
    """An array as a column with features of a shape.

    Raises:
        ValueError: If a list has another length than the shape says.
    """
    return Column(*_numbers(array, shape, name))


def groups_in(array: pa.Array) -> tuple[np.ndarray, tuple[str, ...]]:
    """For every value the index of its group, and the names of the groups; nulls are in the group ``NO_GROUP``."""
    import pyarrow as pa
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    coded = array.dictionary_encode(null_encoding="encode")
    names = compute.cast(coded.dictionary, pa.string()).to_pylist()
    labels = tuple(NO_GROUP if each is None else each for each in names)
    return coded.indices.to_numpy(zero_copy_only=False), labels


def _numbers(array: pa.Array, shape: Shape, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (n, *shape), and which of them are not null."""
    import pyarrow as pa
    from pyarrow import types

    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        return _tensors(array, name)
    if isinstance(kind, pa.BaseExtensionType):
        return _numbers(array.storage, shape, name)
    if types.is_dictionary(kind):
        return _numbers(array.dictionary_decode(), shape, name)
    if _is_list(kind):
        return _vectors(array, shape, name)
    if types.is_null(kind):
        return np.zeros((len(array), *shape)), np.zeros(len(array), dtype=bool)
    return _scalars(array), _present(array)


def _scalars(array: pa.Array) -> np.ndarray:
    import pyarrow as pa
    from pyarrow import types

    if types.is_boolean(array.type):
        return array.fill_null(False).to_numpy(zero_copy_only=False)
    if types.is_decimal(array.type):
        return _decimals(array)
    if array.null_count:  # a view of the same memory, where nulls have any number
        array = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], 0, array.offset)
    return array.to_numpy(zero_copy_only=True)


def _present(array: pa.Array) -> np.ndarray | None:
    return array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None


def _decimals(array: pa.Array) -> np.ndarray:
    """Decimal numbers, each rounded once to float64: the quotient of two whole numbers that float64 has."""
    scale, width = array.type.scale, array.type.byte_width
    if width != 16 or not 0 <= scale <= _TENS:
        return _slow_decimals(array)
    buffer = array.buffers()[1]
    words = np.frombuffer(buffer, np.int64)[2 * array.offset : 2 * (array.offset + len(array))].reshape(-1, 2)
    low, high = words.T
    exact = (high == low >> 63) & (abs(low) <= _WHOLE) & (low != np.iinfo(np.int64).min)
    present = _present(array)
    if (exact if present is None else exact | ~present).all():
        return low / 10.0**scale
    return _slow_decimals(array)


def _slow_decimals(array: pa.Array) -> np.ndarray:
    return np.array([float(each) for each in array.fill_null(Decimal(0)).to_pylist()], dtype=np.float64)


def _tensors(array: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    kind = array.type
    values, present = _vectors(array.storage, (int(np.prod(kind.shape)),), name)
    order = [0, *(axis + 1 for axis in kind.permutation or range(len(kind.shape)))]
    if present is not None and present.ndim > 1:
        present = present.reshape(-1, *kind.shape).transpose(order)
    return values.reshape(-1, *kind.shape).transpose(order), present


def _vectors(array: pa.Array, shape: Shape, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Lists of ``shape[0]`` values, each of shape ``shape[1:]``; a null list has nulls only."""
    present = _present(array)
    _check_lengths(array, present, shape, name)
    inside, inside_present = _numbers(array.flatten(), shape[1:], name)  # values of lists that are not null
    values = _unflattened(inside, present, len(array), shape)
    if inside_present is None:
        return values, present
    every = (
        np.broadcast_to(inside_present.reshape(len(inside), *(1,) * (inside.ndim - inside_present.ndim)), inside.shape)
        if inside_present.ndim < inside.ndim
        else inside_present
    )
    return values, _unflattened(every, present, len(array), shape)


def _unflattened(flat: np.ndarray, present: np.ndarray | None, n: int, shape: Shape) -> np.ndarray:
    """Values (k * shape[0], *shape[1:]) of k lists that are present, as (n, *shape); 0 or False for others."""
    if present is None:
        return flat.reshape(n, *shape)
    full = np.zeros((n, *shape), dtype=flat.dtype)
    full[present] = flat.reshape(-1, *shape)
    return full


def _check_lengths(array: pa.Array, present: np.ndarray | None, shape: Shape, name: str) -> None:
    from pyarrow import types

    if types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size)
    else:
        lengths = array.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = lengths != (shape[0] if shape else -1)
    wrong = wrong if present is None else wrong & present
    if wrong.any():
        row = int(wrong.argmax())
        want = f"lists of {shape[0]} numbers" if shape else "nulls only"
        raise ValueError(f"expected {want} in column {name!r}, got a list of {lengths[row]} in row {row} of a block")
