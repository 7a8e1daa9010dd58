"""The lecture's networks, and ensembles of them that train as one program.

An ensemble holds R networks of one architecture with their parameters and buffers stacked on axis 0 and runs them
through torch.func.vmap, so that all seeds and learning rates of an arm cost about as many operator calls as one
network. The networks stay independent: one that diverges does not touch its neighbours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from batchnorm.layers import BatchNorm1d

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
Norm = Callable[[int], nn.Module]


def fully_connected(sizes: Sequence[int], activation: str = "relu", norm: Norm | None = BatchNorm1d) -> nn.Sequential:
    """A classifier with weights W1 .. Wl: children "w1", "norm1", "act1", "w2", ..., "wl".

    Both arms start from the initialization made for their activation (He et al. 2015 for ReLU, Glorot and Bengio
    2010 otherwise), so the arm without batch norm is not handicapped.

    Args:
        sizes: Inputs, hidden widths, classes.
        activation: A key of ACTIVATIONS.
        norm: What makes a layer's normalization from its width; None for no normalization.
    """
    net = nn.Sequential()
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        last = layer == len(sizes) - 1
        net.add_module(f"w{layer}", _linear(fan_in, fan_out, activation, bias=last or norm is None))
        if not last:
            if norm is not None:
                net.add_module(f"norm{layer}", norm(fan_out))
            net.add_module(f"act{layer}", ACTIVATIONS[activation]())
    return net


def _linear(fan_in: int, fan_out: int, activation: str, *, bias: bool) -> nn.Linear:
    """A layer whose weights do not depend on ``bias``: with and without, the same random numbers are drawn."""
    layer = nn.Linear(fan_in, fan_out)
    initialize = nn.init.kaiming_normal_ if activation == "relu" else nn.init.xavier_normal_
    initialize(layer.weight)
    nn.init.zeros_(layer.bias)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


@dataclass(eq=False)
class Ensemble:
    """R networks of one architecture, run as one.

    Args:
        template: The architecture; its own parameters are not used.
        parameters: Every parameter, stacked: (R, ...), leaves that require a gradient.
        buffers: Every buffer, stacked.
    """

    template: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, build: Callable[[], nn.Module], seeds: Sequence[int], repeat: int = 1) -> Self:
        """One network for each seed, ``repeat`` copies of each next to one another (for as many learning rates)."""
        with torch.random.fork_rng(devices=[]):
            networks = [_seeded(build, seed) for seed in seeds]
        parameters, buffers = stack_module_state(networks)
        return cls(
            networks[0],
            {k: v.detach().repeat_interleave(repeat, 0).requires_grad_() for k, v in parameters.items()},
            {k: v.repeat_interleave(repeat, 0) for k, v in buffers.items()},
        )

    @property
    def size(self) -> int:
        """Number of networks, R."""
        return len(next(iter(self.parameters.values())))

    def __call__(self, x: Tensor, *, train: bool = False, keep_statistics: bool = False) -> Tensor:
        """Outputs of every network.

        Args:
            x: One batch for each network, (R, N, features), or one for all of them, (N, features).
            train: Normalize by the batch; else by stored statistics.
            keep_statistics: Leave the stored statistics as they are in train mode.
        """
        return self.through(self.template, x, train=train, keep_statistics=keep_statistics)

    def through(
        self, part: nn.Module, x: Tensor, *, prefix: str = "", train: bool = False, keep_statistics: bool = False
    ) -> Tensor:
        """As a call, but through ``part`` only: a slice of the template whose names start as the template's do."""
        names = {f"{prefix}{name}" for name, _ in (*part.named_parameters(), *part.named_buffers())}
        parameters, buffers = (
            {k.removeprefix(prefix): v for k, v in tensors.items() if k in names}
            for tensors in (self.parameters, self.buffers)
        )
        if keep_statistics and train:
            buffers = {k: v.clone() for k, v in buffers.items()}
        part.train(train)
        shared = x.ndim == 2
        run = vmap(
            lambda parameters, buffers, batch: functional_call(part, (parameters, buffers), (batch,)),
            in_dims=(0, 0, None if shared else 0),
            randomness="different",
        )
        return run(parameters, buffers, x)

    def behind(self, child: str, x: Tensor, *, train: bool) -> Tensor:
        """Values behind one child of every network, without gradient: (R, N, ...) -> (R, N, units).

        In train mode the values are what the next layer receives in training; stored statistics stay as they are.
        """
        children = dict(self.template.named_children())
        part = nn.Sequential(OrderedDict(list(children.items())[: list(children).index(child) + 1]))
        with torch.no_grad():
            return self.through(part, x, train=train, keep_statistics=True)


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()
