"""Moments: the count, mean and sum of squared deviations of every channel, as one value with an algebra.

With ``count`` n, ``mean`` m and ``m2`` = sum (x - m)^2, the moments of two sets of examples a and b give those of their
union exactly (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances", eq. 2.1):

    n = n_a + n_b        d = m_b - m_a
    m = m_a + d n_b / n  m2 = m2_a + m2_b + d^2 n_a n_b / n

All numbers are float64, and E[x^2] - E[x]^2 is never computed: if the mean is far from zero, it loses all digits of the
variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from batchnorm import moments_union
from batchnorm.kernels import cpu
from batchnorm.kernels.choice import is_plain, kernel_for
from batchnorm.moment_arguments import as_float64, channel_axes, weight_of_each_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Values that are widened to float64 at a time (32 MB): this bounds the memory that `of` needs in addition to its input.
_CHUNK = 1 << 22


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of every channel, in float64.

    ``+`` gives the moments of two sets of examples together, in any order: of batches, ranks and files. Moments are a
    commutative monoid under ``+``, with ``Moments.empty()`` as identity. ``-`` removes examples again.

    A channel with count 0 has ``mean`` and ``var`` NaN. With count 1, ``var`` is 0 and ``unbiased_var`` NaN. NaN and
    infinite values make a channel's moments NaN or infinite; leave such values out with ``mask``.

    Args:
        count: Number of values (or their total weight), 0 or more: a scalar, or a tensor of the shape of ``mean``.
        mean: Mean of each channel, of any shape.
        m2: Sum of squared deviations from the mean, of the shape of ``mean``.

    Raises:
        TypeError: If an argument is not numbers.
        ValueError: If the shapes differ, or a count or m2 is negative.

    Example:
        >>> import torch
        >>> a = Moments.of(torch.tensor([[1.0], [2.0]]))
        >>> b = Moments.of(torch.tensor([[6.0]]))
        >>> a + b
        Moments(count=3, mean=[3], std=[2.16])
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        for name in ("count", "mean", "m2"):
            value = as_float64(name, getattr(self, name))
            # a copy, so that moments do not change with a buffer that is updated in place
            object.__setattr__(self, name, value.detach().clone())
        if self.mean.shape != self.m2.shape or self.count.shape not in {torch.Size(), self.mean.shape}:
            raise ValueError(
                "Moments needs mean and m2 of one shape and count a scalar or of that shape, got "
                f"count {tuple(self.count.shape)}, mean {tuple(self.mean.shape)}, m2 {tuple(self.m2.shape)}. "
                "Give one mean and one m2 for every channel, or measure with Moments.of."
            )
        if bool((self.count < 0).any()) or bool((self.m2 < 0).any()):
            raise ValueError(
                f"Moments needs count and m2 of 0 or more, got count {_brief(self.count)}, m2 {_brief(self.m2)}. "
                "A negative variance is a sign of E[x^2] - E[x]^2: measure with Moments.of."
            )

    @staticmethod
    def of(
        x: Tensor,
        channel_axis: int | Sequence[int] | None = 1,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Moments:
        """Moments of every channel of ``x`` over all its other axes, with every sum in float64.

        Args:
            x: Real tensor of any dtype; integers and half precision are widened before values are added.
            channel_axis: The axis, or axes, of the channels; None makes all values one channel.
            weight: Weight of each value, 0 or more, broadcastable to ``x``; an integer weight w is the same
                as w copies of the value.
            mask: Boolean tensor, broadcastable to ``x``; False leaves a value out, also a NaN.

        Shape:
            ``mean`` and ``m2`` have the sizes of the channel axes. ``count`` is a scalar; with a weight or mask it
            has the shape of ``mean``.

        Raises:
            TypeError: If ``x`` is not a real tensor or ``mask`` is not boolean.
            ValueError: If ``channel_axis`` is not an axis of ``x`` or names an axis twice, a weight or mask does not
                broadcast to ``x``, or a weight is negative, NaN or infinite.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"Moments.of needs a tensor, got {type(x).__name__}. Convert it with torch.as_tensor.")
        if x.is_complex():
            raise TypeError(f"Moments.of needs a real tensor, got {x.dtype}. Measure x.real and x.imag separately.")
        channels = channel_axes(channel_axis, x.ndim)
        if weight is None and mask is None and channels == [1] and _is_native(x):
            mean, var = cpu.measure(x.detach(), exact=True)
            count = x.numel() // len(mean)
            return unchecked(torch.tensor(count, dtype=torch.float64), mean, var * count)
        others = [axis for axis in range(x.ndim) if axis not in channels]
        order = (*others, *channels)
        weights = weight_of_each_value(x, weight, mask)
        weights = None if weights is None else weights.permute(order)
        return _in_chunks(x.detach().permute(order), weights, len(others))  # (others..., channels...)

    @staticmethod
    def empty(shape: Sequence[int] = ()) -> Moments:
        """Moments of no values at all: ``a + Moments.empty()`` is ``a``, bit for bit."""
        return Moments(torch.zeros(()), torch.full(tuple(shape), torch.nan), torch.zeros(tuple(shape)))

    @staticmethod
    def from_var(count: Tensor | float, mean: Tensor, var: Tensor, *, correction: int = 0) -> Moments:
        """Moments with a known variance: m2 = var (count - correction), or 0 where the count is below ``correction``.

        Args:
            count: Number of values that ``mean`` and ``var`` were computed from.
            mean: Mean of each channel.
            var: Variance of each channel, of the same shape.
            correction: 0 for a biased variance, 1 for an unbiased one, such as torch's running_var.
        """
        count = torch.as_tensor(count, dtype=torch.float64)
        mean = torch.where(count == 0, torch.nan, mean.double())
        return Moments(count, mean, var.double() * (count - correction).clamp_min(0))

    @property
    def shape(self) -> torch.Size:
        """Shape of the channels."""
        return self.mean.shape

    @property
    def var(self) -> Tensor:
        """Biased variance, m2 / count: NaN at count 0, 0 at count 1."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance, m2 / (count - 1): NaN at count 0 and 1."""
        return torch.where(self.count > 1, self.m2 / (self.count - 1), torch.nan)

    @property
    def std(self) -> Tensor:
        """Biased standard deviation: NaN at count 0, 0 at count 1."""
        return self.var.sqrt()

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean of independent values, sqrt(unbiased_var / count).

        NaN at count 0 and 1.
        """
        return (self.unbiased_var / self.count).sqrt()

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of values together."""
        if not isinstance(other, Moments):
            return NotImplemented
        a, b = self._matched(other)
        return unchecked(*merged((a.count, a.mean, a.m2), (b.count, b.mean, b.m2)))

    def __radd__(self, other: object) -> Moments:
        """``sum(parts)`` starts from 0, which counts as no values."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Moments) -> Moments:
        """Moments of the values of ``self`` that are not in ``other``, which must be a part of ``self``.

        Raises:
            ValueError: If ``other`` counts more values than ``self``.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        a, b = self._matched(other)
        if bool((b.count > a.count).any()):
            raise ValueError(
                f"Moments a - b needs b to be a part of a, got count {_brief(a.count)} - {_brief(b.count)}. "
                "Subtract only what was added."
            )
        count = a.count - b.count
        delta = a.mean - b.mean
        mean = a.mean + delta * (b.count / count)
        # a.mean - b.mean is only count / a.count of the distance between the means of the two parts
        m2 = a.m2 - b.m2 - delta.square() * (a.count * b.count / count)
        remainder = [torch.where(b.count == 0, a.mean, mean), torch.where(b.count == 0, a.m2, m2.clamp_min(0))]
        gone = count == 0
        return Moments(count, torch.where(gone, torch.nan, remainder[0]), torch.where(gone, 0.0, remainder[1]))

    def scaled(self, factor: Tensor | float) -> Moments:
        """The same distribution at ``factor`` times the weight: count and m2 are multiplied, mean and var stay.

        A factor below 1 lets old values count less; ``m.scaled(n / m.count)`` makes a prior count as n values. Factor 0
        gives moments of no values.

        Raises:
            ValueError: If a factor is negative, NaN or infinite.
        """
        factor = torch.as_tensor(factor, dtype=torch.float64, device=self.mean.device)
        if bool((factor < 0).any()) or not bool(torch.isfinite(factor).all()):
            raise ValueError(
                f"Moments.scaled needs a finite factor of 0 or more, got {_brief(factor)}. Use 1 for no change."
            )
        mean = torch.where(factor == 0, torch.nan, self.mean)
        return Moments(self.count * factor, mean, self.m2 * factor)

    def ema(self, new: Moments, momentum: float) -> Moments:
        """Exponential moving average with torch's rule: (1 - momentum) old + momentum new.

        Mean and *unbiased* variance are averaged separately, as BatchNorm's running_mean and running_var are, so the
        distance between the two means does not enter the variance; with ``+`` it does. The count becomes the effective
        number of values of the average, 1 / ((1 - momentum)^2 / n_old + momentum^2 / n_new), so that
        ``standard_error`` stays right: for batches of n values the count approaches n (2 - momentum) / momentum.

        If one side has count 0, the result is the other side. If one side has count 1, it has no unbiased variance, and
        the result's variance is NaN.

        Raises:
            ValueError: If ``momentum`` is outside of 0..1.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"Moments.ema needs momentum in 0..1, got {momentum}. Use 0.1, torch's default.")
        a, b = self._matched(new)
        keep = 1 - momentum
        count = 1 / (keep**2 / a.count + momentum**2 / b.count)
        mean = keep * a.mean + momentum * b.mean
        m2 = (keep * a.unbiased_var + momentum * b.unbiased_var) * (count - 1)
        parts = [(a.count, b.count, count), (a.mean, b.mean, mean), (a.m2, b.m2, m2)]
        return Moments(*(torch.where(b.count == 0, x, torch.where(a.count == 0, y, z)) for x, y, z in parts))

    def standardized_mean_difference(self, other: Moments) -> Tensor:
        """(other.mean - self.mean) / self.std, in standard deviations of ``self`` (Glass's delta).

        ``self`` is the reference, such as the statistics that a layer stores. If its std is 0, the result is infinite,
        or NaN for equal means.
        """
        a, b = self._matched(other)
        return (b.mean - a.mean) / a.std

    def w2(self, other: Moments) -> Tensor:
        """2-Wasserstein distance between two normal laws with these moments, in the unit of the values.

        It is sqrt((mean_a - mean_b)^2 + (std_a - std_b)^2). For two laws that differ only in location and scale it is
        exact; for others it is a lower bound (Gelbrich 1990).
        """
        a, b = self._matched(other)
        return torch.hypot(a.mean - b.mean, a.std - b.std)

    def symmetric_kl(self, other: Moments) -> Tensor:
        """KL(a || b) + KL(b || a) of two normal laws with these moments, in nats (Jeffreys 1946).

        If both variances are 0, it is 0 for equal means and otherwise infinite; if one variance is 0, it is infinite.
        """
        a, b = self._matched(other)
        between, spread = (a.mean - b.mean).square(), a.var - b.var
        # a sum of terms of 0 or more: for close laws nothing cancels
        distance = (spread.square() + between * (a.var + b.var)) / (2 * a.var * b.var)
        constants = torch.where(between == 0, 0.0, torch.inf)
        return torch.where((a.var == 0) & (b.var == 0), constants, distance)

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return Moments(self.count.to(device), self.mean.to(device), self.m2.to(device))

    def __repr__(self) -> str:
        return f"Moments(count={_brief(self.count)}, mean={_brief(self.mean)}, std={_brief(self.std)})"

    def _matched(self, other: Moments) -> tuple[Moments, Moments]:
        """Both sides in one shape; empty moments without a shape take the shape of the other side."""
        if self.shape == other.shape:
            return self, other
        if self.shape == () and not self.count.any():
            return Moments.empty(other.shape).to(other.mean.device), other
        if other.shape == () and not other.count.any():
            return self, Moments.empty(self.shape).to(self.mean.device)
        raise ValueError(
            "Moments must have the same channels, got shapes "
            f"{tuple(self.shape)} and {tuple(other.shape)}. Measure both with the same channel_axis."
        )


def merged(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and m2 of the values of ``a`` and ``b`` together, from count, mean and m2 of each.

    A side with count 0 leaves the other side's mean and m2 as they are, bit for bit, also if its own are NaN. Means may
    be complex: m2 is then the sum of |x - mean|^2.
    """
    return moments_union.merged(a, b, torch.where)


def unchecked(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Moments of new float64 tensors, without the checks and copies of ``__init__``, which take 20 us."""
    moments = object.__new__(Moments)
    for name, value in (("count", count), ("mean", mean), ("m2", m2)):
        object.__setattr__(moments, name, value)
    return moments


def _is_native(x: Tensor) -> bool:
    """Whether the native kernels measure ``x``: they read it once or twice, torch three times."""
    return x.is_floating_point() and is_plain(x) and kernel_for(x) is cpu


def _in_chunks(x: Tensor, weight: Tensor | None, reduced: int) -> Moments:
    """Moments over the first ``reduced`` axes of ``x``; a large ``x`` is halved along the longest of these axes."""
    longest = max(range(reduced), key=lambda axis: x.shape[axis], default=0)
    if x.numel() <= _CHUNK or not reduced or x.shape[longest] < 2:
        return _two_pass(x, weight, reduced)
    halves = x.tensor_split(2, longest)
    weights = (None, None) if weight is None else weight.tensor_split(2, longest)
    first, second = (_in_chunks(*half, reduced) for half in zip(halves, weights, strict=True))
    return first + second


def _two_pass(x: Tensor, weight: Tensor | None, reduced: int) -> Moments:
    shape = (x.shape[:reduced].numel(), *x.shape[reduced:])  # (values, channels...)
    rows = x.double().reshape(shape)
    return _of_rows(rows) if weight is None else _of_weighted_rows(rows, weight.reshape(shape))


def _of_rows(rows: Tensor) -> Moments:
    count = torch.tensor(float(len(rows)), device=rows.device)
    mean = rows.sum(0) / count
    deviation = rows - mean
    # without rounding the deviations would sum to 0; their sum is the mean's rounding error, which is removed from m2
    m2 = deviation.square().sum(0) - deviation.sum(0).square() / count
    return Moments(count, mean, torch.where(count == 0, 0.0, m2.clamp_min(0)))


def _of_weighted_rows(rows: Tensor, weight: Tensor) -> Moments:
    out = weight == 0
    count = weight.sum(0)
    rows = torch.where(out, 0.0, rows)  # a NaN that is left out must not make the sums NaN
    mean = (weight * rows).sum(0) / count
    deviation = torch.where(out, 0.0, rows - mean)
    m2 = (weight * deviation.square()).sum(0) - (weight * deviation).sum(0).square() / count
    return Moments(count, mean, torch.where(count == 0, 0.0, m2.clamp_min(0)))


def _brief(x: Tensor) -> str:
    """A scalar as a number; a tensor as at most four numbers and an ellipsis."""
    values = [f"{value:.3g}" for value in x.flatten()[:4].tolist()]
    if x.ndim == 0:
        return values[0]
    return f"[{', '.join(values)}{', ...' if x.numel() > 4 else ''}]"
