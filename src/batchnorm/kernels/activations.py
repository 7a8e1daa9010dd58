"""The activations that a layer applies in the same pass: the table of all that there is to know of each.

| name | a(p) | parameter |
|---|---|---|
| relu | max(p, 0) | |
| leaky_relu | p if p > 0 else s p | s, torch's negative_slope, 0.01 |
| elu | p if p > 0 else a (exp(p) - 1) | a, torch's alpha, 1 |
| silu | p sigmoid(p) | |
| gelu | p Phi(p), Phi the standard normal distribution | |
| hardswish | p min(max(p + 3, 0), 6) / 6 | |

Values and derivatives at the kinks are torch's: the derivative of relu and leaky_relu at 0 is that from the left. The
native kernels (native/activations.hpp) and Triton's (triton_blocks.py) have formulas of their own for the same names. A
new activation is a row here, a case in each of those and one in tests/oracle_activations.py; CONTRIBUTING.md has the
recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of p and the parameter
Formula = Callable[[Tensor, float], Tensor]
# a value that torch's modules and functions take beside the input
Option = bool | float | str


@final
@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        number: Its place in the native kernels' list; 0 stands for none.
        function: a(p), given p and the parameter.
        derivative: a'(p), itself differentiable.
        module: torch's module that applies it.
        functions: torch's functions that do.
        methods: A tensor's methods that do.
        options: What torch's functions take behind the input, in their order, with their values.
        parameter: The name of the option that is the parameter, or None.
        sign_shows: Whether a'(p) follows from the sign of a(p), given the parameter.
    """

    number: int
    function: Formula
    derivative: Formula
    module: type[nn.Module]
    functions: tuple[Callable[..., Tensor], ...]
    methods: tuple[str, ...] = ()
    options: dict[str, Option] = field(default_factory=lambda: {"inplace": False})
    parameter: str | None = None
    sign_shows: Callable[[float], bool] = lambda param: False  # noqa: ARG005

    @property
    def default(self) -> float:
        """torch's value of the parameter; 0 for an activation that has none."""
        return 0.0 if self.parameter is None else float(self.options[self.parameter])


def _relu_slope(p: Tensor, _: float) -> Tensor:
    return (p > 0).to(p.dtype)


def _leaky_relu_slope(p: Tensor, param: float) -> Tensor:
    return torch.where(p > 0, torch.ones_like(p), param)


def _elu_slope(p: Tensor, param: float) -> Tensor:
    return torch.where(p > 0, 1.0, param * p.clamp_max(0).exp())


def _silu_slope(p: Tensor, _: float) -> Tensor:
    s = p.sigmoid()
    return s * (1 + p * (1 - s))


def _gelu_slope(p: Tensor, _: float) -> Tensor:
    density = torch.exp(-0.5 * p * p) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-p / math.sqrt(2)) + p * density


def _hardswish_slope(p: Tensor, _: float) -> Tensor:
    return torch.where(p >= 3, 1.0, torch.where(p <= -3, 0.0, p / 3 + 0.5))


TABLE: dict[str, Activation] = {
    "relu": Activation(
        number=1, function=lambda p, _: F.relu(p), derivative=_relu_slope, module=nn.ReLU,
        functions=(F.relu, torch.relu, torch.relu_), methods=("relu", "relu_"), sign_shows=lambda _: True,
    ),
    "leaky_relu": Activation(
        number=2, function=F.leaky_relu, derivative=_leaky_relu_slope, module=nn.LeakyReLU,
        functions=(F.leaky_relu, F.leaky_relu_),
        options={"negative_slope": 0.01, "inplace": False}, parameter="negative_slope",
        sign_shows=lambda slope: slope >= 0,
    ),
    "elu": Activation(
        number=3, function=F.elu, derivative=_elu_slope, module=nn.ELU, functions=(F.elu, F.elu_),
        options={"alpha": 1.0, "inplace": False}, parameter="alpha",
    ),
    "silu": Activation(
        number=4, function=lambda p, _: F.silu(p), derivative=_silu_slope, module=nn.SiLU, functions=(F.silu,)
    ),
    "gelu": Activation(
        number=5, function=lambda p, _: F.gelu(p), derivative=_gelu_slope, module=nn.GELU, functions=(F.gelu,),
        options={"approximate": "none"},
    ),
    "hardswish": Activation(
        number=6, function=lambda p, _: F.hardswish(p), derivative=_hardswish_slope, module=nn.Hardswish,
        functions=(F.hardswish,),
    ),
}  # fmt: skip
NAMES = tuple(TABLE)


_NUMBERS: dict[str | None, int] = {None: 0, **{name: row.number for name, row in TABLE.items()}}


def activation(act: str) -> Activation:
    """The row of an activation.

    Raises:
        ValueError: If there is none of this name.
    """
    row = TABLE.get(act) if isinstance(act, str) else None
    if row is None:
        raise ValueError(f"act must be None or one of {', '.join(NAMES)}, got {act!r}. Apply another one behind it.")
    return row


def number(act: str | None) -> int:
    """The number of an activation in the native kernels; 0 without one."""
    found = _NUMBERS.get(act)
    return activation(str(act)).number if found is None else found


def parameter(act: str | None, given: float | None) -> float:
    """The parameter of an activation: the given one, or torch's own; 0 for one that has none.

    Raises:
        ValueError: If the activation is unknown, or takes no parameter and one is given.
    """
    row = None if act is None else activation(act)
    if given is None:
        return 0.0 if row is None else row.default
    if row is None or row.parameter is None:
        takers = " or ".join(name for name, row in TABLE.items() if row.parameter)
        raise ValueError(f"act_param belongs to {takers}, got {given} with act={act!r}. Leave it out.")
    return float(given)


def has_parameter(act: str | None) -> bool:
    """Whether an activation takes a parameter."""
    return act is not None and activation(act).parameter is not None


def sign_shows(act: str | None, param: float) -> bool:
    """Whether the derivative at p follows from the sign of a(p) alone, so that p need not be known."""
    return act is not None and activation(act).sign_shows(param)


def activate(p: Tensor, act: str | None, param: float) -> Tensor:
    """a(p); p itself without an activation."""
    return p if act is None else activation(act).function(p, param)


def derivative(p: Tensor, act: str | None, param: float) -> Tensor:
    """a'(p), itself differentiable; where ``sign_shows``, ``p`` may be a(p)."""
    return torch.ones_like(p) if act is None else activation(act).derivative(p, param)
