"""The inputs of one batch norm layer, measured batch by batch and compared with its stored statistics.

With m, v the mean and variance of a channel over all examples (population), m_b, v_b over one batch, m_s, v_s the
stored ones and r = 1 / sqrt(v + eps), two ways to normalize values of mean u and variance w give outputs that differ by

    E[((x - m_1) r_1 - (x - m_2) r_2)^2] = w (r_1 - r_2)^2 + ((u - m_1) r_1 - (u - m_2) r_2)^2

so the gap between train and eval mode, its noise part (batch against population) and its stale part (population
against stored) follow from moments alone, without the effects of other layers.

A running average with momentum a over batches of n examples is as noisy as a mean of n (2 - a) / a examples. Stored
statistics are compared with fresh ones over N examples in units of both noises:

    t = (stored - fresh) / sqrt(s^2 c (a / ((2 - a) n) + 1 / N))

s^2 is the variance of the examples' own means (for t of the mean) or of their mean squares divided by the variance (for
t of the log variance). It accounts for correlated positions within an example; c >= 1 accounts for correlated examples
(``Clustering.excess``). t is right for nearly normal examples; ``stored_statistics_bets`` holds for any distribution.
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
from batchnorm.rules.rule_evidence import Measured

# t counts a difference below a thousandth of the sd, or of the variance, as one thousandth
_LEAST_NOISE = 1e-3
_KEPT = 64  # largest number of examples per batch, and of batches, in the permutation test
_WIDE = {torch.float32, torch.float64}
_NARROW = {torch.float16, torch.bfloat16}


@dataclass
class InputMeasurement:
    """Moments of a layer's inputs, kept per batch so that batches can be compared.

    NaN or an infinite value excludes all values of that example's channel.
    """

    layer: _BatchNorm
    values: list[Moments] = field(default_factory=list)
    means: list[Moments] = field(default_factory=list)  # of each example's mean
    # of each example's mean square deviation from the batch's mean
    squares: list[Moments] = field(default_factory=list)
    examples: int = 0
    non_finite: int = 0
    is_clusterable: bool = True  # whether every call has one row per example of the model
    rounding: float = 0.0
    extremes: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # smallest and largest input of each channel
    padding: list[tuple[Tensor, int]] = field(default_factory=list)  # equal positions at the end, and all positions
    columns: int = 1  # number of channels in the permutation test
    rows: list[Tensor] = field(default_factory=list)  # means, (N, columns), of each batch's first examples
    given: int = 0  # examples of the model, counted in each call
    bets: Bets | None = None

    def add(self, x: Tensor, examples: int) -> None:
        """Count one input of the layer; the model's batch had ``examples`` examples."""
        if not x.numel():
            return
        x = x.detach()
        self.examples += len(x)
        self.given += examples or len(x)
        self.is_clusterable &= len(x) == examples
        self.rounding = torch.finfo(x.dtype).eps
        values, mask = Moments.of(x), None
        if not bool(torch.isfinite(values.m2).all()):
            finite = torch.isfinite(x)
            self.non_finite += x.numel() - int(finite.sum())
            mask = finite.reshape(*x.shape[:2], -1).all(2)  # (N, C)
            values = Moments.of(x, mask=mask.reshape(*mask.shape, *[1] * (x.ndim - 2)))
        self.values.append(values)
        axes = [0, *range(2, x.ndim)]
        self.extremes.append((x.amin(axes).double(), x.amax(axes).double()))
        var, mean = _by_example(x)
        self.means.append(Moments.of(mean, mask=mask))
        self._bet(mean, var, mask, values)
        if len(self.rows) < _KEPT:
            picked = torch.linspace(0, mean.shape[1] - 1, min(self.columns, mean.shape[1])).long().unique()
            self.rows.append(mean[:_KEPT, picked.to(mean.device)].cpu())
        self.squares.append(Moments.of(var + (mean - values.mean).square(), mask=mask))
        if x.ndim == 3:
            self.padding.append((_equal_at_end(x).cpu(), x.shape[2]))

    def _bet(self, mean: Tensor, var: Tensor, mask: Tensor | None, values: Moments) -> None:
        if self.bets is None:
            stored_mean, stored_var = _stored(self.layer, values)
            self.bets = Bets(stored_mean, stored_var + self.layer.eps)
        self.bets.add(mean, var, mask)

    def measured(self) -> Measured:
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
        return Measured(
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
        """Channels whose stored statistics provably differ from those of the examples."""
        if self.bets is None:
            return ()
        # without clustering, rows that belong to one example count as one
        excess = max(1.0, of_means.excess if of_means else self.examples / self.given)
        return self.bets.shown(self._averaged(of_means), excess)

    def _averaged(self, of_means: Clustering | None) -> float:
        """Number of examples in a running average, (2 - a) / a batches; infinite without a running average."""
        momentum = None if isinstance(self.layer, Frozen) else self.layer.momentum
        if momentum is None or not 0 < momentum < 2:
            return math.inf
        size = of_means.size if of_means else self.examples / len(self.values)
        return size * (2 - momentum) / momentum

    def _outputs(self, mean: Tensor, var: Tensor) -> dict[str, array[float]]:
        """Smallest and largest eval output of each channel, before any activation; {} if some are not finite."""
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
        """The gap, its two parts, and the proven stale part: rms over all values, in sd of the eval output."""
        batches = [batch for batch in self.values if bool((batch.count > 1).all())]
        if not batches or not has_stored_statistics(self.layer) or isinstance(self.layer, Frozen):
            return None, None, None, None
        eps, gamma = self.layer.eps, _affine_values(self.layer.weight, torch.ones_like(mean))
        if gamma is None:
            return None, None, None, None
        gain = gamma.square()
        means, variances = (torch.stack([getattr(b, name) for b in batches]) for name in ("mean", "var"))  # (B, C)
        counts = torch.stack([b.count.expand(mean.shape) for b in batches])
        fresh = total.mean, (total.var + eps).rsqrt()
        stored = mean, (var + eps).rsqrt()
        of_batch = means, (variances + eps).rsqrt()
        output = (gain * total.var * stored[1].square()).sum()
        parts = (
            difference(means, variances, of_batch, stored).mul(counts).sum(0) / counts.sum(0),
            difference(means, variances, of_batch, fresh).mul(counts).sum(0) / counts.sum(0),
            difference(total.mean, total.var, fresh, stored),
        )
        squares = [(gain * part).sum() for part in parts] + [(gain * parts[2])[list(shown)].sum()]
        gaps = [float((square / output).sqrt()) for square in squares]
        return tuple(value if math.isfinite(value) else None for value in gaps)

    def _t(self, total: Moments, mean: Tensor, var: Tensor) -> tuple[array[float] | None, array[float] | None]:
        """t of the stored mean and of the log of the stored variance; None if their noise is unknown."""
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
        """Share of end positions that repeat one value, if examples end at different places."""
        if not self.padding:
            return 0.0
        padded = torch.cat([torch.where(run > 1, run, 0) for run, _ in self.padding])
        ends = torch.cat([length - torch.where(run > 1, run, 0) for run, length in self.padding])
        positions = sum(len(run) * length for run, length in self.padding)
        return float(padded.sum()) / positions if len(ends.unique()) > 1 else 0.0


def is_measurable(x: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers in channels, (N, C, ...), and is dense."""
    return x.dtype in _WIDE | _NARROW and x.layout == torch.strided and not x.is_nested and x.ndim > 1


def _by_example(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of every example's channels: (N, C, ...) -> (N, C), in float64."""
    wide = x if x.dtype in _WIDE else x.float()
    if x.ndim == 2:
        return torch.zeros_like(wide, dtype=torch.float64), wide.double()
    var, mean = torch.var_mean(wide, tuple(range(2, x.ndim)), correction=0)
    return var.double(), mean.double()


def _equal_at_end(x: Tensor) -> Tensor:
    """Number of positions at each example's end that equal the last one in all channels: (N, C, L) -> (N,)."""
    same = (x == x[:, :, -1:]).all(1)  # (N, C, L) -> (N, L)
    return same.flip(1).long().cumprod(1).sum(1)


def _affine_values(parameter: Tensor | None, otherwise: Tensor) -> Tensor | None:
    """Gamma or beta in float64; ``otherwise`` if the layer has none; None if its values cannot be read here."""
    if parameter is None:
        return otherwise
    plain = whole(parameter, len(otherwise))
    return None if plain is None else plain.detach().double()


def _stored(layer: _BatchNorm, total: Moments) -> tuple[Tensor, Tensor]:
    """Stored mean and variance in float64; NaN if there are none."""
    unknown = torch.full_like(total.mean, torch.nan)
    if not has_stored_statistics(layer):
        return unknown, unknown
    mean, var = (whole(buffer, len(total.mean)) for buffer in buffers(layer))
    return unknown if mean is None else mean.double(), unknown if var is None else var.double()


def plain(values: Tensor) -> array[float]:
    """A tensor with one value per channel as plain float64 numbers."""
    return array("d", values.double().cpu().tolist())
