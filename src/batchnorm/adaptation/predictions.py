"""Predictions: how much information a model's predictions carry about its inputs, without labels.

With p the predicted probabilities of an example, H entropy in nats and a bar the mean over a window of examples,

    I = H(p-bar) - H(p)-bar

is the mutual information of example and predicted class (Bridle, Heading and MacKay 1991). It is large if each
prediction is certain and different examples get different classes. With unsuitable statistics a model predicts the same
for all inputs, or is uncertain; with statistics of a single class it spreads that class over others, uncertainly. Both
lose most of I, and so does a window of few classes, whose statistics should not be used either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

SHORT = 256  # examples needed before their mix of classes counts as complete


@final
@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Sums over the predictions of some examples; ``+`` adds them.

    Args:
        total: Sum of predicted probabilities, (K,).
        doubt: Sum of the entropies of single predictions, nats.
        count: Examples.
    """

    total: Tensor
    doubt: float
    count: int

    @classmethod
    def of(cls, p: Tensor) -> Predictions:
        """The sums for predicted probabilities, (N, K)."""
        return cls(p.sum(0), float(_entropy(p).sum()), len(p))

    def __add__(self, other: Predictions) -> Predictions:
        k = max(len(self.total), len(other.total))  # pads classes not predicted yet
        a, b = (torch.nn.functional.pad(each.total, (0, k - len(each.total))) for each in (self, other))
        return Predictions(a + b, self.doubt + other.doubt, self.count + other.count)

    @property
    def diversity(self) -> float:
        """Entropy of the mix of predicted classes, nats."""
        return float(_entropy(self.total / max(1, self.count)))

    @property
    def top_share(self) -> float:
        """Share of the most frequent class."""
        return float(self.total.max()) / max(1, self.count)

    @property
    def doubt_each(self) -> float:
        """Mean entropy of a prediction, nats."""
        return self.doubt / max(1, self.count)

    @property
    def information(self) -> float:
        """I, nats."""
        return self.diversity - self.doubt_each

    @property
    def is_whole(self) -> bool:
        """Whether there are enough to show the mix of classes."""
        return self.count >= SHORT

    def expected(self, window: int) -> float:
        """Expected ``information`` of ``window`` examples drawn like these.

        If these are too few to show every class, or none, all classes are assumed equally frequent.
        """
        whole = math.log(len(self.total))
        if not self.is_whole:
            return max(_in_window(whole, window), self.information)
        return max(0.0, _in_window(self.diversity, window) - self.doubt_each)


def _in_window(entropy: float, window: int) -> float:
    """Mean entropy of the mix in a window of draws from classes with the given entropy.

    With e^entropy equally likely classes the mean is lower by (classes - 1) / (2 window) (Miller 1955). If the window
    is smaller than the number of classes, it is log window minus log 2 for each pair of equal classes.
    """
    classes = math.exp(entropy)
    if classes <= window:
        return entropy - (classes - 1) / (2 * window)
    return max(0.0, math.log(window) - (window - 1) / classes * math.log(2))


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
