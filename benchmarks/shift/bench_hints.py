"""What alarms hint at, and which layer and channels they name: python benchmarks/shift/bench_hints.py [WORLD ...].

Hints: a hundred streams for each change of inputs or of the shares of classes, of 400 clean observations and then
changed ones, each to its alarm. Names: 400 observations whose means are 0.5 stored sd higher in the first four channels
of one layer and of all behind it, of clean examples and of normal ones; each layer in turn. Calibrated streams have
1,000 clean observations of their own each. Written to benchmarks/results/shift_hints.json, where worlds that are not
measured stay as they were.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_shift import ALPHA, CLEAN_BEFORE, MOST
from pools import ROUND, Streams, calibrations, drawn, observations, prepared
from report import FOLDER, save
from worlds import WORLDS

from batchnorm.experiment.environment import environment
from batchnorm.shift.alarm import e_bh
from batchnorm.shift.stream import LOGGER, Stream

KINDS = {"checkpoint": 0, "calibrated": 1000}
SETTLED = 128  # observations after an alarm, when its hint has been given
STREAMS, BESIDE, POOL = 100, 20, 20_000
MOVED, FIRST_CHANNELS, PLANTED = 0.5, 4, 400  # stored sd, channels of each layer, observations
OF_MEANS = 0.3  # sd of an observation's mean, of normal ones

Pool = tuple[Tensor, Tensor]
Draw = Callable[[int, int, torch.Generator], Pool]


def main() -> None:
    torch.set_num_threads(1)
    LOGGER.setLevel("CRITICAL")
    results = {"environment": environment(), "streams": STREAMS, "alpha": ALPHA, "worlds": before()}
    for name in [name for name in WORLDS if name in sys.argv] or list(WORLDS):
        _, monitor = prepared(WORLDS[name])
        clean = observations(monitor, WORLDS[name].clean, POOL, seed=7)
        shifted = {shift: observations(monitor, s, POOL // 2, seed=8) for shift, s in WORLDS[name].shifts.items()}
        for kind, n in KINDS.items():
            found = {"hints": hinted(monitor.reference, clean, shifted, n)}
            found |= {of: named(monitor.reference, draw, n) for of, draw in planters(clean).items()}
            results["worlds"].setdefault(name, {})[kind] = found
            save("shift_hints", results)
            tell(name, kind, found)


def before() -> dict[str, Any]:
    """What the file has of worlds."""
    path = FOLDER / "shift_hints.json"
    return json.loads(path.read_text())["worlds"] if path.exists() else {}


def hinted(reference: Any, clean: Pool, shifted: dict[str, Pool], calibration: int) -> dict[str, dict[str, int]]:
    """How many streams' alarms said what, of each change."""
    random = torch.Generator().manual_seed(16)
    found: dict[str, Counter[str]] = {shift: Counter() for shift in shifted}
    for _ in range(STREAMS):
        (own,) = calibrations(reference, clean, calibration, 1, random)
        first = Stream(own, "example", alpha=ALPHA, arl=None)
        of_alarm(first, clean, CLEAN_BEFORE, random)
        for shift, pool in shifted.items():
            stream = Stream(own, "example", alpha=ALPHA, arl=None)
            stream.put(first.state())
            found[shift][of_alarm(stream, pool, MOST, random)] += 1
    return {shift: dict(said) for shift, said in found.items()}


def of_alarm(stream: Stream, pool: Pool, most: int, random: torch.Generator) -> str:
    """The hint of a stream's alarm within so many more observations, and what it says after 128 more."""
    after = 0
    for _ in range(most // ROUND):
        after += stream.alarm is not None
        if after > SETTLED // ROUND:
            break
        stream.observe(*(part[:, 0] for part in drawn(pool, ROUND, 1, random)))
    return "no alarm" if stream.alarm is None else stream.alarm.hint or "no hint"


def planters(clean: Pool) -> dict[str, Draw]:
    """Where clean observations come from, by the name of what is named."""
    channels = clean[0].shape[1]

    def normal(n: int, streams: int, random: torch.Generator) -> Pool:
        z = OF_MEANS * torch.randn(n, streams, channels, generator=random).double()
        return z, z.square() + 1 - OF_MEANS**2

    return {"planted": lambda n, streams, random: drawn(clean, n, streams, random), "planted_normal": normal}


def named(reference: Any, draw: Draw, calibration: int) -> dict[str, Any]:
    """Which layers and channels are named where the shift was planted."""
    random = torch.Generator().manual_seed(14)
    layers, right, false, hits, none = len(reference.sizes), 0, 0, 0, 0
    for layer in range(layers):
        for _ in range(0, STREAMS, BESIDE):
            first, channels = planted(reference, draw, calibration, layer, random)
            right, none = right + int((first == layer).sum()), none + int((first < 0).sum())
            for found in channels:
                wrong = sum(c >= FIRST_CHANNELS for c in found)
                false, hits = false + wrong, hits + len(found) - wrong
    trials = STREAMS * layers
    told = {"trials": trials, "right": right / trials, "no_layer": none, "other_layer": trials - right - none}
    return told | {"channels": FIRST_CHANNELS * trials, "channels_named": hits, "false_channels": false}


def planted(
    reference: Any, draw: Draw, calibration: int, layer: int, random: torch.Generator
) -> tuple[Tensor, Iterator[tuple[int, ...]]]:
    """The first layer that moved in each stream, -1 for none, and the channels named in the layer that did."""
    z, q = draw(max(1, calibration), BESIDE, random)
    own = [reference.calibrated(z[:, i], q[:, i]) if calibration else reference for i in range(BESIDE)]
    beside = Streams(own)
    starts = [sum(reference.sizes[:i]) for i in range(len(reference.sizes))]
    moved = torch.zeros(sum(reference.sizes), dtype=torch.float64)
    for start in starts[layer:]:
        moved[start : start + FIRST_CHANNELS] = MOVED
    for _ in range(PLANTED // ROUND):
        z, q = draw(ROUND, BESIDE, random)
        beside.observe(z + moved, q + 2 * moved * z + moved.square())  # (z + m)^2 = z^2 + 2 m z + m^2
    of_layers = beside.evidence.log_layers.reshape(BESIDE, -1) >= -math.log(ALPHA)
    first = torch.where(of_layers.any(1), of_layers.double().argmax(1), -1)
    channels = beside.evidence.log_channels.reshape(BESIDE, -1)
    return first, (e_bh(c[starts[layer] : starts[layer] + reference.sizes[layer]], 0.05) for c in channels)


def tell(name: str, kind: str, found: dict[str, Any]) -> None:
    """Lines on a terminal."""
    for shift, said in found["hints"].items():
        print(f"{name:<8}{kind:<12}{shift:<22}{said}", flush=True)
    for of in ("planted", "planted_normal"):
        print(f"{name:<8}{kind:<12}{of:<22}{found[of]}", flush=True)


if __name__ == "__main__":
    main()
