"""The callback for Hugging Face's Trainer, with a small model of one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import StemAndBody
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import batchnorm as bn
from batchnorm.integrations.transformers import AccumulatedStatistics, BatchNormCallback
from batchnorm.record import Log

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]
NO_LIMIT = 1e9


class Net(StemAndBody):
    """A classifier in the Trainer's manner: it takes labels and returns its loss."""

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(self.stem(pixels))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Blind(Net):
    """One that takes no labels; the Trainer computes its loss."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(pixels)


class Rows(Dataset):
    def __init__(self, size: int = 96) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = 3 * torch.randn(size, 6, generator=generator) + 1
        self.y = torch.randint(3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixels": self.x[i], "labels": self.y[i]}


def trained(
    folder: Path, *callbacks: Any, model: nn.Module | None = None, change: Any = None,
    trainer: dict[str, Any] | None = None, **arguments: Any,
) -> nn.Module:  # fmt: skip
    if model is None:
        torch.manual_seed(0)
        model = Net()
    if change is not None:
        change(model)
    settings = TrainingArguments(
        str(folder / "out"), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=0.01, report_to="none",
        save_strategy="no", logging_steps=5, disable_tqdm=True, use_cpu=True, seed=1, **arguments,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=Rows(), callbacks=list(callbacks), **(trainer or {})).train()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_a_watched_training_gives_the_same_weights_bit_for_bit(arguments: dict[str, Any], tmp_path: Path) -> None:
    alone = trained(tmp_path, **arguments)
    callback = BatchNormCallback(log=tmp_path / "run", every=5, budget=NO_LIMIT)
    assert same(trained(tmp_path, callback, **arguments), alone)
    assert callback.run is not None
    assert callback.run.steps == (36 if "gradient_accumulation_steps" not in arguments else 12)
    assert "free" in {record.tier for record in callback.run.records}
    log = Log(tmp_path / "run")
    assert log.layers == ("stem.1", "body.1")
    assert log.rows("end")[0]["reason"] == "finished"
    assert 0.3 < log.rows("progress")[-1]["values"]["loss"] < 3


@pytest.mark.slow
def test_frozen_layers_stay_frozen_though_every_step_sets_train_mode(tmp_path: Path) -> None:
    model = trained(tmp_path, BatchNormCallback(), change=lambda model: bn.freeze(model.stem))
    assert int(model.get_buffer("stem.1.num_batches_tracked")) == 0
    assert int(model.get_buffer("body.1.num_batches_tracked")) == 36
    thawed = trained(tmp_path, change=lambda model: model.stem.eval())
    assert int(thawed.get_buffer("stem.1.num_batches_tracked")) == 36


@pytest.mark.slow
def test_statistics_are_measured_when_training_ends(tmp_path: Path) -> None:
    alone, model = trained(tmp_path), trained(tmp_path, BatchNormCallback(recalibrate=True))
    assert_measured(model)
    parameters = dict(alone.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_labels_are_kept_from_a_model_that_takes_none(tmp_path: Path) -> None:
    def loss(outputs: dict[str, Tensor], labels: Tensor, **_: Any) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    callback = BatchNormCallback(recalibrate=True)
    model = trained(tmp_path, callback, model=Blind(), trainer={"compute_loss_func": loss}, remove_unused_columns=False)
    assert_measured(model)


def assert_measured(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    bn.recalibrate(twin, DataLoader(Rows(), 32), forward=lambda net, batch: net(batch["pixels"]))
    for name, buffer in twin.named_buffers():
        if "running" in name:
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_some_examples_are_enough_if_so_wanted(tmp_path: Path) -> None:
    model = trained(tmp_path, BatchNormCallback(recalibrate=True, max_examples=16))
    assert int(model.get_buffer("stem.1.num_batches_tracked")) == 2


@pytest.mark.slow
def test_a_training_that_failed_is_ended_by_the_next_one(tmp_path: Path) -> None:
    class Broken(Rows):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            raise ZeroDivisionError

    callback = BatchNormCallback(log=tmp_path / "run", probe=False)
    settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    torch.manual_seed(0)
    model = Net()
    with pytest.raises(ZeroDivisionError):
        Trainer(model, settings, train_dataset=Broken(), callbacks=[callback]).train()
    with pytest.warns(RuntimeWarning, match="saw no step of an optimizer"):
        trained(tmp_path, callback, model=model)
    assert [row["reason"] for row in Log(tmp_path / "run").rows("end")] == ["interrupted", "finished"]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_accumulated_micro_batches_are_stored_once_a_step(steps: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = bn.convert(Net()), []
    model.stem[1].momentum = 1.0

    def record(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if layer.training:
            inputs.append(arguments[0].detach().double())

    model.stem[1].register_forward_pre_hook(record)
    trained(
        tmp_path, AccumulatedStatistics(), model=model, gradient_accumulation_steps=steps, eval_strategy="steps",
        eval_steps=1, trainer={"eval_dataset": Rows(16)},
    )  # fmt: skip
    together = torch.cat(inputs[-(12 % steps or steps) :])
    assert model.stem[1].num_batches_tracked == 3 * -(-12 // steps)
    torch.testing.assert_close(model.stem[1].running_mean, together.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.stem[1].running_var, together.var(0).float(), rtol=1e-5, atol=1e-6)


def test_a_step_that_an_exception_left_open_can_be_discarded(tmp_path: Path) -> None:
    model, callback = bn.convert(Net()), AccumulatedStatistics()

    def fail(*_: Any) -> None:
        raise KeyError("data")

    handle = model.body.register_forward_hook(fail)
    with pytest.raises(KeyError, match="data"):
        trained(tmp_path, callback, model=model)
    handle.remove()
    callback.discard()
    model.train()(torch.randn(8, 6))
    assert model.stem[1].num_batches_tracked == 1
