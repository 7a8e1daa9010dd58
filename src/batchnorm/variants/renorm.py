"""Batch renorm (Ioffe 2017, "Batch Renormalization", algorithm 1): train mode gives nearly the results of eval mode.

For a channel with the batch's mean and standard deviation mu_B and sigma_B, and the stored mu and sigma, which are
those before the batch moves them:

    r = clip(sigma_B / sigma, 1 / rmax, rmax)       d = clip((mu_B - mu) / sigma, -dmax, dmax)
    p = gamma (r (x - mu_B) / sigma_B + d) + beta

r and d are constants for the gradient. Where nothing is clipped, p = gamma (x - mu) / sigma + beta, as in eval mode. So
sigma = sqrt(running_var + eps) as eval mode has it, of the unbiased variance, and sigma_B = sqrt(var + eps) as train
mode has it, of the biased variance. p is batch norm with gamma r in the place of gamma and beta + gamma d in that of
beta, which ``renormalized`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, final

import torch
from torch import Tensor, nn

from batchnorm.argument_types import require_number, require_type
from batchnorm.kernels import ChannelStatistics, Layer, Measured
from batchnorm.kernels.reference import exact_dtype

# rmax or dmax: a number, or a function of the number of batches so far, an int64 tensor ()
Limit = float | Callable[[Tensor], Tensor | float]


@final
@dataclass(frozen=True)
class Ramp:
    """A limit that is ``start`` up to a batch, grows linearly, and is ``end`` from another batch on.

    Args:
        start: The limit up to batch number ``begin``.
        end: The limit from batch number ``finish`` on.
        begin: Number of batches after which the limit begins to grow.
        finish: Number of batches after which it no longer grows; more than ``begin``.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``finish`` is not more than ``begin``.

    Example:
        >>> Ramp(1, 3, 5_000, 40_000)(torch.tensor(22_500)).item()
        2.0
    """

    start: float
    end: float
    begin: float
    finish: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require_number(value, f"Ramp's {name}", "See batchnorm.Renorm for the paper's numbers.")
        if not self.finish > self.begin:
            raise ValueError(
                f"Ramp's finish must be more than begin, got {self.begin} to {self.finish}. Give a number in place of "
                "a Ramp if the limit does not grow."
            )

    def __call__(self, batches: Tensor) -> Tensor:
        """The limit after this number of batches."""
        share = ((batches.to(exact_dtype(batches.device)) - self.begin) / (self.finish - self.begin)).clamp(0, 1)
        return self.start + (self.end - self.start) * share


@final
@dataclass(frozen=True)
class Renorm:
    """The limits of batch renorm, for a layer's setting ``renorm``.

    A limit is a number, or a function of the number of batches that the layer has stored: it is called with
    ``num_batches_tracked``, an int64 tensor (), and returns a number or a tensor (), so that no accelerator is waited
    for. The defaults are the paper's: batch norm for 5,000 batches, then rmax grows to 3 within 35,000 batches, and
    dmax to 5 within 20,000. Reinforcement learning often uses constants from the first batch on.

    Args:
        rmax: Largest factor between the batch's and the stored standard deviation, at least 1; infinity clips nothing.
        dmax: Largest distance between the two means in stored standard deviations, at least 0.

    Raises:
        TypeError: If a limit is neither a number nor a function.
        ValueError: If rmax is below 1, or dmax below 0, or NaN. A number that a function returns is checked when the
            layer calls it, a tensor is not.

    Example:
        >>> Renorm(rmax=3.0, dmax=Ramp(0, 5, 1_000, 10_000))
        Renorm(rmax=3.0, dmax=Ramp(start=0, end=5, begin=1000, finish=10000))
    """

    rmax: Limit = Ramp(1, 3, 5_000, 40_000)
    dmax: Limit = Ramp(0, 5, 5_000, 25_000)

    def __post_init__(self) -> None:
        for name, least in (("rmax", 1), ("dmax", 0)):
            limit = getattr(self, name)
            if not callable(limit) or isinstance(limit, nn.Module):
                _check_limit(name, limit, least)

    def limits(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """rmax and dmax after this number of batches, each ()."""
        rmax, dmax = _limit("rmax", self.rmax, batches, 1), _limit("dmax", self.dmax, batches, 0)
        return rmax, dmax


PAPER = Renorm()  # made here: a compiled program cannot construct it


def check_renorm(renorm: object) -> None:
    """Refuse a value of the setting ``renorm`` that is neither a flag nor limits."""
    require_type(
        renorm, (bool, Renorm), "renorm must be True, False or a Renorm", "Use batchnorm.Renorm(rmax=3.0, dmax=5.0)."
    )


def check_stored(kind: str, renorm: object, *, is_tracked: bool) -> None:
    """Raise if a layer of class ``kind`` has renorm and no stored statistics."""
    if renorm and not is_tracked:
        raise ValueError(
            f"{kind} needs stored statistics for renorm, got track_running_stats=False. Leave out one of the two."
        )


def renormalized(layer: Layer, measured: Measured, stored: ChannelStatistics, limits: Sequence[Tensor]) -> Layer:
    """The layer with gamma r and beta + gamma d in the place of gamma and beta.

    Args:
        layer: Its parameters, for each channel, or for each channel of each of several batches, (batches C,).
        measured: The moments of the batch, or of each of the batches, (batches C,).
        stored: The stored statistics before this batch, (C,).
        limits: rmax and dmax, each ().
    """
    r, d = corrections(measured.statistics, stored, layer.eps, limits)
    gamma = None if layer.weight is None else layer.weight.to(r.dtype)
    shift = d if gamma is None else gamma * d
    bias = shift if layer.bias is None else layer.bias.to(r.dtype) + shift
    return layer._replace(weight=r if gamma is None else gamma * r, bias=bias)


def corrections(
    statistics: ChannelStatistics, stored: ChannelStatistics, eps: float, limits: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """r and d in the type of ``statistics``, float64 or, on Apple's GPUs, float32."""
    mean, var = (t.unflatten(0, (-1, stored.mean.shape[0])) for t in statistics)  # (batches C,) -> (batches, C)
    rmax, dmax = (limit.to(var.dtype) for limit in limits)
    sigma = (stored.var.to(var.dtype) + eps).sqrt()
    r = ((var + eps).sqrt() / sigma).clamp(1 / rmax, rmax)
    d = ((mean - stored.mean.to(var.dtype)) / sigma).clamp(-dmax, dmax)
    return r.flatten(), d.flatten()


def _limit(name: str, limit: Any, batches: Tensor, least: float) -> Tensor:
    value = limit(batches) if callable(limit) else limit
    if not isinstance(value, Tensor):
        _check_limit(name, value, least)
        value = torch.full((), float(value), dtype=exact_dtype(batches.device), device=batches.device)
    return value


def _check_limit(name: str, limit: Any, least: float) -> None:
    require_number(limit, f"Renorm's {name}", "Or give a function of the number of batches, such as a batchnorm.Ramp.")
    if not least <= limit <= inf:
        raise ValueError(f"Renorm's {name} must be {least} or more, got {limit}. {least} is plain batch norm.")
