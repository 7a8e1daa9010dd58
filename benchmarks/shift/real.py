"""Clean worlds of real data: two tables, an electrocardiogram and a sound, as packages bring them.

An example is a row, or a window at a random place, and is drawn again and again, so that a stream has no end and no
order: its law is known, and any alarm is a false one. Networks have random weights and exact statistics.
"""

from __future__ import annotations

import io
import wave
from functools import cache
from importlib.resources import files

import numpy as np
import pywt
import torch
from sklearn import datasets
from tails import exact
from torch import Tensor, nn
from worlds import World, tones_net

_WINDOW = 64  # samples


@cache
def _wine() -> Tensor:
    return _standard(datasets.load_wine().data)


@cache
def _cancer() -> Tensor:
    return _standard(datasets.load_breast_cancer().data)


@cache
def _heart() -> Tensor:
    return _windows(np.asarray(pywt.data.ecg(), np.float64))


@cache
def _sound() -> Tensor:
    """A piece of music of 8 bits."""
    data = files("pygame").joinpath("examples", "data", "house_lo.wav").read_bytes()
    with wave.open(io.BytesIO(data)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.uint8)
    return _windows(samples.astype(np.float64))


def _standard(x: np.ndarray) -> Tensor:
    return torch.tensor((x - x.mean(0)) / x.std(0)).float()


def _windows(x: np.ndarray) -> Tensor:
    """All windows, (N, 1, 64)."""
    return torch.tensor((x - x.mean()) / x.std()).float().unfold(0, _WINDOW, 1)[:, None]


def _table_net(columns: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (columns, 32):
        layers += [nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def _drawn(rows: Tensor) -> World:
    return exact(lambda n, random: rows[torch.randint(len(rows), (n,), generator=random)], lambda: _net_for(rows))


def _net_for(rows: Tensor) -> nn.Module:
    return _table_net(rows.shape[1]) if rows.ndim == 2 else tones_net()


REAL = {
    "wine": _drawn(_wine()),
    "cancer": _drawn(_cancer()),
    "electrocardiogram": _drawn(_heart()),
    "sound": _drawn(_sound()),
}
