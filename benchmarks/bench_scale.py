"""Statistics of data sets beside other engines: python benchmarks/bench_scale.py [--quick] [--rounds N].

Each engine reads the same files in a process of its own, once a round, engines in turn. Time is that of the fit alone:
imports and the start of an engine are left out, and stored beside it as start_s. Peak memory is that of the process
(not of Ray's workers), and how far it grows over the imports. cpu is the time of processors in the process: it says
more than the clock if other programs use the machine. Errors are those of the variance of two columns far from zero,
against a two-pass sum in 80 bits. Written to benchmarks/results/scale.json. All files are made in a temporary folder,
which needs 6 GB.

    table       1,000,000 rows of 50 float64 columns, zstd Parquet; A is N(1e6, 1e-2), B is N(1e9, 0.1)
    table x 10  ten such files: memory must not grow with the data
    vectors     200,000 vectors of 256 float32, Parquet
    images      5,000 JPEGs of 128 x 128
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

MB = 1 << 20
Numbers = tuple[Any, Any]  # mean and biased variance of each feature that is compared


# ---- the data


def make_table(path: Path, rows: int) -> dict[str, float]:
    """Write the table; the 80-bit variances of A and B."""
    import pyarrow as pa
    from pyarrow import parquet

    random = np.random.default_rng(0)
    columns = {f"c{i}": random.normal(i, 1 + i, rows) for i in range(48)}
    columns |= {"A": random.normal(1e6, 1e-2, rows), "B": random.normal(1e9, 0.1, rows)}
    parquet.write_table(pa.table(columns), path, compression="zstd", row_group_size=131_072)
    return {name: _variance(columns[name]) for name in "AB"}


def _variance(values: np.ndarray) -> float:
    wide = values.astype(np.longdouble)
    return float(((wide - wide.mean()) ** 2).mean())


def make_vectors(path: Path, rows: int) -> dict[str, float]:
    """Write the vectors, far from zero; the 80-bit variance of the first place."""
    import pyarrow as pa
    from pyarrow import parquet

    values = np.random.default_rng(1).normal(100, 1, (rows, 256)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 256)
    parquet.write_table(pa.table({"v": column}), path, compression="zstd", row_group_size=32_768)
    return {"v": _variance(values[:, 0])}


def make_images(folder: Path, number: int) -> dict[str, float]:
    """Write smooth random images; the variance of the decoded first channel."""
    from PIL import Image

    folder.mkdir()
    random, channel = np.random.default_rng(2), []
    for i in range(number):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)
        channel.append(np.asarray(Image.open(folder / f"{i:05}.jpg"))[..., 0].ravel())
    return {"image": _variance(np.concatenate(channel)) / 255**2}


# ---- the engines: each imports what it needs, and returns its fit


def ours(path: str) -> Callable[[], dict[str, float]]:
    from batchnorm.datasets.measurement import data_statistics

    data_statistics(_small(), workers=1)  # imports pyarrow, Pillow and fsspec

    def fit() -> dict[str, float]:
        found = data_statistics(path.split("|") if "|" in path else path)
        return {name: float(column.var.ravel()[0]) for name, column in found.columns.items()}

    return fit


def _small() -> str:
    """A small Parquet file, whose reading imports what a reader imports."""
    import pyarrow as pa
    from pyarrow import parquet

    path = Path(tempfile.mkdtemp()) / "small.parquet"
    parquet.write_table(pa.table({"x": [1.0, 2.0]}), path)
    return str(path)


def polars(path: str, *, same_numbers: bool = False) -> Callable[[], dict[str, float]]:
    import polars as pl

    every = pl.all().cast(pl.Float64)
    made = [every.mean().name.suffix(":mean"), every.var(ddof=0)]
    if same_numbers:
        made += [every.min().name.suffix(":min"), every.max().name.suffix(":max")]
        made += [every.is_nan().sum().name.suffix(":nan"), every.is_infinite().sum().name.suffix(":infinite")]
        made += [every.null_count().name.suffix(":null"), every.count().name.suffix(":count")]

    def fit() -> dict[str, float]:
        frame = pl.scan_parquet(path)
        if frame.collect_schema().get("v") is not None:
            frame = frame.select(pl.col("v").arr.to_struct(fields=["v", *(f"v{i}" for i in range(1, 256))])).unnest("v")
        row = frame.select(made).collect(engine="streaming").row(0, named=True)
        return {name: value for name, value in row.items() if ":" not in name}

    return fit


def polars_same(path: str) -> Callable[[], dict[str, float]]:
    return polars(path, same_numbers=True)


def duckdb(path: str) -> Callable[[], dict[str, float]]:
    import duckdb as db

    def fit() -> dict[str, float]:
        found = db.sql(f"SELECT avg(COLUMNS(*)), var_pop(COLUMNS(*)) FROM '{path}'")
        (values,) = found.fetchall()
        names = [column[0] for column in db.sql(f"SELECT * FROM '{path}' LIMIT 0").description]
        return dict(zip(names, values[len(names) :], strict=True))

    return fit


def scikit_learn(path: str) -> Callable[[], dict[str, float]]:
    from pyarrow import parquet
    from sklearn.preprocessing import StandardScaler

    def fit() -> dict[str, float]:
        scaler, file = StandardScaler(), parquet.ParquetFile(path)
        for batch in file.iter_batches(65_536):
            scaler.partial_fit(np.stack([column.to_numpy() for column in batch.columns], 1))
        return dict(zip(file.schema_arrow.names, scaler.var_.tolist(), strict=True))

    return fit


def dask(path: str) -> Callable[[], dict[str, float]]:
    import dask
    import dask.dataframe as dd

    def fit() -> dict[str, float]:
        frame = dd.read_parquet(path, split_row_groups=True)
        _, variance = dask.compute(frame.mean(), frame.var(ddof=0))
        return variance.to_dict()

    return fit


def ray(path: str) -> Callable[[], dict[str, float]]:
    import ray as ray_
    from ray.data.preprocessors import StandardScaler

    ray_.init(include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level="error")
    ray_.data.DataContext.get_current().enable_progress_bars = False

    def fit() -> dict[str, float]:
        frame = ray_.data.read_parquet(path)
        names = frame.schema().names
        found = StandardScaler(names).fit(frame).stats_
        return {name: found[f"std({name})"] ** 2 for name in names}

    return fit


def pillow(path: str) -> Callable[[], dict[str, float]]:
    from PIL import Image

    def fit() -> dict[str, float]:
        total = squares = count = 0.0
        for file in sorted(Path(path).iterdir()):
            values = np.asarray(Image.open(file)).reshape(-1, 3) / 255
            total, squares, count = total + values.sum(0), squares + (values**2).sum(0), count + len(values)
        return {"image": float((squares / count - (total / count) ** 2)[0])}

    return fit


ENGINES = {
    "ours": ours, "Polars": polars, "Polars, all numbers": polars_same, "DuckDB": duckdb, "scikit-learn": scikit_learn,
    "Dask": dask, "Ray StandardScaler": ray, "Pillow and NumPy": pillow,
}  # fmt: skip
VERSIONS = ("batchnorm", "numpy", "pyarrow", "polars", "duckdb", "scikit-learn", "dask", "ray", "pillow")
ONCE = {"Ray StandardScaler"}  # a minute each


# ---- the measurement


def one(engine: str, path: str) -> None:
    """Run one fit and print what it took: the body of a process."""
    start = time.perf_counter()
    fit = ENGINES[engine](path)
    ready, busy, before = time.perf_counter(), time.process_time(), _peak()
    variances = fit()
    seconds = time.perf_counter() - ready
    found = {name: variances[name] for name in ("A", "B", "v", "image") if name in variances}
    told = {"seconds": seconds, "cpu_s": time.process_time() - busy, "start_s": ready - start, "peak_mb": _peak()}
    print(json.dumps({**told, "grown_mb": _peak() - before, "variances": found}))


def _peak() -> float:
    """The largest resident memory of this process in MB. getrusage's would include that of the parent before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / MB


def measured(engine: str, path: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", engine, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def case(name: str, path: str, engines: list[str], right: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """The rows of one case: medians over rounds in which the engines take turns."""
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for turn in range(rounds):
        for engine in engines:
            if not (turn and engine in ONCE):
                runs[engine].append(measured(engine, path))
    rows = [_row(name, engine, found, right) for engine, found in runs.items()]
    base = next(row for row in rows if row["engine"] == "ours")
    for row in rows:
        pairs = zip(runs["ours"], runs[row["engine"]], strict=False)
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs if "seconds" in a and "seconds" in b]
        row["ours_to_this"] = statistics.median(ratios) if ratios else None
        _tell(row, base)
    return rows


def _row(name: str, engine: str, found: list[dict[str, Any]], right: dict[str, float]) -> dict[str, Any]:
    good = [run for run in found if "seconds" in run]
    if not good:
        return {"case": name, "engine": engine, "failed": found[0]["failed"]}
    middle = {
        key: statistics.median(run[key] for run in good)
        for key in ("seconds", "cpu_s", "start_s", "peak_mb", "grown_mb")
    }
    errors = {
        key: abs(good[0]["variances"][key] / value - 1) for key, value in right.items() if key in good[0]["variances"]
    }
    return {
        "case": name,
        "engine": engine,
        "rounds": len(good),
        **middle,
        "all_s": [r["seconds"] for r in good],
        "errors": errors,
    }


def _tell(row: dict[str, Any], base: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['case']:<11} {row['engine']:<20} FAILED {row['failed']}", flush=True)
        return
    errors = " ".join(f"{key} {value:.0e}" for key, value in row["errors"].items())
    ratio = "" if row is base or row["ours_to_this"] is None else f"  ours takes {row['ours_to_this']:.2f} x its time"
    took = f"{row['seconds']:7.2f} s (cpu {row['cpu_s']:.2f})"
    memory = f"{row['peak_mb']:6.0f} MB (+{row['grown_mb']:.0f})"
    print(f"{row['case']:<11} {row['engine']:<20} {took} {memory}  {errors}{ratio}", flush=True)


def main() -> None:
    is_quick = "--quick" in sys.argv
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 1 if is_quick else 5
    part = 10 if is_quick else 1
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        table, vectors, images = place / "table.parquet", place / "vectors.parquet", place / "images"
        right = make_table(table, 1_000_000 // part)
        of_vectors, of_images = make_vectors(vectors, 200_000 // part), make_images(images, 5000 // part)
        everyone = ["ours", "Polars", "Polars, all numbers", "DuckDB", "scikit-learn", "Dask", "Ray StandardScaler"]
        rows = case("table", str(table), everyone, right, rounds)
        more = [place / f"table{i}.parquet" for i in range(10)]
        for copy in more:
            shutil.copyfile(table, copy)
        rows += case("table x 10", "|".join(map(str, more)), ["ours"], right, 1)
        rows += case("vectors", str(vectors), ["ours", "Polars"], of_vectors, rounds)
        rows += case("images", str(images), ["ours", "Pillow and NumPy"], of_images, min(rounds, 2))
    save(rows, load, is_quick=is_quick)


def save(rows: list[dict[str, Any]], load: tuple[float, float, float], *, is_quick: bool) -> None:
    import report

    from batchnorm import bench
    from batchnorm.experiment.environment import environment

    busy = {"load_before": load, "load_after": os.getloadavg(), "processors": os.cpu_count()}
    if busy["load_before"][1] > 1 or busy["load_after"][1] > 2 * (os.cpu_count() or 1):
        busy["note"] = "Other programs used this machine: repeat the command when it is quieter."
        print(busy["note"])
    versions = {name: version(name) for name in VERSIONS}
    data = {
        "schema_version": bench.SCHEMA_VERSION,
        "environment": environment(),
        "versions": versions,
        "load": busy,
        "rows": rows,
    }
    report.save("scale-quick" if is_quick else "scale", data)


if __name__ == "__main__":
    if "--one" in sys.argv:
        one(*sys.argv[sys.argv.index("--one") + 1 :])
    else:
        main()
