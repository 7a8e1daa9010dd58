"""Pieces without files, for tests of engines and ledgers: their values, when they finish, and how they fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchnorm.datasets.blocks import Block, Column, Selection


@dataclass(frozen=True)
class FakePiece:
    """``rows`` examples with a column of numbers and a column of vectors.

    ``seconds`` is how long reading takes, ``error`` an exception that it raises, and ``kills`` a file: if it does not
    exist, the piece creates it and kills the process that reads it; "always" kills every process.
    """

    index: int
    rows: int = 20
    seconds: float = 0.0
    error: Exception | None = None
    kills: str = ""
    fingerprint: str = "1"

    @property
    def file(self) -> str:
        return f"/data/{self.index // 2}.parquet"  # two pieces for each file

    @property
    def key(self) -> str:
        return f"{self.file}:{self.fingerprint}:{self.index}"

    @property
    def size(self) -> int:
        return 100

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(self.index)
        return random.normal(1e6, 1, self.rows), random.normal(size=(self.rows, 3))

    def blocks(self, selection: Selection) -> Iterator[Block]:
        if self.kills and not Path(self.kills).exists():
            if self.kills != "always":
                Path(self.kills).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        x, v = self.values()
        groups = None
        if selection.by:
            groups = np.array([f"g{(self.index + i) % 3}" for i in range(self.rows)])
        for start in range(0, self.rows, 7):
            part = slice(start, start + 7)
            columns = {"x": Column(x[part]), "v": Column(v[part])}
            yield Block(len(x[part]), columns, None if groups is None else groups[part])
