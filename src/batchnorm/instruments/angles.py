"""Angles: how far each filter of a weight turns in a step, beside the angle at which weight decay holds it.

A weight w before batch norm is scale-invariant: L(c w) = L(w), so <w, grad L> = 0 and only its direction matters. With
w' the filter after a step, eta the learning rate and lambda the weight decay,

    angle            theta = 2 asin(|w / ||w|| - w' / ||w'||| / 2)     [arccos <w, w'> / (||w|| ||w'||), small ones too]
    effective rate   eta / ||w||^2
    invariance       |<w, g>| / (||w|| ||g||)                          [0]

Gradients of such weights only lengthen them and weight decay shortens them. In equilibrium the rms angle is

    SGD with momentum alpha     theta*^2 = 2 eta lambda / (1 + alpha)         within (1 - alpha) / (4 eta lambda) steps
    with Nesterov's momentum    theta*^2 = 2 eta lambda ((1 - alpha) (1 + alpha)^2 + alpha^4 / (1 + alpha))
    with dampening d            eta (1 - d) in the place of eta
    AdamW with beta1            theta*^2 = 2 eta lambda (1 - beta1) / (1 + beta1)     within 1 / (2 eta lambda) steps

(van Laarhoven 2017; Wan et al. 2020, "Spherical Motion Dynamics"; Kosson et al. 2023, "Rotational Equilibrium"). All
follow from an update eta sum_k c_k (g_(t-k) + lambda w_(t-k)) with independent gradients: theta*^2 = 2 eta lambda
sum c_k^2 / sum c_k, and a time constant of 1 / (4 eta lambda sum c_k). In brackets what holds for an invariant weight.
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

_KEEP = 1000
# |<w, g>| / (||w|| ||g||) of two unrelated directions in d dimensions has the median 0.6745 / sqrt(d): what is below a
# tenth of it is no accident for a layer of more than a few filters. Rounding is far below it in float32 (unit
# roundoff 6e-8 times how far the gradient's terms cancel, over sqrt(d)), and still below it in bfloat16.
_UNRELATED = 0.6745
_SHARE = 0.1


@final
@dataclass(frozen=True, slots=True)
class WeightAngle:
    """How one weight turns.

    Args:
        name: Of the parameter.
        filters: Rows that feed one output channel each.
        angle: Per step, rms over filters and steps, radians.
        effective_rate: eta / ||w||^2, median over filters, before the last step.
        invariance: Median over filters, then over steps; NaN without gradients.
        tolerance: An ``invariance`` below it counts as 0: a tenth of the value for unrelated directions.
        invariant: Whether it does.
        equilibrium: theta*, rms over steps, radians; None if the weight is not invariant, has no weight decay, or
            for other optimizers.
        ratio: angle / theta*.
        time_constant: Steps in which the distance of ||w||^4 (AdamW: ||w||^2) from equilibrium falls to 1 / e.
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
    """How every weight turned over ``steps`` measured steps."""

    weights: tuple[WeightAngle, ...]
    steps: int

    def __str__(self) -> str:
        return f"angles of {self.steps} steps\n" + "\n".join(f"  {weight}" for weight in self.weights)


@final
class Angles:
    """A block in which every step of an optimizer is measured by how far it turns the filters of a model.

    Nothing is changed: a step is the same with and without it. It costs a copy of the weights and a few passes over
    them per measured step, and no waiting for a GPU until ``report``.

    Unit: radians per step; ``ratio`` has none. Noise floor: storing a weight again turns it by about a fifth of its
    type's eps: 2.4e-8 in float32, 0.0016 in bfloat16.

    How to read it: ratio 1 is equilibrium, where learning rate and weight decay alone set how fast a layer turns.
    Above 1 the weight is still too short (it turns too fast and grows), below 1 still too long. It misleads before
    five or more time constants have passed, or when the learning rate changes faster than that; where gradients of
    successive steps agree or oppose each other, as early in training, with large batches or large rates; and for
    gradients that a closure computes inside of the step, whose invariance is that of the step before. A weight that
    should be invariant and is not stands before batch norm in eval mode, has a penalty in the loss, feeds something
    past the batch norm, or varies by less than the layer's eps.

    Args:
        model: Whose weights of two axes or more are measured, by their rows: one for each output channel.
        optimizer: Of torch.optim; SGD and AdamW have a theory.
        every: Measure each so many steps.
        keep: Remember the last so many measured steps.

    Raises:
        TypeError: If ``optimizer`` is none, or LBFGS.
        ValueError: If it holds no weight of the model with two axes or more, or a number is below 1.
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
                raise ValueError(f"Angles needs {name} of 1 or more, got {value}. Leave it out for the usual one.")
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
        """Every weight over the last measured steps, by default all that are kept.

        Raises:
            RuntimeError: If no step was measured.
            ValueError: If ``last`` is below 1.
        """
        if last is not None and last < 1:
            raise ValueError(f"report needs last of 1 or more, got {last}. Leave it out for all steps.")
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
    """A parameter and which of its axes, in how many groups, stands for outputs."""

    name: str
    tensor: nn.Parameter
    groups: int | None  # of a transposed convolution, whose outputs are on axis 1

    def filters(self, gradient: bool = False) -> Tensor:
        """(filters, entries): one row for each output channel."""
        tensor = self.tensor.grad if gradient else self.tensor.detach()
        assert tensor is not None  # noqa: S101 - gradients are asked for where there are some
        if self.groups is not None:
            tensor = tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return tensor.flatten(1)


def _weights(model: nn.Module) -> list[_Weight]:
    found: dict[int, _Weight] = {}
    for path, module in model.named_modules():
        groups = module.groups if isinstance(module, _ConvTransposeNd) else None
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim > 1 and parameter.requires_grad:
                found.setdefault(id(parameter), _Weight(name, parameter, groups))
    if not found:
        raise ValueError(
            f"Angles needs weights of two axes or more that are trained, got none in {type(model).__name__}. "
            "Pass the model whose weights the optimizer holds."
        )
    return list(found.values())


def _mean_square_angle(before: Tensor, after: Tensor) -> Tensor:
    """Mean over filters; filters that are 0 have no direction and are left out."""
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
    """Angle of equilibrium, squared, and time constant, at one step."""

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
    """From (steps, 3): mean square angle, effective rate, invariance."""
    filters, entries = weight.filters().shape
    angle = float(values[:, 0].nanmean().sqrt())
    invariance, tolerance = float(values[:, 2].nanmedian()), _SHARE * _UNRELATED / math.sqrt(entries)
    invariant = invariance < tolerance
    known = [theory for theory in theories if theory is not None]
    equilibrium = math.sqrt(sum(t.square for t in known) / len(known)) if known and invariant else None
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
        time_constant=known[-1].time_constant if equilibrium else None,
    )
