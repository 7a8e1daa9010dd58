"""Many streams at once: observations of a large pool of clean examples, drawn again and again, against the real code.

A network sees a hundred thousand clean examples once. A stream is a random sequence of them, so its law is known: that
of the pool, not that of the stored statistics. Streams run side by side as if they were layers of one model, so the
bets and the evidence are the product's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from worlds import World, trained

from batchnorm.shift import Reference, ShiftMonitor
from batchnorm.shift.components import Components
from batchnorm.shift.evidence import Evidence
from batchnorm.shift.passes import passes
from batchnorm.shift.tap import Tap

if TYPE_CHECKING:
    from worlds import Sampler

ROUND = 8


def observations(monitor: ShiftMonitor, sampler: Sampler, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means and energies of channels of n examples, as the monitor's tap measures them."""
    random = torch.Generator().manual_seed(seed)
    parts = [(sampler(min(1000, n - i), random)[0], None) for i in range(0, n, 1000)]
    tap = Tap(monitor.layers, monitor.reference)
    found = [(z, q) for _, z, q in passes(monitor.model, tap, parts, None, "the benchmark")]
    z, q = (torch.cat(rows) for rows in zip(*found, strict=True))
    return z, q


def prepared(world: World, *, calibrated: bool) -> tuple[nn.Module, ShiftMonitor]:
    """A trained network and a monitor of one kind; calibration takes 1,000 clean examples of its own."""
    net = trained(world)
    monitor = ShiftMonitor(net, examples=None, budget=None)
    if calibrated:
        random = torch.Generator().manual_seed(1234)
        monitor.calibrate([world.clean(100, random)[0] for _ in range(10)])
    return net, monitor


def side_by_side(reference: Reference, streams: int) -> Reference:
    """One reference for so many streams: each stream's layers as layers of their own."""
    tensors: dict[str, Any] = {
        name: getattr(reference, name).repeat(streams)
        for name in ("mean", "std", "center", "kappa", "delta", "energy", "d", "v", "power", "power_d", "power_v")
    }
    layers, sizes = reference.layers * streams, reference.sizes * streams
    if (of := reference.components) is not None:
        # those of z of all streams, then those of energies
        bounds = {n: getattr(of, n).reshape(2, -1).repeat(1, streams).flatten() for n in ("center", "delta", "kappa")}
        tensors["components"] = Components(sizes, of.axes.repeat(1, streams, 1, 1), **bounds)
    return replace(reference, layers=layers, sizes=sizes, **tensors)


class Streams:
    """Evidence of many streams, (streams,)."""

    def __init__(self, reference: Reference, streams: int, *, is_spread: bool = True) -> None:
        self.count = streams
        self.evidence = Evidence.start(side_by_side(reference, streams), is_spread=is_spread)
        self.layers = len(reference.sizes)

    def observe(self, z: Tensor, q: Tensor) -> Tensor:
        """Log evidence after one more round: observations (n, streams, channels) each."""
        self.evidence = self.evidence.after(z.flatten(1), q.flatten(1))
        of_layers = self.evidence.log_layers.reshape(self.count, self.layers)
        return of_layers.logsumexp(1) - torch.tensor(float(self.layers)).log()


def drawn(pool: tuple[Tensor, Tensor], n: int, streams: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations of the pool for all streams, (n, streams, channels) each."""
    at = torch.randint(len(pool[0]), (n, streams), generator=random)
    return pool[0][at], pool[1][at]
