"""Files of statistics: NAME.bnstats.safetensors, and beside it NAME.bnstats.json for people.

The safetensors file has everything and is the only one that is read. Its tensors are ``rows`` (parts,), and for each
number of ``ColumnStatistics`` a tensor (parts, features): the first part is all data, the others are the groups in
order, and the features are those of all columns side by side. Its metadata has the columns with their shapes, the
groups, the files that were counted with their fingerprints, and the version of the package.

The JSON file is written second, and has the SHA-256 of the safetensors file that it was made from: if a job ends
between the two, the hash tells that the JSON file is of older data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

import numpy as np

from batchnorm.datasets.feature_sums import COUNTS, NUMBERS, FeatureSums
from batchnorm.datasets.partial_statistics import Partial, Source
from batchnorm.files.sidecar import Sidecar, write_whole
from batchnorm.package_version import VERSION
from batchnorm.reporting.json_values import Json, to_json

if TYPE_CHECKING:
    import os

SUFFIX = ".bnstats.safetensors"
_FILE: Sidecar[np.ndarray] = Sidecar(
    "stats", SUFFIX, "statistics of data", version=1, remedy="Write it with statistics.save(path).", library="numpy"
)
_FOR_PEOPLE = ("count", "mean", "std", "var", "minimum", "maximum", "skewness", "kurtosis", *COUNTS[1:])
_NOTE = (
    "count is the number of finite values; only these enter mean, var (biased: divided by count), minimum and maximum. "
    "The text nan stands for a number that does not exist, such as the mean of no values. Images of 8 and 16 bits are "
    "measured in 0..1."
)


@final
class Contents(NamedTuple):
    """What a file has: the fields of ``DataStatistics``."""

    total: Partial
    by: str
    groups: Mapping[str, Partial]
    sources: tuple[Source, ...]


class _Statistics(Protocol):
    """``DataStatistics``, which reads and writes files by these functions."""

    @property
    def total(self) -> Partial: ...
    @property
    def by(self) -> str: ...
    @property
    def groups(self) -> Mapping[str, Partial]: ...
    @property
    def sources(self) -> tuple[Source, ...]: ...


def write(statistics: _Statistics, path: str | os.PathLike[str]) -> None:
    """Write the safetensors file, then the JSON file beside it; each replaces an old file at once.

    Raises:
        ValueError: If the path does not end in .bnstats.safetensors.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol of an address, is not installed.
        OSError: If a file cannot be written.
    """
    place, data = _FILE.named(path), to_bytes(statistics)
    made_from = {"file": place.replace("\\", "/").rpartition("/")[2], "sha256": sha256(data).hexdigest()}
    text = to_json({**as_json(statistics), "made_from": made_from})
    write_whole(place, data)
    write_whole(place.removesuffix(SUFFIX) + ".bnstats.json", text.encode("ascii") + b"\n")


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a safetensors file from ``write``, at a path or an address of fsspec.

    Raises:
        ValueError: If the file is damaged, or of another kind or version.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
        OSError: If the file cannot be read.
    """
    return _of_file(*_FILE.read(path), str(path))


def to_bytes(statistics: _Statistics) -> bytes:
    """The bytes of the safetensors file.

    Raises:
        ValueError: If a group has other columns than the data.
    """
    parts, shapes = [statistics.total, *statistics.groups.values()], statistics.total.shapes
    if any(part.shapes != shapes for part in parts):
        raise ValueError("expected groups with the columns of the data, got others. Merge groups with `+` or union.")
    sums = FeatureSums.stacked([part.sums for part in parts])
    tensors = dict(zip(NUMBERS, sums.numbers, strict=True)) | dict(zip(COUNTS, sums.counts, strict=True))
    about = {
        "package": VERSION,
        "by": statistics.by,
        "columns": [[name, list(shape)] for name, shape in shapes.items()],
        "groups": list(statistics.groups),
        "sources": [[each.file, each.fingerprint, each.size, each.rows] for each in statistics.sources],
    }
    return _FILE.to_bytes(about, tensors | {"rows": np.array([part.rows for part in parts], dtype=np.int64)})


def from_bytes(data: bytes, name: str = "the data") -> Contents:
    """The statistics in bytes from ``to_bytes``, the same to the bit.

    Args:
        data: The bytes.
        name: What errors call them.

    Raises:
        ValueError: If the bytes are damaged, or of another kind or version.
    """
    return _of_file(*_FILE.from_bytes(data, name), name)


def _of_file(about: Mapping[str, Any], tensors: Mapping[str, np.ndarray], name: str) -> Contents:
    try:
        return _checked(about, tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{name} is not {_FILE.what}, or it is damaged: {why}. {_FILE.remedy}") from error


def _checked(about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Contents:
    shapes = {_text(name): tuple(map(_count, shape)) for name, shape in about["columns"]}
    groups = [_text(name) for name in about["groups"]]
    if len(shapes) != len(about["columns"]) or len(set(groups)) != len(groups):
        raise ValueError("a column or a group has the name of another")
    sources = tuple(
        Source(_text(file), _text(print_), _count(size), _count(rows)) for file, print_, size, rows in about["sources"]
    )
    features = [math.prod(shape) for shape in shapes.values()]
    rows, sums = _sums(tensors, 1 + len(groups), sum(features))
    _check_numbers(rows, sums, features)
    parts = [Partial.of_sums(int(n), sums.mapped(lambda row, i=i: row[:, i]), shapes) for i, n in enumerate(rows)]
    return Contents(parts[0], _text(about["by"]), dict(zip(groups, parts[1:], strict=True)), sources)


def _sums(tensors: Mapping[str, np.ndarray], parts: int, features: int) -> tuple[np.ndarray, FeatureSums]:
    expected = {"rows": ("int64", (parts,))}
    expected |= dict.fromkeys(NUMBERS, ("float64", (parts, features)))
    expected |= dict.fromkeys(COUNTS, ("int64", (parts, features)))
    for name, (dtype, shape) in expected.items():
        if (tensors[name].dtype, tensors[name].shape) != (np.dtype(dtype), shape):
            raise ValueError(f"{name} has not the shape {shape} and the type {dtype}")
    return tensors["rows"], FeatureSums(*(np.stack([tensors[name] for name in names]) for names in (NUMBERS, COUNTS)))


def _check_numbers(rows: np.ndarray, sums: FeatureSums, features: Sequence[int]) -> None:
    """Refuse numbers that no data can have.

    Raises:
        ValueError: If there are any.
    """
    mean, low, m2, m3, m4, least, most = sums.numbers
    count = sums.counts[0]
    empty, near = count == 0, 1e-9 * np.maximum(np.abs(least), np.abs(most))  # a mean has rounding errors
    with np.errstate(all="ignore"):
        faults = {
            "a number of rows is negative": rows < 0,
            "a count is negative or too large": (sums.counts < 0) | (sums.counts > 1 << 60),
            "a mean is NaN": ~empty & np.isnan(mean),
            "a sum of squares is negative or NaN": ~((m2 >= 0) & (m4 >= 0)) | np.isinf(m3),
            "numbers of no values are not empty": empty & ~(np.isnan(mean) & np.isnan(least) & np.isnan(most)),
            "an extreme is NaN or infinite": ~empty & ~(np.isfinite(least) & np.isfinite(most)),
            "a mean is outside of the extremes": ~empty & ((mean < least - near) | (mean > most + near)),
            "the low part of a mean is too large": ~(np.abs(low) <= 1e-9 * np.where(empty, 0, np.abs(mean))),
            "values without any spread differ": ~empty & (m2 == 0) & (most - least > 1e-6 * near),
        }
        if len(rows) > 1:
            faults["groups do not add up to all data"] = (sums.counts[:, 1:].sum(1) != sums.counts[:, 0]) | (
                rows[1:].sum() != rows[0]
            )
    for fault, where in faults.items():
        if where.any():
            raise ValueError(fault)
    values, first = sums.counts.sum(0), 0
    for number in features:
        column = values[:, first : first + number]
        if (column != column[:, :1]).any():
            raise ValueError("the features of a column have different numbers of values")
        first += number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")  # noqa: TRY004 - a damaged file
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a number of things")
    return value


def as_json(statistics: _Statistics) -> dict[str, Json]:
    """The statistics for people and other programs: names, numbers, groups and files, without what only ``+`` needs."""
    return {
        "kind": "batchnorm.stats",
        "version": _FILE.version,
        "package": VERSION,
        "note": _NOTE,
        **_part_as_json(statistics.total),
        "by": statistics.by,
        "groups": {name: _part_as_json(part) for name, part in statistics.groups.items()},
        "sources": [
            {"file": each.file, "fingerprint": each.fingerprint, "size": each.size, "rows": each.rows}
            for each in statistics.sources
        ],
    }


def _part_as_json(part: Partial) -> dict[str, Json]:
    return {
        "rows": part.rows,
        "columns": {
            name: {"shape": list(each.shape), **{field: getattr(each, field).tolist() for field in _FOR_PEOPLE}}
            for name, each in part.columns.items()
        },
    }
