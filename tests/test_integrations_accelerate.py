"""accelerate: ``watch`` takes the model before or after ``prepare``, and ``accumulate`` stores each step once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_population_sharding import images, net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.integrations.accelerate import accumulate
from batchnorm.record import Log

NO_LIMIT = 1e9


@pytest.fixture(autouse=True)
def _state_of_its_own() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(log: Path | None, *, prepared: bool = True, **arguments: Any) -> tuple[nn.Module, bn.instruments.Watch]:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, **arguments)
    data = TensorDataset(torch.randn(96, 6), torch.randint(3, (96,)))
    own = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    model, optimizer, loader = accelerator.prepare(
        own, torch.optim.SGD(own.parameters(), 0.05, momentum=0.9), DataLoader(data, 8, shuffle=True)
    )
    run = bn.watch(model if prepared else own, log=log, every=5, budget=NO_LIMIT)
    with run if log else torch.enable_grad():
        for _ in range(4):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
    return accelerator.unwrap_model(model), run


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 3}, {"mixed_precision": "bf16"}], ids=str)
def test_a_prepared_model_is_watched_and_trains_to_the_same_weights(
    arguments: dict[str, Any], prepared: bool, tmp_path: Path
) -> None:
    alone, _ = trained(None, **arguments)
    watched, run = trained(tmp_path, prepared=prepared, **arguments)
    mine, theirs = watched.state_dict(), alone.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert run.steps == (16 if "gradient_accumulation_steps" in arguments else 48)
    assert Log(tmp_path).layers == ("1",)
    assert {record.tier for record in run.records} >= {"free"}


def test_a_model_whose_parameters_are_offloaded_is_measured_as_it_runs():
    whole, offloaded = net().eval(), accelerate.cpu_offload(net().eval(), execution_device=torch.device("cpu"))
    assert offloaded[0][0].weight.is_meta
    batches = [images(seed) for seed in range(4)]
    expected, found = (bn.recalibrate(model, batches) for model in (whole, offloaded))
    assert all(torch.equal(found[name].mean, expected[name].mean) for name in expected)
    again = [bn.adapt(model, batches, prior=8) for model in (whole, offloaded)]
    assert all(torch.equal(again[0][name].var, again[1][name].var) for name in expected)
    assert torch.equal(offloaded(batches[0]), whole(batches[0]))
    assert offloaded[0][0].weight.is_meta


def test_statistics_that_are_offloaded_are_refused_by_name():
    model = accelerate.cpu_offload(net().eval(), execution_device=torch.device("cpu"), offload_buffers=True)
    for look in (bn.recalibrate, bn.adapt, lambda model, _: bn.ShiftMonitor(model)):
        with pytest.raises(ValueError, match=r"'0.1.running_mean', got a tensor that is on the meta device .* buffers"):
            look(model, [images(0)])


def accumulated(prepared: bool, loader: Any) -> nn.Module:
    """A layer after one epoch of steps of 3 batches of 8."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    own = nn.Sequential(nn.Linear(6, 8), bn.BatchNorm1d(8, momentum=1.0))
    model, optimizer, loader = accelerator.prepare(own, torch.optim.SGD(own.parameters(), 0.0), loader)
    for (x,) in loader:
        with accumulate(accelerator, model if prepared else own):
            accelerator.backward(model(x).square().sum())
            optimizer.step()
            optimizer.zero_grad()
    return own


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(("size", "last"), [(72, 24), (80, 8)])
def test_accumulated_steps_store_the_moments_of_their_batches(prepared: bool, size: int, last: int) -> None:
    data = torch.randn(size, 6)
    model = accumulated(prepared, DataLoader(TensorDataset(data), 8))
    inputs = model[0](data[-last:]).detach().double()
    assert model[1].num_batches_tracked == -(-size // 24)
    torch.testing.assert_close(model[1].running_mean, inputs.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, inputs.var(0).float(), rtol=1e-5, atol=1e-6)


def test_an_exception_discards_the_step_that_goes_on() -> None:
    layer = nn.Sequential(bn.BatchNorm1d(6))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)

    def micro_batch(x: torch.Tensor) -> None:
        with accumulate(accelerator, layer):
            layer(x)

    micro_batch(torch.randn(8, 6))
    with pytest.raises(ValueError, match="should contain 5 elements"):
        micro_batch(torch.randn(8, 5))
    assert layer[0].num_batches_tracked == 0
    layer(torch.randn(8, 6))
    assert layer[0].num_batches_tracked == 1
