"""Other libraries' batch norm, each in a process and, if wanted, an interpreter of its own.

``BENCH_PYTHON_JAX=/a/venv/bin/python`` runs a peer there; by default it runs with this interpreter. All get the same
number of threads and an allocator that keeps large blocks, as ``batchnorm.tune_allocator`` arranges it for torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PEERS = {"jax": "JAX", "tensorflow": "TensorFlow", "onnxruntime": "ONNX Runtime", "onednn": "oneDNN"}
# batchnorm.allocator's settings, as glibc reads them when a process starts
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_MAX_": "0",
}
REST = 5e-3  # seconds that a pool of threads may still spin after an answer, before the next contestant runs


class Peer:
    """A worker process; ``version`` is None and ``missing`` says why where it cannot run here."""

    def __init__(self, name: str, threads: int, *, tuned: bool = True) -> None:
        python = os.environ.get(f"BENCH_PYTHON_{name.upper()}", sys.executable)
        count = str(threads)
        settings = {"OMP_NUM_THREADS": count, "NPROC": count, "JAX_PLATFORMS": "cpu"}
        # torch tunes by bn.tune_allocator, others by what glibc reads when a process starts
        settings |= {"BENCH_TUNED": str(int(tuned))} if name == "torch" else ALLOCATOR
        script = Path(__file__).with_name(f"{name}_peer.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | settings,
        )  # fmt: skip
        self.pid = self._process.pid
        hello = self._answer()
        self.name, self.version, self.missing = PEERS.get(name, name), hello.get("version"), hello.get("missing")

    def prepare(self, case: dict) -> dict:
        """What the peer says to a case: means of its results, or why it is unsupported."""
        return self._ask({"prepare": case})

    def round(self) -> float:
        """Seconds of one call."""
        seconds = self._ask({"round": True}).get("seconds")
        time.sleep(REST)
        if seconds is None:
            raise RuntimeError(f"{self.name} ended in the middle of a round")
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, question: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"unsupported": "its process ended"}
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"missing": "its process ended", "unsupported": "its process ended"}
