"""The activations that a layer can apply in the same pass over memory as the normalization, in one table.

p is the value before the activation, a(p) the value after it.

| name | a(p) | parameter |
|---|---|---|
| relu | max(p, 0) | |
| leaky_relu | p if p > 0 else negative_slope p | negative_slope, by default 0.01 |
| elu | p if p > 0 else alpha (exp(p) - 1) | alpha, by default 1 |
| silu | p sigmoid(p) | |
| gelu | p Phi(p), Phi the standard normal distribution | |
| hardswish | p min(max(p + 3, 0), 6) / 6 | |

Values and derivatives at the kinks are torch's: at 0 the derivative of relu and leaky_relu is the left-hand one. The
native kernels (native/activations.hpp) and the Triton kernels (triton_blocks.py) have their own formulas for the same
names. To add an activation, add a row here, a case in native/activations.hpp and in triton_blocks.py, and a case in
tests/oracle_activations.py; CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# called with p and the activation's parameter
Formula = Callable[[Tensor, float], Tensor]
# an argument of torch's modules and functions besides the input
Option = bool | float | str


@final
@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        number: Its position in the native kernels' list, where 0 is "no activation".
        function: a(p), called with p and the parameter.
        derivative: a'(p), called with p and the parameter; it can be differentiated again.
        module: torch's module that applies the activation.
        functions: torch's functions that apply it.
        methods: Tensor methods that apply it.
        options: Further arguments of torch's functions, in order, with their default values.
        parameter: The name of the option that is the parameter; None if the activation has no parameter.
        sign_shows: Called with the parameter: whether a'(p) follows from the sign of a(p).
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
        """torch's default value of the parameter; 0 for an activation without a parameter."""
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
        ValueError: If no activation has this name.
    """
    row = TABLE.get(act) if isinstance(act, str) else None
    if row is None:
        names = ", ".join(NAMES)
        raise ValueError(f"act must be None or one of {names}, got {act!r}. Apply it as a module after the layer.")
    return row


def number(act: str | None) -> int:
    """The number of an activation in the native kernels; 0 for None."""
    known_number = _NUMBERS.get(act)
    return activation(str(act)).number if known_number is None else known_number


def parameter(act: str | None, given: float | None) -> float:
    """The activation's parameter: ``given``, or torch's default if that is None; 0 without activation or parameter.

    Raises:
        ValueError: If the activation is unknown, or ``given`` is a number and the activation has no parameter.
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
    """Whether a'(p) follows from the sign of a(p) alone, so that p need not be kept; False for None."""
    return act is not None and activation(act).sign_shows(param)


def activate(p: Tensor, act: str | None, param: float) -> Tensor:
    """a(p); p itself if ``act`` is None."""
    return p if act is None else activation(act).function(p, param)


def derivative(p: Tensor, act: str | None, param: float) -> Tensor:
    """a'(p), which can be differentiated again; if ``sign_shows(act, param)``, a(p) can be passed in place of p."""
    return torch.ones_like(p) if act is None else activation(act).derivative(p, param)
