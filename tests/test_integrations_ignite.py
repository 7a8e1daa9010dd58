"""An engine of PyTorch-Ignite, watched."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.integrations.ignite import attach
from batchnorm.record import Log

with warnings.catch_warnings():
    # it loads a part of torch that is deprecated, and only when it is imported
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    from ignite.engine import Engine, Events, create_supervised_trainer

NO_LIMIT = 1e9


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(8, 3),
    )  # fmt: skip


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(12)]


def engine_of(model: nn.Module) -> Engine:
    torch.manual_seed(1)
    return create_supervised_trainer(model, torch.optim.SGD(model.parameters(), 0.05), F.cross_entropy)


def failing(model: nn.Module) -> Engine:
    engine = engine_of(model)

    @engine.on(Events.EPOCH_COMPLETED)
    def fail() -> None:
        raise ZeroDivisionError

    return engine


def test_a_watched_run_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    alone, watched = made(), made()
    engine_of(alone).run(batches(), max_epochs=3)
    engine = engine_of(watched)
    session = attach(engine, watched, log=tmp_path, every=5, budget=NO_LIMIT)
    engine.run(batches(), max_epochs=3)
    assert all(torch.equal(tensor, watched.state_dict()[name]) for name, tensor in alone.state_dict().items())
    assert session.run is not None
    assert session.run.steps == 36
    assert {record.tier for record in session.run.records} == {"free", "probe"}
    log = Log(tmp_path)
    assert log.rows("end")[0]["reason"] == "finished"
    assert 0.3 < log.rows("progress")[-1]["values"]["loss"] < 3


def test_each_run_is_a_watch_of_its_own(tmp_path: Path) -> None:
    model = made()
    engine = engine_of(model)
    session = attach(engine, model, log=tmp_path, every=5, probe=False)
    engine.run(batches(), max_epochs=1)
    first = session.run
    engine.run(batches(), max_epochs=1)
    assert session.run is not first
    assert Log(tmp_path).step == 24


def test_an_exception_ends_the_watch_and_is_raised(tmp_path: Path) -> None:
    model = made()
    engine = failing(model)
    attach(engine, model, log=tmp_path, probe=False)
    with pytest.raises(ZeroDivisionError):
        engine.run(batches())
    assert Log(tmp_path).rows("end")[0]["reason"] == "raised ZeroDivisionError"


@pytest.mark.parametrize("first", [True, False])
def test_a_handler_of_exceptions_decides_as_it_did(first: bool, tmp_path: Path) -> None:
    model, seen = made(), []
    engine = failing(model)
    if first:
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: seen.append(error))
    attach(engine, model, log=tmp_path, probe=False)
    if not first:
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: seen.append(error))
    engine.run(batches())
    assert [type(error) for error in seen] == [ZeroDivisionError]
    assert Log(tmp_path).rows("end")[0]["reason"] == "raised ZeroDivisionError"


def test_a_run_that_is_terminated_is_ended(tmp_path: Path) -> None:
    model = made()
    engine = engine_of(model)
    attach(engine, model, log=tmp_path, probe=False)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: engine.terminate(skip_completed=True))
    engine.run(batches())
    assert Log(tmp_path).rows("end")[0]["reason"] == "terminated"
    assert Log(tmp_path).step == 5
