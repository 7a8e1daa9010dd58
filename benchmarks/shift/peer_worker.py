"""Runs in a peer's own Python: python peer_worker.py NAME FOLDER reads reference.npy and streams-*.npy, prints JSON.

Each detector sees windows of 64 feature vectors one after another, as its documentation shows, and may ring at each:
batch detectors are asked at every window, online ones are fed one example at a time. For each stream: examples until it
rang, or null.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import warnings
from pathlib import Path

import numpy as np

WINDOW = 64
ALPHA = 0.01
# Expected run time that alibi-detect's online detectors are asked for: 1,472 examples are 0.147 of it, so at most
# 1 - exp(-0.147) = 14 % of clean streams should ring.
ERT = 10_000
# CVM takes the quantile 1 - 1 / (32 features x ERT) of its bootstraps 64 times over and drops what exceeds it: fewer
# than these its own check refuses.
CVM_BOOTSTRAPS = 320_111
MMD_BOOTSTRAPS = 30_000  # its check refuses fewer than 10,125; minutes at most
# Rings at none of 99, which is a level of 1 %; of 100, one would do too, as 1/100 in float32 is under 0.01: nearly 2 %.
PERMUTATIONS = 99


def main() -> None:
    warnings.simplefilter("ignore")
    np.random.seed(0)  # alibi-detect draws from this one and from torch's
    name, folder = sys.argv[1], Path(sys.argv[2])
    reference = np.load(folder / "reference.npy").astype(np.float32)
    with contextlib.redirect_stdout(sys.stderr):
        ring = DETECTORS[name](reference)
        found = {
            path.stem.removeprefix("streams-"): [ring(s) for s in np.load(path).astype(np.float32)]
            for path in sorted(folder.glob("streams-*.npy"))
        }
    print(json.dumps(found))


def by_windows(rings):
    """Ask a batch detector at every window."""

    def ring(stream):
        for start in range(0, len(stream) - WINDOW + 1, WINDOW):
            if rings(stream[start : start + WINDOW]):
                return start + WINDOW
        return None

    return ring


def by_examples(detector):
    """Feed an online detector of alibi-detect one example after another."""

    def ring(stream):
        detector.reset_state()
        for i, x in enumerate(stream, start=1):
            if detector.predict(x)["data"]["is_drift"]:
                return i
        return None

    return ring


def alibi_ks(reference):
    from alibi_detect.cd import KSDrift

    detector = KSDrift(reference, p_val=ALPHA, correction="bonferroni")
    return by_windows(lambda window: bool(detector.predict(window)["data"]["is_drift"]))


def alibi_mmd(reference):
    import torch
    from alibi_detect.cd import MMDDrift

    torch.manual_seed(0)
    detector = MMDDrift(reference, backend="pytorch", p_val=ALPHA, n_permutations=PERMUTATIONS)
    return by_windows(lambda window: bool(detector.predict(window)["data"]["is_drift"]))


def alibi_cvm_online(reference):
    from alibi_detect.cd import CVMDriftOnline

    detector = CVMDriftOnline(reference, ert=ERT, window_sizes=[WINDOW], n_bootstraps=CVM_BOOTSTRAPS, verbose=False)
    return by_examples(detector)


def alibi_mmd_online(reference):
    import torch
    from alibi_detect.cd import MMDDriftOnline

    torch.manual_seed(0)
    if sys.platform == "linux":
        # Its bootstraps keep a little of each large tensor's place; glibc's heap grew past 20 GB around them. -3 is
        # M_MMAP_THRESHOLD: large tensors apart from the heap.
        ctypes.CDLL(None).mallopt(-3, 1 << 15)
    detector = MMDDriftOnline(
        reference, ert=ERT, window_size=WINDOW, backend="pytorch", n_bootstraps=MMD_BOOTSTRAPS, verbose=False
    )
    return by_examples(detector)


def torchdrift_ks(reference):
    import torch
    import torchdrift

    detector = torchdrift.detectors.KSDriftDetector()
    detector.fit(torch.from_numpy(reference))
    return by_windows(lambda window: float(detector.compute_p_value(torch.from_numpy(window))) < ALPHA)


def frouros_ks(reference):
    from frouros.detectors.data_drift import KSTest

    detectors = []
    for column in reference.T:
        detector = KSTest()
        detector.fit(X=column)
        detectors.append(detector)
    # univariate: Bonferroni over features, which its users have to do by themselves
    limit = ALPHA / len(detectors)
    return by_windows(
        lambda window: any(d.compare(X=c)[0].p_value < limit for d, c in zip(detectors, window.T, strict=True))
    )


DETECTORS = {
    "alibi-detect KS": alibi_ks,
    "alibi-detect MMD": alibi_mmd,
    "alibi-detect CVM online": alibi_cvm_online,
    "alibi-detect MMD online": alibi_mmd_online,
    "torchdrift KS": torchdrift_ks,
    "frouros KS": frouros_ks,
}

if __name__ == "__main__":
    main()
