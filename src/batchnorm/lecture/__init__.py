"""The lecture's claims about why batch norm works, each as an experiment with a pre-set criterion."""

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

# In the lecture's order, with the module of each, which imports torch, and so is loaded when the claim runs.
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
        raise ValueError(f"claim must be one of {', '.join(NAMES)}, got {name!r}.")
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
    """The experiments' matrices are small: handing them between threads costs more than it saves, far more on a busy
    machine, and one thread gives the same numbers on every machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
