"""The alarm against its promises: python benchmarks/shift/bench_shift.py [--quick] [WORLD or KIND or PART ...].

False alarms on clean streams at alpha 0.01 and by average run length, the delay until it rings on shifted ones, what
it names, and what a test of fixed size does when one looks again and again. Every world, kind (checkpoint, calibrated
with 200, 1,000 and 5,000) and part (delay, false_alarms, run_length) unless some are named; worlds with tails (see
tails.py) and of real data (real.py) have clean streams only. The promise is about a stream and its calibration
together, so there are many calibrations, with eight streams each. Written to benchmarks/results/shift-WORLD.json,
where what is not measured stays as it was.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

import many
from pools import ROUND, Streams, calibrations, drawn, observations, prepared
from real import REAL
from report import FOLDER, save
from tails import TAILS
from worlds import WORLDS, accuracy

from batchnorm.experiment.environment import environment
from batchnorm.shift.alarm import e_bh

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALPHA, ARL = 0.01, 1e5
KINDS = {"checkpoint": 0, "calibrated-200": 200, "calibrated-1000": 1000, "calibrated-5000": 5000}
ALL = WORLDS | TAILS | REAL
PARTS = ("delay", "false_alarms", "run_length")
POOL, ALIKE = 40_000, 8  # clean examples; streams with one calibration
CLEAN_BEFORE, MOST = 400, 3000


def main() -> None:
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv
    kinds = [kind for kind in KINDS if kind in sys.argv] or list(KINDS)
    for name in [name for name in ALL if name in sys.argv] or list(ALL):
        file = f"shift-{name}" + ("-quick" if quick else "")
        results = {"alpha": ALPHA, "arl": ARL, "worlds": {name: before(file, name)}}
        for kind in kinds:
            start = time.perf_counter()
            measured = of_kind(name, kind, [part for part in PARTS if part in sys.argv] or PARTS, quick=quick)
            results["worlds"][name][kind] = results["worlds"][name].get(kind, {}) | measured
            if name in WORLDS and not set(PARTS) & set(sys.argv):
                results["worlds"][name] |= of_world(name, quick=quick)
            print(f"{name}, {kind}: {time.perf_counter() - start:.0f} s", flush=True)
            save(file, results)


def before(file: str, name: str) -> dict[str, Any]:
    """What a world's file has."""
    path = FOLDER / f"{file}.json"
    return json.loads(path.read_text())["worlds"][name] if path.exists() else {}


def of_kind(name: str, kind: str, wanted: Sequence[str], *, quick: bool) -> dict[str, Any]:
    world, n = ALL[name], KINDS[kind]
    net, monitor = prepared(world)
    pool = observations(monitor, world.clean, POOL // (10 if quick else 1), seed=7)
    streams, units = (100, 2000) if quick else (2000, 10_000)
    sizes = monitor.reference.sizes
    parts: dict[str, Any] = {"environment": environment(), "channels": sum(sizes), "layers": len(sizes)}
    if world.shifts and "delay" in wanted:
        parts["accuracy"] = accuracy(net, world.clean)
        parts["delay"] = {}
        for shift, sampler in world.shifts.items():
            parts["delay"][shift] = delay(monitor, net, sampler, pool, n, 20 if quick else 100)
            tell(name, kind, shift, parts["delay"][shift])
    if "false_alarms" in wanted:
        parts["false_alarms"] = false_alarms(monitor.reference, pool, streams, units, n)
        tell(name, kind, "false alarms", parts["false_alarms"])
    if "run_length" in wanted:
        parts["run_length"] = run_length(monitor.reference, pool, 50 if quick else 200, units, n)
        tell(name, kind, "run length", parts["run_length"])
    return parts


def of_world(name: str, *, quick: bool) -> dict[str, Any]:
    """What does not depend on the kind."""
    _, monitor = prepared(WORLDS[name])
    found = {"planted": planted(monitor.reference, 20 if quick else 200)}
    tell(name, "", "planted", found["planted"])
    found["fixed_size"] = fixed_size(observations(monitor, WORLDS[name].clean, 10_000, seed=7), 20 if quick else 200)
    tell(name, "", "KS at every window", found["fixed_size"])
    return found


def false_alarms(reference: Any, pool: Any, streams: int, units: int, calibration: int) -> dict[str, Any]:
    """Clean streams that ever rang, the upper end of the exact 95 % interval, and calibrations of which one rang."""
    limit = -math.log(ALPHA)
    found = clean_streams(reference, pool, streams, units, calibration, seed=11)
    rang = [bool((logs >= limit).any()) for logs in found]
    upper = stats.binomtest(sum(rang), streams).proportion_ci(0.9, method="exact").high
    alike = [any(rang[i : i + ALIKE]) for i in range(0, streams, ALIKE)] if calibration else []
    more = {"calibrations": len(alike), "calibrations_that_rang": sum(alike)} if calibration else {}
    row = {"streams": streams, "units": units, "rang": sum(rang), "rate": sum(rang) / streams, "upper_95": upper}
    return row | more


def run_length(reference: Any, pool: Any, streams: int, units: int, calibration: int) -> dict[str, Any]:
    """Observations until a false alarm: all that were made over the alarms that rang; a stream ends with its own."""
    rang, made = 0, 0
    for logs in clean_streams(reference, pool, streams, units, calibration, seed=12, is_spread=False):
        rings = logs >= math.log(ARL)
        rang += bool(rings.any())
        made += ROUND * (int(rings.argmax()) + 1 if rings.any() else len(logs))
    return {"observations": made, "rang": rang, "at_least": made / max(1, rang)}


def clean_streams(
    reference: Any, pool: Any, streams: int, units: int, calibration: int, *, seed: int, is_spread: bool = True
) -> Iterator[Any]:
    """Log evidence after each round of clean streams; the first is compared with what the product says."""
    random = torch.Generator().manual_seed(seed)
    energy, z = reference.of_layers(pool[1]).numpy(), pool[0].numpy()
    known, cells = reference, None
    for stream in range(streams):
        if calibration and stream % ALIKE == 0:
            known = calibrations(reference, pool, calibration, 1, random)[0]
            cells = many.cells_of_pool(known, pool)
        at = torch.randint(len(z), (units,), generator=random).numpy()
        if cells is None:
            logs = many.from_checkpoint(known, z[at], energy[at], is_spread=is_spread)
        else:
            logs = many.by_ranks(known, cells[at], is_spread=is_spread)
        if stream == 0:
            first = at[:800]
            many.checked(known, pool[0][first], pool[1][first], logs[:100], is_spread=is_spread)
        yield logs


def delay(monitor: Any, net: Any, sampler: Any, pool: Any, calibration: int, streams: int) -> dict[str, Any]:
    """Observations from the shift to the alarm, after clean ones, and what the alarm named."""
    random = torch.Generator().manual_seed(13)
    shifted = observations(monitor, sampler, 20_000 if streams > 20 else 4000, seed=8)
    beside = Streams(calibrations(monitor.reference, pool, calibration, streams, random))
    for _ in range(CLEAN_BEFORE // ROUND):
        beside.observe(*drawn(pool, ROUND, streams, random))
    at = torch.full((streams,), math.inf)
    for step in range(1, MOST // ROUND + 1):
        rings = (beside.observe(*drawn(shifted, ROUND, streams, random)) >= -math.log(ALPHA)) & at.isinf()
        at[rings] = float(ROUND * step)
        if not at.isinf().any():
            break
    ordered = sorted(at.tolist())
    ninety = ordered[math.ceil(0.9 * streams) - 1]
    median = statistics.median(ordered)
    finite = {"median": median if math.isfinite(median) else None, "ninety": ninety if math.isfinite(ninety) else None}
    return {**finite, "rang": int((~at.isinf()).sum()), "streams": streams, "accuracy": accuracy(net, sampler)}


def planted(reference: Any, streams: int) -> dict[str, Any]:
    """Shifts of 0.5 sd in four channels of one layer and all behind it: which layer and which channels are named?"""
    random = torch.Generator().manual_seed(14)
    layers, right, false, named = len(reference.sizes), 0, 0, 0
    starts = [sum(reference.sizes[:i]) for i in range(layers)]
    for layer in range(layers):
        beside = Streams([reference] * streams)
        for _ in range(50):
            z = 0.3 * torch.randn(ROUND, streams, sum(reference.sizes), generator=random).double()
            for behind in range(layer, layers):
                z[:, :, starts[behind] : starts[behind] + 4] += 0.5
            beside.observe(z, torch.ones_like(z))
        of_layers = beside.evidence.log_layers.reshape(streams, layers) >= -math.log(ALPHA)
        first = torch.where(of_layers.any(1), of_layers.double().argmax(1), -1)
        right += int((first == layer).sum())
        channels = beside.evidence.log_channels.reshape(streams, -1)
        for stream in channels:
            found = e_bh(stream[starts[layer] : starts[layer] + reference.sizes[layer]], 0.05)
            false, named = false + sum(c >= 4 for c in found), named + len(found)
    total = streams * layers
    return {"right": right / total, "trials": total, "named": named, "false_discoveries": false / max(1, named)}


def fixed_size(pool: Any, streams: int) -> dict[str, Any]:
    """Kolmogorov-Smirnov on every channel mean of the last layer, Bonferroni at 1 %, at each of 23 windows of 64."""
    random = torch.Generator().manual_seed(15)
    features = pool[0][:, -24:]
    reference = features[torch.randint(len(features), (1000,), generator=random)].numpy()
    rang = 0
    for _ in range(streams):
        for _ in range(23):
            window = features[torch.randint(len(features), (64,), generator=random)].numpy()
            if min(stats.ks_2samp(reference, window).pvalue) < ALPHA / features.shape[1]:
                rang += 1
                break
    return {"streams": streams, "looks": 23, "rang": rang, "rate": rang / streams}


def tell(world: str, kind: str, what: str, row: dict[str, Any]) -> None:
    told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(f"{world:<8}{kind:<12}{what:<22}{told}", flush=True)


if __name__ == "__main__":
    main()
