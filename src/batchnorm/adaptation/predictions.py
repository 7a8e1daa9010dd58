"""Predictions: how much information a model's predictions carry about its inputs, without labels.

Let p be the predicted probabilities of an example, H the entropy in nats, and a bar the mean over a window of examples:

    I = H(p-bar) - H(p)-bar

is the mutual information of example and predicted class (Bridle, Heading and MacKay 1991). It is large if each
prediction is certain and different examples get different classes. With unsuitable statistics a model predicts the same
for all inputs, or is uncertain; with statistics of a single class it assigns that class's examples to other classes
too, with uncertain predictions. In both cases most of I is lost. It is also lost in a window of few classes, whose
statistics should not be used either.
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
        total: Sum of predicted probabilities of K classes, (K,).
        doubt: Sum of the entropies of single predictions, nats.
        count: Number of examples.
    """

    total: Tensor
    doubt: float
    count: int

    @classmethod
    def of(cls, p: Tensor) -> Predictions:
        """The sums for predicted probabilities, (N, K)."""
        return cls(p.sum(0), float(_entropy(p).sum()), len(p))

    def __add__(self, other: Predictions) -> Predictions:
        k = max(len(self.total), len(other.total))  # pad with 0: classes that were not predicted yet
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
        """The mutual information I (see the module), nats."""
        return self.diversity - self.doubt_each

    @property
    def is_whole(self) -> bool:
        """Whether there are enough examples to show the mix of classes."""
        return self.count >= SHORT

    def expected(self, window: int) -> float:
        """Expected ``information`` of a window of ``window`` examples with the same mix of classes.

        Unless ``is_whole``, the mix is not known: then classes are assumed equally frequent and predictions certain,
        and the result is at least the measured information.
        """
        largest = math.log(len(self.total))
        if not self.is_whole:
            return max(_in_window(largest, window), self.information)
        return max(0.0, _in_window(self.diversity, window) - self.doubt_each)


def _in_window(entropy: float, window: int) -> float:
    """Expected entropy of the class shares in a window of draws; the classes themselves have the given entropy.

    The classes count as C = e^entropy equally likely ones. The expected entropy is lower than ``entropy`` by (C - 1) /
    (2 window) (Miller 1955). If the window is smaller than C, it is log window - (window - 1) / C log 2: a pair of
    draws of one class lowers it by 2 log 2 / window, and window (window - 1) / (2 C) such pairs are expected.
    """
    classes = math.exp(entropy)
    if classes <= window:
        return entropy - (classes - 1) / (2 * window)
    return max(0.0, math.log(window) - (window - 1) / classes * math.log(2))


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
