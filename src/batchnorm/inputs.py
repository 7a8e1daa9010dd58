"""InputNorm: input features at mean 0 and variance 1, as the first module of a network.

    z = (x - mean) / scale        x = z scale + mean        scale = sqrt(var), or 1 for a constant feature

The statistics are measured once, over the training data, and saved inside the network's checkpoint, so that test
examples are scaled in the same way as training examples (LeCun, Bottou, Orr and Müller 1998, "Efficient BackProp",
section 4.3). The statistics are float64 buffers. From float32 inputs the mean is subtracted in two float32 parts:
values far from zero lose only digits that float32 inputs do not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from batchnorm.argument_types import require_whole_number
from batchnorm.input_statistics import (
    Batch,
    InputStatistics,
    Total,
    as_columns,
    as_tuple,
    is_address,
    names_as_tensor,
    names_of_tensor,
    of_files,
    tensors,
)
from batchnorm.moments import Moments
from batchnorm.tracing import call_whole

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Sequence

    import numpy as np

_STATISTICS = ("count", "mean", "var")
_NAMES = "feature_names"
# the types with values that float32 cannot represent exactly: for them the arithmetic is in float64
_WIDE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}
# The sum of n values, added one by one, has a relative error of up to n eps; scikit-learn uses this bound. Moments are
# summed in blocks and merged, so their error stays below 65536 eps for any n. Without this cap on n, 10 million values
# with mean 1e6 and std 1e-3 would count as constant.
_ROUNDING_COUNT = 1 << 16


class InputNorm(nn.Module):
    """Normalization of input features by stored population statistics.

    ``InputNorm.fit(data)`` measures the statistics. ``InputNorm(num_features)`` has no statistics yet and returns its
    input; load a checkpoint into it (``strict=True``). Train and eval mode are the same, and forward never changes the
    module. As in scikit-learn's StandardScaler, the variance is biased and a constant feature has scale 1: a variance
    no larger than its rounding error, (n eps mean)^2, counts as 0. There n is the count, or 65536 if the count is
    larger.

    Results have the dtype of floating-point inputs. For integer inputs (images, counts) they have the dtype that the
    module was cast to (``model.half()``; float32 by default). The statistics stay float64 through every cast, so the
    device must support float64. A NaN in the input gives NaN at the same place of the result and nowhere else.

    ``feature_names`` has the names of features that were read from files: names of columns, with the place in brackets
    for columns of vectors, as in "embedding[3]". It is () otherwise. The names are saved in the state dict, as bytes in
    a tensor, only if there are any; a loaded state replaces them.

    Args:
        num_features: Size of the channel axis, or sizes of the channel axes.
        channel_axis: The axis, or axes, of the features; a negative axis counts from the end. All other axes are
            examples and positions. 1 gives one mean for each column of (N, C) and each channel of (N, C, H, W);
            (1, 2, 3) gives one mean for each pixel; None, with ``num_features=()``, gives one mean for all values.
        device: Device of the statistics.

    Shape:
        The features are on ``channel_axis``; the output has the shape of the input.

    Raises:
        TypeError: If a size or an axis is not a whole number.
        ValueError: If the number of sizes is not the number of channel axes.

    Example:
        >>> import torch
        >>> data = torch.tensor([[1.0, 200.0], [3.0, 600.0]])
        >>> norm = InputNorm.fit(data)
        >>> norm
        InputNorm(2, channel_axis=1, count=2)
        >>> norm(data)
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> net = torch.nn.Sequential(norm, torch.nn.Linear(2, 1))
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    _dtype_carrier: Tensor
    feature_names: tuple[str, ...] = ()

    def __init__(
        self,
        num_features: int | Sequence[int],
        channel_axis: int | Sequence[int] | None = 1,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, sizes in (("num_features", num_features), ("channel_axis", channel_axis)):
            for size in as_tuple(sizes, name):
                require_whole_number(size, name, "Give a tuple for several axes. For data call InputNorm.fit.")
        self.num_features = as_tuple(num_features)
        self.channel_axis = channel_axis
        if len(self.num_features) != len(self._axes()):
            raise ValueError(
                f"InputNorm needs one size for each channel axis, got num_features={num_features} for "
                f"channel_axis={channel_axis}. Use num_features=() with channel_axis=None."
            )
        for name, value in (("count", 0.0), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full(self.num_features, value, dtype=torch.float64, device=device))
        # .half() and other casts change the dtype of this buffer; results for integer inputs have the same dtype
        self.register_buffer("_dtype_carrier", torch.empty(0, device=device), persistent=False)

    @classmethod
    def fit(
        cls,
        data: Tensor | np.ndarray | Iterable[Batch] | str | os.PathLike[str],
        channel_axis: int | Sequence[int] | None = 1,
        *,
        nan: Literal["raise", "omit"] = "raise",
        key: Hashable = None,
        columns: str | Sequence[str] = (),
    ) -> Self:
        """An InputNorm with the exact statistics of all data, whatever the batch sizes and their order.

        They are accumulated in float64 by Chan's update, with one batch in memory at a time. A feature with a single
        value has this value as its mean, and scale 1.

        From files, which may be larger than memory, the features are the columns side by side. A column of vectors is
        as many features as it has places. Images are three features with values in 0..1, as ToTensor makes them. See
        ``batchnorm.data_statistics`` for formats.

        Args:
            data: A tensor or array with examples and features, or batches of them: a DataLoader, a list, an
                iterator. The input is the first element of a batch that is a tuple or list, and the value at ``key``
                of a batch that is a mapping. Or files: a path, a folder, a pattern, an address that fsspec opens, or a
                list of them; or a file of statistics, as for ``load``.
            channel_axis: As for InputNorm. Of files, it is the axis of features in arrays.
            nan: "raise" refuses NaN, and missing values in files; "omit" leaves each out of its own feature, as
                scikit-learn does.
            key: The input's key in batches that are mappings.
            columns: Columns of files, in the order of the features; by default all columns of numbers, in their order.

        Raises:
            ValueError: If ``nan`` is neither "raise" nor "omit"; if there is no value at all, NaN with ``nan="raise"``,
                an infinity, a value whose square does not fit float64, no ``key`` in a batch that is a mapping, or
                batches differ in their features; if a file is damaged or lacks a column; if ``columns`` is given
                without files.
            TypeError: If ``data`` or a batch is of no type described above, or a column of a file has no numbers.
            OSError: If a file cannot be read.

        Warns:
            RuntimeWarning: If all values of a feature are NaN. Its count is 0, and forward does not change it.
        """
        _require_nan_policy(nan)
        if is_address(data):
            return cls._of_statistics(of_files(data, as_columns(columns), channel_axis), channel_axis, nan)
        if columns:
            raise ValueError(
                f"InputNorm.fit needs files for columns={columns!r}, got {type(data).__name__}. Select columns of the "
                "data before."
            )
        total = Total(channel_axis)
        for x in tensors(data, key, channel_axis):
            total.add(x)
        return cls._of_statistics(total.statistics, channel_axis, nan)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        columns: str | Sequence[str] = (),
        channel_axis: int | Sequence[int] | None = 1,
        *,
        nan: Literal["raise", "omit"] = "raise",
    ) -> Self:
        """An InputNorm with the statistics in a file that ``batchnorm stats`` or ``DataStatistics.save`` wrote.

        Args:
            path: NAME.bnstats.safetensors.
            columns: Columns in the order of the features; by default all columns, in the order of the data's files.
            channel_axis: As for InputNorm.
            nan: As for ``fit``: "raise" refuses statistics of data with NaN or missing values in the columns.

        Raises:
            ValueError: If the file is damaged, or no such file; if it lacks a column; as for ``fit``.
            OSError: If the file cannot be read.

        Warns:
            RuntimeWarning: As for ``fit``.
        """
        from batchnorm.datasets.data_statistics import DataStatistics

        _require_nan_policy(nan)
        return cls._of_statistics(
            InputStatistics.of_data(DataStatistics.load(path), as_columns(columns), len(as_tuple(channel_axis))),
            channel_axis,
            nan,
        )

    @classmethod
    def _of_statistics(
        cls, statistics: InputStatistics, channel_axis: int | Sequence[int] | None, nan: Literal["raise", "omit"]
    ) -> Self:
        norm = cls.from_moments(statistics.checked(omit_nan=nan == "omit", stacklevel=4), channel_axis)
        norm.feature_names = statistics.names
        return norm

    @classmethod
    def from_moments(cls, moments: Moments, channel_axis: int | Sequence[int] | None = 1) -> Self:
        """An InputNorm with the statistics of ``moments``, on their device.

        Forward does not change a feature with count 0; a feature with count 1 has scale 1.
        """
        norm = cls(tuple(moments.shape), channel_axis, device=moments.mean.device)
        norm.count.copy_(moments.count)
        filled = norm.count > 0
        norm.mean.copy_(torch.where(filled, moments.mean, 0.0))
        norm.var.copy_(torch.where(filled, moments.var, 1.0))
        return norm

    @property
    def moments(self) -> Moments:
        """The stored statistics as Moments; NaN for a feature of count 0."""
        filled = self.count > 0
        return Moments(
            self.count, torch.where(filled, self.mean, torch.nan), torch.where(filled, self.var * self.count, 0.0)
        )

    @property
    def scale(self) -> Tensor:
        """The divisor of x - mean, in float64: the biased standard deviation, or 1 for a constant feature."""
        error = self.count.clamp_max(_ROUNDING_COUNT) * torch.finfo(torch.float64).eps * self.mean
        constant = self.var <= error.square()  # scikit-learn adds n eps var, which matters only if n > 1e15
        return torch.where(constant, 1.0, self.var.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` normalized: in the dtype of ``x``, or for integers in the dtype that the module was cast to.

        Raises:
            TypeError: If ``x`` is not a real tensor.
            ValueError: If ``x`` does not have ``num_features`` on ``channel_axis``.
        """
        if (node := call_whole(self, x)) is not None:
            return node
        self._check_input(x)
        high, low, scale = self._parts(x)
        z = ((x.to(high.dtype) - high) - low) / scale
        return z.to(x.dtype if x.is_floating_point() else self._dtype_carrier.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """The input for which ``forward`` returns ``z``: z scale + mean.

        It is float64 for a float64, int32 or int64 ``z`` (also unsigned), and otherwise float32.

        Raises:
            TypeError: If ``z`` is not a real tensor.
            ValueError: If ``z`` does not have ``num_features`` on ``channel_axis``.
        """
        self._check_input(z)
        high, low, scale = self._parts(z)
        return (z.to(high.dtype) * scale + low) + high

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean in two parts and the scale, in the dtype of the arithmetic, shaped to broadcast over ``x``."""
        dtype = torch.float64 if x.dtype in _WIDE else torch.float32
        high = self.mean.to(dtype)
        low = (self.mean - high).to(dtype)  # the rounding error of high
        high, low, scale = (self._along_features(part, x) for part in (high, low, self.scale.to(dtype)))
        return high, low, scale

    def _along_features(self, values: Tensor, x: Tensor) -> Tensor:
        axes = [axis % x.ndim for axis in self._axes()]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return values.permute(order).reshape([x.shape[a] if a in axes else 1 for a in range(x.ndim)])

    def _axes(self) -> tuple[int, ...]:
        return as_tuple(self.channel_axis)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"InputNorm needs a tensor, got {type(x).__name__}. Convert it with torch.as_tensor.")
        if x.is_complex():
            raise TypeError(f"InputNorm needs a real tensor, got {x.dtype}. Use torch.view_as_real(x).")
        axes = self._axes()
        inside = all(-x.ndim <= axis < x.ndim for axis in axes)
        if not inside or tuple(x.shape[axis] for axis in axes) != self.num_features:
            raise ValueError(
                f"InputNorm needs {self.num_features} features on channel_axis={self.channel_axis}, got shape "
                f"{tuple(x.shape)}. Give inputs with the axes of the training data, including the batch axis."
            )

    def extra_repr(self) -> str:
        """Number of features, their axis, how many values of each feature were counted, and at most three names."""
        features = self.num_features[0] if len(self.num_features) == 1 else self.num_features
        if self.count.is_meta:
            counted = "on the meta device"
        elif not self.count.any():
            counted = "not filled"
        else:
            low, high = int(self.count.min()), int(self.count.max())
            counted = f"count={low}" if low == high else f"count={low}..{high}"
        names = [*map(repr, self.feature_names[:3]), *(["..."] if len(self.feature_names) > 3 else [])]
        named = f", feature_names=({', '.join(names)})" if names else ""
        return f"{features}, channel_axis={self.channel_axis}, {counted}{named}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as every module does, but keep statistics in float64: a cast would lose digits for ever."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float64:
                setattr(self, name, (now if old.is_meta else old).to(now.device, torch.float64))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.feature_names:
            destination[prefix + _NAMES] = names_as_tensor(self.feature_names)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load as every module does, and replace the names of the features by those of the state."""
        key, wrong = prefix + _NAMES, len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [each for each in unexpected_keys if each != key]
        if len(error_msgs) > wrong:
            return
        try:
            names = names_of_tensor(state_dict[key]) if key in state_dict else ()
            if names and len(names) != self.mean.numel():
                raise ValueError(f"expected {self.mean.numel()} names, got {len(names)}")  # noqa: TRY301
            self.feature_names = names
        except ValueError as error:
            error_msgs.append(f"{key}: {error}.")


def _require_nan_policy(nan: str) -> None:
    if nan not in {"raise", "omit"}:
        raise ValueError(f"InputNorm.fit needs nan='raise' or 'omit', got {nan!r}.")
