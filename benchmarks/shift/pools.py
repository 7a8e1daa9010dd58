"""Many streams at once: observations of a large pool of clean examples, drawn again and again, against the real code.

A network sees a hundred thousand clean examples once. A stream is a random sequence of them, so its law is known: that
of the pool, not that of the stored statistics. Streams run side by side as if they were layers of one model, so the
bets and the evidence are the product's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from worlds import World, trained

from batchnorm.shift import Reference, ShiftMonitor
from batchnorm.shift.clean_observations import CleanObservations
from batchnorm.shift.data_passes import passes
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.layer_observer import LayerObserver

if TYPE_CHECKING:
    from worlds import Sampler

ROUND = 8


def observations(monitor: ShiftMonitor, sampler: Sampler, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means and energies of channels of n examples, as the monitor's tap measures them."""
    random = torch.Generator().manual_seed(seed)
    parts = [(sampler(min(1000, n - i), random)[0], None) for i in range(0, n, 1000)]
    tap = LayerObserver(monitor.layers, monitor.reference)
    found = [(z, q) for _, z, q in passes(monitor.model, tap, parts, None, "the benchmark")]
    z, q = (torch.cat(rows) for rows in zip(*found, strict=True))
    return z, q


def prepared(world: World, *, calibration: int = 0, seed: int = 1234) -> tuple[nn.Module, ShiftMonitor]:
    """A trained network and a monitor, calibrated with so many clean examples of its own if any."""
    net = trained(world)
    monitor = ShiftMonitor(net, examples=None, budget=None)
    if calibration:
        random = torch.Generator().manual_seed(seed)
        monitor.calibrate([world.clean(100, random)[0] for _ in range(calibration // 100)])
    return net, monitor


def calibrations(
    reference: Reference, pool: tuple[Tensor, Tensor], n: int, streams: int, random: torch.Generator
) -> list[Reference]:
    """A reference for each stream, calibrated with n examples of its own if n is not 0."""
    if not n:
        return [reference] * streams
    z, q = drawn(pool, n, streams, random)
    return [reference.calibrated(z[:, i], q[:, i]) for i in range(streams)]


def side_by_side(references: list[Reference]) -> Reference:
    """One reference for many streams: each stream's layers as layers of their own."""
    first = references[0]
    sizes = first.sizes * len(references)
    own = {name: torch.cat([getattr(of, name) for of in references]) for name in ("mean", "std", "delta", "kappa", "d")}
    v = None if first.v is None else torch.cat([of.v for of in references if of.v is not None])
    clean = None if first.clean is None else _beside([of.clean for of in references if of.clean is not None], sizes)
    return replace(first, layers=first.layers * len(references), sizes=sizes, **own, v=v, clean=clean)


def _beside(cleans: list[CleanObservations], sizes: tuple[int, ...]) -> CleanObservations:
    """Tensors of all streams next to each other: of rows (scores, directions, marks) within each row."""
    layers = len(sizes) // len(cleans)
    joined = {}
    for name, one in cleans[0].tensors().items():
        all_ = [clean.tensors()[name] for clean in cleans]
        if name in {"components.axes", "marks.upper", "marks.lower"}:
            joined[name] = torch.cat(all_, 1)
        elif name == "marks.shares":
            joined[name] = one
        else:  # scores of each layer, means and energies of each channel, or channels
            scores, twice = name in _OF_SCORES, name in _OF_COMPONENTS
            rows = len(one) // layers if scores else 2 if twice else 1
            joined[name] = torch.cat([of.unflatten(0, (rows, -1)) for of in all_], 1).flatten(0, 1)
    return CleanObservations.of_tensors(sizes, joined)


_OF_SCORES = {"scores.middle", "scores.width", "bag.above"}
_OF_COMPONENTS = {
    "components.center", "components.delta", "components.kappa", "scores.turned_center", "scores.turned_spread",
}  # fmt: skip


class Streams:
    """Evidence of many streams, (streams,), each against its own reference."""

    def __init__(self, references: list[Reference], *, is_spread: bool = True) -> None:
        self.count = len(references)
        self.evidence = ShiftEvidence.start(side_by_side(references), is_spread=is_spread)
        self.layers = len(references[0].sizes)

    def observe(self, z: Tensor, q: Tensor) -> Tensor:
        """Log evidence after one more round: observations (n, streams, channels) each."""
        self.evidence = self.evidence.after(z.flatten(1), q.flatten(1))
        of_layers = self.evidence.log_layers.reshape(self.count, self.layers)
        together = of_layers.logsumexp(1) if self.evidence.ranks is None else of_layers.amax(1)
        return together - torch.tensor(float(self.layers)).log()


def drawn(pool: tuple[Tensor, Tensor], n: int, streams: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations of the pool for all streams, (n, streams, channels) each."""
    at = torch.randint(len(pool[0]), (n, streams), generator=random)
    return pool[0][at], pool[1][at]
