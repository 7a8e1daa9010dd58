"""The lecture's networks, and ensembles of them that train as one program.

An ensemble has R networks of one architecture. Their parameters and buffers are stacked on axis 0, and torch.func.vmap
runs all networks at once, with about as many operator calls as for one network. The networks are independent: if one
diverges, the others are not affected.
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

    The weights are initialized for the activation (He et al. 2015 for ReLU, Glorot and Bengio 2010 otherwise), with and
    without batch norm, so that the network without batch norm has no disadvantage.

    Args:
        sizes: Number of inputs, widths of hidden layers, number of classes.
        activation: A key of ACTIVATIONS.
        norm: Makes a normalization layer of a given width; None for no normalization.
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
    """A layer whose weights do not depend on ``bias``: the same random numbers are drawn in both cases."""
    layer = nn.Linear(fan_in, fan_out)
    initialize = nn.init.kaiming_normal_ if activation == "relu" else nn.init.xavier_normal_
    initialize(layer.weight)
    nn.init.zeros_(layer.bias)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


@dataclass(eq=False)
class Ensemble:
    """R networks of one architecture that run at once.

    Args:
        template: The architecture; its own parameters are not used.
        parameters: Name -> parameter of all networks, (R, ...), a leaf that requires a gradient.
        buffers: Name -> buffer of all networks, (R, ...).
    """

    template: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, build: Callable[[], nn.Module], seeds: Sequence[int], repeat: int = 1) -> Self:
        """``repeat`` copies of one network for each seed, one copy for each learning rate; copies are neighbours."""
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
            x: One batch for each network, (R, N, features), or one batch for all networks, (N, features).
            train: True normalizes by batch statistics, False by stored statistics.
            keep_statistics: True does not update the stored statistics in train mode.
        """
        return self.through(self.template, x, train=train, keep_statistics=keep_statistics)

    def through(
        self, part: nn.Module, x: Tensor, *, prefix: str = "", train: bool = False, keep_statistics: bool = False
    ) -> Tensor:
        """Outputs of ``part``, a slice or child of the template, for every network.

        ``prefix`` and the names in ``part`` together are names in the template.
        """
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
        """Outputs of one child of every network, without gradient: (R, N, ...) -> (R, N, units).

        With ``train`` they are the values that the next layer receives in training. Stored statistics are not changed.
        """
        children = dict(self.template.named_children())
        part = nn.Sequential(OrderedDict(list(children.items())[: list(children).index(child) + 1]))
        with torch.no_grad():
            return self.through(part, x, train=train, keep_statistics=True)


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()
