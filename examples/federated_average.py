"""Two clients with different data learn one network, which is averaged: what its statistics are made of matters.

The clients' inputs have other means, so the averaged network's layers see values that spread more than those of either
client. Four ways to set the statistics of the average are measured by the loss on data of both clients:

- usual: means of running_mean and of running_var, as for all other tensors;
- merged: ``batchnorm.merge_statistics``, which adds the variance between the clients;
- local: every client keeps its own layers (FedBN), and is measured on its own data;
- recalibrated: measured on training data of both, as REPAIR (Jordan et al. 2022) does in networks with batch norm.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import batchnorm as bn

CLIENTS, EXAMPLES, ROUNDS, STEPS, BATCH = 2, 512, 5, 20, 64


def task(count: int, client: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs of one client, (N, 8), and classes that depend on the sum of squares."""
    z = torch.randn(count, 8, generator=g)
    return z + 3.0 * client, (z.square().sum(1) > 7.5).long()


def network() -> nn.Sequential:
    """A small network with two batch norm layers."""
    return nn.Sequential(
        nn.Linear(8, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 2),
    )


def learn(net: nn.Module, data: tuple[Tensor, Tensor], g: torch.Generator) -> None:
    """Some steps of SGD on one client's data, in place."""
    optimizer = torch.optim.SGD(bn.parameter_groups(net.train(), weight_decay=1e-4), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randperm(EXAMPLES, generator=g)[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data[0][rows]), data[1][rows]).backward()
        optimizer.step()


def usual(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means of all tensors, running_var too."""
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


@torch.no_grad()
def loss(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """The mean cross entropy on all data in eval mode."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    return nn.functional.cross_entropy(net.eval()(x), y).item()


def losses(seed: int) -> dict[str, float]:
    """The loss of the averaged network, by the way its statistics are made."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    train, test = ([task(EXAMPLES, client, g) for client in range(CLIENTS)] for _ in range(2))
    net = network()
    clients = [copy.deepcopy(net) for _ in range(CLIENTS)]
    for _ in range(ROUNDS):
        for client, data in zip(clients, train, strict=True):
            client.load_state_dict(net.state_dict())
            learn(client, data, g)
        net.load_state_dict(bn.merge_statistics(clients, [EXAMPLES] * CLIENTS))
    found = {"merged": loss(net, test)}
    net.load_state_dict(usual([client.state_dict() for client in clients]))
    found["usual"] = loss(net, test)
    own = [copy.deepcopy(client) for client in clients]
    for client in own:
        client.load_state_dict(bn.merge_statistics(clients, local="batch_norm"), strict=False)
    found["local"] = sum(loss(client, [data]) for client, data in zip(own, test, strict=True)) / CLIENTS
    bn.recalibrate(net, [x for x, _ in train])
    found["recalibrated"] = loss(net, test)
    return found


if __name__ == "__main__":
    every = [losses(seed) for seed in range(5)]
    for name in ("usual", "merged", "local", "recalibrated"):
        values = [each[name] for each in every]
        print(f"{name:13} {min(values):.2f} to {max(values):.2f}")
