"""Check the engine spark with two local workers, one of which is killed: the bits must be those of threads.

pip install 'batchnorm[spark]'   # and Java 17
python benchmarks/scale/spark_stats.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from fake_pieces import FakePiece

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.engines import engine
from batchnorm.datasets.measurement import measured
from batchnorm.datasets.statistics_files import to_bytes

SELECTION = Selection(by="group")


def main() -> None:
    """Print whether the bits are equal, whether a worker was killed, the text of an error, and the seconds."""
    os.environ["PYTHONPATH"] = sys.path[0]  # Spark's workers import the pieces
    expected = to_bytes(measured([FakePiece(i) for i in range(20)], SELECTION, engine("threads")))
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "killed"
        deadly = [FakePiece(i, kills=str(mark) if i == 7 else "") for i in range(20)]
        begun = time.perf_counter()
        equal = to_bytes(measured(deadly, SELECTION, engine("spark", workers=2))) == expected
        seconds, was_killed = time.perf_counter() - begun, mark.exists()
    try:
        measured([FakePiece(0, error=ValueError("broken"))], SELECTION, engine("spark", workers=2))
        error = ""
    except ValueError as caught:
        error = str(caught)
    print(json.dumps({"equal": equal, "killed": was_killed, "error": error, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
