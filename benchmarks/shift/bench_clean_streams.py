"""What an adapter does to clean streams with tails: python benchmarks/shift/bench_clean_streams.py [--quick].

A classifier of four classes is trained on data whose examples are rarely large, come in bursts, or have noise without a
fourth moment; its statistics are exact. Nothing changes in the streams, so that each error more than the deployed
model's is the adapter's. Six streams of 3,200 examples in batches of 16 in each world, from the checkpoint alone and
calibrated with 200 and 1,000 clean examples. Written to benchmarks/results/shift_clean_streams.json; ten minutes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import save
from tails import TAILS

import batchnorm as bn
from batchnorm.experiment.environment import environment

STREAMS, EXAMPLES, SIZE = 6, 3200, 16
FEATURES, CLASSES = 16, 4
MODES = {"checkpoint": 0, "calibrated, 200": 200, "calibrated, 1,000": 1000}
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
CENTERS = 1.1 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))


def _multiplied(share: float, rare: float, usual: float) -> Draw:
    """Examples around their class's center, of which a share is multiplied by ``rare`` and the others by ``usual``."""

    def draw(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (n,), generator=random)
        x = CENTERS[y] + torch.randn(n, FEATURES, generator=random)
        return x * torch.where(torch.rand(n, 1, generator=random) < share, rare, usual), y

    return draw


def _noisy(name: str) -> Draw:
    """Centers with the noise of one of the worlds with tails, less its mean."""

    def draw(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (n,), generator=random)
        noise = TAILS[name].clean(n, random)[0]
        return CENTERS[y] + 0.5 * (noise - noise.median(0).values), y

    return draw


WORLDS: dict[str, Draw] = {
    "normal": _multiplied(0.0, 1.0, 1.0),
    "3 in 1,000 times 30": _multiplied(0.003, 30.0, 1.0),
    "1 in 1,000 times 100": _multiplied(0.001, 100.0, 1.0),
    "silence with 10 % bursts": _multiplied(0.1, 1.0, 0.05),
    "noise of Student 2.5": _noisy("student-2.5"),
    "noise of Pareto 2.2": _noisy("pareto-2.2"),
}


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("batchnorm").setLevel("CRITICAL")
    streams = 2 if "--quick" in sys.argv else STREAMS
    found = {world: of_world(draw, streams) for world, draw in WORLDS.items()}
    for world, rows in found.items():
        print(f"\n{world}: errors of streams as deployed, %: {rows['as deployed']}")
        for mode in MODES:
            print(f"    {mode:<20} added, %: {rows[mode]['added']}, states {rows[mode]['states']}", flush=True)
    name = "shift_clean_streams" + ("-quick" if "--quick" in sys.argv else "")
    save(name, {"environment": environment(), "streams": streams, "examples": EXAMPLES, "worlds": found})


def of_world(draw: Draw, streams: int) -> dict:
    """Errors of each stream as deployed, and what an adapter adds to them in each mode."""
    model = trained(draw)
    data = [draw(EXAMPLES, torch.Generator().manual_seed(100 + seed)) for seed in range(streams)]
    deployed = [error(model, x, y) for x, y in data]
    rows: dict = {"as deployed": [round(e, 2) for e in deployed]}
    for mode, clean in MODES.items():
        added, states = [], []
        for seed, ((x, y), before) in enumerate(zip(data, deployed, strict=True)):
            monitor = bn.ShiftMonitor(model, examples=None, budget=None)
            if clean:
                monitor.calibrate(draw(clean, torch.Generator().manual_seed(1000 + seed))[0].split(100))
            with bn.Adapter(monitor) as adapter:
                added.append(round(error(model, x, y) - before, 2))
            states.append(adapter.state)
        rows[mode] = {"added": added, "states": states}
    return rows


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Errors on a stream, %."""
    answers = torch.cat([model(part).argmax(1) for part in x.split(SIZE)])
    return 100 * float((answers != y).double().mean())


def trained(draw: Draw) -> nn.Module:
    """A network of two hidden layers, its statistics exact from 200,000 examples, in eval mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (FEATURES, 32):
        layers += [nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    random = torch.Generator().manual_seed(1)
    bn.recalibrate(model, list(draw(200_000, random)[0].split(10_000)))
    for _ in range(600):  # as eval mode will be: a batch that lacks the rare ones has other statistics
        x, y = draw(256, random)
        optimizer.zero_grad()
        F.cross_entropy(model.eval()(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    bn.recalibrate(model, list(draw(200_000, random)[0].split(10_000)))
    return model.eval()


if __name__ == "__main__":
    main()
