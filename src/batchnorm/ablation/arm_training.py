"""Training of one arm at one learning rate from one seed: SGD with momentum, and the loss of each step's own batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.ablation.arms import make_arm
from batchnorm.ablation.user_model import Subject, quiet_divergence
from batchnorm.call_types import Batch

MOMENTUM = 0.9
# neighbours differ by a factor of 4 or 5, which is more than the factor of 3 in the criterion on rates
RATES = (0.001, 0.005, 0.02, 0.1, 0.5)

_RUNAWAY = 1e8  # its fifth power is beyond float32

# Called before each step with the steps done, the model and the step's batch, and at the end unless the run diverged
Observer = Callable[[int, nn.Module, Batch], None]


def train(
    subject: Subject, arm: str, seed: int, rate: float, steps: int, observe: Observer | None = None
) -> tuple[Tensor, nn.Module]:
    """The loss before each step, (steps,), and the trained model; from divergence on the loss is infinite.

    If a forward pass or a loss raises because parameters have become too large, this is divergence too. The same seed
    gives the same first weights, batches, order and dropout in every arm.
    """
    model = make_arm(subject, arm, seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=MOMENTUM)
    losses = torch.full((steps,), torch.inf)
    batches = subject.data.deal(seed)
    torch.manual_seed(seed)
    with quiet_divergence():
        for step, batch in zip(range(steps), batches, strict=False):
            if observe is not None:
                observe(step, model, batch)
            try:
                loss = subject.value(model, batch)
            except Exception:
                if _has_diverged(model):  # the user's code refuses NaN, so divergence appears as an error
                    return losses, model
                raise
            if not bool(loss.detach().isfinite()):
                return losses, model
            losses[step] = float(loss.detach())
            _step(loss, optimizer)
        if observe is not None:
            observe(steps, model, next(batches))
    return losses, model


def _has_diverged(model: nn.Module) -> bool:
    """Whether a parameter is not finite, or so large that a product over a few layers is not finite."""
    return not all(bool((p.abs() < _RUNAWAY).all()) for p in model.parameters())


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    if not loss.requires_grad:
        raise ValueError("a loss must depend on the model's parameters, got a loss without gradient. Do not detach it.")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
