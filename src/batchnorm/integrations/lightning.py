"""Lightning: callbacks that watch, recalibrate, accumulate and freeze; for ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack, final

from torch import nn

from batchnorm.instruments import Watch
from batchnorm.integrations.accumulated_step import AccumulatedStep
from batchnorm.integrations.layer_summary import summary
from batchnorm.integrations.metric_sending import MetricSending
from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.recalibration_in_training import calibrate, with_own_workers
from batchnorm.integrations.watch_session import Session, WatchArguments, raised
from batchnorm.layers import batch_norms
from batchnorm.population import freeze, frozen, unfreeze
from batchnorm.population.batches import call
from batchnorm.population.freezing import Frozen, has_stored_statistics

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback() -> type:
    """The base class of callbacks, from the package that is imported; from both packages if both are imported."""
    loaded = [package for name in _PACKAGES if (package := sys.modules.get(name))]
    return type("Callback", tuple(package.Callback for package in loaded or [_installed()]), {})


def _installed() -> Any:
    name = _PACKAGES[1] if find_spec("lightning") is None and find_spec(_PACKAGES[1]) is not None else _PACKAGES[0]
    with needed("lightning", "lightning"):
        return import_module(name)


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from batchnorm.call_types import Answer, Batch
else:
    Callback = _callback()


@final
class BatchNormMonitor(Callback):
    """Measures batch norm while the trainer fits; the weights are trained as without it, bit for bit.

    If a LightningModule has no ``forward`` of its own and only one child with batch norm, this child is watched,
    because ``training_step`` calls it. The names of layers are then relative to the child.

    Args:
        log_to_logger: Also send ``batchnorm/...`` to the trainer's loggers: minimum, median and maximum over layers.
        watch: Arguments of ``batchnorm.watch``: ``log``, ``every``, ``budget``, ``probe``, ``loss``, ``sinks`` and
            ``group``.

    Raises:
        ValueError: When fitting begins, if the model has no batch norm or an argument is out of range.
    """

    def __init__(self, *, log_to_logger: bool = False, **watch: Unpack[WatchArguments]) -> None:
        super().__init__()
        self._log_to_logger = log_to_logger
        self._session = Session(**watch)

    @property
    def run(self) -> Watch | None:
        """The watch of the current or last fit."""
        return self._session.run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the watch: now weights are loaded and on their device."""
        sinks = [_Loggers(trainer)] if self._log_to_logger else []
        self._session.begin(_Direct(_trained_part(pl_module)), *sinks)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Answer, batch: Batch, batch_idx: int
    ) -> None:
        """Log the loss."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Lightning divides the loss of automatic optimization by the number of accumulated batches
        self._session.note_loss(loss, trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the watch."""
        self._session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the watch, and log the exception."""
        self._session.end(raised(exception))


@final
class Recalibrate(Callback):
    """Replaces running averages by the statistics of the training data: when training ends, and before validation.

    With ``WeightAveraging`` or ``StochasticWeightAveraging`` the statistics are measured with the averaged weights: the
    callback moves itself after these callbacks. Checkpoints written at validation contain the latest measured
    statistics. The training does not change, because layers in train mode do not use stored statistics. Layers that are
    frozen, or in eval mode while the model trains, keep their statistics. With several processes the statistics are
    those of the data of all processes, on all of them.

    Args:
        max_examples: Largest number of examples to measure, of all processes; None: all batches of an epoch, or of
            ``loader``.
        every_n_epochs: n, to measure also before the validation of every n-th epoch; None measures only at the end.
        loader: The batches to measure; None: the trainer's training dataloader. Of several processes each reads its
            own, so give it a ``DistributedSampler``; otherwise every example counts once for each process.
        forward: A function ``forward(module, batch)``, needed if the module's forward accepts neither a batch nor its
            first part.
        exact: False for one pass over the data, as in ``batchnorm.recalibrate``.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1. While fitting: if ``loader`` is None and the trainer has no
            training dataloader or several of them; and every error of ``batchnorm.recalibrate``.
    """

    def __init__(
        self,
        *,
        max_examples: int | None = None,
        every_n_epochs: int | None = None,
        loader: Iterable[Batch] | None = None,
        forward: Callable[[nn.Module, Batch], object] | None = None,
        exact: bool = True,
    ) -> None:
        super().__init__()
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be 1 or more, got {every_n_epochs}. Use None for the end only.")
        self._max_examples, self._every, self._exact = max_examples, every_n_epochs, exact
        self._loader, self._forward = loader, forward or call
        self._held: list[nn.Module] = []

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Move this callback after the callbacks that average weights."""
        rest = [callback for callback in trainer.callbacks if callback is not self]
        last = max((i for i, callback in enumerate(trainer.callbacks) if _averages(callback)), default=-1)
        if last > trainer.callbacks.index(self):
            # a new list: Lightning is iterating over the old one
            trainer.callbacks = [*rest[:last], self, *rest[last:]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """At the start of an epoch, remember the layers in eval mode: validation puts all layers into eval mode."""
        if batch_idx == 0:
            layers = batch_norms(pl_module).values()
            self._held = [layer for layer in layers if not layer.training and has_stored_statistics(layer)]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure before the first batch: by then every callback has put averaged weights into the model."""
        if batch_idx == dataloader_idx == 0 and self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final statistics."""
        self._measure(trainer, pl_module)

    def _is_due(self, trainer: Trainer) -> bool:
        if self._every is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return False
        return (trainer.current_epoch + 1) % self._every == 0

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def forward(module: nn.Module, batch: Batch) -> object:
            batch = _moved(trainer, pl_module, batch)
            with trainer.precision_plugin.forward_context():
                return self._forward(module, batch)

        batches = _Epoch(trainer) if self._loader is None else self._loader
        with ExitStack() as held:
            for layer in self._held:
                held.enter_context(frozen(layer))
            calibrate(
                _trained_part(pl_module), batches, self._max_examples, forward=forward, exact=self._exact,
                is_distributed=trainer.world_size > 1,
            )  # fmt: skip


@final
class AccumulatedStatistics(Callback):
    """Moves stored statistics once for each step of the optimizer, with ``accumulate_grad_batches`` or by hand.

    The batches since the last step count together, as in ``batchnorm.step``; each is normalized by its own statistics.
    When training ends, batches after the last step are stored too. After an exception they are not.

    Raises:
        ValueError: When fitting begins, if the model has batch norm layers that are not of this package, or none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step, self._has_stepped = AccumulatedStep(), False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Begin a step, unless one goes on."""
        self._step.begin(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Note that this batch ends a step."""
        self._has_stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Answer, batch: Batch, batch_idx: int
    ) -> None:
        """Store the statistics of a step that ended."""
        if self._has_stepped:
            self._step.store()
            self._has_stepped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the statistics of the batches after the last step."""
        self._step.store()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Store nothing."""
        self._step.discard()


@final
class FreezeBatchNorm(Callback):
    """Freezes batch norm: layers compute the same in train and eval mode, also after the trainer's ``model.train()``.

    ``BaseFinetuning.freeze(train_bn=False)`` and ``BackboneFinetuning`` only set ``track_running_stats`` to False: then
    a layer normalizes by the batch in training and by stored statistics in evaluation. With this callback, layers stay
    frozen after the fit; ``batchnorm.unfreeze(model)`` unfreezes them.

    Args:
        parts: Dotted paths of the modules whose layers are frozen; empty for all layers.
        from_epoch: First epoch with frozen layers.
        until_epoch: First epoch in which layers are no longer frozen; None keeps them frozen.
        affine: Whether gamma and beta are frozen too.

    Raises:
        ValueError: When fitting begins, if a module does not exist or a layer has no stored statistics.
    """

    def __init__(
        self, parts: str | Sequence[str] = (), *, from_epoch: int = 0, until_epoch: int | None = None,
        affine: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._parts = [parts] if isinstance(parts, str) else list(parts) or [""]
        self._from, self._until, self._affine = from_epoch, until_epoch, affine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze now, before a wrapper for several devices collects the parameters that are trained."""
        if stage == "fit":
            self._apply(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze or unfreeze, in each epoch again, because layers may have been added or converted."""
        self._apply(trainer, pl_module)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        for part in self._parts:
            module = _submodule(pl_module, part)
            if self._until is not None and epoch >= self._until:
                _thaw(module, pl_module.training)
            elif epoch >= self._from:
                freeze(module, self._affine)


def _thaw(module: nn.Module, training: bool) -> None:
    """Unfreeze, and set layers to the model's mode: Lightning leaves frozen layers in eval mode after validation."""
    layers = [layer for layer in batch_norms(module).values() if isinstance(layer, Frozen)]
    unfreeze(module)
    for layer in layers:
        layer.train(training)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"FreezeBatchNorm needs paths of modules, got {path!r}. The model has {names}.") from None


def _trained_part(pl_module: LightningModule) -> nn.Module:
    """The module that a training step most likely calls: see ``BatchNormMonitor``."""
    if type(pl_module).forward.__qualname__ not in {"LightningModule.forward", "_forward_unimplemented"}:
        return pl_module
    children = [child for child in pl_module.children() if batch_norms(child)]
    return children[0] if len(children) == 1 else pl_module


@final
class _Direct(nn.Module):
    """A wrapper of a module for ``watch``, which sees only calls of the module's own forward.

    With several devices Lightning replaces forward by ``training_step``, and calls the module with the arguments of
    ``training_step``. Like the wrapper of torch.compile, it has the module as ``_orig_mod``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def register_forward_pre_hook(self, hook: Any, **arguments: Any) -> Any:
        """Register the hook; it runs only while forward is the same as at this moment."""
        own = vars(self._orig_mod).get("forward")

        def direct(module: nn.Module, *inputs: Batch) -> Answer:
            return hook(module, *inputs) if vars(module).get("forward") is own else None

        return self._orig_mod.register_forward_pre_hook(direct, **arguments)


def _averages(callback: object) -> bool:
    # compared by name, because older versions lack some of these classes, and there are two packages
    names = {"WeightAveraging", "StochasticWeightAveraging"}
    return any(kind.__name__ in names for kind in type(callback).__mro__)


def _moved(trainer: Trainer, pl_module: LightningModule, batch: Batch) -> Batch:
    """The batch in the form in which ``training_step`` gets it: converted, and on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        if owner is not None:
            batch = owner.on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@final
class _Epoch:
    """The batches of one epoch, from a separate iterator."""

    def __init__(self, trainer: Trainer) -> None:
        self._loader = trainer.train_dataloader
        if self._loader is None or isinstance(self._loader, (dict, list, tuple)):
            raise ValueError(
                f"Recalibrate needs a trainer with one training dataloader, got {type(self._loader).__name__}. "
                "Pass loader=."
            )
        self._most = trainer.num_training_batches
        self.generator = getattr(
            self._loader, "generator", None
        )  # recalibrate starts each pass from the same state of the generator
        for name in ("sampler", "batch_sampler", "collate_fn"):  # they show which examples are repetitions
            setattr(self, name, getattr(self._loader, name, None))

    def __iter__(self) -> Iterator[Batch]:
        return islice(with_own_workers(self._loader), None if math.isinf(self._most) else int(self._most))


@final
class _Loggers:
    """A sink that writes to a trainer's loggers."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._delivery = MetricSending("the trainer's logger")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a summary over the layers with the trainer's step."""
        numbers = summary(values)
        if not self._delivery.is_open or not numbers:
            return
        with self._delivery:
            for logger in self._trainer.loggers:
                logger.log_metrics(numbers, self._trainer.global_step)

    def close(self) -> None:
        """Do nothing: the loggers belong to the trainer."""
