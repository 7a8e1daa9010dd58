"""The lecture's data: three tables from scikit-learn, and silhouettes of cats and dogs.

Wine: 178 x 13, 3 cultivars (Forina et al. 1988). Breast cancer: 569 x 30, 2 diagnoses (Street et al. 1993). Digits:
1797 x 64 pixels of 0..16, 10 digits (Alpaydin and Kaynak 1998). Cats: 1989 silhouettes of 28 x 28, see cats.LICENSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

_LOADERS = {"wine": datasets.load_wine, "cancer": datasets.load_breast_cancer, "digits": datasets.load_digits}


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Inputs and their classes; an index selects examples.

    Args:
        x: Inputs, (N, ...), float32.
        y: Classes, (N,), int64.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Examples:
        return Examples(self.x[index], self.y[index])


@cache
def table(name: str) -> Examples:
    """All examples of "wine", "cancer" or "digits", with unchanged features."""
    x, y = _LOADERS[name](return_X_y=True)
    return Examples(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


@cache
def cats() -> Examples:
    """All silhouettes: x, (N, 28, 28), is 1 on the shape and 0 on the ground; y, (N,), is 0 for a cat, 1 for a dog."""
    with files("batchnorm.lecture").joinpath("cats.npz").open("rb") as file, np.load(file) as stored:
        return Examples(torch.tensor(stored["images"]).float() / 255, torch.tensor(stored["is_dog"]).long())


def split(count: int, train: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of ``train`` random examples of ``count`` examples, and indices of the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:train], order[train:]


def batch_indices(pool: Tensor, batch: int, steps: int, seed: int) -> Tensor:
    """Indices of the mini-batches of a training run, (steps, batch), with a new random order in each epoch.

    A batch has no example twice. An incomplete batch at the end of an epoch is dropped, as with drop_last=True.
    """
    if batch > len(pool):
        raise ValueError(
            f"a batch must not exceed the {len(pool)} training examples, got {batch}. Use a smaller batch."
        )
    random = torch.Generator().manual_seed(seed)
    per_epoch = len(pool) // batch
    epochs = -(-steps // per_epoch)
    orders = [torch.randperm(len(pool), generator=random)[: per_epoch * batch] for _ in range(epochs)]
    return pool[torch.cat(orders)[: steps * batch].view(steps, batch)]
