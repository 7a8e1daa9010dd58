"""The activations that a layer applies in the same pass: a(p), its derivative, and how they are written.

| name | a(p) | parameter |
|---|---|---|
| relu | max(p, 0) | |
| leaky_relu | p if p > 0 else s p | s, torch's negative_slope, 0.01 |
| elu | p if p > 0 else a (exp(p) - 1) | a, torch's alpha, 1 |
| silu | p sigmoid(p) | |
| gelu | p Phi(p), Phi the standard normal distribution | |
| hardswish | p min(max(p + 3, 0), 6) / 6 | |

Values and derivatives at the kinks are torch's: the derivative of relu and leaky_relu at 0 is that from the left.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("relu", "leaky_relu", "elu", "silu", "gelu", "hardswish")
PARAMETERS = {"leaky_relu": 0.01, "elu": 1.0}


def parameter(act: str | None, given: float | None) -> float:
    """The parameter of an activation: the given one, or torch's own; 0 for one that has none.

    Raises:
        ValueError: If the activation is unknown, or takes no parameter and one is given.
    """
    if act is not None and act not in NAMES:
        raise ValueError(f"act must be None or one of {', '.join(NAMES)}, got {act!r}. Apply another one behind it.")
    if given is not None and act not in PARAMETERS:
        raise ValueError(f"act_param belongs to leaky_relu or elu, got {given} with act={act!r}. Leave it out.")
    return PARAMETERS.get(act or "", 0.0) if given is None else float(given)


def sign_shows(act: str | None, param: float) -> bool:
    """Whether the derivative at p follows from the sign of a(p) alone, so that p need not be known."""
    return act == "relu" or (act == "leaky_relu" and param >= 0)


def activate(p: Tensor, act: str | None, param: float) -> Tensor:
    """a(p); p itself without an activation."""
    match act:
        case None:
            return p
        case "leaky_relu":
            return F.leaky_relu(p, param)
        case "elu":
            return F.elu(p, param)
    return getattr(F, act)(p)


def derivative(p: Tensor, act: str | None, param: float) -> Tensor:
    """a'(p), itself differentiable; for relu and leaky_relu of a slope from 0 on, ``p`` may be a(p)."""
    match act:
        case None:
            return torch.ones_like(p)
        case "relu":
            return (p > 0).to(p.dtype)
        case "leaky_relu":
            return torch.where(p > 0, torch.ones_like(p), param)
        case "elu":
            return torch.where(p > 0, 1.0, param * p.clamp_max(0).exp())
        case "silu":
            s = p.sigmoid()
            return s * (1 + p * (1 - s))
        case "gelu":
            density = torch.exp(-0.5 * p * p) / math.sqrt(2 * math.pi)
            return 0.5 * torch.erfc(-p / math.sqrt(2)) + p * density
    return torch.where(p >= 3, 1.0, torch.where(p <= -3, 0.0, p / 3 + 0.5))
