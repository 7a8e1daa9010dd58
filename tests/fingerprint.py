"""A model that holds state of every kind, and everything about a model written down to be compared."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import torch
from torch import nn

import batchnorm as bn


class Net(nn.Module):
    """Layers of both makers, a tie, dropout, and state of every kind that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.theirs = nn.BatchNorm1d(4, momentum=0.3)
        self.ours = bn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.last.weight
        self.history = [[1.0], {"losses": [2.0]}]
        self.names = {"a", "b"}
        self.recent = deque([1, 2], maxlen=2)
        self.pair = (torch.tensor([1.0]), "fixed")
        self.cache = torch.arange(3.0)
        self.generator = torch.Generator().manual_seed(5)
        self.register_buffer("phase", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.register_buffer("mask", torch.tensor(True), persistent=False)
        self.register_buffer("short", torch.tensor([1.5], dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.ours(torch.relu(self.theirs(self.first(x))))
        return self.tied(torch.relu(self.last(self.drop(hidden))))


def data() -> torch.Tensor:
    return torch.randn(8, 3) * 2 + 1


def trained_net() -> Net:
    """In train mode, with gradients, one frozen-by-hand layer, and hooks of its owner."""
    net = Net()
    net(data()).sum().backward()
    net.theirs.eval()
    net.first.weight.requires_grad_(False)
    net.last.register_forward_hook(lambda module, args, output: None)
    return net


def bits(tensor: torch.Tensor | None) -> object:
    if tensor is None or tensor.is_meta:
        return None
    flat = tensor.detach().clone().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), flat.view(torch.uint8).tolist()


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def traits(value: object) -> object:
    """A value to compare, written down independently of how the shield remembers it."""
    if isinstance(value, torch.Tensor):
        grad = value.grad if value.is_leaf else None
        hooks = [None if h is None else len(h) for h in (value._backward_hooks, value._post_accumulate_grad_hooks)]
        own = {key: traits(v) for key, v in vars(value).items()}
        return id(value), type(value), bits(value), value.requires_grad, id(grad), bits(grad), hooks, own
    if isinstance(value, nn.Module):
        return id(value), type(value), [(key, traits(v)) for key, v in vars(value).items()]
    if isinstance(value, dict):
        return id(value), [(key, traits(v)) for key, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return id(value), [traits(v) for v in value]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, set):
        return id(value), sorted(map(repr, value))
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def fingerprint(model: nn.Module) -> object:
    state = np.random.get_state()
    return traits(model), torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]
