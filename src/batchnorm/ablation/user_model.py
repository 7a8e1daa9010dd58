"""The subject of the questions: the user's model, which is made again for every seed, its data and its loss."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.ablation.user_data import Data, examples_in, first_examples
from batchnorm.ablation.usual_losses import accuracy, default_loss
from batchnorm.call_types import Answer, Batch
from batchnorm.layers import batch_norms
from batchnorm.population.batches import arguments, call
from batchnorm.population.forward_signatures import names_in
from batchnorm.population.freezing import Frozen
from batchnorm.population.hooks import seeing
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.tensor_trees import tensors_in

# number of input values of all layers for one batch; from here on a second thread makes a step faster
_LARGE = 2**20


@final
@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model, its data and its loss.

    Args:
        name: The model's address on the command line.
        make: Returns a new model with fresh weights, drawn from the global random states.
        data: Training and held-out batches.
        loss: ``loss(output, batch)`` returns a scalar; None means ``usual_losses.default_loss``.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Data
    loss: Callable[[Answer, Batch], Tensor] | None = None

    def fresh(self, seed: int) -> nn.Module:
        """A new model with the weights of a seed, in train mode; a forward pass gives lazy layers their shape.

        Raises:
            ValueError: If the model has no batch norm layer.
        """
        _seed(seed)
        model = self.make()
        if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
            with torch.no_grad():
                call(model.eval(), next(self.data.deal(seed)))
        if not batch_norms(model):
            raise ValueError(
                f"{self.name} has no batch norm layer, so there is nothing to compare. Add one: batchnorm.BatchNorm2d."
            )
        return model.train()

    def value(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, in the model's present mode.

        Raises:
            ValueError: If the loss is no scalar.
        """
        output = call(model, batch)
        loss = self.loss(output, batch) if self.loss else default_loss(output, _with_target(model, batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a loss must be one number, got {got}. Return its mean from --loss.")
        return loss.reshape(())

    def accuracy(self, model: nn.Module, batch: Batch) -> float | None:
        """Share of right classes; None if the user gives a loss, or if the targets are no classes."""
        return None if self.loss is not None else accuracy(call(model, batch), _with_target(model, batch))

    def to_device(self) -> Subject:
        """The same subject with data on the model's device; batches stay whole if the model cannot use parts of them.

        Raises:
            ValueError: If a batch has no finite loss before any training.
        """
        model = self.fresh(0)
        device = next((t.device for t in model.parameters()), torch.device("cpu"))
        moved = self if device.type == "cpu" else replace(self, data=self.data.to(device))
        moved._require_finite(model)
        return moved if moved._takes_parts(model.eval()) else replace(moved, data=moved.data.kept_whole())

    def _require_finite(self, model: nn.Module) -> None:
        """Raise if the loss is not finite for the first batch, or for the first batch with NaN or infinite values."""
        non_finite = next((batch for batch in self.data.train if not _is_finite(batch)), None)
        for batch in (self.data.train[0], non_finite):
            if batch is None or math.isfinite(self._first_loss(model, batch)):
                continue
            cause = "its values are finite" if _is_finite(batch) else "it has NaN or infinite values"
            raise ValueError(
                f"every batch must have a finite loss before training, but one batch has none; {cause}. Mend the "
                "data, the model's first weights or the loss."
            )

    def _first_loss(self, model: nn.Module, batch: Batch) -> float:
        """The loss before training; 0 if the pass or the loss raises, because the training will raise again."""
        with torch.no_grad(), preserve_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return float(self.value(model, batch))
            except Exception:  # noqa: BLE001 - whatever the user's code raises
                return 0.0

    def _takes_parts(self, model: nn.Module) -> bool:
        """Whether the model accepts half a batch; True if it accepts no batch, because the training will raise."""
        if self.data.whole:
            return True
        batch = self.data.train[0]
        with torch.no_grad(), preserve_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(model, first_examples(batch, examples_in(batch)))
            except Exception:  # noqa: BLE001 - whatever the user's code raises
                return True
            try:
                call(model, first_examples(batch, max(1, examples_in(batch) // 2)))
            except Exception:  # noqa: BLE001
                return False
        return True


def _is_finite(batch: Batch) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_in(batch) if t.is_floating_point())


def _with_target(model: nn.Module, batch: Batch) -> Batch:
    """The batch as (last input, target, ...), since a model with several inputs uses several parts of a batch."""
    if not isinstance(batch, (tuple, list)) or isinstance(batch[0], (tuple, list)):
        return batch
    args, by_name = arguments(model, batch)
    if by_name and (named := names_in(batch)) is not None:  # a named tuple
        return (*list(by_name.values())[-1:], *(part for name, part in named.items() if name not in by_name))
    return batch[max(0, len(args) - 1) :]


def own_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer, for the layers that use batch statistics in train mode."""
    return {path: layer for path, layer in batch_norms(model).items() if not isinstance(layer, Frozen)}


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """A block after which buffers and training flags are restored."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def quiet_divergence() -> Iterator[None]:
    """A block without warnings of NaN or infinity, which are expected for a learning rate that is too large."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NaN or infinity in the batch statistics", RuntimeWarning)
        yield


@contextmanager
def undisturbed(subject: Subject) -> Iterator[None]:
    """A block that restores random states, and runs on one thread if the model's layers are small.

    For small tensors several threads are slower than one, and several times slower on a busy machine. The size of the
    layers decides, and not a measured time, so that the same command always gives the same numbers.
    """
    threads = torch.get_num_threads()
    with preserve_random_state():
        try:
            if _values(subject) < _LARGE:
                torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)


def _values(subject: Subject) -> int:
    """Number of input values of all batch norm layers for one batch."""
    model = subject.fresh(0)
    return sum(x.numel() for x in received(model, next(subject.data.deal(0))).values())


def received(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Path -> input of each batch norm layer for a batch, in the order of the forward; only of a layer's first call."""
    inputs: dict[str, Tensor] = {}

    def see(path: str, _: nn.Module, x: Tensor) -> None:
        inputs.setdefault(path, x.detach())

    with seeing(batch_norms(model), see), torch.no_grad(), quiet_divergence():
        call(model, batch)
    return inputs


def first_tensor(output: Answer) -> Tensor | None:
    """The first floating-point tensor in a model's output; None if there is none."""
    return next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed(seed)
