"""Layer evidence: combines all bets, for the model, its layers and its channels.

Testing many places costs the logarithm of their number. From a checkpoint all bets are fair given the same past, and an
average of e-processes of one past is an e-process however dependent they are (Vovk and Wang 2021): the evidence is the
average over stakes, signs and channels of a layer, over kinds of bets, and over layers.

Bets on ranks of one score are fair given this score's past only. Other scores may carry more information, and an
average of such e-processes need not be one (Choe and Ramdas 2024). Let E_j be the e-process of score j, and w_j weights
that sum to 1: equal for layers, for the kinds of a layer and for the scores of a kind. The evidence is the largest
w_j E_j. Each w_j E_j reaches 1 / alpha with probability at most alpha w_j (Ville 1939), so the probability that any of
them reaches it is at most alpha. Little evidence is lost, because one term usually dominates the sum.

For an average run length let S_j be the process of score j (``e_processes``). S_j - t cannot grow in expectation, so
S_j reaches c within t observations with probability at most t / c, and the largest w_j S_j reaches 2 arl with
probability at most t / (2 arl). The expected number of observations until then is at least the sum of 1 - t / (2 arl)
over t < 2 arl, which is arl. So the evidence is half of the largest w_j S_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from batchnorm.shift import betting, by_layer, channel_marks, conformal
from batchnorm.shift.e_processes import EProcesses
from batchnorm.shift.scores import KIND_OF

KINDS = ("mean", "energy up", "energy down", "channel energy", "components", "component means")
BETS = ("mean", "up", "down", "ranks", "marks")  # the fields of LayerEvidence that hold bets


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerEvidence:
    """E-processes of every channel and layer after ``observations`` observations.

    Args:
        layers: Names of the layers.
        sizes: Number of channels of each layer.
        mean: Bets on higher and lower means, (2, stakes, channels); mean, up and down are None if calibrated.
        up: Bets on more energy, (stakes, layers).
        down: Bets on less energy, (stakes, layers); None also if no kurtosis was declared.
        ranks: Bets on small p-values, (bets, scores); ranks and marks are None from a checkpoint alone.
        marks: Bets on higher and lower means, to name channels, (2, bets, channels).
        observations: Number of observations.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    mean: EProcesses | None = None
    up: EProcesses | None = None
    down: EProcesses | None = None
    ranks: EProcesses | None = None
    marks: EProcesses | None = None
    observations: int = 0

    @cached_property
    def log_channels(self) -> Tensor:
        """Log e-value of every channel's mean, (channels,)."""
        wealth = self.mean or self.marks
        assert wealth is not None  # noqa: S101 - one of them exists
        return wealth.log_mean

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of bets in use."""
        return KINDS if self.ranks is not None else KINDS[: 2 + (self.down is not None)]

    @cached_property
    def log_kinds(self) -> Tensor:
        """Log e-value of every layer by each kind of bet, (kinds, layers), in the order of ``kinds``."""
        if self.ranks is not None:
            return self._log_kinds_of_ranks(self.ranks)
        energies = [wealth.log_mean for wealth in (self.up, self.down) if wealth is not None]
        return torch.stack([by_layer.log_mean_exp(self.log_channels, self.sizes), *energies])

    def _log_kinds_of_ranks(self, ranks: EProcesses) -> Tensor:
        of_scores = ranks.log_mean - (0.0 if ranks.is_spread else math.log(2))
        parts = of_scores.reshape(len(KIND_OF), -1).split([KIND_OF.count(kind) for kind in KINDS])
        return torch.stack([part.amax(0) - math.log(len(part)) for part in parts])  # (kinds, layers)

    @cached_property
    def log_layers(self) -> Tensor:
        """Log e-value of every layer, (layers,)."""
        return self._joined(self.log_kinds)

    @cached_property
    def log(self) -> float:
        """Log of the evidence that any layer moved."""
        return float(self._joined(self.log_layers))

    def _joined(self, logs: Tensor) -> Tensor:
        """Combined evidence over several places: logs (places, ...) -> (...)."""
        combined = logs.logsumexp(0) if self.ranks is None else logs.amax(0)
        return combined - math.log(len(logs))

    @property
    def bets(self) -> dict[str, EProcesses]:
        """The bets in use, by their names."""
        return {name: bet for name in BETS if (bet := getattr(self, name)) is not None}


def bet_shapes(sizes: tuple[int, ...], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of bets, by their names in ``LayerEvidence``, for layers of so many channels."""
    channels, layers = sum(sizes), len(sizes)
    shapes = {
        "mean": (betting.SIDES, betting.STAKES, channels),
        "up": (betting.STAKES, layers),
        "down": (betting.STAKES, layers),
        "ranks": (conformal.BETS, len(KIND_OF) * layers),
        "marks": (2, channel_marks.BETS, channels),
    }
    return {name: shapes[name] for name in names}
