"""The inputs of one batch norm layer, measured batch by batch and compared with its stored statistics.

Let x be values with mean u and variance w. Two normalizations of x, (x - m_1) r_1 and (x - m_2) r_2, with
r = 1 / sqrt(v + eps) for a variance v, have the mean squared difference

    E[((x - m_1) r_1 - (x - m_2) r_2)^2] = w (r_1 - r_2)^2 + ((u - m_1) r_1 - (u - m_2) r_2)^2

The means and variances are those of one batch, of all examples (population), or the stored ones. So the gap between
train and eval mode (batch against stored), its noise part (batch against population) and its stale part (population
against stored) follow from moments alone, without the effects of other layers.

A running average with momentum a over batches of n examples is as noisy as a mean of n (2 - a) / a examples. Stored
statistics are compared with those of N measured examples, in units of the standard error of their difference:

    t = (stored - measured) / sqrt(s^2 c (a / ((2 - a) n) + 1 / N))

For t of the mean, s^2 is the variance over examples of an example's mean. For t of the log variance, it is the variance
over examples of an example's mean squared deviation, divided by the squared variance of the channel. s^2 accounts for
correlated positions within an example; c >= 1 (``Clustering.excess``) accounts for correlated examples. t assumes
nearly normal examples; ``stored_statistics_bets`` is valid for any distribution.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.measuring.batch_clustering import Clustering, clustering
from batchnorm.doctor.measuring.stored_statistics_bets import Bets
from batchnorm.instruments.output_differences import difference
from batchnorm.moments import Moments
from batchnorm.population.freezing import Frozen, has_stored_statistics
from batchnorm.population.stored_statistics import buffers
from batchnorm.population.tensor_memory import whole
from batchnorm.rules.rule_evidence import MeasuredLayer

# the noise in t is at least a thousandth of the sd (0.001 for the log variance): with a smaller difference |t| is below
# 1
_LEAST_NOISE = 1e-3
_MOST_IN_PERMUTATION_TEST = 64  # largest number of examples per batch, and of batches, in the permutation test
_WIDE = {torch.float32, torch.float64}
_NARROW = {torch.float16, torch.bfloat16}


@dataclass
class InputMeasurement:
    """Moments of a layer's inputs, kept per batch so that batches can be compared.

    If an example has NaN or infinity in a channel, all its values in this channel are left out.
    """

    layer: _BatchNorm
    values: list[Moments] = field(default_factory=list)
    means: list[Moments] = field(default_factory=list)  # of each example's mean
    # of each example's mean square deviation from the batch's mean
    squares: list[Moments] = field(default_factory=list)
    examples: int = 0
    non_finite: int = 0
    is_clusterable: bool = True  # whether the input of every call has as many rows as the model's batch
    rounding: float = 0.0
    extremes: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # smallest and largest input of each channel
    padding: list[tuple[Tensor, int]] = field(default_factory=list)  # equal last positions of examples; all positions
    columns: int = 1  # number of channels in the permutation test
    rows: list[Tensor] = field(default_factory=list)  # per batch: means of its first examples, (N, columns)
    given: int = 0  # sizes of the model's batches, added up over the layer's calls
    bets: Bets | None = None

    def add(self, x: Tensor, examples: int, valid: Tensor | None = None) -> None:
        """Count one input of the layer; the model's batch had ``examples`` examples.

        ``valid`` is the mask of a call that leaves padding out, bool and broadcastable to ``x``. Examples that are all
        padding do not count.
        """
        if valid is not None:
            has_values = valid.expand_as(x).reshape(len(x), -1).any(1)
            x, valid = x[has_values], valid.expand_as(x)[has_values]
        if not x.numel():
            return
        x = x.detach()
        self.examples += len(x)
        self.given += examples or len(x)
        self.is_clusterable &= len(x) == examples
        self.rounding = torch.finfo(x.dtype).eps
        values, mask = Moments.of(x, mask=valid), None
        if not bool(torch.isfinite(values.m2).all()):
            finite = torch.isfinite(x) if valid is None else torch.isfinite(x) | ~valid
            self.non_finite += x.numel() - int(finite.sum())
            mask = finite.reshape(*x.shape[:2], -1).all(2)  # (N, C)
            whole_examples = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
            values = Moments.of(x, mask=whole_examples if valid is None else whole_examples & valid)
        self.values.append(values)
        axes = [0, *range(2, x.ndim)]
        self.extremes.append((_where(valid, x, torch.inf).amin(axes), _where(valid, x, -torch.inf).amax(axes)))
        var, mean = _by_example(x) if valid is None else _by_example_of_valid(x, valid)
        self.means.append(Moments.of(mean, mask=mask))
        self._bet(mean, var, mask, values)
        if len(self.rows) < _MOST_IN_PERMUTATION_TEST:
            picked = torch.linspace(0, mean.shape[1] - 1, min(self.columns, mean.shape[1])).long().unique()
            self.rows.append(mean[:_MOST_IN_PERMUTATION_TEST, picked.to(mean.device)].cpu())
        self.squares.append(Moments.of(var + (mean - values.mean).square(), mask=mask))
        if x.ndim == 3 and valid is None:
            self.padding.append((_equal_at_end(x).cpu(), x.shape[2]))

    def _bet(self, mean: Tensor, var: Tensor, mask: Tensor | None, values: Moments) -> None:
        if self.bets is None:
            stored_mean, stored_var = _stored(self.layer, values)
            self.bets = Bets(stored_mean, stored_var + self.layer.eps)
        self.bets.add(mean, var, mask)

    def measured(self) -> MeasuredLayer:
        """All measurements as plain numbers."""
        total = sum(self.values, Moments.empty())
        layer = self.layer
        mean, var = _stored(layer, total)
        of_means = clustering(self.means)
        batches = of_means if self.is_clusterable else None
        shown = self._shown(of_means)
        gap, noise, stale, stale_shown = self._gap(total, mean, var, shown)
        t_mean, t_var = self._t(total, mean, var)
        constant = (total.std <= self.rounding * total.mean.abs()) & (total.count > 1)
        return MeasuredLayer(
            examples=self.examples,
            batches=len(self.values),
            values_per_example=float(total.count.max()) / max(1.0, float(sum(self.means, Moments.empty()).count.max())),
            mean=plain(total.mean),
            var=plain(total.var),
            mean_deviation=plain((total.mean - mean) / (var + layer.eps).sqrt()),
            var_ratio=plain((total.var + layer.eps) / (var + layer.eps)),
            t_mean=t_mean,
            t_var=t_var,
            effective_examples=batches and batches.effective,
            batch_examples=batches and batches.size,
            clustering_p=batches and batches.p,
            non_finite=self.non_finite,
            constant=tuple(constant.nonzero().flatten().tolist()),
            **self._outputs(mean, var),
            padded_share=self._padded_share(),
            gap=gap,
            gap_noise=noise,
            gap_stale=stale,
            gap_shown=stale_shown,
            shown=shown,
        )

    def _shown(self, of_means: Clustering | None) -> tuple[int, ...]:
        """Channels whose stored statistics differ significantly from those of the examples (see ``Bets.shown``)."""
        if self.bets is None:
            return ()
        # if clustering could not be computed, all rows of one example count as one
        excess = max(1.0, of_means.excess if of_means else self.examples / self.given)
        return self.bets.shown(self._examples_averaged(of_means), excess)

    def _examples_averaged(self, of_means: Clustering | None) -> float:
        """Number of examples whose mean is as noisy as the running average; infinite without a running average."""
        momentum = None if isinstance(self.layer, Frozen) else self.layer.momentum
        if momentum is None or not 0 < momentum < 2:
            return math.inf
        size = of_means.size if of_means else self.examples / len(self.values)
        return size * (2 - momentum) / momentum

    def _outputs(self, mean: Tensor, var: Tensor) -> dict[str, array[float]]:
        """Smallest and largest eval output of each channel, before any activation; {} if unknown or not finite."""
        layer = self.layer
        gamma, beta = (
            _affine_values(layer.weight, torch.ones_like(mean)),
            _affine_values(layer.bias, torch.zeros_like(mean)),
        )
        if gamma is None or beta is None:
            return {}
        gain = (var + layer.eps).rsqrt() * gamma
        ends = [torch.stack(each) for each in zip(*self.extremes, strict=True)]
        low, high = (gain * (end - mean) + beta for end in (ends[0].amin(0), ends[1].amax(0)))
        if not bool(torch.isfinite(low + high).all()):
            return {}
        return {"lowest": plain(torch.minimum(low, high)), "highest": plain(torch.maximum(low, high))}

    def _gap(self, total: Moments, mean: Tensor, var: Tensor, shown: tuple[int, ...]) -> tuple[float | None, ...]:
        """The gap, its noise part, its stale part, and the stale part of the channels in ``shown`` alone.

        Each is a root mean square over all values, in standard deviations of the eval output; None if it is unknown.
        """
        batches = [batch for batch in self.values if bool((batch.count > 1).all())]
        if not batches or not has_stored_statistics(self.layer) or isinstance(self.layer, Frozen):
            return None, None, None, None
        eps, gamma = self.layer.eps, _affine_values(self.layer.weight, torch.ones_like(mean))
        if gamma is None:
            return None, None, None, None
        gain = gamma.square()
        means, variances = (torch.stack([getattr(b, name) for b in batches]) for name in ("mean", "var"))  # (B, C)
        counts = torch.stack([b.count.expand(mean.shape) for b in batches])
        population = total.mean, (total.var + eps).rsqrt()
        stored = mean, (var + eps).rsqrt()
        of_batch = means, (variances + eps).rsqrt()
        output = (gain * total.var * stored[1].square()).sum()
        parts = (
            difference(means, variances, of_batch, stored).mul(counts).sum(0) / counts.sum(0),
            difference(means, variances, of_batch, population).mul(counts).sum(0) / counts.sum(0),
            difference(total.mean, total.var, population, stored),
        )
        squares = [(gain * part).sum() for part in parts] + [(gain * parts[2])[list(shown)].sum()]
        gaps = [float((square / output).sqrt()) for square in squares]
        return tuple(value if math.isfinite(value) else None for value in gaps)

    def _t(self, total: Moments, mean: Tensor, var: Tensor) -> tuple[array[float] | None, array[float] | None]:
        """t of the stored mean and of the log of the stored variance, by channel; None if their noise is unknown."""
        momentum, eps = self.layer.momentum, self.layer.eps
        of_means, of_squares = clustering(self.means), clustering(self.squares)
        if of_means is None or of_squares is None or isinstance(self.layer, Frozen):
            return None, None
        if momentum is None or not 0 < momentum < 2:  # no running average, or one that diverges
            return None, None
        if not has_stored_statistics(self.layer):
            return None, None
        sizes = momentum / ((2 - momentum) * of_means.size) + 1 / self.examples
        scale = total.var + eps
        noise = of_means.var * max(1.0, of_means.excess) * sizes + scale * _LEAST_NOISE**2
        log_noise = of_squares.var / scale.square() * max(1.0, of_squares.excess) * sizes + _LEAST_NOISE**2
        log_ratio = ((var + eps) / (total.unbiased_var + eps)).log()
        return plain((mean - total.mean) / noise.sqrt()), plain(log_ratio / log_noise.sqrt())

    def _padded_share(self) -> float:
        """Share of positions that look like padding: equal positions at an example's end; 0 if all end at the same."""
        if not self.padding:
            return 0.0
        padded = torch.cat([torch.where(run > 1, run, 0) for run, _ in self.padding])
        ends = torch.cat([length - torch.where(run > 1, run, 0) for run, length in self.padding])
        positions = sum(len(run) * length for run, length in self.padding)
        return float(padded.sum()) / positions if len(ends.unique()) > 1 else 0.0


def is_measurable(x: Tensor) -> bool:
    """Whether a tensor is dense, floating-point, and has a channel axis: (N, C, ...)."""
    return x.dtype in _WIDE | _NARROW and x.layout == torch.strided and not x.is_nested and x.ndim > 1


def _by_example(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each channel of each example: (N, C, ...) -> (N, C), in float64."""
    wide = x if x.dtype in _WIDE else x.float()
    if x.ndim == 2:
        return torch.zeros_like(wide, dtype=torch.float64), wide.double()
    var, mean = torch.var_mean(wide, tuple(range(2, x.ndim)), correction=0)
    return var.double(), mean.double()


def _by_example_of_valid(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The same over the valid positions, of which each channel of each example has one or more."""
    moments = Moments.of(x, (0, 1), mask=valid)
    return moments.var, moments.mean


def _where(valid: Tensor | None, x: Tensor, otherwise: float) -> Tensor:
    """``x`` in float64, with another value in the padding."""
    return x.double() if valid is None else torch.where(valid, x, otherwise).double()


def _equal_at_end(x: Tensor) -> Tensor:
    """Number of positions at each example's end that equal the last one in all channels: (N, C, L) -> (N,)."""
    same = (x == x[:, :, -1:]).all(1)  # (N, C, L) -> (N, L)
    return same.flip(1).long().cumprod(1).sum(1)


def _affine_values(parameter: Tensor | None, otherwise: Tensor) -> Tensor | None:
    """Gamma or beta in float64; ``otherwise`` if the parameter is None; None if its values cannot be read here."""
    if parameter is None:
        return otherwise
    tensor = whole(parameter, len(otherwise))
    return None if tensor is None else tensor.detach().double()


def _stored(layer: _BatchNorm, total: Moments) -> tuple[Tensor, Tensor]:
    """Stored mean and variance in float64; NaN if they are missing or cannot be read here."""
    nan = torch.full_like(total.mean, torch.nan)
    if not has_stored_statistics(layer):
        return nan, nan
    mean, var = (whole(buffer, len(total.mean)) for buffer in buffers(layer))
    return nan if mean is None else mean.double(), nan if var is None else var.double()


def plain(values: Tensor) -> array[float]:
    """A tensor with one value per channel as an array of float64 numbers."""
    return array("d", values.double().cpu().tolist())
