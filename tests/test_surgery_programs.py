"""Whatever a forward does with layers, activations and sums, a fused one does too: random programs."""

from __future__ import annotations

import operator
import warnings
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from surgery_checks import acts, assert_same, measured
from torch import nn

from batchnorm.surgery import convert, revert

# each takes two values; those that write are given one that a program may use again
OPERATIONS = {
    **{f"bn{i}": lambda self, a, b, i=i: self.layers[i](a) for i in range(5)},
    "linear": lambda self, a, b: self.linear(a),
    "inner": lambda self, a, b: self.inner(a),
    "relu module": lambda self, a, b: self.relu(a),
    "elu module": lambda self, a, b: self.elu(a),
    "relu": lambda self, a, b: F.relu(a),
    "relu_": lambda self, a, b: a.relu_(),
    "leaky": lambda self, a, b: F.leaky_relu(a, 0.1),
    "silu": lambda self, a, b: F.silu(a),
    "+": lambda self, a, b: a + b,
    "+=": lambda self, a, b: operator.iadd(a, b),
    "add alpha": lambda self, a, b: torch.add(a, b, alpha=2),
    "view": lambda self, a, b: a.view(-1, 3),
    "*= in train": lambda self, a, b: operator.imul(a, 2) if self.training else a * 1,
}
STEPS = st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(1, 4), st.integers(1, 4))
# a layer, perhaps a sum, and an activation, as code has them
MOTIF = st.tuples(
    st.sampled_from(["bn0", "bn1", "bn2", "bn3", "bn4", "inner"]),
    st.sampled_from(["", "+", "+=", "linear"]),
    st.sampled_from(["relu module", "elu module", "relu_", "leaky", "silu", "view"]),
    st.integers(1, 3),
    st.integers(1, 4),
).map(lambda m: [(m[0], m[3], 1), *([(m[1], 1, m[4])] if m[1] else []), (m[2], 1, 1)])
PROGRAMS = st.lists(MOTIF | STEPS.map(lambda step: [step]), min_size=1, max_size=5).map(lambda parts: [*chain(*parts)])


class Program(nn.Module):
    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(5))
        self.linear, self.relu, self.elu = nn.Linear(3, 3), nn.ReLU(inplace=True), nn.ELU()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.steps = steps

    def forward(self, x):
        values = [x, self.linear(x)]
        for name, a, b in self.steps:
            values.append(OPERATIONS[name](self, values[-min(a, len(values))], values[-min(b, len(values))]))
        return values[-1]


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(PROGRAMS)
@example([("bn0", 1, 1), ("+=", 1, 3), ("relu", 1, 1), ("bn1", 1, 1)])
@example([("linear", 1, 1), ("bn0", 1, 1), ("relu_", 2, 1), ("+", 2, 1), ("relu", 1, 1)])
def test_a_fused_program_does_the_same(steps):
    net, x = Program(steps), torch.randn(6, 3)
    try:
        for mode in (True, False):
            measured(net, x, mode)
    except RuntimeError:
        assume(False)  # a program that autograd refuses
    for batch in (None, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = convert(net, fuse=True, example=batch)
        event(f"{sum(act is not None for act in acts(result).values())} fused")
        assert_same(net, result, x)
        assert_same(net, revert(result), x)
