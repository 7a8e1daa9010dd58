"""Fleets of 20 replicas: python benchmarks/shift/bench_fleet.py [--quick]; ten minutes.

2,000 clean fleets per row at alpha 0.01, read after each round of 8 observations of each replica: how many raise an
alarm, by the fleet's rule and by rules that it does not use. Replicas of a fleet share one reference: statistics that
an exponential average of 64 x 19 examples gives (checkpoint), or a calibration with 200 examples. Then the delay of
shifts of one replica and of all, against a single monitor. Written to benchmarks/results/shift_fleet.json.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from pools import ROUND, Streams, drawn, observations, prepared
from report import save
from tails import TAILS, exact

from batchnorm.experiment.environment import environment
from batchnorm.shift import Reference, fleet
from batchnorm.shift.e_processes import EProcesses
from batchnorm.shift.layer_evidence import LayerEvidence
from batchnorm.shift.scores import KIND_OF

ALPHA, REPLICAS, FLEETS = 0.01, 20, 2000
LIMIT = -math.log(ALPHA)
OBSERVATIONS = {"checkpoint": 400, "calibrated": 160}  # of each replica
POOL, TRAINING, CALIBRATION = 100_000, 64 * 19, 200
AT_ONCE = {"checkpoint": 100, "calibrated": 20}
LAG = 10  # rounds by which a replica's file may be older, for fleets whose replicas report at different times
SHIFT, CLEAN_BEFORE = 0.5, 160  # sd of every channel's mean; clean observations of each replica before it


def small() -> nn.Module:
    """Two layers of eight channels."""
    layers: list[nn.Module] = []
    for inputs in (16, 8):
        layers += [nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


WORLDS = {
    "normal": exact(lambda n, random: torch.randn(n, 16, generator=random), small),
    "student-2.5": exact(lambda n, random: TAILS["student-2.5"].clean(n, random)[0], small),
}


@dataclass(frozen=True)
class Pool:
    """Observations of one world, and its reference with exact statistics."""

    reference: Reference
    z: Tensor
    q: Tensor

    @classmethod
    def of(cls, name: str, size: int = POOL) -> Pool:
        """The pool of a world."""
        _, monitor = prepared(WORLDS[name])
        return cls(monitor.reference, *observations(monitor, WORLDS[name].clean, size, seed=7))

    def trained(self, fleets: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and sd that each fleet's checkpoint stores, in exact sd, (fleets, channels): from 1,216 examples."""
        z, q = drawn((self.z, self.q), TRAINING, fleets, random)
        mean = z.mean(0)
        return mean, (q.mean(0) - mean.square()).clamp_min(1e-12).sqrt()


def fleets_of(
    pool: Pool, mode: str, count: int, random: torch.Generator, *, is_exact: bool = False
) -> tuple[Streams, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Streams of ``count`` fleets, and what their stored statistics make of observations (n, streams, channels)."""
    if mode == "calibrated":
        z, q = drawn((pool.z, pool.q), CALIBRATION, count, random)
        references = [pool.reference.calibrated(z[:, i], q[:, i]) for i in range(count)]
        return Streams([each for each in references for _ in range(REPLICAS)]), lambda z, q: (z, q)
    streams = Streams([pool.reference] * (count * REPLICAS))
    if is_exact:
        return streams, lambda z, q: (z, q)
    mean, sd = (x.repeat_interleave(REPLICAS, 0) for x in pool.trained(count, random))
    return streams, lambda z, q: ((z - mean) / sd, (q - 2 * mean * z + mean.square()) / sd.square())


def by_replica(streams: Streams, count: int) -> list[LayerEvidence]:
    """The evidence of the first replicas of all fleets, of the second replicas, and so on: fleets side by side."""
    evidence, layers = streams.evidence, streams.layers
    sizes, names = evidence.sizes[:layers], evidence.layers[:layers]

    def of_replica(name: str, bet: EProcesses, k: int) -> EProcesses:
        rows = len(KIND_OF) if name == "ranks" else 1
        parts = (getattr(bet, part).unflatten(-1, (rows, count, REPLICAS, -1)) for part in ("product", "restarted"))
        return replace(
            bet, **dict(zip(("product", "restarted"), (x[..., k, :].flatten(-3) for x in parts), strict=True))
        )

    return [
        LayerEvidence(
            layers=names * count, sizes=sizes * count,
            **{name: of_replica(name, bet, k) for name, bet in evidence.bets.items() if name != "marks"},
        )
        for k in range(REPLICAS)
    ]  # fmt: skip


def log_of(evidence: LayerEvidence, count: int) -> Tensor:
    """Log evidence of each fleet, whose layers are side by side, (count,)."""
    of_layers = evidence.log_layers.reshape(count, -1)
    together = of_layers.logsumexp(1) if evidence.ranks is None else of_layers.amax(1)
    return together - math.log(of_layers.shape[1])


def combined(parts: list[LayerEvidence], rule: str, count: int) -> Tensor:
    """Log of the combined evidence of all fleets, by the product's own code, (count,)."""
    return log_of(fleet._merged(parts, rule, -math.log(REPLICAS), REPLICAS), count)


def largest_by_bet(parts: list[LayerEvidence], count: int) -> Tensor:
    """Before: the largest evidence of each bet, before the mean over bets."""
    stacked = torch.stack([part.ranks.log for part in parts]).amax(0) - math.log(REPLICAS)
    ranks = replace(parts[0].ranks, product=stacked, restarted=stacked, rest=1e-300)
    return log_of(replace(parts[0], ranks=ranks), count)


def read(streams: Streams, logs: list[Tensor], count: int, lags: Tensor, mode: str) -> dict[str, Tensor]:
    """Log evidence of every rule after the last round, (count,)."""
    parts, own = by_replica(streams, count), logs[-1]
    singles = {
        "one monitor": own[:, 0],
        "20 monitors": own.amax(1),
        "20 monitors at alpha / 20": own.amax(1) - math.log(REPLICAS),
    }
    seen = (len(logs) - 1 - lags).clamp_min(0)  # the round of each replica's file
    late = torch.stack(logs)[seen, torch.arange(count)[:, None], torch.arange(REPLICAS)] - math.log(REPLICAS)
    product = combined(parts, fleet.PRODUCT, count)
    if mode == "calibrated":
        mean = own.logsumexp(1) - math.log(REPLICAS)
        return {"fleet: largest": combined(parts, fleet.LARGEST, count),
                "fleet: files of different times": late.amax(1),
                "before: largest by bet": largest_by_bet(parts, count), "average (not proved)": mean,
                "product (not allowed)": product, **singles}  # fmt: skip
    return {"fleet: average": combined(parts, fleet.AVERAGE, count),
            "fleet: files of different times": fleet.of_one_time(late, seen.double(), 2.0)[0],
            "independent, and before: product": product, **singles}  # fmt: skip


def alarms(
    pool: Pool, mode: str, count: int, random: torch.Generator, *, is_exact: bool = False, moved: int = 0,
    clean: int = 0, last: int = 0, mirrored: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Observations of a replica until each fleet's alarm by each rule, (count,); infinite without an alarm.

    After ``clean`` observations every channel's mean moves, in the first ``moved`` replicas. If ``mirrored``, all
    replicas of a fleet get the same examples.
    """
    streams, stored = fleets_of(pool, mode, count, random, is_exact=is_exact)
    is_moved = (torch.arange(REPLICAS) < moved).double().repeat(count)[:, None]
    lags = torch.randint(LAG + 1, (count, REPLICAS), generator=random)
    logs: list[Tensor] = []
    first: dict[str, Tensor] = {}
    for n in range(ROUND, (last or OBSERVATIONS[mode]) + 1, ROUND):
        z, q = drawn((pool.z, pool.q), ROUND, count if mirrored else count * REPLICAS, random)
        if mirrored:
            z, q = (x.repeat_interleave(REPLICAS, 1) for x in (z, q))
        by = SHIFT * is_moved * (n > clean) * (pool.q - pool.z.square() + pool.z.var(0)).clamp_min(0).mean(0).sqrt()
        z, q = stored(z + by, q + 2 * by * z + by.square())
        logs.append(streams.observe(z, q).reshape(count, REPLICAS))
        for rule, log in read(streams, logs, count, lags, mode).items():
            at = first.setdefault(rule, torch.full((count,), torch.inf))
            at[(log >= LIMIT) & at.isinf()] = n
    return first


def chunks(total: int, size: int) -> Iterator[int]:
    """Parts of ``total``, of at most ``size`` each."""
    yield from (min(size, total - at) for at in range(0, total, size))


def clean_rates(name: str, mode: str, total: int, **more: Any) -> dict[str, Any]:
    """For each rule: how many of ``total`` clean fleets raise an alarm, and the upper 95 % bound of their share."""
    pool, random = Pool.of(name), torch.Generator().manual_seed(17)
    parts = [alarms(pool, mode, count, random, **more) for count in chunks(total, AT_ONCE[mode])]
    found = {rule: int(sum(part[rule].isfinite().sum() for part in parts)) for rule in parts[0]}
    return {rule: {"alarms": k, "fleets": total, "upper": upper(k, total)} for rule, k in found.items()}


def upper(k: int, n: int) -> float:
    """Upper end of the one-sided 95 % interval of a share (Clopper and Pearson 1934)."""
    return 1.0 if k == n else float(beta.ppf(0.95, k + 1, n - k))


def delays(name: str, mode: str, total: int, moved: int) -> dict[str, Any]:
    """For each rule: the median number of observations of a replica from the change to the alarm."""
    pool, random = Pool.of(name), torch.Generator().manual_seed(18)
    how = {"moved": moved, "clean": CLEAN_BEFORE, "last": CLEAN_BEFORE + 400}
    parts = [alarms(pool, mode, count, random, **how) for count in chunks(total, AT_ONCE[mode])]
    rows = {}
    for rule in parts[0]:
        at = torch.cat([part[rule] for part in parts]) - CLEAN_BEFORE
        after = at[at > 0]
        rows[rule] = {"median": float(after.median()), "alarms": int(after.isfinite().sum()), "fleets": len(after)}
    return rows


CLEAN_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "checkpoint, normal": ("normal", "checkpoint", {}),
    "checkpoint, normal, all replicas get the same requests": ("normal", "checkpoint", {"mirrored": True}),
    "checkpoint, student-2.5": ("student-2.5", "checkpoint", {"is_exact": True}),
    "calibrated with 200, normal": ("normal", "calibrated", {}),
    "calibrated with 200, student-2.5": ("student-2.5", "calibrated", {}),
}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    total, shifted = (100, 20) if "--quick" in sys.argv else (FLEETS, 60)
    clean, late = {}, {}
    for row, (name, mode, more) in CLEAN_ROWS.items():
        start = time.perf_counter()
        clean[row] = clean_rates(name, mode, total, **more)
        print(f"{row}, {time.perf_counter() - start:.0f} s")
        for rule, found in clean[row].items():
            print(f"    {rule:<36} {found['alarms']:>5} of {total}, at most {100 * found['upper']:.2f} %", flush=True)
    for mode in OBSERVATIONS:
        for moved in (1, REPLICAS):
            late[f"{mode}, {moved} of {REPLICAS} replicas"] = rows = delays("normal", mode, shifted, moved)
            print(
                f"{mode}, {moved} of {REPLICAS}: ", {rule: found["median"] for rule, found in rows.items()}, flush=True
            )
    data = {
        "alpha": ALPHA,
        "replicas": REPLICAS,
        "observations": OBSERVATIONS,
        "shift": SHIFT,
        "clean": clean,
        "delays": late,
    }
    save("shift_fleet" + ("-quick" if "--quick" in sys.argv else ""), {"environment": environment(), **data})


if __name__ == "__main__":
    main()
