"""Channels of layers, reduced layer by layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.shift import by_layer


@pytest.mark.slow
@given(st.lists(st.sampled_from([1, 2, 3, 17]), min_size=1, max_size=8), st.integers(0, 2**31))
def test_each_layer_is_reduced_by_itself(sizes: list[int], seed: int) -> None:
    x = torch.randn(2, 3, sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = x.split(sizes, -1)
    near = {"rtol": 1e-12, "atol": 1e-12}  # up to 17 roundings
    torch.testing.assert_close(by_layer.mean(x, sizes), torch.stack([part.mean(-1) for part in parts], -1), **near)
    assert torch.equal(by_layer.largest(x, sizes), torch.stack([part.amax(-1) for part in parts], -1))
    expected = torch.stack([part.exp().mean(-1).log() for part in parts], -1)
    torch.testing.assert_close(by_layer.log_mean_exp(x, sizes), expected, **near)
