"""Short runs of the lecture's claims, which several test files read, and one network out of an ensemble."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from batchnorm import lecture
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.lecture.networks import Ensemble, fully_connected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.experiment.claim import Result

QUICK = RunSettings(seeds=2, effort=0.1)
SETTINGS = {"cats": RunSettings(seed=3, seeds=2, effort=0.01), "cause": RunSettings(seeds=2, effort=0.05)}
EPS32 = torch.finfo(torch.float32).eps


class Run(NamedTuple):
    """A claim's result, and the progress that it reported on its way."""

    result: Result
    progress: tuple[float, ...]


@cache
def quick(claim: str) -> Run:
    steps: list[float] = []
    return Run(lecture.run(claim, SETTINGS.get(claim, QUICK), steps.append).result, tuple(steps))


def one_network(ensemble: Ensemble, index: int, sizes: Sequence[int]) -> nn.Module:
    net = fully_connected(sizes)
    net.load_state_dict({k: v[index].detach().clone() for k, v in {**ensemble.parameters, **ensemble.buffers}.items()})
    return net
