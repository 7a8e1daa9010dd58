"""Resumption: which layers a file of finished layers has for a measurement, the same on all ranks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from batchnorm.argument_types import require_type
from batchnorm.population.finished_layers import FinishedLayers
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.tensor_memory import digest_of
from batchnorm.population.tensor_trees import tensors_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchnorm.population.observation import Observation


def finished_before(
    view: Observation, path: str | os.PathLike[str], things: Mapping[str, tuple[str, str]], *, exact: bool
) -> FinishedLayers:
    """The finished layers in the file that the first rank reads; none if there is no file yet.

    Args:
        view: The model, its layers, its batches, and the ranks.
        path: The file.
        things: What the measurement depends on, from ``fingerprint``.
        exact: Whether layers are measured one after another.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If layers are not measured one after another, or the file belongs to another measurement.
        OSError: If the file cannot be read.
    """
    require_type(path, (str, os.PathLike), "resume must be the path of a file", "Or leave it out.")
    if not exact:
        raise ValueError(
            "recalibrate needs exact=True to be resumed, got exact=False, which measures all layers in one pass. Leave "
            "resume out."
        )
    firsts = view.pool.of_all("first batches", _digest_of_first_batch(view))
    origin = {name: " ".join(about) for name, about in things.items()}
    origin |= {f"first batch of rank {rank}": each for rank, each in zip(view.pool.ranks, firsts, strict=True)}
    finished = FinishedLayers(path, origin, writes=view.pool.part[0] == 0)
    finished.contents = view.pool.of_all("finished layers", finished.contents)[0]
    return finished


def _digest_of_first_batch(view: Observation) -> str:
    with preserve_random_state(*view.batches.generators):
        first = next(iter(view.batches), None)
    return digest_of({str(index): tensor for index, tensor in enumerate(tensors_in(first))})
