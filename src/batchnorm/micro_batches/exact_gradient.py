"""The gradient of a step's loss through the moments of the whole step.

All micro-batches go back through a level; then their shares of the sums of the layer before it are added, and all go on
from the total. With several segments only the tensors of one segment of levels are held: its forwards run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

from batchnorm.kernels import joined_batches
from batchnorm.micro_batches.cut_graphs import CutGraph, Key
from batchnorm.micro_batches.joined_layers import JoinedModel
from batchnorm.micro_batches.step_totals import RandomStarts
from batchnorm.population.observation import EndForward

# the loss of a micro-batch, from the model's output and its position
LossOf = Callable[[object, int], Tensor]


def exact_backward(
    joined: JoinedModel, starts: RandomStarts, loss: LossOf, *, segments: int, has_gates: bool = True
) -> list[Tensor]:
    """Add the gradients of the sum of all losses to those of the parameters; return the losses.

    Raises:
        UncutGraphError: If graphs cannot be cut in this way; some gradients were added.
    """
    losses: list[Tensor] = []
    wanted: list[dict[Key, Tensor]] = [{} for _ in joined.micros]
    for first, last in reversed(_segments([site.values for site in joined.sites], segments)):
        end = None if last == len(joined.sites) else last
        graphs = [CutGraph(first, end, each, has_gates=has_gates) for each in wanted]
        for micro, graph in enumerate(graphs):
            starts.before[micro]()
            torch.clear_autocast_cache()  # so that every run makes the same nodes
            losses += _run(joined, graph, loss, micro)
        for level in range(last - 1, first - 1, -1):
            for graph in graphs:
                graph.flush(level)
            if level >= 0:
                _pass_site(joined, graphs, level)
        wanted = [graph.leave() for graph in graphs]
    return losses


def _run(joined: JoinedModel, graph: CutGraph, loss: LossOf, micro: int) -> list[Tensor]:
    """Record a graph; the loss, if the forward does not end before it."""
    losses: list[Tensor] = []
    with suppress(EndForward), graph.recorded():
        value = loss(joined.forward(micro, graph), micro)
        graph.start(value)
        losses.append(value.detach())
    graph.require_all()
    return losses


def _pass_site(joined: JoinedModel, graphs: Sequence[CutGraph], level: int) -> None:
    """Carry the gradients of all micro-batches through a site."""
    shares = [graph.share(level) for graph in graphs]
    sums = [share[2][0] for share in shares if share is not None]
    if not sums:
        return
    group = joined.sites[level].group
    with torch.no_grad():
        total = torch.stack(sums).sum(0)
        total = total if group is None else group.total(total)
    for graph, share in zip(graphs, shares, strict=True):
        if share is not None:
            batch, grad, (_, kept) = share
            graph.receive(level, joined_batches.from_total(batch, grad, kept, total))


def _segments(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Levels [first, last) of each segment, with about the same number of values; a level has those of its site."""
    whole, bounds = sum(sizes), [-1]
    for part in range(1, count):
        share = part * whole / count
        bounds.append(next(level for level in range(len(sizes)) if sum(sizes[: level + 1]) >= share))
    bounds = sorted({*bounds, len(sizes)})
    return list(pairwise(bounds))
