"""The tables of docs/scale.md: python benchmarks/scale/cost_model.py writes them, from measured rates and stated nets.

seconds = start + max(pieces, network, store, merging)

pieces   bytes / (workers x rate of a core), times ceil(pieces / workers) / (pieces / workers): the last round of
         pieces leaves workers without work
network  bytes / (machines x bytes per second of a machine's network)
store    bytes / bytes per second of the object store
merging  pieces x seconds for the record of a piece at the one process that merges
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "scale.md"
# what is assumed, not measured
NETWORK, STORE, START = 1.25e9, 12.5e9, 15.0  # bytes per second: 10 Gbit/s a machine, 100 Gbit/s the store; seconds
CORES = 16  # of a machine
DATA, FILES = 1e12, 1000  # bytes, and files of the same size
PIECE = {"JPEG": DATA / FILES}  # bytes of a piece: a tar shard is one piece
CUT = 64e6  # bytes of a piece of the other formats
WORKERS = (1, 16, 64, 256, 1024, 4096, 16384)
LATENCY, MESSAGES = 50e-6, 2  # seconds of a message between ranks; messages of a layer: sizes, then moments
BYTES = 3 * 8  # of a channel: count, mean and m2 in float64
# channels of all batch norm layers, and their number
NETWORKS = {"ResNet-50": (26_560, 53), "MobileNetV2": (17_056, 52)}


@dataclass(frozen=True, slots=True)
class Job:
    """Data of some bytes in some pieces, for some workers that read at a measured rate."""

    rate: float
    workers: int
    record_s: float
    pieces: int

    @property
    def terms(self) -> dict[str, float]:
        """Seconds of everything that may be the slowest."""
        busy = min(self.workers, self.pieces)
        uneven = math.ceil(self.pieces / busy) / (self.pieces / busy)
        machines = math.ceil(self.workers / CORES)
        return {
            "pieces": DATA / (busy * self.rate) * uneven,
            "network": DATA / (machines * NETWORK),
            "store": DATA / STORE,
            "merging": self.pieces * self.record_s,
        }

    @property
    def seconds(self) -> float:
        """The time of the whole job."""
        return START + max(self.terms.values())

    @property
    def slowest(self) -> str:
        """What decides the time: the start if it is more than all else."""
        terms = {"start": START, **self.terms}
        return max(terms, key=terms.__getitem__)


def main() -> None:
    text = filled(PAGE.read_text(encoding="utf-8"))
    if "--check" in sys.argv:
        sys.exit(text != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def filled(page: str) -> str:
    """The page with its tables written anew, each between the comments that name it."""
    for name, lines in tables().items():
        head, _, rest = page.partition(f"<!-- {name} -->\n")
        _, _, tail = rest.partition("<!-- end -->")
        page = f"{head}<!-- {name} -->\n\n" + "\n".join(lines) + f"\n\n<!-- end -->{tail}"
    return page


def tables() -> dict[str, list[str]]:
    """The lines of each table, by its name in the page."""
    rates, merges = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("scale-rates", "scale-merge"))
    return {
        "rates": list(_rates(rates)),
        "record": list(_record(rates)),
        "workers": list(_workers(rates)),
        "ranks": list(_ranks()),
        "merges": list(_merges(merges)),
    }


def _rates(measured: dict[str, Any]) -> Iterator[str]:
    yield "| format | MB/s, one thread | MB/s, two threads | 1 TB on one core |"
    yield "|---|---|---|---|"
    for row in measured["rows"]:
        one, two = row["mb_per_s"], row["mb_per_s_2"]
        yield f"| {row['format']} | {one:,.0f} | {two:,.0f} | {_time(DATA / 1e6 / one)} |"


def _workers(measured: dict[str, Any]) -> Iterator[str]:
    record = measured["merging"]["merge_s"] + measured["merging"]["note_s"]
    rates = {row["format"]: row["mb_per_s"] * 1e6 for row in measured["rows"]}
    yield "| workers (cores) | " + " | ".join(rates) + " |"
    yield "|---|" + "---|" * len(rates)
    for workers in WORKERS:
        jobs = [Job(rate, workers, record, _pieces(name)) for name, rate in rates.items()]
        yield f"| {workers:,} | " + " | ".join(f"{_time(job.seconds)} ({job.slowest})" for job in jobs) + " |"


def _record(measured: dict[str, Any]) -> Iterator[str]:
    merging, count = measured["merging"], math.ceil(DATA / CUT)
    seconds = merging["merge_s"] + merging["note_s"]
    yield (
        f"Of 50 columns, the statistics of a piece have {merging['bytes'] / 1e3:.1f} kB, and merging and noting them "
        f"takes {seconds * 1e3:.1f} ms: {_time(seconds * count)} for the {count:,} pieces of 1 TB."
    )


def _pieces(name: str) -> int:
    return math.ceil(DATA / PIECE.get(name, CUT))


def _ranks() -> Iterator[str]:
    yield "| network | channels | layers | ranks | bytes that each rank receives | time, all layers |"
    yield "|---|---|---|---|---|---|"
    for name, (channels, layers) in NETWORKS.items():
        for ranks in (4, 64, 1000):
            received = BYTES * channels * (ranks - 1)
            seconds = layers * MESSAGES * LATENCY * (ranks - 1) + received / NETWORK
            yield f"| {name} | {channels:,} | {layers} | {ranks:,} | {received / 1e6:,.1f} MB | {_time(seconds)} |"


def _merges(measured: dict[str, Any]) -> Iterator[str]:
    yield "| data | ranks | order | relative error of the variance | error of the mean in sd | ms |"
    yield "|---|---|---|---|---|---|"
    for row in measured["rows"]:
        errors = f"{row['var_error']:.1e} | {row['mean_error']:.1e}"
        yield f"| {row['data']} | {row['ranks']:,} | {row['order']} | {errors} | {row['ms']:.2f} |"


def _time(seconds: float) -> str:
    """A time in the unit that has few digits."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e3:.0f} ms"


if __name__ == "__main__":
    main()
