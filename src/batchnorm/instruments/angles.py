"""Angles: how far each filter of a weight turns in a step, and the angle to which weight decay leads.

A weight w before batch norm is scale-invariant: the loss L(c w) equals L(w) for c > 0, so <w, grad L> = 0 and only the
direction of w matters. With w' the filter after a step, g its gradient, eta the learning rate, lambda the weight decay:

    angle            theta = 2 asin(|w / ||w|| - w' / ||w'||| / 2)     arccos <w, w'> / (||w|| ||w'||) in exact numbers
    effective rate   eta / ||w||^2
    invariance       |<w, g>| / (||w|| ||g||)                          0 for a scale-invariant weight

Gradient steps only lengthen a scale-invariant weight, and weight decay shortens it. In equilibrium the rms angle is
theta*, which is reached with the time constant tau, in steps:

    SGD with momentum alpha     theta*^2 = 2 eta lambda / (1 + alpha)                 tau = (1 - alpha) / (4 eta lambda)
    with Nesterov's momentum    theta*^2 = 2 eta lambda ((1 - alpha) (1 + alpha)^2 + alpha^4 / (1 + alpha)), same tau
    with dampening d            eta (1 - d) in the place of eta
    AdamW with beta1            theta*^2 = 2 eta lambda (1 - beta1) / (1 + beta1)     tau = 1 / (2 eta lambda)

(van Laarhoven 2017; Wan et al. 2020, "Spherical Motion Dynamics"; Kosson et al. 2023, "Rotational Equilibrium"). The
formulas follow from an update eta sum_k c_k (g_(t-k) + lambda w_(t-k)) with independent gradients: theta*^2 = 2 eta
lambda sum c_k^2 / sum c_k, and for SGD tau = 1 / (4 eta lambda sum c_k).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from batchnorm.instruments.internal_covariate_shift import check_optimizer
from batchnorm.instruments.probe_tier import unwrapped
from batchnorm.kernels.reference import exact_dtype
from batchnorm.population.hooks import detach
from batchnorm.population.tensor_memory import require

_KEEP = 1000  # measured steps
# |<w, g>| / (||w|| ||g||) of two unrelated directions in d dimensions has the median 0.6745 / sqrt(d). In a layer with
# more than a few filters a median below a tenth of this is not chance. Rounding errors are far below the tenth in
# float32 (unit roundoff 6e-8), and still below it in bfloat16.
_UNRELATED = 0.6745
_SHARE = 0.1


@final
@dataclass(frozen=True, slots=True)
class WeightAngle:
    """How one weight turns.

    Args:
        name: The parameter's name.
        filters: Number of filters; a filter has the entries of the weight that feed one output channel.
        angle: Angle per step in radians, rms over filters and steps, without filters of zeros.
        effective_rate: eta divided by the median of ||w||^2 over filters, with w from before the last measured step.
        invariance: |<w, g>| / (||w|| ||g||), median over filters, then over steps; NaN without gradients.
        tolerance: An ``invariance`` below this counts as 0; a tenth of the value for unrelated directions.
        invariant: Whether ``invariance`` is below ``tolerance``; False without gradients.
        equilibrium: theta* in radians, rms over steps; None if the weight is not invariant, if it has no weight decay,
            or if there is no formula for the optimizer.
        ratio: angle / theta*; None without theta*.
        time_constant: Steps in which the distance of ||w||^4 (AdamW: ||w||^2) from equilibrium falls to 1 / e;
            None without theta*.
    """

    name: str
    filters: int
    angle: float
    effective_rate: float
    invariance: float
    tolerance: float
    invariant: bool
    equilibrium: float | None
    ratio: float | None
    time_constant: float | None

    def __str__(self) -> str:
        kind = "scale-invariant" if self.invariant else "not scale-invariant"
        text = f"{self.name}: {self.angle:.3g} rad per step, {kind} ({self.invariance:.1g})"
        if self.ratio is None:
            return text
        return f"{text}, {self.ratio:.2f} of equilibrium (time constant {self.time_constant:.3g} steps)"


@final
@dataclass(frozen=True, slots=True)
class AngleReport:
    """The angles of every weight over ``steps`` measured steps."""

    weights: tuple[WeightAngle, ...]
    steps: int

    def __str__(self) -> str:
        return f"angles of {self.steps} steps\n" + "\n".join(f"  {weight}" for weight in self.weights)


@final
class Angles:
    """A ``with`` block that measures how far each step of an optimizer turns the filters of a model.

    The steps are the same with and without the block. A measured step costs a copy of the weights and a few passes over
    the weights; a GPU is not waited for until ``report``.

    Unit: radians per step; ``ratio`` has no unit. Noise floor: rounding turns a stored weight by about a fifth of the
    eps of its type: 2.4e-8 in float32, 0.0016 in bfloat16.

    How to read it: ratio 1 is equilibrium, where learning rate and weight decay alone determine how fast a layer turns.
    Above 1 the weight is still too short (it turns too fast and grows), below 1 it is still too long. The ratio
    misleads in three cases: until five time constants have passed since the start or since a change of the learning
    rate; when gradients of successive steps agree or oppose each other, as early in training, with large batches or
    large rates; and when a closure computes the gradients inside of the step, because ``invariance`` then uses the
    gradients of the step before. If a weight should be invariant and is not, there are four usual causes: its batch
    norm is in eval mode; the loss has a penalty on the weight; the weight's outputs also go past the batch norm; or the
    variance of these outputs is not far above the layer's eps.

    Args:
        model: The model whose weights of two axes or more are measured, one filter for each output channel.
        optimizer: A torch.optim optimizer. theta* is known for SGD, and without amsgrad for AdamW and for Adam with
            decoupled_weight_decay; it is not known for their subclasses.
        every: Measure one step in this many.
        keep: Number of measured steps that are remembered; older steps are dropped.

    Raises:
        TypeError: If ``optimizer`` is not a torch.optim optimizer, or is LBFGS.
        ValueError: If no trained weight of the model has two axes or more, ``optimizer`` has no such weight, a weight
            cannot be read, or ``every`` or ``keep`` is below 1.
        RuntimeError: From ``report``, if no step was measured.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        >>> with Angles(model, optimizer) as angles:
        ...     model(torch.randn(32, 8)).pow(3).sum().backward()
        ...     optimizer.step()
        >>> angles.report().weights[0].invariant
        True

    References:
        van Laarhoven 2017; Wan et al. 2020; Kosson et al. 2023.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 1, keep: int = _KEEP
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"Angles needs {name} of 1 or more, got {value}. Leave {name} out for its default.")
        self._weights = _weights(unwrapped(model))
        check_optimizer(optimizer, [w.tensor for w in self._weights], "Angles")
        require({w.name: w.tensor for w in self._weights}, "Angles")
        self._optimizer, self._every = optimizer, every
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._weights = [w for w in self._weights if id(w.tensor) in held]
        self._seen = 0
        self._before: list[Tensor] | None = None
        self._tests: Tensor | None = None
        self._steps: deque[tuple[Tensor, list[_Theory | None]]] = deque(maxlen=keep)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Angles:
        if not self._handles:
            before, after = self._optimizer.register_step_pre_hook, self._optimizer.register_step_post_hook
            self._handles = [before(self._look), after(self._compare)]
        return self

    def __exit__(self, *_: object) -> None:
        detach(self._handles)
        self._before = None

    def report(self, last: int | None = None) -> AngleReport:
        """The angles of every weight over the ``last`` measured steps; None uses all remembered steps.

        Raises:
            RuntimeError: If no step was measured.
            ValueError: If ``last`` is below 1.
        """
        if last is not None and last < 1:
            raise ValueError(f"report needs last of 1 or more, got {last}. Leave last out for all steps.")
        if not self._steps:
            raise RuntimeError("Angles measured no step. Call optimizer.step() inside of the block.")
        steps = list(self._steps)[-last if last else 0 :]
        values = torch.stack([value for value, _ in steps]).cpu()  # (steps, 3, weights)
        theories = [theory for _, theory in steps]
        each = [
            _summary(weight, values[:, :, i], [step[i] for step in theories]) for i, weight in enumerate(self._weights)
        ]
        return AngleReport(tuple(each), len(steps))

    @torch.no_grad()
    def _look(self, *_: object) -> None:
        self._seen += 1
        if (self._seen - 1) % self._every:
            self._before = None
            return
        self._before = [weight.filters().clone() for weight in self._weights]
        self._tests = torch.stack([
            _invariance(weight, w) for weight, w in zip(self._weights, self._before, strict=True)
        ])  # fmt: skip

    @torch.no_grad()
    def _compare(self, *_: object) -> None:
        if self._before is None or self._tests is None:
            return
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        groups = [groups[id(weight.tensor)] for weight in self._weights]
        turned = [_mean_square_angle(w, v.filters()) for w, v in zip(self._before, self._weights, strict=True)]
        squares = [w.to(exact_dtype(w.device)).square().sum(1) for w in self._before]
        rates = [float(g["lr"]) / square.median() for g, square in zip(groups, squares, strict=True)]
        self._steps.append((
            torch.stack([torch.stack(turned), torch.stack(rates), self._tests]),
            [_theory(self._optimizer, group) for group in groups],
        ))  # fmt: skip
        self._before = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A parameter, and how its entries belong to output channels."""

    name: str
    tensor: nn.Parameter
    groups: int | None  # of a transposed convolution, whose output channels are on axis 1; None: they are on axis 0

    def filters(self, gradient: bool = False) -> Tensor:
        """The weight, or its gradient, with one row for each output channel: (filters, entries)."""
        tensor = self.tensor.grad if gradient else self.tensor.detach()
        assert tensor is not None  # noqa: S101 - _invariance has checked it
        if self.groups is not None:
            tensor = tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return tensor.flatten(1)


def _weights(model: nn.Module) -> list[_Weight]:
    weights: dict[int, _Weight] = {}
    for path, module in model.named_modules():
        groups = module.groups if isinstance(module, _ConvTransposeNd) else None
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim > 1 and parameter.requires_grad:
                weights.setdefault(id(parameter), _Weight(name, parameter, groups))
    if not weights:
        raise ValueError(
            f"Angles needs trained weights of two axes or more, got none in {type(model).__name__}. "
            "Pass the model that the optimizer trains."
        )
    return list(weights.values())


def _mean_square_angle(before: Tensor, after: Tensor) -> Tensor:
    """Mean of the squared angle over filters, without filters of zeros, which have no direction; NaN if all are 0."""
    a, b = (w.to(exact_dtype(w.device)) for w in (before, after))
    chord = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).norm(dim=1)
    # the arccos of a cosine near 1 would lose half of the digits
    return (2 * (chord / 2).clamp(max=1).asin()).square().nanmean()


def _invariance(weight: _Weight, filters: Tensor) -> Tensor:
    if weight.tensor.grad is None:
        return torch.full((), torch.nan, dtype=exact_dtype(filters.device), device=filters.device)
    w, g = (x.to(exact_dtype(filters.device)) for x in (filters, weight.filters(gradient=True)))
    return ((w * g).sum(1).abs() / (w.norm(dim=1) * g.norm(dim=1))).nanmedian()


@final
@dataclass(frozen=True, slots=True)
class _Theory:
    """Squared angle of equilibrium theta*^2, and the time constant in steps, at one step."""

    square: float
    time_constant: float


def _theory(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> _Theory | None:
    strength = float(group["lr"]) * float(group.get("weight_decay", 0))
    if not strength > 0:
        return None
    if type(optimizer) is torch.optim.SGD:
        return _of_sgd(strength * (1 - group["dampening"]), group["momentum"], group["nesterov"])
    decoupled = type(optimizer) is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    if type(optimizer) in {torch.optim.AdamW, torch.optim.Adam} and decoupled and not group["amsgrad"]:
        beta = float(group["betas"][0])
        return _Theory(2 * strength * (1 - beta) / (1 + beta), 1 / (2 * strength))
    return None


def _of_sgd(strength: float, alpha: float, nesterov: bool) -> _Theory | None:
    if not strength > 0:
        return None
    noise = (1 - alpha) * (1 + alpha) ** 2 + alpha**4 / (1 + alpha) if nesterov else 1 / (1 + alpha)
    return _Theory(2 * strength * noise, (1 - alpha) / (4 * strength))


def _summary(weight: _Weight, values: Tensor, theories: list[_Theory | None]) -> WeightAngle:
    """The result for one weight from ``values``, (steps, 3): mean square angle, effective rate, invariance."""
    filters, entries = weight.filters().shape
    angle = float(values[:, 0].nanmean().sqrt())
    invariance, tolerance = float(values[:, 2].nanmedian()), _SHARE * _UNRELATED / math.sqrt(entries)
    invariant = invariance < tolerance
    defined = [theory for theory in theories if theory is not None]
    equilibrium = math.sqrt(sum(t.square for t in defined) / len(defined)) if defined and invariant else None
    return WeightAngle(
        name=weight.name,
        filters=filters,
        angle=angle,
        effective_rate=float(values[-1, 1]),
        invariance=invariance,
        tolerance=tolerance,
        invariant=invariant,
        equilibrium=equilibrium,
        ratio=angle / equilibrium if equilibrium else None,
        time_constant=defined[-1].time_constant if equilibrium else None,
    )
