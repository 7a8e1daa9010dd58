"""Layer observer: statistics of a few examples of each batch, measured at the input of every batch norm layer.

Let x_c be the values of channel c in one example, and mean_c and std_c the channel's stored statistics. The channel has
a mean z_c and an energy q_c; the layer's energy is the mean of q_c over channels:

    z_c = mean over positions of (x_c - mean_c) / std_c,      q_c = mean over positions of ((x_c - mean_c) / std_c)^2.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from batchnorm.call_types import Arguments, Keywords
from batchnorm.channel_axis import channels_second
from batchnorm.layers import batch_norms, input_of
from batchnorm.other_libraries import layers_of_others, unreached
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.freezing import has_stored_statistics, statistics_of
from batchnorm.population.hooks import Hook, attached
from batchnorm.population.tensor_memory import require, whole
from batchnorm.shift.alarm_reference import Reference

ALL = 2**62  # examples: more than a batch has


def random_rows(size: int, examples: int, seed: int) -> list[int] | None:
    """Random rows of a batch of ``size``, in rising order, because batches may be sorted; None stands for all rows."""
    return None if examples >= size else sorted(Random(seed).sample(range(size), examples))  # noqa: S311


@final
class _Pass(threading.local):
    """State of one thread's forward pass."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.begin(0, 0)

    def begin(self, examples: int, seed: int) -> None:
        self.examples, self.seed = examples, seed
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}  # by layer: mean and energy of each example
        self._indices: dict[tuple[int, torch.device], Tensor | None] = {}

    def of(self, x: Tensor) -> Tensor:
        """The observed rows of a layer's input; all layers observe the same rows."""
        key = len(x), x.device
        if key not in self._indices:
            rows = random_rows(len(x), self.examples, self.seed)
            self._indices[key] = None if rows is None else torch.tensor(rows, device=x.device)
        index = self._indices[key]
        return x if index is None else x[index]


@final
class LayerObserver:
    """Hooks on layers that keep statistics of some examples of each batch.

    Args:
        layers: The layers by name, in the reference's order.
        reference: The reference, whose means and standard deviations standardize the inputs.
    """

    def __init__(self, layers: dict[str, _BatchNorm], reference: Reference) -> None:
        self._layers = layers
        self._pass = _Pass()
        parts = zip(
            reference.mean.split(list(reference.sizes)), reference.std.split(list(reference.sizes)), strict=True
        )
        self._standards = dict(zip(layers, parts, strict=True))
        self._on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def begin(self, examples: int, seed: int) -> None:
        """Observe up to ``examples`` examples of this thread's next batch; 0 observes none.

        Args:
            examples: Largest number per batch.
            seed: Seed of the random selection.
        """
        self._pass.begin(examples, seed)

    def end(self) -> int:
        """Stop observing this thread's pass; return the number of examples that were to be observed."""
        examples, self._pass.examples = self._pass.examples, 0
        return examples

    def seconds_taken(self) -> float:
        """Time that this thread has spent observing since the last call."""
        seconds, self._pass.seconds = self._pass.seconds, 0.0
        return seconds

    def attach(self) -> list[RemovableHandle]:
        """Observe the layers' inputs until the handles are removed."""
        return [
            layer.register_forward_pre_hook(Hook(partial(self._see, name), is_always=True), with_kwargs=True)
            for name, layer in self._layers.items()
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A block in which all examples are observed."""
        with attached(self.attach()):
            self.begin(ALL, 0)
            try:
                yield
            finally:
                self.begin(0, 0)  # forget the first layers' statistics, which a failed pass leaves

    def taken(self) -> tuple[Tensor, Tensor] | None:
        """Means and energies of channels, (n, channels) each, observed since the last call: float64, on the CPU.

        The first call of a layer counts. None if a layer was not reached, is in train mode, or has an input without
        readable values, or if different numbers of examples were observed because layers run on parts of the batch.
        """
        statistics, self._pass.statistics = self._pass.statistics, {}
        if set(statistics) != set(self._layers) or len({len(z) for z, _ in statistics.values()}) != 1:
            return None
        z, q = (torch.cat([statistics[name][i] for name in self._layers], 1) for i in (0, 1))
        return z.cpu().double(), q.cpu().double()

    def _see(self, name: str, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        current = self._pass
        if not current.examples or module.training or name in current.statistics:
            return
        start = time.perf_counter()
        x = input_of(args, kwargs)
        if x is not None and (x := whole(x)) is not None:  # also from a DTensor; None during tracing
            current.statistics[name] = self._statistics(name, current.of(channels_second(module, x)))
        current.seconds += time.perf_counter() - start

    @torch.no_grad()
    def _statistics(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._standard(name, x.device)
        wide = x.detach().flatten(2).float() if x.ndim > 2 else x.detach().float()[:, :, None]  # (n, C, positions)
        var, center = torch.var_mean(wide, 2, correction=0)
        z = (center - mean) / std
        return z, z.square() + var / std.square()

    def _standard(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        key = name, device
        if key not in self._on_device:
            mean, std = self._standards[name]
            self._on_device[key] = mean.float().to(device), std.float().to(device)
        return self._on_device[key]


def storing_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers that store statistics, of torch, ours and other libraries', by name.

    Raises:
        ValueError: If there is no such layer, or a tensor of the model has no numbers.
    """
    require_real(model, "ShiftMonitor")
    require({name: tensor for name, tensor in model.named_parameters() if is_lazy(tensor)}, "ShiftMonitor")
    layers: dict[str, Any] = {**batch_norms(model), **layers_of_others(model)}
    storing = {name: layer for name, layer in layers.items() if has_stored_statistics(layer)}
    if not storing:
        raise ValueError(
            f"ShiftMonitor needs batch norm layers that store statistics, got {type(model).__name__} without such "
            f"layers. Monitor the model before its layers are folded.{unreached(model)}"
        )
    require(statistics_of(storing), "ShiftMonitor")
    return storing
