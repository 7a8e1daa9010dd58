"""Callbacks of Lightning: the same weights, the right statistics, layers that stay frozen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from small_networks import StemAndBody
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.integrations.lightning import AccumulatedStatistics, BatchNormMonitor, FreezeBatchNorm, Recalibrate
from batchnorm.population.freezing import Frozen
from batchnorm.record import Log

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training:UserWarning"),
]
NO_LIMIT = 1e9


class Net(StemAndBody, pl.LightningModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Hidden(Net):
    """The same behind a child, without a forward."""

    forward = pl.LightningModule.forward

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(self.stem, self.body)
        del self.stem, self.body

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", F.cross_entropy(self.model(batch[0]), batch[1]))


def dataset(size: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        3 * torch.randn(size, 6, generator=generator) + 1, torch.randint(3, (size,), generator=generator)
    )


def loader(**arguments: Any) -> DataLoader:
    return DataLoader(dataset(), batch_size=8, shuffle=True, **arguments)


def quiet(*callbacks: Any, **arguments: Any) -> pl.Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"accelerator": "cpu", "callbacks": list(callbacks)} | silent | arguments)


def fitted(
    *callbacks: Any, kind: type[Net] = Net, epochs: int = 3, change: Any = None, **arguments: Any
) -> tuple[Net, pl.Trainer]:
    pl.seed_everything(1, verbose=False)
    model = kind()
    if change is not None:
        change(model)
    trainer = quiet(*callbacks, max_epochs=epochs, **arguments)
    trainer.fit(model, loader(), DataLoader(dataset(16), batch_size=8))
    return model, trainer


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# -- monitor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
def test_a_watched_fit_gives_the_same_weights_bit_for_bit(arguments: dict[str, Any], tmp_path: Path) -> None:
    alone, _ = fitted(**arguments, epochs=4)
    state = torch.get_rng_state()
    monitor = BatchNormMonitor(log=tmp_path / "run", every=5, budget=NO_LIMIT)
    watched, trainer = fitted(monitor, **arguments, epochs=4)
    assert same(watched, alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert monitor.run is not None
    assert monitor.run.steps == trainer.global_step
    assert {record.tier for record in monitor.run.records} >= {"free"}
    assert not watched._forward_pre_hooks


def test_the_log_has_the_loss_and_an_end(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(log=tmp_path, every=5, budget=NO_LIMIT)
    fitted(monitor)
    log = Log(tmp_path)
    assert log.rows("end")[0]["reason"] == "finished"
    assert log.layers == ("stem.1", "body.1")
    assert log.count("probe")
    assert 0.3 < log.rows("progress")[-1]["values"]["loss"] < 3


def test_the_noted_loss_is_not_divided_by_the_accumulated_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.instruments.watched_training._PULSE", NO_LIMIT)  # one line, at the end
    seen = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(outputs["loss"]) * 4)

    fitted(BatchNormMonitor(log=tmp_path, every=5, probe=False), Seen(), accumulate_grad_batches=4, epochs=1)
    (row,) = Log(tmp_path).rows("progress")
    assert row["values"]["loss"] == pytest.approx(sum(seen) / len(seen), rel=1e-4)


def test_a_child_is_watched_where_the_module_has_no_forward() -> None:
    monitor = BatchNormMonitor(every=5, budget=NO_LIMIT)
    fitted(monitor, kind=Hidden)
    assert monitor.run is not None
    assert {record.tier for record in monitor.run.records} == {"free", "probe"}
    assert monitor.run.latest.layers == ("0.1", "1.1")


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log:UserWarning")
def test_behind_a_wrapper_for_several_devices_the_probe_has_the_inputs_of_forward() -> None:
    alone, _ = fitted()
    monitor = BatchNormMonitor(every=5, budget=NO_LIMIT)
    callbacks = monitor, Recalibrate(), FreezeBatchNorm("body", affine=True)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # Lightning sets more of it, and leaves it so
        try:
            watched, trainer = fitted(*callbacks, strategy="ddp", devices=1)
        finally:
            torch.distributed.destroy_process_group()
    assert trainer.state.finished
    assert monitor.run is not None
    assert monitor.run.steps == 36
    assert {record.tier for record in monitor.run.records} == {"free", "probe"}
    assert_has(watched, {"body.1.running_mean": torch.zeros(8)})
    assert not same(watched, alone)


def test_a_second_fit_continues_the_log(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(log=tmp_path, every=5, probe=False)
    model, _ = fitted(monitor, epochs=1)
    quiet(monitor, max_epochs=1).fit(model, loader(), DataLoader(dataset(16)))
    assert Log(tmp_path).count("end") == 2
    assert Log(tmp_path).step == 24


def test_an_exception_ends_the_log_and_takes_the_hooks_away(tmp_path: Path) -> None:
    class Broken(Net):
        def on_train_epoch_end(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(BatchNormMonitor(log=tmp_path), kind=Broken)
    assert Log(tmp_path).rows("end")[0]["reason"] == "raised ZeroDivisionError"
    net = Net()
    net(torch.randn(4, 6)).sum().backward()
    net.configure_optimizers().step()  # a hook that was left would count this step


def test_loggers_get_a_summary_over_the_layers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fitted(BatchNormMonitor(log_to_logger=True, every=5, budget=NO_LIMIT), logger=logger)
    heads = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"batchnorm/noise/median", "batchnorm/noise/max", "batchnorm/output_gap", "batchnorm/cost"} <= set(heads)
    assert not any("stem" in head for head in heads)


def test_a_logger_that_fails_does_not_end_the_fit(tmp_path: Path) -> None:
    class Full(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("batchnorm/") for name in metrics):
                raise OSError("disk full")

    monitor = BatchNormMonitor(log_to_logger=True, every=5, budget=NO_LIMIT)
    with pytest.warns(
        RuntimeWarning, match=r"the trainer's logger did not accept numbers of batch norm: OSError: disk"
    ):
        _, trainer = fitted(monitor, logger=Full(tmp_path))
    assert trainer.state.finished
    assert monitor.run is not None
    assert len(monitor.run.records) > 3


def test_a_model_without_batch_norm_is_refused() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem[1], self.body[1] = nn.Identity(), nn.Identity()

    with pytest.raises(ValueError, match="watch needs a model with batch norm layers, got Plain without any"):
        fitted(BatchNormMonitor(), kind=Plain)


# -- recalibrate --------------------------------------------------------------------------------------------------


def exact(model: nn.Module, data: Any = None) -> dict[str, Tensor]:
    """What the statistics should be, from a fresh measurement of a copy."""
    import copy

    twin = copy.deepcopy(model)
    inner = twin.model if isinstance(twin, Hidden) else twin
    bn.recalibrate(inner, DataLoader(data or dataset(), batch_size=32))
    return {name: buffer for name, buffer in twin.named_buffers() if "running" in name}


def assert_has(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in expected:
            torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Net, Hidden])
def test_the_fitted_model_has_the_statistics_of_the_training_data(kind: type[Net]) -> None:
    alone, _ = fitted(kind=kind)
    model, _ = fitted(Recalibrate(), kind=kind)
    assert_has(model, exact(model))
    parameters = dict(alone.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert all(module.training == alone.get_submodule(name).training for name, module in model.named_modules())


def test_measuring_before_validation_does_not_change_what_is_trained() -> None:
    validated = []

    class Seen(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                validated.append((exact(pl_module), pl_module.get_buffer("stem.1.running_mean").clone()))

    alone, _ = fitted(epochs=4)
    state = torch.get_rng_state()
    model, _ = fitted(Recalibrate(every_n_epochs=2), Seen(), epochs=4)
    assert torch.equal(torch.get_rng_state(), state)
    parameters = dict(alone.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    agree = [torch.allclose(mean, wanted["stem.1.running_mean"], rtol=1e-5) for wanted, mean in validated]
    assert agree == [False, True, False, True]
    assert not any(p.is_inference() for p in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_get_their_own_statistics(first: bool, tmp_path: Path) -> None:
    pair = [Recalibrate(every_n_epochs=1), WeightAveraging()]
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    model, trainer = fitted(*(pair if first else pair[::-1]), checkpoints, enable_checkpointing=True)
    assert [type(c).__name__ for c in trainer.callbacks][-1] == "ModelCheckpoint"
    assert_has(model, exact(model))
    stored = torch.load(checkpoints.best_model_path, weights_only=False)["state_dict"]
    averaged = Net()
    averaged.load_state_dict(stored)
    assert_has(averaged, exact(averaged))


def test_without_it_averaged_weights_have_other_statistics() -> None:
    model, _ = fitted(WeightAveraging())
    with pytest.raises(AssertionError):
        assert_has(model, exact(model))


def test_stochastic_weight_averaging_is_followed_by_a_measurement() -> None:
    model, _ = fitted(Recalibrate(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), epochs=3)
    assert_has(model, exact(model))


@pytest.mark.filterwarnings("ignore:recalibrate measured nothing:RuntimeWarning")
def test_frozen_layers_and_layers_held_in_eval_mode_keep_their_statistics() -> None:
    def change(model: Net) -> None:
        bn.freeze(model.stem)
        model.body[1].eval()  # Lightning keeps the modes that it finds

    model, _ = fitted(Recalibrate(every_n_epochs=1), change=change)
    assert model.get_buffer("stem.1.running_mean").eq(0).all()
    assert model.get_buffer("body.1.running_mean").eq(0).all()


def test_a_layer_that_stores_nothing_may_be_held_in_eval_mode() -> None:
    def change(model: Net) -> None:
        model.body[1] = nn.BatchNorm1d(8, track_running_stats=False).eval()

    model, _ = fitted(Recalibrate(every_n_epochs=1), change=change)
    assert int(model.get_buffer("stem.1.num_batches_tracked")) == 12


@pytest.mark.filterwarnings("ignore:recalibrate measured nothing:RuntimeWarning")
def test_nothing_to_measure_is_told_and_no_error() -> None:
    _, trainer = fitted(Recalibrate(), change=bn.freeze)
    assert trainer.state.finished


def test_batches_and_their_number_can_be_given() -> None:
    data = [dataset(24)[:]]
    model, _ = fitted(Recalibrate(loader=data, max_examples=16))
    assert_has(model, exact(model, TensorDataset(*dataset(24)[:16])))
    assert int(model.get_buffer("stem.1.num_batches_tracked")) == 1


def test_a_limited_epoch_is_not_exceeded() -> None:
    model, _ = fitted(Recalibrate(), limit_train_batches=2)
    assert int(model.get_buffer("stem.1.num_batches_tracked")) == 2


def test_several_loaders_need_a_choice() -> None:
    class Two(Net):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return super().training_step(batch["a"], _)

    with pytest.raises(ValueError, match=r"needs a trainer with one training dataloader, got dict\. Pass loader="):
        quiet(Recalibrate(), max_epochs=1).fit(Two(), {"a": loader(), "b": loader()}, DataLoader(dataset(16)))
    with pytest.raises(ValueError, match="every_n_epochs must be 1 or more, got 0"):
        Recalibrate(every_n_epochs=0)


def test_workers_that_persist_are_left_to_the_epoch() -> None:
    from batchnorm.integrations.recalibration_in_training import with_own_workers

    data = loader(num_workers=1, persistent_workers=True)
    mine = iter(data)
    next(mine)
    assert len(list(with_own_workers(data))) == 12
    assert len(list(mine)) == 11
    assert with_own_workers(plain := loader()) is plain


# -- freeze -------------------------------------------------------------------------------------------------------


def outputs_by_mode(model: Net) -> tuple[Tensor, Tensor]:
    x = dataset(8)[:][0]
    with torch.no_grad(), bn.preserve_state(model):
        return model.train().stem(x), model.eval().stem(x)


class Theirs(BaseFinetuning):
    """Lightning's own way to freeze a backbone with its batch norm."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.stem, train_bn=False)

    def finetune_function(self, *_: Any) -> None:
        pass


def pretrained(model: Net) -> None:
    model.stem[1].running_mean += 2.0
    model.stem[1].running_var *= 3.0


def test_frozen_layers_compute_the_same_in_both_modes_unlike_lightnings_own() -> None:
    ours, _ = fitted(FreezeBatchNorm("stem"), change=pretrained)
    trained, evaluated = outputs_by_mode(ours)
    assert torch.equal(trained, evaluated)
    assert torch.equal(ours.stem[1].running_mean, torch.full((8,), 2.0))
    theirs, _ = fitted(Theirs(), change=pretrained)
    trained, evaluated = outputs_by_mode(theirs)
    assert (trained - evaluated).abs().mean() > 0.1
    assert not theirs.stem[1].track_running_stats


def test_layers_freeze_and_thaw_at_their_epochs() -> None:
    tracked, kinds = [], []

    class Seen(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            tracked.append(int(pl_module.stem[1].num_batches_tracked))
            kinds.append(isinstance(pl_module.stem[1], Frozen))

    model, _ = fitted(FreezeBatchNorm(from_epoch=1, until_epoch=3), Seen(), epochs=4)
    assert kinds == [False, True, True, False]
    assert tracked == [12, 12, 12, 24]
    assert model.stem[1].training


def test_gamma_and_beta_can_be_held_too() -> None:
    model, _ = fitted(FreezeBatchNorm(["stem"], affine=True))
    assert model.stem[1].weight.eq(1).all()
    assert not model.body[1].weight.eq(1).all()


def test_a_path_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match=r"FreezeBatchNorm needs paths of modules, got 'back'\. The model has stem"):
        fitted(FreezeBatchNorm("back"))


# -- packages -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_packages_take_the_callbacks() -> None:
    """The class fits whichever package is in use, and both if both are."""
    program = (
        "import sys, pytorch_lightning\n"
        "from batchnorm.integrations.lightning import BatchNormMonitor, Recalibrate\n"
        "assert issubclass(BatchNormMonitor, pytorch_lightning.Callback)\n"
        "assert 'lightning.pytorch' not in sys.modules\n"
        "trainer = pytorch_lightning.Trainer(logger=False, callbacks=[Recalibrate()], accelerator='cpu')\n"
        "assert 'Recalibrate' in [type(c).__name__ for c in trainer.callbacks]\n"
    )
    done = forked.run(program)
    assert done.returncode == 0, done.stderr
    assert issubclass(BatchNormMonitor, pl.Callback)


# --- AccumulatedStatistics ----------------------------------------------------------------------------------


class Converted(Net):
    """A module with layers of ours that store the latest batch, and records the inputs of the first."""

    def __init__(self) -> None:
        super().__init__()
        bn.convert(self, inplace=True)
        self.inputs: list[Tensor] = []
        self.stem[1].momentum = 1.0
        self.stem[1].register_forward_pre_hook(self.record)

    def record(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if layer.training:
            self.inputs.append(arguments[0].detach().double())


class ByHand(Converted):
    """Steps its optimizer itself, after every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.manual_backward(super().training_step(batch, index))
        if index % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def assert_stored(layer: nn.Module, inputs: list[Tensor], steps: int) -> None:
    """The layer stored that many steps, the last of them with these inputs."""
    together = torch.cat(inputs)
    assert layer.num_batches_tracked == steps
    torch.testing.assert_close(layer.running_mean, together.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, together.var(0).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("accumulated", "last"), [(3, 3), (5, 2), (1, 1)])
def test_accumulated_batches_are_stored_once_a_step(accumulated: int, last: int) -> None:
    model, trainer = fitted(
        AccumulatedStatistics(), kind=Converted, epochs=2, accumulate_grad_batches=accumulated, val_check_interval=4
    )
    assert_stored(model.stem[1], model.inputs[-last:], trainer.global_step)


def test_steps_by_hand_are_stored_once() -> None:
    model, _ = fitted(AccumulatedStatistics(), kind=ByHand, epochs=2)
    assert_stored(model.stem[1], model.inputs[-3:], 8)


def test_an_exception_stores_nothing_of_its_step() -> None:
    def fail(model: nn.Module) -> None:
        def raised(*_: Any) -> None:
            if len(model.inputs) == 5:
                raise KeyError("data")

        model.stem[1].register_forward_hook(raised)

    with pytest.raises(KeyError, match="data"):
        fitted(AccumulatedStatistics(), kind=Converted, change=fail, accumulate_grad_batches=3)


def test_layers_of_torch_are_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"step needs layers of this package, got BatchNorm1d"):
        fitted(AccumulatedStatistics())
