"""InputNorm: input features at mean 0 and variance 1, as the first module of a network.

    z = (x - mean) / scale        x = z scale + mean        scale = sqrt(var), or 1 for a constant feature

The statistics are measured once, over the training data, and saved inside the network's checkpoint, so that test
examples are scaled in the same way as training examples (LeCun, Bottou, Orr and Müller 1998, "Efficient BackProp",
section 4.3). The statistics are float64 buffers. From float32 inputs the mean is subtracted in two float32 parts:
values far from zero lose only digits that float32 inputs do not have.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from batchnorm.argument_types import require_whole_number
from batchnorm.moments import Moments
from batchnorm.tracing import call_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    import numpy as np

# a tensor or an array; a tuple or list whose first element is a tensor or array; or a mapping with such a value
Batch = Any
_STATISTICS = ("count", "mean", "var")
# the types with values that float32 cannot represent exactly: for them the arithmetic is in float64
_WIDE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}
# Values of an array that are widened to float64 at a time (32 MB), as in Moments.of.
_CHUNK = 1 << 22
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

    def __init__(
        self,
        num_features: int | Sequence[int],
        channel_axis: int | Sequence[int] | None = 1,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, sizes in (("num_features", num_features), ("channel_axis", channel_axis)):
            for size in _as_tuple(sizes, name):
                require_whole_number(size, name, "Give a tuple for several axes. For data call InputNorm.fit.")
        self.num_features = _as_tuple(num_features)
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
        data: Tensor | np.ndarray | Iterable[Batch],
        channel_axis: int | Sequence[int] | None = 1,
        *,
        nan: Literal["raise", "omit"] = "raise",
        key: Hashable = None,
    ) -> Self:
        """An InputNorm with the exact statistics of all data, whatever the batch sizes and their order.

        They are accumulated in float64 by Chan's update, with one batch in memory at a time. A feature with a single
        value has this value as its mean, and scale 1.

        Args:
            data: A tensor or array with examples and features, or batches of them: a DataLoader, a list, an
                iterator. The input is the first element of a batch that is a tuple or list, and the value at ``key``
                of a batch that is a mapping.
            channel_axis: As for InputNorm.
            nan: "raise" refuses NaN; "omit" leaves each NaN out of its own feature, as scikit-learn does.
            key: The input's key in batches that are mappings.

        Raises:
            ValueError: If ``nan`` is neither "raise" nor "omit"; if there is no value at all, NaN with ``nan="raise"``,
                an infinity, a value whose square does not fit float64, no ``key`` in a batch that is a mapping, or
                batches differ in their features.
            TypeError: If ``data`` or a batch is of no type described above.

        Warns:
            RuntimeWarning: If all values of a feature are NaN. Its count is 0, and forward does not change it.
        """
        if nan not in {"raise", "omit"}:
            raise ValueError(f"InputNorm.fit needs nan='raise' or 'omit', got {nan!r}.")
        total = _Total(channel_axis)
        for x in _tensors(data, key, channel_axis):
            total.add(x)
        return cls.from_moments(total.checked(omit_nan=nan == "omit"), channel_axis)

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
        return _as_tuple(self.channel_axis)

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
        """Number of features, their axis, and how many values of each feature were counted."""
        features = self.num_features[0] if len(self.num_features) == 1 else self.num_features
        if self.count.is_meta:
            counted = "on the meta device"
        elif not self.count.any():
            counted = "not filled"
        else:
            low, high = int(self.count.min()), int(self.count.max())
            counted = f"count={low}" if low == high else f"count={low}..{high}"
        return f"{features}, channel_axis={self.channel_axis}, {counted}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as every module does, but keep statistics in float64: a cast would lose digits for ever."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float64:
                setattr(self, name, (now if old.is_meta else old).to(now.device, torch.float64))
        return self


def _as_tuple(axes: int | Sequence[int] | None, name: str = "channel_axis") -> tuple[int, ...]:
    if axes is None:
        return ()
    if isinstance(axes, int) or not isinstance(axes, Iterable):
        require_whole_number(axes, name, "Give a tuple for several axes. For data call InputNorm.fit.")
        return (axes,)
    return tuple(axes)


class _Total:
    """Moments of all values except NaN, and the number of NaN and of infinities in each feature."""

    def __init__(self, channel_axis: int | Sequence[int] | None) -> None:
        self.channel_axis = channel_axis
        self.moments = Moments.empty()
        self.nan: Tensor | int = 0
        self.inf: Tensor | int = 0

    def add(self, x: Tensor) -> None:
        new = Moments.of(x, self.channel_axis)
        if x.is_floating_point() and not torch.isfinite(new.m2).all():
            new = Moments.of(x, self.channel_axis, mask=~x.isnan())
            self.nan = self.nan + self._count(x.isnan())
            self.inf = self.inf + self._count(x.isinf())
        self.moments += new

    def _count(self, mask: Tensor) -> Tensor:
        moments = Moments.of(mask, self.channel_axis)  # the mean of a mask is the share of True
        return (moments.mean * moments.count).round().long()

    def checked(self, *, omit_nan: bool) -> Moments:
        """The moments; an error if an InputNorm cannot store them."""
        if torch.as_tensor(self.inf).any():
            raise ValueError(
                f"InputNorm.fit needs finite values, got infinity in {_by_feature(self.inf)}. Clip or remove it."
            )
        if not omit_nan and torch.as_tensor(self.nan).any():
            raise ValueError(
                f"InputNorm.fit needs values without NaN, got NaN in {_by_feature(self.nan)}. "
                "Use nan='omit' to leave NaN out, or impute the values."
            )
        counts = self.moments.count.expand(self.moments.shape)
        if not counts.any():
            raise ValueError("InputNorm.fit needs at least one value, got no data. Check the loader's length.")
        if not torch.isfinite(self.moments.m2).all():
            large = (~torch.isfinite(self.moments.m2)).long()
            raise ValueError(
                f"InputNorm.fit needs values whose squares fit float64, got larger in {_by_feature(large)}. "
                "Divide the values by a constant first."
            )
        if not counts.all():
            warnings.warn(
                f"InputNorm.fit needs numbers, got only NaN in {_by_feature((counts == 0).long() * self.nan)}. "
                "Forward does not change such a feature. Remove it from the data.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.moments


def _by_feature(counts: Tensor | int) -> str:
    """The features with a count above 0 and their counts, in words; at most five are named."""
    counts = torch.as_tensor(counts)
    where = counts.nonzero().tolist()
    texts = [
        f"{index[0] if len(index) == 1 else tuple(index)} ({int(counts[tuple(index)])} times)" for index in where[:5]
    ]
    more = f" and {len(where) - 5} more" if len(where) > 5 else ""
    return f"{'feature' if len(where) == 1 else 'features'} {', '.join(texts)}{more}"


def _tensors(data: Batch, key: Hashable, channel_axis: int | Sequence[int] | None) -> Iterator[Tensor]:
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
    axes = _as_tuple(channel_axis)
    divisible = 0 not in axes and -array.ndim not in axes  # if axis 0 has features, a slice would separate them
    rows = max(1, _CHUNK * len(array) // max(array.size, 1)) if divisible else max(len(array), 1)
    for start in range(0, max(len(array), 1), rows):
        yield torch.from_numpy(np.array(array[start : start + rows], dtype=np.float64))
