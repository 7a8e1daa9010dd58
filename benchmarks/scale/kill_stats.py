"""Kill ``batchnorm stats`` at random moments, and resume it: the result must be the same to the bit each time.

Each round starts the command on 60 Parquet files. It kills the command with SIGKILL when the ledger has a random share
of its length, and up to 3 ms later: at a random piece, and anywhere within it. It checks that no file is
unreadable, and runs the command again until it ends. Prints the sums over all rounds as JSON.

    python benchmarks/scale/kill_stats.py [ROUNDS]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.data_statistics import DataStatistics
from batchnorm.datasets.ledger import Ledger
from batchnorm.datasets.measurement import question

FILES, ROWS = 60, 30_000
OUTPUT, LEDGER = Path("all.bnstats.safetensors"), Path("all.bnstats.ledger")
# the same as the console script, from an interpreter that is known
COMMAND = [sys.executable, "-m", "batchnorm", "stats", "data/*.parquet", "-o", str(OUTPUT), "-q"]


def make_data() -> None:
    """60 files with three columns, one of them vectors."""
    Path("data").mkdir()
    for i in range(FILES):
        random_numbers = np.random.default_rng(i)
        vectors = pa.FixedSizeListArray.from_arrays(random_numbers.normal(size=ROWS * 16), 16)
        columns = {
            "a": random_numbers.normal(1e6, 1e-2, ROWS),
            "b": random_numbers.normal(1e9, 0.1, ROWS),
            "v": vectors,
        }
        pq.write_table(pa.table(columns), f"data/{i:02}.parquet", row_group_size=5_000)


def noted() -> int:
    """The number of pieces in the ledger, which must be readable if there is one."""
    if not LEDGER.exists():
        return 0
    with Ledger(LEDGER, question(Selection())) as ledger:
        for key in ledger.files:
            ledger[key]
        return len(ledger)


def started() -> subprocess.Popen[bytes]:
    """The running command."""
    return subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def length() -> int:
    """Bytes of the ledger; 0 if there is none."""
    try:
        return LEDGER.stat().st_size
    except FileNotFoundError:
        return 0


def killed(share: float, longest: int) -> bool:
    """Run the command and kill it when its ledger has this share of its length; False if it had ended before."""
    process = started()
    while length() < share * longest and process.poll() is None and not OUTPUT.exists():
        time.sleep(0.0002)
    time.sleep(random.uniform(0, 0.003))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def one_round(longest: int, expected: bytes) -> dict[str, int]:
    """Kill the command once, then let it end."""
    kills = int(killed(random.uniform(0, 1), longest))
    pieces = noted()
    unreadable = 0
    if OUTPUT.exists():
        try:
            DataStatistics.load(OUTPUT)
        except ValueError:
            unreadable = 1
        OUTPUT.unlink()
    subprocess.run(COMMAND, check=True, stderr=subprocess.DEVNULL)
    different = int(OUTPUT.read_bytes() != expected or LEDGER.exists())
    OUTPUT.unlink()
    return {"killed": kills, "resumed": int(pieces > 0), "unreadable": unreadable, "different": different}


def main(rounds: int) -> None:
    """Print the sums over all rounds."""
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_data()
        process, longest = started(), 0
        while process.poll() is None:
            longest = max(longest, length())
            time.sleep(0.0002)
        expected = OUTPUT.read_bytes()
        OUTPUT.unlink()
        results = [one_round(longest, expected) for _ in range(rounds)]
        os.chdir("/")
    print(json.dumps({"rounds": rounds} | {key: sum(each[key] for each in results) for key in results[0]}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100)
