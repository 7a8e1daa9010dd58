"""Every public entrance: models whose tensors have no numbers, and arguments of a wrong type."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tensor_kinds import freed
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.argument_types import require_flag, require_number, require_whole_number
from batchnorm.population.batches import call

if TYPE_CHECKING:
    from collections.abc import Callable


class Scaled(nn.Module):
    """Uses a parameter of another module, whose own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.of.weight)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.Flatten(), nn.Linear(216, 6), Scaled()
    ).eval()  # fmt: skip


def batches() -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8) for _ in range(2)]


def trained(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="watch saw no step")
        with bn.watch(net.train()):
            for x in batches():
                optimizer.zero_grad()
                net(x).sum().backward()
                optimizer.step()


def served(monitor: bn.ShiftMonitor, by: Any) -> None:
    with torch.no_grad(), by:
        monitor.model(batches()[0])


def monitored(net: nn.Module) -> None:
    monitor = bn.ShiftMonitor(net)
    served(monitor, monitor)


def followed(net: nn.Module) -> None:
    monitor = bn.ShiftMonitor(net)
    served(monitor, bn.Adapter(monitor))


def used(net: nn.Module) -> None:
    with bn.adapted(net, batches()):
        pass


# what runs a model
RUNNING: dict[str, Callable[[Any], object]] = {
    "recalibrate": lambda net: bn.recalibrate(net, batches()),
    "recalibrate at once": lambda net: bn.recalibrate(net, batches(), exact=False),
    "recalibrate by a forward": lambda net: bn.recalibrate(net, batches(), forward=lambda net, x: net(x)),
    "adapt": lambda net: bn.adapt(net, batches()),
    "adapt by an average": lambda net: bn.adapt(net, batches(), ema=0.5),
    "adapted": used,
    "DomainBank": lambda net: bn.DomainBank(net).add("night", batches()),
    "calibrate": lambda net: bn.ShiftMonitor(net).calibrate(batches()),
    "ShiftMonitor": monitored,
    "Adapter": followed,
    "probe": lambda net: bn.probe(net, batches()[0]),
    "watch": trained,
    "examine": lambda net: bn.examine(net, batches()),
    "treat": lambda net: bn.treat(net, data=batches()),
    "convert": lambda net: bn.convert(net, fuse=True, example=batches()[0]),
    "convert in place": lambda net: bn.convert(net, fuse=True, example=batches()[0], inplace=True),
    "fold": lambda net: bn.fold(net, batches()[0], report=None),
    "fold in place": lambda net: bn.fold(net, batches()[0], report=None, inplace=True),
    "for_export": lambda net: bn.for_export(net, fold=True, example=batches()[0]),
}
# what copies one
COPYING: dict[str, Callable[[Any], object]] = {
    "convert without an example": bn.convert,
    "revert": bn.revert,
    "for_export without fold": bn.for_export,
    "unfold": bn.unfold,
    "replace": lambda net: bn.replace(net, lambda path, layer: None),
    "to_group_norm": bn.to_group_norm,
}
PLACES = ["0.weight", "0.bias", "1.weight", "1.running_var", "2.weight", "4.bias", "5.of.weight"]


def tensor_at(net: nn.Module, place: str) -> Tensor:
    return dict([*net.named_parameters(), *net.named_buffers()])[place]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("entrance", [*RUNNING, *COPYING])
def test_memory_that_was_given_back_is_told_by_name(entrance, place):
    net = model()
    freed(tensor_at(net, place))
    with pytest.raises(ValueError if place != "5.of.weight" else Exception) as caught:
        ({**RUNNING, **COPYING}[entrance])(net)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert f"{place!r}, got a tensor that has given its memory back. Use its full_tensor()" in told


@pytest.mark.parametrize("part", ["", "0", "1", "4"])
@pytest.mark.parametrize("entrance", RUNNING)
def test_a_part_on_the_meta_device_is_told_by_name(entrance, part):
    net = model()
    net.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match=rf"'{part}.*got a tensor that is on the meta device .* Load its values first"):
        RUNNING[entrance](net)


@pytest.mark.parametrize("part", ["all", "weight", "batch norm"])
@pytest.mark.parametrize("entrance", RUNNING)
def test_a_model_of_fake_tensors_is_refused(entrance, part):
    net, mode = model(), FakeTensorMode(allow_non_fake_inputs=True)
    if part == "all":
        with mode:
            net = model()
    elif part == "weight":
        with mode:
            net[0].weight = nn.Parameter(torch.randn(6, 3, 3, 3))
    else:
        with mode:
            net[1] = nn.BatchNorm2d(6).eval()
    with pytest.raises(ValueError, match=r"needs the numbers of '[01]\.\w+', got a tensor that is fake"):
        RUNNING[entrance](net)


@pytest.mark.parametrize("kind", ["fake", "meta", "freed"])
@pytest.mark.parametrize("entrance", ["recalibrate", "adapt", "examine", "calibrate", "probe", "watch"])
def test_a_batch_without_numbers_is_refused(entrance, kind):
    net, x = model(), torch.randn(8, 3, 8, 8)
    x = {"fake": FakeTensorMode().from_tensor, "meta": lambda x: x.to("meta"), "freed": freed}[kind](x)
    enter: Any = {
        "calibrate": lambda net, data: bn.ShiftMonitor(net).calibrate(data),
        "probe": lambda net, data: bn.probe(net, data[0]),
        "watch": lambda net, data: bn.watch(net, probe=data[0]),
    }
    with pytest.raises(ValueError, match=rf"^{entrance} needs batches with numbers, got a tensor that (is|has)"):
        enter.get(entrance, getattr(bn, entrance, None))(net, [x])


def test_a_trace_through_an_observed_model_counts_for_nothing():
    net, mode = model(), FakeTensorMode(allow_non_fake_inputs=True)
    run = bn.watch(net.train(), every=1, budget=1e9).start()
    with mode:
        net(torch.randn(8, 3, 8, 8))
    assert run._probe is None
    net(torch.randn(8, 3, 8, 8))
    assert run._probe is not None
    with pytest.warns(RuntimeWarning, match="watch saw no step"):
        run.stop()


class Fetching(nn.Linear):
    """Brings its weight back by itself, as offloading does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.weight.untyped_storage().nbytes():
            self.weight.untyped_storage().resize_(4 * self.weight.numel())
            with torch.no_grad():
                self.weight.fill_(0.5)
        return super().forward(x)


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_memory_that_is_fetched_for_a_pass_is_no_reason_to_refuse(how):
    net = nn.Sequential(Fetching(3, 4) if how == "forward" else nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    freed(net[0].weight)
    if how == "hook":

        def fetch(module: nn.Module, _: Any) -> None:
            module.weight.untyped_storage().resize_(48)
            module.weight.data.fill_(0.5)

        net[0].register_forward_pre_hook(fetch)
    x = torch.randn(64, 3)
    with torch.no_grad():
        expected = (0.5 * x.double().sum(1, keepdim=True) + net[0].bias.double()).mean(0)
    found = bn.recalibrate(net, [x])["1"].mean
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)  # float32 sums of 3 numbers
    with bn.ShiftMonitor(net) as monitor, torch.no_grad():
        net(x)
    assert monitor.stream.looked


def test_a_mistake_of_another_kind_is_not_taken_for_absent_numbers():
    net = model()
    freed(net[4].weight)
    with pytest.raises(ValueError, match="channels"):  # before the layer that lacks its weight
        call(net, torch.randn(8, 5, 8, 8))


@pytest.mark.parametrize("exact", [True, False])
def test_statistics_that_were_made_in_inference_mode_are_measured(exact):
    net = model()
    with torch.inference_mode():
        net[1].running_mean, net[1].running_var = torch.zeros(6), torch.ones(6)
        net[1].num_batches_tracked = torch.tensor(3)
    data = batches()
    found = bn.recalibrate(net, data, exact=exact)["1"]
    assert torch.allclose(net[1].running_mean.double(), found.mean, rtol=1e-6, atol=0)
    assert int(net[1].num_batches_tracked) == 2


def test_a_monitor_says_of_a_lazy_model_that_it_has_no_shape():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(
        ValueError, match=r"ShiftMonitor needs the numbers of '0\.weight', got a tensor that has no shap"
    ):
        bn.ShiftMonitor(net)
    bank = bn.DomainBank(net)
    assert bank.current == "stored"


REPLICATED = """
import os, sys, torch, torch.distributed as d, batchnorm as bn
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor, init_device_mesh
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
d.init_process_group("gloo", rank=0, world_size=1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
mesh = init_device_mesh("cpu", (1,))
def spread(name, module, mesh):
    for table in (module._parameters, module._buffers):
        for key, value in table.items():
            shared = distribute_tensor(value.detach(), mesh, [Replicate()])
            table[key] = nn.Parameter(shared) if table is module._parameters else shared
data = [torch.randn(8, 3, 8, 8) for _ in range(30)]
plain = bn.ShiftMonitor(model, budget=None)
with plain, torch.no_grad():
    for x in data: model(x)
distribute_module(model, mesh, spread)
monitor = bn.ShiftMonitor(model, budget=None)
shared = [distribute_tensor(x, mesh, [Replicate()]) for x in data]
with monitor, torch.no_grad():
    for x in shared: model(x)
assert monitor.stream.looked == plain.stream.looked == 120
print(monitor.log_evidence == plain.log_evidence)
try:
    bn.recalibrate(model, data)
except ValueError as error:
    print(error)
d.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_of_tensors_that_each_rank_has_is_monitored_as_a_plain_one():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    port = str(20000 + (os.getpid() + 7) % 20000)
    done = subprocess.run([sys.executable, "-c", REPLICATED, port], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        "True",
        "a pass needs inputs of the kind of '0.weight', a DTensor, got others. Distribute the inputs, or use "
        "the tensor's full_tensor().",
    ], done.stderr[-2000:]


# -- arguments of a wrong type ------------------------------------------------------------------------------------


def of_words() -> Any:
    return (word for word in ("a",))


WRONG: dict[str, Callable[[], Any]] = {
    "int": lambda: 7,
    "None": lambda: None,
    "str": lambda: "model",
    "list": lambda: [torch.randn(8, 3, 8, 8)],
    "class": lambda: nn.BatchNorm2d,
    "DataLoader": lambda: DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), 4),
    "dict": lambda: {"a": 1},
    "tensor": lambda: torch.randn(8, 3, 8, 8),
    "float": lambda: 1.5,
    "model": model,
    "generator": of_words,
    "object": object,
    "function": lambda: of_words,
}
LOADER = ("list", "DataLoader")
A_BATCH = ("list", "tensor")
FLAG: tuple[str, ...] = ()
NUMBER = ("int", "float")


def added(output: Tensor, _micro: object) -> Tensor:
    return output.sum()


def entered(block: Any) -> None:
    with block:
        pass


# entrance, what it is given in the place in question, and what is right there
FIRST: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "recalibrate": (lambda it: bn.recalibrate(it, batches()), ("model",)),
    "adapt": (lambda it: bn.adapt(it, batches()), ("model",)),
    "adapted": (lambda it: entered(bn.adapted(it, batches())), ("model",)),
    "DomainBank": (bn.DomainBank, ("model",)),
    "ShiftMonitor": (bn.ShiftMonitor, ("model",)),
    "Adapter": (bn.Adapter, ()),
    "broadcast_statistics": (bn.broadcast_statistics, ("model",)),
    "check_replicas": (bn.check_replicas, ("model",)),
    "convert": (bn.convert, ("model",)),
    "data_statistics": (bn.data_statistics, ("str",)),
    "examine": (bn.examine, ("model", "str")),
    "find": (bn.find, ("model",)),
    "fold": (lambda it: bn.fold(it, batches()[0], report=None), ("model",)),
    "for_export": (bn.for_export, ("model",)),
    "freeze": (bn.freeze, ("model",)),
    "frozen": (lambda it: entered(bn.frozen(it)), ("model",)),
    "merge_statistics": (bn.merge_statistics, ()),
    "padding": (lambda it: entered(bn.padding(it, [2, 2])), ("model",)),
    "parameter_groups": (lambda it: bn.parameter_groups(it, 0.1), ("model",)),
    "preserve_state": (lambda it: entered(bn.preserve_state(it)), ("model",)),
    "probe": (lambda it: bn.probe(it, batches()[0]), ("model",)),
    "replace": (lambda it: bn.replace(it, lambda path, layer: None), ("model",)),
    "revert": (bn.revert, ("model",)),
    "step": (lambda it: entered(bn.step(it)), ("model",)),
    "step_backward": (lambda it: bn.step_backward(it, batches(), added), ("model",)),
    "to_group_norm": (bn.to_group_norm, ("model",)),
    "treat": (bn.treat, ("model",)),
    "unfold": (bn.unfold, ("model",)),
    "unfreeze": (bn.unfreeze, ("model",)),
    "watch": (bn.watch, ("model",)),
    "BatchNorm1d": (bn.BatchNorm1d, ("int",)),
    "BatchNorm2d": (bn.BatchNorm2d, ("int",)),
    "BatchNorm3d": (bn.BatchNorm3d, ("int",)),
    "LazyBatchNorm1d": (bn.LazyBatchNorm1d, NUMBER),
    "LazyBatchNorm2d": (bn.LazyBatchNorm2d, NUMBER),
    "LazyBatchNorm3d": (bn.LazyBatchNorm3d, NUMBER),
    "InputNorm": (bn.InputNorm, ("int",)),
    "Ramp": (lambda it: bn.Ramp(it, 3, -1, 99), NUMBER),
    "Renorm": (bn.Renorm, (*NUMBER, "class", "function")),
    "Moments": (lambda it: bn.Moments(it, torch.zeros(3), torch.zeros(3)), ("int", "float")),
}
SECOND: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "recalibrate": (lambda it: bn.recalibrate(model(), it), LOADER),
    "recalibrate, exact": (lambda it: bn.recalibrate(model(), batches(), exact=it), FLAG),
    "recalibrate, forward": (lambda it: bn.recalibrate(model(), batches(), forward=it), ("None", "class", "function")),
    "recalibrate, max_examples": (lambda it: bn.recalibrate(model(), batches(), it), ("int", "None")),
    "adapt": (lambda it: bn.adapt(model(), it), LOADER),
    "adapt, prior": (lambda it: bn.adapt(model(), batches(), prior=it), (*NUMBER, "None")),
    "adapted": (lambda it: entered(bn.adapted(model(), it)), LOADER),
    "calibrate": (lambda it: bn.ShiftMonitor(model()).calibrate(it), ()),
    "ShiftMonitor": (lambda it: bn.ShiftMonitor(model(), it), ()),
    "Adapter": (lambda it: bn.Adapter(bn.ShiftMonitor(model()), prior=it), NUMBER),
    "broadcast_statistics": (lambda it: bn.broadcast_statistics(model(), it), ()),
    "broadcast_statistics, group": (lambda it: bn.broadcast_statistics(model(), group=it), ("None",)),
    "check_replicas": (lambda it: bn.check_replicas(model(), it), ("None",)),
    "convert": (lambda it: bn.convert(model(), fuse=it), FLAG),
    "convert, sync": (lambda it: bn.convert(model(), sync=it), ("None",)),
    "convert, process_group": (lambda it: bn.convert(model(), process_group=it), ("None",)),
    "convert, example": (lambda it: bn.convert(model(), example=it), (*A_BATCH, "None")),
    "data_statistics, columns": (lambda it: bn.data_statistics("no.csv", columns=it), ("str",)),
    "data_statistics, by": (lambda it: bn.data_statistics("no.csv", by=it), ("str",)),
    "data_statistics, options": (lambda it: bn.data_statistics("no.csv", options=it), ("None",)),
    "data_statistics, engine": (lambda it: bn.data_statistics("no.csv", engine=it), ()),
    "data_statistics, workers": (lambda it: bn.data_statistics("no.csv", workers=it), ("int", "None")),
    "data_statistics, ledger": (lambda it: bn.data_statistics("no.csv", ledger=it), ("None", "str")),
    "data_statistics, progress": (
        lambda it: bn.data_statistics("no.csv", progress=it),
        ("None", "class", "function"),
    ),
    "examine": (lambda it: bn.examine(model(), it), (*LOADER, "None")),
    "fold": (lambda it: bn.fold(model(), it, report=None), A_BATCH),
    "for_export": (lambda it: bn.for_export(model(), fold=it), FLAG),
    "freeze": (lambda it: bn.freeze(model(), it), FLAG),
    "frozen": (lambda it: entered(bn.frozen(model(), it)), FLAG),
    "merge_statistics": (lambda it: bn.merge_statistics([model(), model()], it), ("None",)),
    "merge_statistics, local": (lambda it: bn.merge_statistics([model()] * 2, local=it), ()),
    "merge_statistics, correction": (lambda it: bn.merge_statistics([model()] * 2, correction=it), ()),
    "parameter_groups": (lambda it: bn.parameter_groups(model(), it), NUMBER),
    "parameter_groups, biases": (lambda it: bn.parameter_groups(model(), 0.1, decay_biases=it), FLAG),
    "parameter_groups, frozen": (lambda it: bn.parameter_groups(model(), 0.1, frozen=it), FLAG),
    "probe": (lambda it: bn.probe(model(), it), A_BATCH),
    "padding": (
        lambda it: entered(bn.padding(bn.convert(model()), [2, 2], rule=it)),
        ("None", "class", "function"),
    ),
    "replace": (lambda it: bn.replace(model(), it), ("class", "function")),
    "revert": (lambda it: bn.revert(model(), inplace=it), FLAG),
    "step_backward": (lambda it: bn.step_backward(bn.convert(model()).train(), it, added), LOADER),
    "step_backward, loss": (
        lambda it: bn.step_backward(bn.convert(model()).train(), batches(), it),
        ("class", "function"),
    ),
    "step_backward, segments": (
        lambda it: bn.step_backward(bn.convert(model()).train(), batches(), added, segments=it),
        ("int",),
    ),
    "to_group_norm": (lambda it: bn.to_group_norm(model(), it), ("None",)),
    "treat": (lambda it: bn.treat(model(), it), ("None",)),
    "treat, data": (lambda it: bn.treat(model(), data=it), (*LOADER, "None")),
    "unfold": (lambda it: bn.unfold(model(), inplace=it), FLAG),
    "watch": (lambda it: bn.watch(model(), log=it), ("None", "str")),
    "watch, probe": (lambda it: bn.watch(model(), probe=it), (*A_BATCH, "None")),
    "BatchNorm1d": (partial(bn.BatchNorm1d, 3), NUMBER),
    "BatchNorm2d": (partial(bn.BatchNorm2d, 3), NUMBER),
    "BatchNorm3d": (partial(bn.BatchNorm3d, 3), NUMBER),
    "LazyBatchNorm1d": (lambda it: bn.LazyBatchNorm1d(axis=it), ("int",)),
    "LazyBatchNorm2d": (lambda it: bn.LazyBatchNorm2d(axis=it), ("int",)),
    "LazyBatchNorm3d": (lambda it: bn.LazyBatchNorm3d(axis=it), ("int",)),
    "InputNorm": (partial(bn.InputNorm, 3), ("int",)),
    "Ramp": (lambda it: bn.Ramp(1, it, -1, 99), NUMBER),
    "Renorm": (lambda it: bn.Renorm(3, it), (*NUMBER, "class", "function")),
    "Moments": (lambda it: bn.Moments(torch.ones(()), it, torch.zeros(())), NUMBER),
}
# of a right type, with a value that cannot be
OUT_OF_RANGE = {
    ("broadcast_statistics", "int"),
    ("data_statistics, engine", "str"),
    ("InputNorm", "None"),  # the size of no axis
    ("examine", "generator"),  # of words
    ("treat, data", "generator"),
    ("merge_statistics, local", "str"),
    ("merge_statistics, local", "dict"),
    ("merge_statistics, local", "generator"),
    ("merge_statistics, correction", "int"),
    ("calibrate", "list"),
    ("calibrate", "DataLoader"),
    ("ShiftMonitor", "int"),
    ("ShiftMonitor", "float"),
    ("to_group_norm", "int"),
    ("Moments", "tensor"),
}
# single numbers: which of require_number, require_whole_number and require_flag must let them through
SINGLE: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "int": (lambda: 3, {"number", "whole"}),
    "0": (lambda: 0, {"number", "whole", "flag"}),
    "float": (lambda: 2.0, {"number"}),
    "bool": (lambda: True, {"flag"}),
    "complex": (lambda: 1j, set()),
    "Fraction": (lambda: Fraction(1, 2), {"number"}),
    "integer tensor": (lambda: torch.tensor(2), {"number", "whole"}),
    "float tensor": (lambda: torch.tensor(1.5), {"number"}),
    "half parameter": (lambda: nn.Parameter(torch.tensor(1.0, dtype=torch.float16)), {"number"}),
    "bool tensor": (lambda: torch.tensor(True), set()),
    "complex tensor": (lambda: torch.tensor(1j), set()),
    "integer tensor of one value": (lambda: torch.tensor([2]), set()),
    "float tensor of one value": (lambda: torch.tensor([1.5]), set()),
    "integer array": (lambda: np.array(2), {"number", "whole"}),
    "float array": (lambda: np.array(1.5), {"number"}),
    "bool array": (lambda: np.array(True), set()),
    "complex array": (lambda: np.array(1j), set()),
    "text array": (lambda: np.array("3"), set()),
    "object array": (lambda: np.array(None), set()),
    "integer array of one value": (lambda: np.array([2]), set()),
    "NumPy integer": (lambda: np.uint8(3), {"number", "whole"}),
    "NumPy 1": (lambda: np.int64(1), {"number", "whole", "flag"}),
    "NumPy float": (lambda: np.float32(1.5), {"number"}),
    "NumPy bool": (lambda: np.bool_(True), {"flag"}),
    "NumPy complex": (lambda: np.complex64(1j), set()),
    "NumPy text": (lambda: np.str_("3"), set()),
    "NumPy date": (lambda: np.datetime64("2020-01-01"), set()),
    "NumPy duration": (lambda: np.timedelta64(3, "D"), set()),
}
NOT_CALLED = {"__version__", "tune_allocator"}  # which take nothing


def test_the_tables_name_every_public_name():
    assert set(FIRST) == set(bn.__all__) - NOT_CALLED
    one_argument = {"DomainBank", "find", "preserve_state", "step", "unfreeze"}
    assert {name.partition(",")[0] for name in SECOND} - {"calibrate"} == set(FIRST) - one_argument


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(
    ("name", "place"), [*((name, "first") for name in FIRST), *((name, "second") for name in SECOND)]
)
def test_an_argument_of_a_wrong_type_is_told(name, place, kind):
    enter, right = (FIRST if place == "first" else SECOND)[name]
    if kind in right:
        return
    with pytest.raises((TypeError, ValueError), match=r", got .+\. [A-Z]") as caught:
        enter(WRONG[kind]())
    assert caught.traceback[-1].path.name != "test_entrances.py"
    assert isinstance(caught.value, TypeError) or (name, kind) in OUT_OF_RANGE, caught.value


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("check", ["number", "whole", "flag"])
def test_a_single_number_is_judged_by_what_it_is(check, kind):
    make, allowed = SINGLE[kind]
    require = {
        "number": lambda it: require_number(it, "eps", "Use 1e-5."),
        "whole": lambda it: require_whole_number(it, "size", "Use 3."),
        "flag": lambda it: require_flag(it, "exact"),
    }[check]
    if check in allowed:
        require(make())
        return
    with pytest.raises(TypeError, match=r" must be (a number|a whole number|True or False), got .+\. [A-Z]"):
        require(make())


def test_a_float_tensor_is_no_number_of_channels_and_a_flag_is_no_eps():
    with pytest.raises(TypeError, match=r"num_features must be a whole number, got Tensor"):
        bn.BatchNorm1d(torch.tensor(1.5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"eps must be a number, got bool"):
        bn.BatchNorm1d(3, True)
    assert bn.BatchNorm1d(torch.tensor(3)).num_features == 3  # type: ignore[arg-type]
