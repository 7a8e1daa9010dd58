"""Processes forked from one that has imported torch: a fresh interpreter spends seconds on that, each time.

The server knows torch and what shards models, and nothing of batchnorm, which each process imports for itself. A test
that is about the interpreter's start, its memory or what an import loads needs a real ``python -c``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

from torch import multiprocessing as torchs

# by name: the server has none of our folders on its path
multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", "accelerate"])


def ranks(function: Callable, arguments: tuple, world: int) -> None:
    """Call function(rank, *arguments) in ``world`` processes at once; the error of one is raised here."""
    torchs.start_processes(function, arguments, nprocs=world, start_method="forkserver")


def run(code: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """What ``python -c code arguments`` would have written and ended with; it may not take more than two minutes."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "written")
        told = (textwrap.dedent(code), list(arguments), environment or {}, str(place))
        process = context.Process(target=_execute, args=told)
        process.start()
        return _result(process, place, code)


def command(*arguments: str) -> subprocess.CompletedProcess:
    """What ``python -m batchnorm arguments`` would have written, for arguments that need torch."""
    return run(
        'import runpy, sys; sys.path.insert(0, ""); runpy.run_module("batchnorm", run_name="__main__")', *arguments
    )


_outcomes: dict[tuple[str, int], list[dict[str, list]]] = {}  # of the ranks of a world: [rank][check]


def checked(code: str, world: int, name: str) -> list[list]:
    """For each rank of a world "ok" or "failed", and what the check ``name`` said there.

    The ranks run all checks of ``code`` in one start. A rank that wrote nothing failed in the check asked first.
    """
    if (code, world) not in _outcomes:
        ranks = run_world(code, world=world)
        _outcomes[code, world] = [
            json.loads(rank.stdout) if rank.stdout else {name: ["failed", rank.stderr[-2000:]]} for rank in ranks
        ]
    return [rank[name] for rank in _outcomes[code, world]]


def run_world(code: str, *arguments: str, world: int = 2) -> list[subprocess.CompletedProcess]:
    """What each rank of torch.distributed writes, of ranks that are fresh interpreters: forked ones have hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments],
            env=os.environ | shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    ended = [rank.communicate(timeout=120) for rank in ranks]
    return [
        subprocess.CompletedProcess(code, rank.returncode, *written) for rank, written in zip(ranks, ended, strict=True)
    ]


def _execute(code: str, arguments: list[str], environment: dict[str, str], place: str) -> None:
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        with open(f"{place}.{stream.fileno()}", "wb") as file:  # noqa: PTH123 - in the process that is tested
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _result(process: multiprocessing.Process, place: Path, code: str) -> subprocess.CompletedProcess:
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
    output, errors = (Path(f"{place}.{number}").read_text(encoding="utf-8") for number in (1, 2))
    return subprocess.CompletedProcess(code, process.exitcode, output, errors)
