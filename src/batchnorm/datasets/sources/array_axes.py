"""Arrays as columns: which of their axes are examples, and which are features.

Axis 0 has the rows. The features are on ``channel_axis``, as in ``InputNorm``; every other axis has more values of each
feature, such as the pixels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from batchnorm.datasets.blocks import NO_GROUP, Block, Column
from batchnorm.datasets.sources.schemas import Feature, Shape

# the column of a file that has a single array
NAME = "values"

Axes = int | tuple[int, ...] | None


def fields_of(name: str, dtype: np.dtype, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
    """Types and shapes of the arrays in an array: the fields of a structured type, or the array itself.

    The field ``a`` of an array called "values" is the column ``a``, that of another array the column ``name.a``.
    """
    if dtype.fields is None:
        base, inner = dtype.subdtype or (dtype, ())
        return {name: (base, (*shape, *inner))}
    found: dict[str, tuple[np.dtype, Shape]] = {}
    for field, (kind, *_) in dtype.fields.items():
        found |= fields_of(field if name == NAME else f"{name}.{field}", kind, shape)
    return found


def fields_in(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays in an array, by the names of ``fields_of``."""
    if array.dtype.fields is None:
        return {name: array}
    found: dict[str, np.ndarray] = {}
    for field in array.dtype.fields:
        found |= fields_in(field if name == NAME else f"{name}.{field}", array[field])
    return found


def feature_of(dtype: np.dtype, shape: Shape, axes: Axes, where: str) -> Feature:
    """What an array (N, ...) is as a column.

    Raises:
        ValueError: If the array has no such axes.
    """
    words = f"{dtype.name}{list(shape)}"
    if dtype.kind not in "biuf" or not shape:
        return Feature("other", (), words, dtype.kind in "SUMT" and len(shape) == 1)
    return Feature(
        "number", tuple(shape[axis] for axis in _features(shape, axes, where)), words, _is_code(dtype, shape)
    )


def _is_code(dtype: np.dtype, shape: Shape) -> bool:
    return dtype.kind in "biu" and len(shape) == 1


def _features(shape: Shape, axes: Axes, where: str) -> tuple[int, ...]:
    """The axes of the features, counted from 0; () for arrays (N,)."""
    given = () if axes is None or len(shape) == 1 else (axes,) if isinstance(axes, int) else tuple(axes)
    found = tuple(axis + len(shape) if axis < 0 else axis for axis in given)
    if len(set(found)) < len(found) or not all(0 < axis < len(shape) for axis in found):
        raise ValueError(
            f"expected channel axes from 1 to {len(shape) - 1}, got channel_axis={axes} for {where} of shape {shape}, "
            "whose axis 0 has the examples. Choose another channel_axis."
        )
    return found


def column_of(array: np.ndarray, axes: Axes) -> Column:
    """Rows (n, ...) of an array as a column: every position on other axes is one more value of the features."""
    chosen = _features(array.shape, axes, "an array")
    others = [axis for axis in range(array.ndim) if axis not in chosen]
    moved = array.transpose([*others, *chosen])
    examples = math.prod(moved.shape[: len(others)])
    return Column(_plain(moved).reshape(examples, *moved.shape[len(others) :]))


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order, and at most float64."""
    kind = np.dtype(np.float64) if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
    return array.astype(kind, copy=False)


def groups_in(array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """For every value of an array (n,) the index of its group, and the names of the groups."""
    names, codes = np.unique(array, return_inverse=True)
    return codes, tuple(map(_label, names))


def _label(value: np.generic) -> str:
    if value.dtype.kind == "b":
        return str(value).lower()
    if value.dtype.kind == "S":
        return value.tobytes().rstrip(b"\0").decode("utf-8", "backslashreplace")
    return NO_GROUP if value.dtype.kind == "M" and np.isnat(value) else str(value)


def grouped(rows: int, columns: Mapping[str, Column], codes: np.ndarray, labels: tuple[str, ...]) -> Iterator[Block]:
    """A block with groups; one block for each group, if a column has several values of a row."""
    if all(len(each.values) == len(codes) for each in columns.values()):
        yield Block(rows, columns, codes, labels)
        return
    for code in np.unique(codes):
        mine = codes == code
        chosen = {
            name: Column(_rows(each.values, len(codes))[mine].reshape(-1, *each.values.shape[1:]))
            for name, each in columns.items()
        }
        yield Block(int(mine.sum()) if rows else 0, chosen, labels[code])


def _rows(values: np.ndarray, rows: int) -> np.ndarray:
    return values.reshape(rows, -1, *values.shape[1:])
