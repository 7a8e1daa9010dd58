"""The callback for skorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.base import clone
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from small_networks import StemAndBody
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.integrations.skorch import BatchNormCallback
from batchnorm.population.freezing import Frozen
from batchnorm.record import Log

NO_LIMIT = 1e9


class Net(StemAndBody):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)).softmax(-1)


class FrozenStem(Net):
    def __init__(self) -> None:
        super().__init__()
        bn.freeze(self.stem)


def data(size: int = 120) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(size, 6, generator=generator) + 1
    return x.numpy(), torch.randint(3, (size,), generator=generator).numpy()


def net(*callbacks: Any, module: type[nn.Module] = Net, **arguments: Any) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        module, callbacks=list(callbacks), max_epochs=3, batch_size=8, lr=0.05, verbose=0, iterator_train__shuffle=True,
        **arguments,
    )  # fmt: skip


def fitted(*callbacks: Any, **arguments: Any) -> NeuralNetClassifier:
    torch.manual_seed(0)
    return net(*callbacks, **arguments).fit(*data())


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_watched_fit_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    alone = fitted()
    watched = fitted(BatchNormCallback(log=tmp_path, every=5, budget=NO_LIMIT))
    assert same(watched.module_, alone.module_)
    run = watched.callbacks_[-2][1].run_
    assert run.steps == 36
    assert {record.tier for record in run.records} == {"free", "probe"}
    log = Log(tmp_path)
    assert log.rows("end")[0]["reason"] == "finished"
    assert 0.3 < log.rows("progress")[-1]["values"]["loss"] < 3


def test_the_callback_is_cloned_and_tuned_as_scikit_learn_does() -> None:
    twin = clone(net(BatchNormCallback(every=7, probe=False)))
    assert twin.callbacks[0].every == 7
    twin.set_params(callbacks__BatchNormCallback__every=9)
    twin.fit(*data())
    assert dict(twin.callbacks_)["BatchNormCallback"].every == 9
    assert clone(twin).callbacks[0].get_params()["probe"] is False


def test_statistics_are_those_of_the_examples_that_were_trained_on() -> None:
    class Seen(Callback):
        def on_epoch_begin(self, net: Any, dataset_train: Any = None, **_: Any) -> None:
            self.seen_ = torch.stack([torch.as_tensor(x) for x, _ in dataset_train])

    alone, fit = fitted(), fitted(BatchNormCallback(recalibrate=True), Seen())
    parameters = dict(alone.module_.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in fit.module_.named_parameters())
    seen = dict(fit.callbacks_)["Seen"].seen_
    assert len(seen) == 96
    measured = {name: buffer.clone() for name, buffer in fit.module_.named_buffers()}
    bn.recalibrate(fit.module_, [seen])
    for name, buffer in fit.module_.named_buffers():
        if "running" in name:
            torch.testing.assert_close(measured[name], buffer, rtol=1e-5, atol=1e-6)


def test_frozen_layers_stay_frozen() -> None:
    module = fitted(BatchNormCallback(recalibrate=True), module=FrozenStem).module_
    assert isinstance(module.stem[1], Frozen)
    assert int(module.stem[1].num_batches_tracked) == 0
    assert int(module.body[1].num_batches_tracked) == 12  # batches of 8 of the 96 that were measured on


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_fit_that_is_interrupted_can_be_continued(error: type[BaseException], tmp_path: Path) -> None:
    class Broken(Callback):
        def on_epoch_end(self, net: Any, **_: Any) -> None:
            if len(net.history) == 1:
                raise error

    torch.manual_seed(0)
    fit = net(BatchNormCallback(log=tmp_path, every=5, probe=False), Broken())
    if error is KeyboardInterrupt:
        fit.fit(*data())  # which skorch takes for an end
    else:
        with pytest.raises(ZeroDivisionError):
            fit.fit(*data())
    fit.partial_fit(*data())
    reasons = [row["reason"] for row in Log(tmp_path).rows("end")]
    assert reasons == ["finished" if error is KeyboardInterrupt else "interrupted", "finished"]
    assert Log(tmp_path).step == 48
