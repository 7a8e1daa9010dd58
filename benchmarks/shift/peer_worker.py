"""Runs in a peer's own Python: python peer_worker.py NAME FOLDER SIZE [--times] reads WORLD.npz, prints JSON.

Each detector sees 64 examples one after another, as its documentation shows, and may ring at each: batch detectors are
asked once for 64, sequential ones at every example. A world has indices of streams into its observations; for each
stream: examples until it rang, or null. With --times it is fed 64 examples whenever a line comes, and prints the
seconds.

What a detector is given ("features", the means of the last batch norm layer's channels, or "entropy", that of the
network's prediction) is told by the table at the end. Those whose theory is about numbers with a known law or mean get
conformal p-values: the rank among the reference and all that came since, ties broken at random (``Ranks``).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
import warnings
from bisect import bisect_left, bisect_right, insort
from pathlib import Path

import numpy as np

WINDOW = 64
ALPHA = 0.01
# Expected run time that alibi-detect's online detectors are asked for: 2,000 examples are 0.2 of it, so at most
# 1 - exp(-0.2) = 18 % of clean streams should ring.
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
    name, folder, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with contextlib.redirect_stdout(sys.stderr):
        if "--times" not in sys.argv:
            found = {path.stem: of_world(name, np.load(path), size) for path in sorted(folder.glob("*.npz"))}
    if "--times" in sys.argv:
        timed(name, np.load(next(folder.glob("*.npz"))), size)
    else:
        print(json.dumps(found))


def of_world(name, world, size):
    """Times of all streams of a world, by "clean" and its shifts."""
    make, given, is_slow = DETECTORS[name]
    pools = {of.split(".", 1)[1]: world[of].astype(np.float64) for of in world.files if of.startswith(f"{given}.")}
    clean = pools["clean"].reshape(len(pools["clean"]), -1)
    shared = make(clean[world["calibration"][0, :size]]) if is_slow else None
    found = {of: [] for of in pools}
    for i, at in enumerate(world["clean"]):
        reference = clean[world["calibration"][i, :size]]
        found["clean"].append(rang(shared or make(reference), clean[at]))
    for shift in pools.keys() - {"clean"}:
        shifted = pools[shift].reshape(len(pools[shift]), -1)
        for i, at in enumerate(world["shifted"]):
            reference = clean[world["calibration"][i, :size]]
            stream = np.concatenate([clean[world["clean"][i, : world["before"]]], shifted[at]])
            found[shift].append(rang(shared or make(reference), stream))
    return found


def rang(detector, stream):
    """Examples until it rang, or None."""
    detector.reset()
    for start in range(0, len(stream), WINDOW):
        at = detector.see(stream[start : start + WINDOW])
        if at is not None:
            return start + at
    return None


def timed(name, world, size):
    """Seconds of 64 examples, for each line that comes."""
    make, given, _ = DETECTORS[name]
    clean = world[f"{given}.clean"].astype(np.float64).reshape(len(world[f"{given}.clean"]), -1)
    with contextlib.redirect_stdout(sys.stderr):
        detector = make(clean[world["calibration"][0, :size]])
        detector.reset()
    for i, _ in enumerate(sys.stdin):
        block = clean[world["clean"][i + 1, :WINDOW]]
        start = time.perf_counter()
        detector.see(block)
        print(time.perf_counter() - start, flush=True)


class Windows:
    """A batch detector, asked at every window."""

    def __init__(self, rings):
        self.rings = rings

    def reset(self):
        """It keeps nothing."""

    def see(self, block):
        """Where it rang in the block, or None."""
        return WINDOW if len(block) == WINDOW and self.rings(block) else None


class Online:
    """An online detector of alibi-detect."""

    def __init__(self, detector):
        self.detector = detector

    def reset(self):
        """Forget what came."""
        self.detector.reset_state()

    def see(self, block):
        """Where it rang in the block, or None."""
        for i, x in enumerate(block.astype(np.float32), start=1):
            if self.detector.predict(x)["data"]["is_drift"]:
                return i
        return None


class Sequential:
    """A sequential test for each number that is observed, each at alpha over their number."""

    def __init__(self, start, reference, ranks=True):
        self.start, self.reference, self.ranks = start, reference, ranks

    def reset(self):
        """Begin anew."""
        self.tests = self.start(self.reference)
        self.bags = Ranks(self.reference) if self.ranks else None

    def see(self, block):
        """Where it rang in the block, or None."""
        return self.tests(block if self.bags is None else self.bags.of(block))


class Ranks:
    """Conformal p-values of each column among a bag that grows."""

    def __init__(self, reference):
        self.bags = [sorted(column) for column in reference.T.tolist()]
        self.random = np.random.default_rng(1)

    def of(self, block):
        """p-values of rows, one after another: (n, columns) each."""
        at = self.random.random(block.shape)
        rows = zip(block.tolist(), at, strict=True)
        return np.array([[self.one(*of) for of in zip(self.bags, x, t, strict=True)] for x, t in rows])

    @staticmethod
    def one(bag, x, t):
        """The rank of one value from above, over the number of values, itself among them."""
        low, high = bisect_left(bag, x), bisect_right(bag, x)
        p = (len(bag) - high + t * (high - low + 1)) / (len(bag) + 1)
        insort(bag, x)
        return p


def first(rings):
    """The first example at which any test rang, counted from 1, or None: (examples,) of bool."""
    return int(np.argmax(rings)) + 1 if np.any(rings) else None


def alibi_ks(reference):
    from alibi_detect.cd import KSDrift

    detector = KSDrift(reference.astype(np.float32), p_val=ALPHA, correction="bonferroni")
    return Windows(lambda window: bool(detector.predict(window.astype(np.float32))["data"]["is_drift"]))


def alibi_mmd(reference):
    import torch
    from alibi_detect.cd import MMDDrift

    torch.manual_seed(0)
    detector = MMDDrift(reference.astype(np.float32), backend="pytorch", p_val=ALPHA, n_permutations=PERMUTATIONS)
    return Windows(lambda window: bool(detector.predict(window.astype(np.float32))["data"]["is_drift"]))


def alibi_cvm_online(reference):
    from alibi_detect.cd import CVMDriftOnline

    bootstraps = CVM_BOOTSTRAPS * reference.shape[1] // 32 + 1
    return Online(
        CVMDriftOnline(
            reference.astype(np.float32), ert=ERT, window_sizes=[WINDOW], n_bootstraps=bootstraps, verbose=False
        )
    )


def alibi_mmd_online(reference):
    import torch
    from alibi_detect.cd import MMDDriftOnline

    torch.manual_seed(0)
    if sys.platform == "linux":
        # Its bootstraps keep a little of each large tensor's place; glibc's heap grew past 20 GB around them. -3 is
        # M_MMAP_THRESHOLD: large tensors apart from the heap.
        ctypes.CDLL(None).mallopt(-3, 1 << 15)
    return Online(
        MMDDriftOnline(
            reference.astype(np.float32),
            ert=ERT,
            window_size=WINDOW,
            backend="pytorch",
            n_bootstraps=MMD_BOOTSTRAPS,
            verbose=False,
        )
    )


def torchdrift_ks(reference):
    import torch
    import torchdrift

    detector = torchdrift.detectors.KSDriftDetector()
    detector.fit(torch.from_numpy(reference.astype(np.float32)))
    return Windows(lambda window: float(detector.compute_p_value(torch.from_numpy(window.astype(np.float32)))) < ALPHA)


def frouros_ks(reference):
    from frouros.detectors.data_drift import KSTest

    detectors = []
    for column in reference.T:
        detector = KSTest()
        detector.fit(X=column)
        detectors.append(detector)
    # univariate: Bonferroni over features, which its users have to do by themselves
    limit = ALPHA / len(detectors)
    return Windows(
        lambda window: any(d.compare(X=c)[0].p_value < limit for d, c in zip(detectors, window.T, strict=True))
    )


def online_cp_jumper(reference):
    from online_cp.martingale import SimpleJumper, VilleWrapper

    def start(known):
        tests = [VilleWrapper(SimpleJumper(), threshold=known.shape[1] / ALPHA) for _ in known.T]

        def see(p):
            for i, row in enumerate(p, start=1):
                for test, one in zip(tests, row, strict=True):
                    test.update(float(one))
                if any(test.rejected for test in tests):
                    return i
            return None

        return see

    return Sequential(start, reference)


def ville_betting(reference):
    import ville

    return Sequential(
        lambda known: by_ville([ville.BettingTest(0.5, alpha=ALPHA / known.shape[1]) for _ in known.T]), reference
    )


def ville_msprt(reference):
    import ville

    def start(known):
        of = zip(known.mean(0), known.std(0, ddof=1), strict=True)
        return by_ville([ville.MSPRT(mean, max(sd, 1e-12), alpha=ALPHA / known.shape[1]) for mean, sd in of])

    return Sequential(start, reference, ranks=False)


def by_ville(tests):
    """Feed a test of ville's for each column; e-values of all that came are kept by it."""

    def see(block):
        rings = np.zeros(len(block), dtype=bool)
        for test, column in zip(tests, block.T, strict=True):
            test.update(column)
            rings |= np.asarray(test.log_e_values_[-len(block) :]) >= -np.log(test.alpha)
        return first(rings)

    return see


def expectation_ranks(reference):
    return Sequential(lambda known: by_expectation(known.shape[1], 0.5, 1 / 12), reference)


def expectation_mean(reference):
    return Sequential(
        lambda known: by_expectation(known.shape[1], known.mean(0), known.var(0, ddof=1).clip(1e-12)),
        reference,
        ranks=False,
    )


def by_expectation(count, means, variances):
    """The parallel engine: one test of a mean for each column."""
    from expectation.par_seqtest import ParallelSequentialTest, ParallelTestConfig

    mode = "known_homogeneous" if np.ndim(variances) == 0 else "known_heterogeneous"
    config = ParallelTestConfig(n_tests=count, alpha=ALPHA / count, variance_mode=mode)
    engine = ParallelSequentialTest(config=config, null_values=means, variance=variances)

    def see(block):
        for i, row in enumerate(block, start=1):
            if engine.step(np.ascontiguousarray(row)).n_rejected:
                return i
        return None

    return see


# by name: the detector, what it is given, and whether it takes minutes to start, so that a world's streams share one
DETECTORS = {
    "online-cp SimpleJumper": (online_cp_jumper, "entropy", False),
    "ville BettingTest on p-values": (ville_betting, "features", False),
    "ville MSPRT": (ville_msprt, "features", False),
    "expectation on p-values": (expectation_ranks, "features", False),
    "expectation": (expectation_mean, "features", False),
    "alibi-detect KS": (alibi_ks, "features", False),
    "alibi-detect MMD": (alibi_mmd, "features", False),
    "alibi-detect CVM online": (alibi_cvm_online, "features", True),
    "alibi-detect MMD online": (alibi_mmd_online, "features", True),
    "torchdrift KS": (torchdrift_ks, "features", False),
    "frouros KS": (frouros_ks, "features", False),
}

if __name__ == "__main__":
    main()
