"""What averaging does to small networks: the example's losses, and what REPAIR asks of every layer."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import torch
from torch import Tensor, nn

import batchnorm as bn

EXAMPLE = Path(__file__).parents[1] / "examples" / "federated_average.py"


def test_the_variance_between_clients_and_a_measurement_lower_the_loss_of_the_average():
    losses = runpy.run_path(str(EXAMPLE))["losses"]
    for seed in (0, 1):
        found = losses(seed)
        assert found["merged"] < found["usual"] / 2, found
        assert found["recalibrated"] < found["usual"] / 2, found
        assert found["local"] < found["usual"] / 2, found


def two_layers() -> nn.Sequential:
    first, second = nn.BatchNorm1d(5, eps=1e-12), nn.BatchNorm1d(4, eps=1e-12)
    return nn.Sequential(nn.Linear(3, 5), first, nn.ReLU(), nn.Linear(5, 4), second).double().eval()


def outputs(net: nn.Sequential, path: int, x: Tensor) -> Tensor:
    return net[: path + 1](x)


def test_measured_statistics_give_the_average_the_mean_and_sd_that_repair_asks_for():
    """REPAIR: mean and sd of each activation are the averages of those of both ends, here in float64."""
    torch.manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64)
    ends = [two_layers() for _ in range(2)]
    for net in ends:
        for path in (1, 4):
            nn.init.uniform_(net[path].weight, 0.5, 2), nn.init.normal_(net[path].bias)
        bn.recalibrate(net, [x])
    average = copy.deepcopy(ends[0])
    average.load_state_dict(bn.merge_statistics(ends))
    plain = outputs(average, 4, x)
    bn.recalibrate(average, [x])
    for path in (1, 4):
        wanted = [[f(outputs(net, path, x)) for net in ends] for f in (lambda y: y.mean(0), lambda y: y.std(0))]
        found = outputs(average, path, x)
        # rounding of float64, and the unbiased variance of 4,000 values in place of the biased one
        torch.testing.assert_close(found.mean(0), sum(wanted[0]) / 2, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.std(0), sum(wanted[1]) / 2, rtol=1e-10, atol=0)
    assert not torch.allclose(plain.std(0), outputs(average, 4, x).std(0), rtol=0.1)  # the recipe does something
