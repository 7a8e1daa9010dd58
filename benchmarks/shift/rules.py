"""Published rules for statistics at test time, each written from its formula, and ours.

A rule is a context in which a model answers a stream batch by batch. With mu_s and v_s stored, mu and v of the batch
(biased, as the papers' code has it) and n examples in it:

    batch       mu, v                                     Nado et al. 2020; the "norm" of Wang et al. 2021 (TENT)
    prior       w s + (1 - w) b, w = N / (N + n)          Schneider et al. 2020, of means and of variances alike
    average     s <- (1 - a) s + a b, then used           Yuan et al. 2023 (RoTTA), likewise
    TEMA        s used, then s <- (1 - a) s + a b         Zhao et al. 2023 (DELTA); the first batch is the first s
    balanced    mean over classes k of mu_k, and of       Su et al. 2024 (TRIBE), eq. 3 to 6 with gamma = 0
                v_k + (mu - mu_k)^2

Balanced statistics of a class begin at mu_s, v_s and move by its examples, as the model itself answers them by the
statistics at hand: d = eta sum (m_b - mu_k), v_k <- v_k - d^2 + eta sum (mean (x - mu_k)^2 - v_k), mu_k <- mu_k + d,
with m_b the mean of an example's positions. That takes a second forward pass for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.adaptation.layer_statistics import mixed
from batchnorm.layers import batch_norms
from batchnorm.moments import Moments
from batchnorm.population.hooks import seeing
from batchnorm.population.stored_statistics import Statistics

# stored mean and variance, mean and variance of the batch, examples -> mean and variance to normalize by
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Rule = Callable[[nn.Module, Tensor], Any]  # model and calibration examples -> context
PRIOR = 16


@contextmanager
def deployed(_: nn.Module, __: Tensor) -> Iterator[None]:
    """Nothing is done."""
    yield


def by_formula(formula: Formula, *, keeps: bool = False) -> Rule:
    """A rule that puts the formula's result into each layer; ``keeps`` makes it what is stored for the next batch."""

    @contextmanager
    def rule(model: nn.Module, _: Tensor) -> Iterator[None]:
        layers = batch_norms(model)
        before = Statistics.of(layers)
        stored = {path: (before.mean[path], before.var[path]) for path in layers}

        def see(path: str, layer: Any, x: Tensor) -> None:
            var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
            new = formula(*stored[path], mean, var, len(x))
            layer.running_mean.copy_(new[0])
            layer.running_var.copy_(new[1])
            if keeps:
                stored[path] = new

        try:
            with seeing(layers, see):
                yield
        finally:
            before.put(layers)

    return rule


def _prior(ms: Tensor, vs: Tensor, mean: Tensor, var: Tensor, n: int) -> tuple[Tensor, Tensor]:
    w = PRIOR / (PRIOR + n)
    return w * ms + (1 - w) * mean, w * vs + (1 - w) * var


def _prior_with_spread(ms: Tensor, vs: Tensor, mean: Tensor, var: Tensor, n: int) -> tuple[Tensor, Tensor]:
    new = mixed((ms, vs), PRIOR, Moments.from_var(2, mean, var / 2), n)  # two values of this biased variance
    return new.mean.float(), new.var.float()


def _average(a: float) -> Formula:
    return lambda ms, vs, mean, var, n: ((1 - a) * ms + a * mean, (1 - a) * vs + a * var)  # noqa: ARG005


@contextmanager
def tema(model: nn.Module, _: Tensor, a: float = 0.05) -> Iterator[None]:
    """Each batch by the average of those before it."""
    layers = batch_norms(model)
    before, average = Statistics.of(layers), dict[str, tuple[Tensor, Tensor]]()

    def see(path: str, layer: Any, x: Tensor) -> None:
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        ms, vs = average.setdefault(path, (mean, var))
        layer.running_mean.copy_(ms)
        layer.running_var.copy_(vs)
        average[path] = (1 - a) * ms + a * mean, (1 - a) * vs + a * var

    try:
        with seeing(layers, see):
            yield
    finally:
        before.put(layers)


@contextmanager
def balanced(model: nn.Module, _: Tensor, eta: float = 0.0005) -> Iterator[None]:
    """Statistics that count each class alike, whatever its share of the stream; eta is for each class."""
    layers = batch_norms(model)
    before = Statistics.of(layers)
    classes: dict[str, tuple[Tensor, Tensor]] = {}
    labels: list[Tensor] = []  # of the batch that runs, while it runs for the second time

    def see(path: str, layer: Any, x: Tensor) -> None:
        if not labels:
            return
        is_of = nn.functional.one_hot(labels[0], labels[1].shape[0]).to(x.dtype)  # (N, K)
        mean, var = (each.expand(len(labels[1]), -1) for each in (before.mean[path], before.var[path]))
        mean, var = classes.get(path, (mean.to(x.dtype), var.to(x.dtype)))
        step, positions = eta * len(mean), x.flatten(2).mean(2) if x.ndim > 2 else x  # (N, C)
        spread = x.flatten(2).var(2, correction=0) if x.ndim > 2 else torch.zeros_like(x)
        counts = is_of.sum(0)[:, None]
        moved = step * (is_of.T @ positions - counts * mean)
        squares = is_of.T @ (spread + positions.square()) - 2 * mean * (is_of.T @ positions) + counts * mean.square()
        classes[path] = mean + moved, (var - moved.square() + step * (squares - counts * var)).clamp_min(0)
        mean, var = classes[path]
        layer.running_mean.copy_(mean.mean(0))
        layer.running_var.copy_((var + (mean - mean.mean(0)).square()).mean(0))

    def label(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not labels:
            p = model.forward(*args)
            labels.extend([p.argmax(1), p[0]])

    first = model.register_forward_pre_hook(label)
    last = model.register_forward_hook(lambda *_: labels.clear())
    try:
        with seeing(layers, see):
            yield
    finally:
        first.remove()
        last.remove()
        before.put(layers)


def adapter(*, calibrated: bool, **options: Any) -> Rule:
    """Ours, which begins with an alarm; every example is looked at."""

    @contextmanager
    def rule(model: nn.Module, clean: Tensor) -> Iterator[bn.Adapter]:
        monitor = bn.ShiftMonitor(model, examples=None, budget=None)
        if calibrated:
            monitor.calibrate(clean.split(100))
        with bn.Adapter(monitor, **options) as made:
            yield made

    return rule


RULES: dict[str, Rule] = {
    "as deployed": deployed,
    "batch (TENT's norm)": by_formula(lambda ms, vs, mean, var, n: (mean, var)),  # noqa: ARG005
    "prior of 16, published": by_formula(_prior),
    "prior of 16, with spread": by_formula(_prior_with_spread),
    "average 0.05 (RoTTA's)": by_formula(_average(0.05), keeps=True),
    "average 0.01": by_formula(_average(0.01), keeps=True),
    "TEMA 0.05 (DELTA's)": tema,
    "balanced (TRIBE's)": balanced,
    "Adapter": adapter(calibrated=False),
    "Adapter, calibrated": adapter(calibrated=True),
}
