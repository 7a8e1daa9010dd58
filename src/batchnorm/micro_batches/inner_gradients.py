"""Backward passes that a forward or a loss runs itself, which would end at the cuts of a graph: they are refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ABOUT = (
    "step_backward with gradient='exact' needs a forward and a loss that call no backward pass through batch norm, got "
    "torch.autograd.grad or backward on a tensor behind a layer: the moments of the other micro-batches are not in its "
    "graph. Compute a gradient penalty outside of step_backward, on one batch inside of batchnorm.step, or give "
    "gradient='constant'."
)


def require_none(outputs: list[Any]) -> None:
    """Refuse a backward pass that starts at tensors behind a cut of a graph.

    Args:
        outputs: Tensors, and other values, which are left out.
    """
    waiting = [t.grad_fn for t in outputs if isinstance(t, Tensor)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() in ("_SourceBackward", "_RenewedBackward"):
            raise RuntimeError(ABOUT)
        seen.add(node)
        waiting.extend(before for before, _ in node.next_functions)
