"""A peer's side of the pipe: one JSON line asks for a case or for a round, one JSON line answers.

It runs in the peer's own interpreter, so that libraries that cannot live in one process can be compared, and needs
NumPy alone. Between two lines it waits in a read: only one process computes at any time.

    -> {"prepare": {"case", "shape", "dtype", "channels_last", ...}}   <- {"means": {"y", "dx"}} or {"unsupported"}
    -> {"round": true}                                                 <- {"seconds"}
"""

from __future__ import annotations

import json
import os
import sys
import time
from math import ceil

AT_LEAST = 2e-3  # seconds of a round, as in batchnorm.paired_timing.timed


class Unsupported(Exception):  # noqa: N818 - an answer, not an error
    """The peer does not offer a case; the message says why."""


def serve(load, prepare):
    """Answer until the pipe closes. ``load() -> version`` imports the peer, ``prepare(case)`` gives (call, means)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like; the pipe is ours

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        answer(version=load())
    except (ImportError, OSError) as error:
        answer(missing=str(error).splitlines()[0])
        return
    contestant = None
    for line in sys.stdin:
        question = json.loads(line)
        if "prepare" in question:
            contestant = None  # frees the case before
            try:
                call, means = prepare(question["prepare"])
                contestant = timed(call)
                answer(means=means)
            except Unsupported as reason:
                answer(unsupported=str(reason))
            except Exception as error:  # noqa: BLE001 - whatever a peer raises is an answer, not the end of the run
                answer(unsupported=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        else:
            answer(seconds=contestant())


def timed(call):
    """As batchnorm.paired_timing.timed: a function that repeats a warmed-up call and returns the seconds of one."""

    def contestant(repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    call()
    repeats = min(ceil(AT_LEAST / max(contestant(2), 1e-9)), 1000)
    return lambda: contestant(repeats)


def arrays(case):
    """x, residual and the gradient of y as float32, in the order that they have in memory, from a fixed seed."""
    import numpy as np

    source = np.random.default_rng(0)
    drawn = [source.standard_normal(case["shape"], dtype=np.float32) * 2 + 0.5 for _ in range(3)]
    if case["channels_last"]:
        drawn = [np.ascontiguousarray(np.moveaxis(values, 1, -1)) for values in drawn]
    return drawn


def means(y, dx=None):
    """Mean absolute values, by which a coordinator sees that the right thing was computed."""
    import numpy as np

    found = {"y": y} if dx is None else {"y": y, "dx": dx}
    return {name: float(np.abs(np.asarray(values).astype(np.float64)).mean()) for name, values in found.items()}
