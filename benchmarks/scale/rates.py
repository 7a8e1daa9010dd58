"""What one core does: python benchmarks/scale/rates.py writes benchmarks/results/scale-rates.json for cost_model.py.

Files of every format are made in a temporary folder and read from the page cache: bytes of files per second with one
and with two threads, in interleaved rounds; bytes of the statistics of a piece, and the times of merging them and of
noting them in a ledger.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import save

from batchnorm import bench
from batchnorm import paired_timing as timing
from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.engines.merging import merged
from batchnorm.datasets.ledger import Ledger
from batchnorm.datasets.measurement import data_statistics
from batchnorm.datasets.measuring import measure
from batchnorm.datasets.sources import pieces
from batchnorm.experiment.environment import environment

ROUNDS, ROWS, COLUMNS, IMAGES = 5, 1_000_000, 50, 1000
RANDOM = np.random.default_rng(0)


def parquet(folder: Path) -> None:
    """One file of 50 float64 columns, compressed by zstd, in 8 row groups."""
    pq.write_table(_table(ROWS), folder / "x.parquet", compression="zstd", row_group_size=ROWS // 8)


def csv(folder: Path) -> None:
    """A tenth of the rows as text."""
    pyarrow.csv.write_csv(_table(ROWS // 10), folder / "x.csv")


def npy(folder: Path) -> None:
    """One array (rows, columns) of float32."""
    np.save(folder / "x.npy", RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32))


def embeddings(folder: Path) -> None:
    """A column of vectors of 256 float32, in Parquet."""
    values = pa.array(RANDOM.normal(size=ROWS // 5 * 256).astype(np.float32))
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(values, 256)})
    pq.write_table(table, folder / "x.parquet", compression="zstd", row_group_size=ROWS // 40)


def images(folder: Path) -> None:
    """JPEG files of 224 x 224 pixels: noise that was made smooth, which has about the size of photographs."""
    for number in range(IMAGES):
        noise = RANDOM.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC).save(
            folder / f"{number:05}.jpg", quality=90
        )


def _table(rows: int) -> pa.Table:
    return pa.table({f"c{number}": RANDOM.normal(1, 1, rows) for number in range(COLUMNS)})


KINDS: dict[str, Callable[[Path], None]] = {
    "Parquet, numbers": parquet, "Parquet, vectors": embeddings, "CSV": csv, "NumPy": npy, "JPEG": images,
}  # fmt: skip


def main() -> None:
    rows = [rate(name, make) for name, make in KINDS.items()]
    data = {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rounds": ROUNDS, "rows": rows}
    save("scale-rates", {**data, "merging": merging()})


def rate(name: str, make: Callable[[Path], None]) -> dict[str, object]:
    """Megabytes of files per second of one core, and of two."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        size = sum(each.stat().st_size for each in Path(folder).iterdir())
        seconds: dict[int, list[float]] = {1: [], 2: []}
        data_statistics(folder, workers=2)
        with timing.others() as load:
            for _ in range(ROUNDS):
                for workers, times in seconds.items():
                    start = perf_counter()
                    data_statistics(folder, workers=workers)
                    times.append(perf_counter() - start)
        one, two = (size / 1e6 / median(seconds[workers]) for workers in (1, 2))
    row = {"format": name, "mb": size / 1e6, "mb_per_s": one, "mb_per_s_2": two, **load}
    print(row, flush=True)
    return row


def merging() -> dict[str, float]:
    """For the table of 50 columns: bytes of a record, and seconds of merging, noting and reading one back."""
    with tempfile.TemporaryDirectory() as folder:
        parquet(Path(folder))
        (piece, *_) = pieces(folder)
        partial = measure(piece, Selection())
        count = 1000
        start = perf_counter()
        merged(enumerate([partial] * count))
        merge = (perf_counter() - start) / count
        path = Path(folder) / "x.bnstats.ledger"
        start = perf_counter()
        with Ledger(path, {}) as ledger:
            for _ in range(count):
                ledger.append(piece, partial)
        note = (perf_counter() - start) / count
        result = {"bytes": path.stat().st_size / count, "merge_s": merge, "note_s": note}
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
