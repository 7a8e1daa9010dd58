"""Percentiles of one layer over time, read from the array files beside a log."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from batchnorm.live.page_data import MOST, is_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from batchnorm.record import Log
    from batchnorm.record.log_entry import JsonValue

NAMES = ("quantiles_input", "quantiles_output", "running_mean", "batch_mean", "running_var", "batch_var")
_MOST_FILES = 2 * MOST  # number of files whose contents stay in memory: 3 KB a file for 53 layers
_LARGEST_FILE = 1 << 24  # bytes; a model with a thousand layers has array files of about 60 KB


class Percentiles:
    """Reads the array files that a log names, and keeps the contents of the last 800 files that it read."""

    def __init__(self) -> None:
        self._contents: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()

    def forget(self) -> None:
        """Drop all contents, after another log has replaced this log."""
        self._contents.clear()

    def of_layer(self, log: Log, rows: list[dict[str, JsonValue]], layer: int) -> dict[str, JsonValue]:
        """The steps, and for each name a list with one entry per step: five percentiles, or None.

        Rows without a valid step are left out, and percentiles are rounded to 4 digits. None means that the file cannot
        be read or is larger than 16 MB, has no array of this name and of shape (layers, 5), or has a percentile of this
        layer that is not finite.

        Raises:
            ModuleNotFoundError: If safetensors or numpy is missing.
        """
        rows = [row for row in rows if isinstance(row, dict) and is_step(row.get("step"))]
        files = [self._load(log, row) for row in rows]
        layers = len(log.layers)
        names = {name: [_five(arrays.get(name), layer, layers) for arrays in files] for name in NAMES}
        return {"steps": [row["step"] for row in rows], "names": names}

    def _load(self, log: Log, row: Mapping[str, JsonValue]) -> dict[str, np.ndarray]:
        name = str(row.get("file"))
        if name not in self._contents:
            self._contents[name] = _read(log, row)
        while len(self._contents) > _MOST_FILES:
            self._contents.popitem(last=False)
        return self._contents[name]


def _read(log: Log, row: Mapping[str, JsonValue]) -> dict[str, np.ndarray]:
    """The arrays of the file that a row of the log names; {} if it is larger than 16 MB or cannot be read.

    The chart then has a gap.
    """
    from safetensors import SafetensorError

    path = log.folder / str(row.get("file"))
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:  # opening a pipe would block
            return {}
        return log.arrays(row)
    except (ValueError, OSError, SafetensorError):
        return {}


def _five(array: np.ndarray | None, layer: int, layers: int) -> list[float] | None:
    if array is None or array.shape != (layers, 5):
        return None
    values = [float(f"{float(value):.4g}") for value in array[layer]]
    return values if all(map(math.isfinite, values)) else None
