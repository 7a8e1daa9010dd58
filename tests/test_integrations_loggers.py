"""Sinks: what is measured arrives in TensorBoard and MLflow, and a sink that fails costs no training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import batchnorm as bn
from batchnorm.integrations.layer_summary import summary
from batchnorm.integrations.metric_sending import MetricSending
from batchnorm.integrations.mlflow import MLflowSink, metric_name
from batchnorm.integrations.tensorboard import TensorBoardSink

NO_LIMIT = 1e9


def trained(*sinks: Any, steps: int = 30) -> bn.instruments.Watch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, every=5, budget=NO_LIMIT, sinks=sinks) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4)).square().mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    return run


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# -- TensorBoard --------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_record(tmp_path: Path) -> None:
    run = trained(TensorBoardSink(tmp_path / "events"))
    found = scalars(tmp_path / "events")
    expected = [(r.step, r["noise"]["1"]) for r in run.records if r.tier == "free"]
    assert found["batchnorm/noise/1"] == [(step, pytest.approx(value)) for step, value in expected]
    assert {"batchnorm/cosine/1", "batchnorm/output_gap", "batchnorm/cost", "loss"} <= set(found)


def test_a_writer_of_ones_own_is_flushed_and_stays_open(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path), flush_secs=3600) as writer:
        trained(TensorBoardSink(writer))
        assert scalars(tmp_path)["batchnorm/gamma/1"]
        writer.add_scalar("mine", 1.0, 1)
    assert scalars(tmp_path)["mine"] == [(1, 1.0)]


def test_a_sink_serves_a_second_training(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    trained(sink)
    trained(sink)
    assert len(list(tmp_path.iterdir())) == 2


# -- MLflow -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the one store that the small distribution has
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The filesystem tracking backend", FutureWarning)
        mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
        yield mlflow
        while mlflow.active_run():
            mlflow.end_run()
    mlflow.set_tracking_uri(None)


def history(mlflow: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(run_id, name)]


def test_mlflow_gets_every_record_in_a_run_that_ends(mlflow: Any) -> None:
    sink = MLflowSink()
    run = trained(sink)
    expected = [(r.step, r["noise"]["1"]) for r in run.records if r.tier == "free"]
    assert history(mlflow, sink.run_id, "batchnorm/noise/1") == [
        (step, pytest.approx(value)) for step, value in expected
    ]
    assert history(mlflow, sink.run_id, "loss")
    assert mlflow.MlflowClient().get_run(sink.run_id).info.status == "FINISHED"
    assert mlflow.active_run() is None


def test_the_active_run_is_used_and_left_open(mlflow: Any) -> None:
    with mlflow.start_run() as mine:
        sink = MLflowSink()
        trained(sink)
        assert sink.run_id == mine.info.run_id
        assert mlflow.active_run() is not None
    assert history(mlflow, mine.info.run_id, "batchnorm/output_gap")


def test_a_run_can_be_named(mlflow: Any) -> None:
    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    trained(MLflowSink(run_id))
    assert mlflow.MlflowClient().get_run(run_id).info.status == "RUNNING"
    assert history(mlflow, run_id, "batchnorm/gamma/1")
    with pytest.raises(mlflow.exceptions.MlflowException, match="not found"):
        MLflowSink("0" * 32)


def test_many_layers_go_in_batches(mlflow: Any) -> None:
    sink = MLflowSink()
    sink.write(3, {f"batchnorm/noise/layer{i}": float(i) for i in range(1001)})
    sink.close()
    assert history(mlflow, sink.run_id, "batchnorm/noise/layer1000") == [(3, 1000.0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batchnorm/noise/layer1.0.bn1", "batchnorm/noise/layer1.0.bn1"),
        ("batchnorm/noise/", "batchnorm/noise/model"),
        ("batchnorm/noise/..", "batchnorm/noise/model"),
        ("acc@5 [%]", "acc_5 ___"),
    ],
)
def test_names_are_such_as_mlflow_takes(name: str, expected: str, mlflow: Any) -> None:
    assert metric_name(name) == expected
    sink = MLflowSink()
    sink.write(0, {name: 1.0})
    sink.close()
    assert history(mlflow, sink.run_id, expected)


# -- failures -----------------------------------------------------------------------------------------------------


class Dead:
    """A writer and a client whose service is gone."""

    def __init__(self) -> None:
        self.tried = 0

    def __getattr__(self, _: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            self.tried += 1
            raise ConnectionError("no route")

        return fail


def test_a_dead_service_is_told_once_given_up_and_costs_no_record() -> None:
    dead = Dead()
    with pytest.warns(
        RuntimeWarning, match=r"TensorBoard did not accept numbers of batch norm: ConnectionError: no ro"
    ):
        run = trained(TensorBoardSink(dead), steps=60)
    assert len(run.records) > 5
    assert run.steps == 60
    assert dead.tried == 4  # three times to write, and once to flush


def test_a_service_that_comes_back_is_used_again() -> None:
    delivery = MetricSending("a service")

    def deliver(outcomes: list[bool]) -> None:
        for outcome in outcomes:
            with delivery:
                assert outcome

    with pytest.warns(RuntimeWarning, match="a service did not accept numbers") as told:
        deliver([False, False, True, False, False])
    assert len(told) == 1
    assert delivery.is_open


def test_an_interruption_is_no_failure() -> None:
    with pytest.raises(KeyboardInterrupt), MetricSending("a service"):
        raise KeyboardInterrupt


# -- summary ------------------------------------------------------------------------------------------------------


def test_a_summary_has_three_numbers_a_quantity_and_those_of_the_model() -> None:
    values = {
        "batchnorm/noise/a": 1.0,
        "batchnorm/noise/b.c": 3.0,
        "batchnorm/noise/": 9.0,
        "batchnorm/cost": 0.5,
        "l": 2,
    }
    assert summary(values) == {
        "batchnorm/noise/min": 1.0,
        "batchnorm/noise/median": 3.0,
        "batchnorm/noise/max": 9.0,
        "batchnorm/cost": 0.5,
    }
    assert summary({}) == {}
