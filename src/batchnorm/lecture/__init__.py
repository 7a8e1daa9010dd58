"""The lecture's claims about why batch norm works; each is tested by an experiment with criteria set beforehand."""

from __future__ import annotations

import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.experiment.claim import Claim
    from batchnorm.experiment.outcomes import ClaimOutcome
    from batchnorm.experiment.run_settings import Progress, RunSettings

# Claim -> its module, in the lecture's order. A module imports torch, so it is loaded only when its claim runs.
_MODULES = {
    "scale": "feature_ranges",
    "hidden": "hidden_units",
    "layer3": "third_layer",
    "cause": "shift_as_cause",
    "cats": "black_cats",
    "noise": "mini_batch_noise",
    "test-time": "single_examples",
    "smooth": "smoother_loss",
}
NAMES = tuple(_MODULES)


def load(name: str) -> Claim:
    """The claim called ``name``.

    Raises:
        ValueError: If there is no such claim.
    """
    if name not in NAMES:
        raise ValueError(f"claim must be one of {', '.join(NAMES)}, got {name!r}. Choose one of these.")
    return import_module(f"{__name__}.claims.{_MODULES[name]}").CLAIM


def run(name: str, settings: RunSettings, progress: Progress = lambda _: None) -> ClaimOutcome:
    """Run one claim's experiment and time it."""
    from batchnorm.experiment.outcomes import ClaimOutcome

    start = time.perf_counter()
    claim = load(name)
    with _one_thread():
        result = claim.run(settings, progress)
    return ClaimOutcome(claim, result, time.perf_counter() - start)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block that runs on one thread.

    The experiments' matrices are small, so several threads are slower than one, much slower on a busy machine. One
    thread also gives the same numbers on machines with different numbers of cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
