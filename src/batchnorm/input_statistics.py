"""What InputNorm stores: moments of each feature, and the numbers of its NaN and infinities, of tensors or files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, final

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from batchnorm.argument_types import require_whole_number
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    import numpy as np

    from batchnorm.datasets.data_statistics import DataStatistics

    Address = str | os.PathLike[str]

# a tensor or an array; a tuple or list whose first element is a tensor or array; or a mapping with such a value
Batch = Any
# Values of an array that are widened to float64 at a time (32 MB), as in Moments.of.
_CHUNK = 1 << 22


@final
@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """Moments of all values but NaN, missing ones and those of ``infinite``.

    Args:
        moments: Moments of each feature.
        nan: Number of NaN and missing values of each feature, or 0.
        infinite: Number of infinities of each feature, or 0.
        names: The features' names; () if they have none.
    """

    moments: Moments
    nan: Tensor | int
    infinite: Tensor | int
    names: tuple[str, ...] = ()

    @staticmethod
    def of_data(statistics: DataStatistics, columns: Sequence[str] = (), axes: int = 1) -> InputStatistics:
        """Statistics of the features of columns side by side, in the order of ``columns``; () means all columns.

        Several channel axes, or none, are those of a single column of arrays, as for ``axes`` of its features.

        Raises:
            ValueError: If there is no such column, or none at all.
        """
        names, features = statistics.features(columns or None)
        moments = statistics.moments(columns or None)
        nan, infinite = torch.from_numpy(features.nan + features.null), torch.from_numpy(features.infinite)
        chosen = [statistics.columns[name].shape for name in columns or statistics.columns]
        if axes != 1 and len(chosen) == 1 and len(chosen[0]) == axes:
            moments = Moments(*(each.reshape(chosen[0]) for each in (moments.count, moments.mean, moments.m2)))
            nan, infinite = nan.reshape(chosen[0]), infinite.reshape(chosen[0])
        return InputStatistics(moments, nan, infinite, tuple(names))

    def checked(self, *, omit_nan: bool, stacklevel: int = 3) -> Moments:
        """The moments.

        Args:
            omit_nan: Whether NaN and missing values are allowed.
            stacklevel: How far from here the user's line is, as for ``warnings.warn``.

        Raises:
            ValueError: If an InputNorm cannot store them.

        Warns:
            RuntimeWarning: If all values of a feature are NaN or missing.
        """
        if torch.as_tensor(self.infinite).any():
            raise ValueError(
                f"InputNorm.fit needs finite values, got infinity in {self._named(self.infinite)}. Clip or remove it."
            )
        missing = "NaN or missing values" if self.names else "NaN"
        if not omit_nan and torch.as_tensor(self.nan).any():
            raise ValueError(
                f"InputNorm.fit needs values without NaN, got {missing} in {self._named(self.nan)}. "
                "Use nan='omit' to leave NaN out, or impute the values."
            )
        counts = self.moments.count.expand(self.moments.shape)
        if not counts.any():
            raise ValueError("InputNorm.fit needs at least one value, got no data. Check the loader's length.")
        if not torch.isfinite(self.moments.m2).all():
            large = (~torch.isfinite(self.moments.m2)).long()
            raise ValueError(
                f"InputNorm.fit needs values whose squares fit float64, got larger in {self._named(large)}. "
                "Divide the values by a constant first."
            )
        if not counts.all():
            warnings.warn(
                f"InputNorm.fit needs numbers, got only {missing} in {self._named((counts == 0).long() * self.nan)}. "
                "Forward does not change such a feature. Remove it from the data.",
                RuntimeWarning,
                stacklevel=stacklevel,
            )
        return self.moments

    def _named(self, counts: Tensor | int) -> str:
        """The features with a count above 0 and their counts, in words; at most five are named."""
        counts = torch.as_tensor(counts)
        where = counts.nonzero().tolist()
        texts = [f"{self._name(index)} ({int(counts[tuple(index)])} times)" for index in where[:5]]
        more = f" and {len(where) - 5} more" if len(where) > 5 else ""
        return f"{'feature' if len(where) == 1 else 'features'} {', '.join(texts)}{more}"

    def _name(self, index: list[int]) -> str:
        if self.names:
            place = torch.arange(len(self.names)).reshape(self.moments.shape)[tuple(index)]
            return repr(self.names[int(place)])
        return str(index[0] if len(index) == 1 else tuple(index))


def is_address(data: object) -> TypeGuard[Address | Sequence[Address]]:
    """Whether ``data`` names files: a path or address, or a list of them that is not empty."""
    if isinstance(data, str | os.PathLike):
        return True
    return isinstance(data, list | tuple) and bool(data) and all(isinstance(each, str | os.PathLike) for each in data)


def of_files(
    data: Address | Sequence[Address], columns: Sequence[str], channel_axis: int | Sequence[int] | None = 1
) -> InputStatistics:
    """Statistics of the features in files of data, or in a file of statistics, NAME.bnstats.safetensors.

    The features of arrays are on ``channel_axis``.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is damaged or lacks a column.
        TypeError: If a column has no numbers.
    """
    from batchnorm.datasets.data_statistics import DataStatistics
    from batchnorm.datasets.measurement import data_statistics
    from batchnorm.datasets.sources import Options
    from batchnorm.datasets.statistics_files import SUFFIX

    axes = as_tuple(channel_axis)
    if isinstance(data, str | os.PathLike) and os.fspath(data).endswith(SUFFIX):
        return InputStatistics.of_data(DataStatistics.load(data), columns, len(axes))
    options = Options(channel_axis=None if channel_axis is None else axes[0] if len(axes) == 1 else axes)
    return InputStatistics.of_data(data_statistics(data, columns=columns, options=options), columns, len(axes))


def as_columns(columns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of columns; one name may be given without a list."""
    return (columns,) if isinstance(columns, str) else tuple(columns)


def names_as_tensor(names: Sequence[str]) -> Tensor:
    """Names as a uint8 tensor, which every format of checkpoints can store."""
    return torch.tensor(list(json.dumps(list(names)).encode("ascii")), dtype=torch.uint8)


def names_of_tensor(stored: Any) -> tuple[str, ...]:
    """The names in a tensor of ``names_as_tensor``.

    Raises:
        ValueError: If there are none.
    """
    try:
        names = json.loads(bytes(stored.tolist()))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected names of features as bytes of JSON, got others: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a list of names of features, got {type(names).__name__}")
    return tuple(names)


def as_tuple(axes: int | Sequence[int] | None, name: str = "channel_axis") -> tuple[int, ...]:
    """One axis or several as a tuple; None as ()."""
    if axes is None:
        return ()
    if isinstance(axes, int) or not isinstance(axes, Iterable):
        require_whole_number(axes, name, "Give a tuple for several axes. For data call InputNorm.fit.")
        return (axes,)
    return tuple(axes)


@final
class Total:
    """Moments of all values except NaN, and the number of NaN and of infinities in each feature."""

    def __init__(self, channel_axis: int | Sequence[int] | None) -> None:
        self.channel_axis = channel_axis
        self.moments = Moments.empty()
        self.nan: Tensor | int = 0
        self.inf: Tensor | int = 0

    def add(self, x: Tensor) -> None:
        """Add the values of a batch."""
        new = Moments.of(x, self.channel_axis)
        if x.is_floating_point() and not torch.isfinite(new.m2).all():
            new = Moments.of(x, self.channel_axis, mask=~x.isnan())
            self.nan = self.nan + self._count(x.isnan())
            self.inf = self.inf + self._count(x.isinf())
        self.moments += new

    def _count(self, mask: Tensor) -> Tensor:
        moments = Moments.of(mask, self.channel_axis)  # the mean of a mask is the share of True
        return (moments.mean * moments.count).round().long()

    @property
    def statistics(self) -> InputStatistics:
        """The statistics of all values."""
        return InputStatistics(self.moments, self.nan, self.inf)


def tensors(data: Batch, key: Hashable, channel_axis: int | Sequence[int] | None) -> Iterator[Tensor]:
    """The input of each batch in ``data``, as a tensor."""
    if isinstance(data, Tensor):
        yield data
    elif hasattr(data, "__array__"):
        yield from _blocks(data, channel_axis)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError("InputNorm.fit needs batches, got a Dataset of single examples. Pass DataLoader(dataset, 256).")
    elif isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f"InputNorm.fit needs an array, a tensor or batches of them, got {type(data).__name__}.")
    else:
        for batch in data:
            x = _input_of(batch, key)
            if isinstance(x, Tensor):
                yield x
            elif hasattr(x, "__array__"):
                yield from _blocks(x, channel_axis)
            else:
                raise TypeError(
                    f"InputNorm.fit needs batches that are arrays or tensors, got {type(x).__name__} in a "
                    f"{type(batch).__name__}. Map them to tensors first."
                )


def _input_of(batch: Batch, key: Hashable) -> Batch:
    if isinstance(batch, Mapping):
        if key not in batch:
            raise ValueError(
                f"InputNorm.fit needs key= to name the input in a mapping, got key={key!r} for keys {list(batch)}."
            )
        return batch[key]
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0]
    return batch


def _blocks(data: np.ndarray, channel_axis: int | Sequence[int] | None) -> Iterator[Tensor]:
    """An array in slices of rows, copied: torch accepts neither foreign byte orders nor negative strides."""
    import numpy as np

    if isinstance(data, np.ma.MaskedArray):
        raise TypeError(
            "InputNorm.fit needs an array without a mask, got a masked one. "
            "Pass data.filled(np.nan) with nan='omit' to leave masked values out."
        )
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"InputNorm.fit needs an array of real numbers, got dtype {array.dtype}. "
            "Encode categories and dates as numbers first."
        )
    if array.ndim == 0:
        array = array[None]
    axes = as_tuple(channel_axis)
    divisible = 0 not in axes and -array.ndim not in axes  # if axis 0 has features, a slice would separate them
    rows = max(1, _CHUNK * len(array) // max(array.size, 1)) if divisible else max(len(array), 1)
    for start in range(0, max(len(array), 1), rows):
        yield torch.from_numpy(np.array(array[start : start + rows], dtype=np.float64))
