"""Conditional conformal test martingales as published, for many streams and scores at once.

With F the empirical distribution of n reference scores, u = F(x) of a new one, and eps = sqrt(log(2 / delta) / (2 n))
the band of Dvoretzky, Kiefer and Wolfowitz that holds the true distribution with probability 1 - delta, a bet is

    1 + (eta (u - 1/2) - sqrt(eta^2 + k^2) eps) / (1/2 + sqrt(1 + k^2) eps),

whose expectation is 1 at most for every distribution in the band under which its own distribution function has mean
1/2, as it does where there are no ties. Online Newton steps choose eta within D of 0 from earlier observations; below
C, and for the first ``WARMUP`` examples, nothing is bet. The promise: with probability 1 - delta over the reference,
the probability that a clean stream ever reaches 1 / alpha is alpha at most.

Several scores: their bets are fair given the same past, so their average is, if all bands hold: delta is divided by
their number.

Shaer, Bar, Prinster and Romano (2026), Testing for distribution shifts with conditional conformal test martingales,
ICML, arXiv 2602.13848, equation 8; constants as in the authors' runner for ImageNet-C.
"""

from __future__ import annotations

import math

import numpy as np

D, C, WARMUP, K = 0.5, 0.05, 10, 1e-6
STEP = 2 / (2 - math.log(3))


def placed(reference: np.ndarray, stream: np.ndarray, random: np.random.Generator | None = None) -> np.ndarray:
    """u of every score: (n, scores), (examples, scores) -> (examples, scores); ties broken at random if asked."""
    u = np.empty(stream.shape)
    for j in range(stream.shape[1]):
        ordered = np.sort(reference[:, j])
        u[:, j] = np.searchsorted(ordered, stream[:, j], "right")
        if random is not None:
            below = np.searchsorted(ordered, stream[:, j], "left")
            u[:, j] = below + random.random(len(stream)) * (u[:, j] - below)
    return u / len(reference)


def walked(u: np.ndarray, n: int, delta: float) -> np.ndarray:
    """Log of the martingale after every example: (examples, streams, scores) -> (examples, streams)."""
    eps = band(n, delta / u.shape[2])
    eta, steps, wealth = np.zeros(u.shape[1:]), np.ones(u.shape[1:]), np.zeros(u.shape[1:])
    found = np.empty(u.shape[:2])
    for i, now in enumerate(u):
        if i > WARMUP:
            wealth += np.log(factor(now, np.where(np.abs(eta) < C, 0.0, eta), eps))
        eta, steps = stepped(now, eta, steps, eps)
        most = wealth.max(1)
        found[i] = most + np.log(np.exp(wealth - most[:, None]).mean(1))
    return found


def band(n: int, delta: float) -> float:
    """Half-width that holds a distribution function with probability 1 - delta."""
    return math.sqrt(math.log(2 / delta) / (2 * n))


def factor(u: np.ndarray, eta: np.ndarray, eps: float) -> np.ndarray:
    """What a bet is worth."""
    return 1 + (eta * (u - 0.5) - np.sqrt(eta**2 + K**2) * eps) / (0.5 + math.sqrt(1 + K**2) * eps)


def stepped(u: np.ndarray, eta: np.ndarray, steps: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The next eta, and the sum of squared gradients that its step is divided by."""
    gradient = (u - 0.5 - eta / np.sqrt(eta**2 + K**2) * eps) / (0.5 + math.sqrt(1 + K**2) * eps)
    gradient /= factor(u, eta, eps)
    steps = steps + gradient**2
    return np.clip(eta + STEP * gradient / steps, -D, D), steps
