"""InputNorm: input features at mean 0 and variance 1, as the first module of a network.

    z = (x - mean) / scale        x = z scale + mean        scale = sqrt(var), or 1 for a constant feature

The statistics are measured once, over the training data, and saved inside the network's checkpoint, so that
examples at test time are scaled as those of training were (LeCun, Bottou, Orr and Müller 1998, "Efficient
BackProp", section 4.3). They are float64 buffers; float32 inputs are shifted by the mean in two float32 parts, so
that values far from zero lose no more digits than their own format has.
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

# a tensor or an array, a tuple or list that begins with one, or a mapping that has one
Batch = Any
_STATISTICS = ("count", "mean", "var")
# values that float32 does not hold exactly are shifted in float64
_WIDE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}
# Rows of an array that are widened to float64 at a time (32 MB), as in Moments.of.
_CHUNK = 1 << 22
# Summing n values one by one has an error of up to n eps, and scikit-learn's bound grows so. Moments are summed in
# blocks and merged, which keeps the error of any n below this one's; without a cap, 10 million values of mean 1e6
# and std 1e-3 would pass for a constant.
_ROUNDING_COUNT = 1 << 16


class InputNorm(nn.Module):
    """Normalization of input features by stored population statistics; the identity until they are filled.

    ``InputNorm.fit(data)`` measures them; ``InputNorm(num_features)`` is the empty one, to load a checkpoint into
    (``strict=True``). Train and eval mode are the same, and forward never changes the module. The variance is the
    biased one, and a constant feature has scale 1, both as in scikit-learn's StandardScaler: a variance no larger
    than its rounding error, (n eps mean)^2, counts as 0 (n is taken as 65536 at most).

    Forward takes floating-point tensors, which keep their dtype, and integer ones (images, counts), which come
    out in the dtype that the module was cast to (``model.half()``; float32 by default). The statistics themselves
    stay float64 through every cast, which needs a device that has float64. NaN stays NaN at its own place and
    touches no other value.

    Args:
        num_features: Size of the channel axis, or sizes of the channel axes.
        channel_axis: The axis, or axes, of the features; negative ones count from the end. All other axes are
            examples and positions: 1 gives one mean for each column of (N, C) and each channel of (N, C, H, W);
            (1, 2, 3) one for each pixel; None, with ``num_features=()``, one for everything.
        device: Where the statistics are kept.

    Shape:
        The features are at ``channel_axis``; the output has the shape of the input.

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
                require_whole_number(size, name, "Or use several, for several axes. InputNorm.fit takes data.")
        self.num_features = _as_tuple(num_features)
        self.channel_axis = channel_axis
        if len(self.num_features) != len(self._axes()):
            raise ValueError(
                f"InputNorm needs one size for each channel axis, got num_features={num_features} for "
                f"channel_axis={channel_axis}. Use num_features=() with channel_axis=None."
            )
        for name, value in (("count", 0.0), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full(self.num_features, value, dtype=torch.float64, device=device))
        # follows .half() and the like, to tell what integers should become
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
        """A filled InputNorm: the exact statistics of all data, whatever the batch sizes and their order.

        Accumulated in float64 by Chan's update, one batch in memory at a time.

        Args:
            data: A tensor or array with examples and features, or batches of them: a DataLoader, a list, an
                iterator. Of a batch that is a tuple or list the first element is taken; of a mapping, ``key``.
            channel_axis: As for InputNorm.
            nan: "raise" refuses NaN; "omit" leaves each NaN out of its own feature, as scikit-learn does.
            key: The input's key in batches that are mappings.

        Raises:
            ValueError: If there is no value at all, NaN with ``nan="raise"``, an infinity, a value whose square
                does not fit float64, or batches differ in their features.
            TypeError: If ``data`` or a batch is of no type described above.

        Warns:
            RuntimeWarning: If a feature has no value but NaN. It is passed on as it is, with count 0.

        At count 1, mean is the value and scale 1.
        """
        if nan not in {"raise", "omit"}:
            raise ValueError(f"InputNorm.fit needs nan='raise' or 'omit', got {nan!r}.")
        total = _Total(channel_axis)
        for x in _tensors(data, key, channel_axis):
            total.add(x)
        return cls.from_moments(total.checked(omit_nan=nan == "omit"), channel_axis)

    @classmethod
    def from_moments(cls, moments: Moments, channel_axis: int | Sequence[int] | None = 1) -> Self:
        """An InputNorm filled with moments that were measured elsewhere, on their device.

        Features with count 0 are passed on as they are; with count 1, scale is 1.
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
        """What deviations are divided by, float64: the biased standard deviation, or 1 for a constant feature."""
        error = self.count.clamp_max(_ROUNDING_COUNT) * torch.finfo(torch.float64).eps * self.mean
        constant = self.var <= error.square()  # scikit-learn adds n eps var, which decides nothing below n = 1e15
        return torch.where(constant, 1.0, self.var.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` normalized, in its own dtype; integers come out as floating point."""
        if (node := call_whole(self, x)) is not None:
            return node
        self._check_input(x)
        high, low, scale = self._parts(x)
        z = ((x.to(high.dtype) - high) - low) / scale
        return z.to(x.dtype if x.is_floating_point() else self._dtype_carrier.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """The input for which ``forward`` returns ``z``: z scale + mean, in float64 for float64 and else in float32."""
        self._check_input(z)
        high, low, scale = self._parts(z)
        return (z.to(high.dtype) * scale + low) + high

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean in two parts and scale, shaped to broadcast over ``x``, in the dtype to compute with."""
        dtype = torch.float64 if x.dtype in _WIDE else torch.float32
        high = self.mean.to(dtype)
        low = (self.mean - high).to(dtype)  # what rounding left of the mean
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
                f"{tuple(x.shape)}. Give the axes that it was fitted with, the batch axis included."
            )

    def extra_repr(self) -> str:
        """Features, their axis, and how many values of each were counted."""
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
        """Move as every module does, but keep statistics at float64 through casts: they cannot be got back."""
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
        require_whole_number(axes, name, "Or use several, for several axes. InputNorm.fit takes data.")
        return (axes,)
    return tuple(axes)


class _Total:
    """Moments of all values but NaN, and the number of NaN and of infinities in each feature."""

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

    def _count(self, found: Tensor) -> Tensor:
        counted = Moments.of(found, self.channel_axis)  # the mean of a yes or no is its share
        return (counted.mean * counted.count).round().long()

    def checked(self, *, omit_nan: bool) -> Moments:
        """The moments, after the checks that they can be stored."""
        if torch.as_tensor(self.inf).any():
            raise ValueError(
                f"InputNorm.fit needs finite values, got infinity in {_by_feature(self.inf)}. Clip or remove them."
            )
        if not omit_nan and torch.as_tensor(self.nan).any():
            raise ValueError(
                f"InputNorm.fit needs values without NaN, got NaN in {_by_feature(self.nan)}. "
                "Use nan='omit' to leave them out, or impute them."
            )
        counts = self.moments.count.expand(self.moments.shape)
        if not counts.any():
            raise ValueError("InputNorm.fit needs at least one value, got no data. Check the loader's length.")
        if not torch.isfinite(self.moments.m2).all():
            large = (~torch.isfinite(self.moments.m2)).long()
            raise ValueError(
                f"InputNorm.fit needs values whose squares fit float64, got larger ones in {_by_feature(large)}. "
                "Divide them by a constant first."
            )
        if not counts.all():
            warnings.warn(
                f"InputNorm.fit found nothing but NaN in {_by_feature((counts == 0).long() * self.nan)}: "
                "such a feature is passed on as it is. Remove it from the data.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.moments


def _by_feature(counts: Tensor | int) -> str:
    """Which features were counted and how often, the first five in words."""
    counts = torch.as_tensor(counts)
    where = counts.nonzero().tolist()
    named = [
        f"{index[0] if len(index) == 1 else tuple(index)} ({int(counts[tuple(index)])} times)" for index in where[:5]
    ]
    more = f" and {len(where) - 5} more" if len(where) > 5 else ""
    return f"{'feature' if len(where) == 1 else 'features'} {', '.join(named)}{more}"


def _tensors(data: Batch, key: Hashable, channel_axis: int | Sequence[int] | None) -> Iterator[Tensor]:
    """The inputs in ``data``, as tensors."""
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
    """An array, a slice of rows at a time: torch takes neither foreign byte orders nor negative strides."""
    import numpy as np

    if isinstance(data, np.ma.MaskedArray):
        raise TypeError(
            "InputNorm.fit needs an array without a mask, got a masked one. "
            "Use data.filled(np.nan) and nan='omit' to leave masked values out."
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
    divisible = 0 not in axes and -array.ndim not in axes  # else the rows are features
    rows = max(1, _CHUNK * len(array) // max(array.size, 1)) if divisible else max(len(array), 1)
    for start in range(0, max(len(array), 1), rows):
        yield torch.from_numpy(np.array(array[start : start + rows], dtype=np.float64))
