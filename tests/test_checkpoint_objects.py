"""Objects beside a state, and modules that were pickled whole: read as data, or named as unread."""

from __future__ import annotations

import argparse
import collections
import copy
import copyreg
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import ipaddress
import itertools
import operator
import pathlib
import pickle
import random
import re
import types
import typing
import uuid
from array import array as plain_array

import numpy as np
import pytest
import torch
from checkpoint_files import legacy, optimizer, saved, trained
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint import Checkpoint, read
from batchnorm.doctor import examine
from batchnorm.doctor.mending.mended_checkpoint import plan

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")


def reading(tmp_path, data: bytes, name: str = "c.pt") -> Checkpoint:
    (tmp_path / name).write_bytes(data)
    return read(tmp_path / name)


class Colour(enum.Enum):
    RED = 1
    BLUE = "blue"
    PAIR = (1, "a")


class Ordered(collections.OrderedDict):
    """A dict with methods of its own."""


class Attributes(dict):
    __getattr__ = dict.get


class Items(list):
    """A list with methods of its own."""


class Lists(collections.defaultdict):
    """A dict that makes its values, with methods of its own."""


class Counts(collections.Counter):
    """A Counter with methods of its own."""


class Recent(collections.deque):
    """A deque with methods of its own."""


class ByNames:
    """Made by arguments with names."""

    def __new__(cls, **_):
        return object.__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"a": 1}


class Counted:
    """Asks for a Counter of what is no dict."""

    def __reduce__(self):
        return collections.Counter, (range(3),)


class Members(set):
    """A set with methods of its own."""


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    path: pathlib.PurePath | None = None
    inner: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    lr: float = 0.1


Pair = collections.namedtuple("Pair", "state epoch")


class Reducing(dict):
    """Pickled as protocol 1 has it."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        return copyreg._reconstructor, (Reducing, dict, {"a": 1}), {"b": 2}


def schedule() -> object:
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), 3)


PLAIN = {
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "complex": 1 + 2j,
    "bytes": b"a",
    "bytearray": bytearray(b"a"),
    "class": Settings,
    "function": trained,
    "deque": collections.deque([1, 2], maxlen=3),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "Counter": collections.Counter("aab"),
    "Counter of numbers": collections.Counter(range(3)),
    "a call of Counter": Counted(),
    "random state": random.getstate(),
    "size": torch.Size([1]),
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "layout": torch.strided,
    "array": np.ones(3),
    "array in Fortran's order": np.asfortranarray(np.ones((3, 4))),
    "array of the other order": np.ones(3, dtype=">f4"),
    "array without values": np.zeros((0, 3)),
    "array of one value": np.array(3.0),
    "NumPy's float": np.float64(3),
    "NumPy's int": np.int64(3),
    "NumPy's bool": np.bool_(True),
    "NumPy's text": np.str_("a"),
    "NumPy's dtype": np.dtype("f4"),
    "NumPy's state": np.random.RandomState(1).get_state(),
    "loss": nn.MSELoss(),
    "loss with a weight": nn.CrossEntropyLoss(weight=torch.ones(3)),
    "lazy module": nn.LazyLinear(3),
    "type": typing.Optional[int],  # noqa: UP045 - it is the older way that is pickled so
    "meta": torch.ones(2, device="meta"),
    "complex tensor": torch.ones(2, dtype=torch.complex64),
}
TOLD = {
    "builtins.range": range(3),
    "builtins.slice": slice(1),
    "builtins.type": type(None),
    "types.GenericAlias": dict[str, int],
    "argparse.Namespace": argparse.Namespace(lr=0.1),
    "pathlib.PurePosixPath": pathlib.PurePosixPath("a/b"),
    "pathlib.PureWindowsPath": pathlib.PureWindowsPath("c:/a"),
    f"pathlib.{type(pathlib.Path()).__name__}": pathlib.Path("a"),
    "fractions.Fraction": fractions.Fraction(1, 3),
    "decimal.Decimal": decimal.Decimal("1.5"),
    "datetime.datetime": dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
    "datetime.date": dt.date(2020, 1, 1),
    "datetime.timedelta": dt.timedelta(1),
    "uuid.UUID": uuid.UUID(int=1),
    "re._compile": re.compile("a"),
    "random.Random": random.Random(1),
    "functools.partial": functools.partial(trained, 1),
    "types.SimpleNamespace": types.SimpleNamespace(a=1),
    "collections.ChainMap": collections.ChainMap({"a": 1}),
    "builtins.ValueError": ValueError("a"),
    "numpy.random.RandomState": np.random.RandomState(1),
    "numpy.random.Generator": np.random.default_rng(1),
    "numpy.random.BitGenerator": np.random.PCG64(1),
    "numpy.random.SeedSequence": np.random.SeedSequence(1),
    "numpy.ma.MaskedArray": np.ma.masked_array([1, 2], [0, 1]),
    "numpy.ndarray of a type that is not read": np.array([1, None, {}], dtype=object),
    f"{__name__}.Colour": [Colour.RED, Colour.BLUE, Colour.PAIR],
    f"{__name__}.Ordered": [Ordered(a=1), Ordered()],
    f"{__name__}.Attributes": Attributes(a=1),
    f"{__name__}.Items": Items([1, 2]),
    f"{__name__}.Members": Members([1, 2]),
    f"{__name__}.Lists": [Lists(list, {"a": [1]}), Lists(None), Lists(Settings), Lists(collections.OrderedDict)],
    f"{__name__}.Counts": [Counts("aab"), Counts(range(3)), Counts({(1, 2): 3})],
    f"{__name__}.Recent": [Recent([1, 2]), Recent([3], maxlen=2)],
    f"{__name__}.ByNames": ByNames(),
    "torch._C.Generator": torch.Generator(),
    "array.array": plain_array("d", [1.5]),
    "decimal.Context": decimal.Context(),
    "ipaddress.IPv4Address": ipaddress.ip_address("127.0.0.1"),
    "builtins.iter": [iter([1]), iter({"a": 1})],
    "builtins.reversed": reversed([1]),
    "builtins.enumerate": enumerate([1]),
    "itertools.repeat": itertools.repeat(3),
    "operator.methodcaller": operator.methodcaller("upper"),
    f"{__name__}.Settings": Settings(inner=Settings()),
    f"{__name__}.Slots": Slots(),
    f"{__name__}.Pair": Pair(1, 2),
    f"{__name__}.Reducing": Reducing(),
    "torch.optim.adam.Adam": optimizer(),
    "torch.optim.lr_scheduler.StepLR": schedule(),
    "torch.amp.grad_scaler.GradScaler": torch.amp.GradScaler("cpu"),
}
EVERY_WAY = pytest.mark.parametrize(
    "write",
    [saved, lambda v: saved(v, pickle_protocol=5), legacy, pickle.dumps, lambda v: pickle.dumps(v, 2)],
    ids=["zip", "zip 5", "legacy", "pickle", "pickle 2"],
)


@EVERY_WAY
@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_values_beside_a_state_are_no_hindrance(tmp_path, write, value):
    result = reading(tmp_path, write({"net": trained().state_dict(), "other": value, "more": [value, (value,)]}))
    assert list(result.layers) == ["1", "2.1"]
    assert result.unread == ()


@EVERY_WAY
@pytest.mark.parametrize(("name", "value"), TOLD.items(), ids=TOLD)
def test_objects_beside_a_state_are_left_unread_by_name(tmp_path, write, name, value):
    if name == "builtins.ValueError" and write is not pickle.dumps:
        name = "exceptions.ValueError"  # as Python 2 called it
    result = reading(tmp_path, write({"net": trained().state_dict(), "other": value, "more": [value, (value,)]}))
    assert list(result.layers) == ["1", "2.1"]
    assert result.unread[0].replace("builtins", "exceptions") == name.replace("builtins", "exceptions")


@EVERY_WAY
def test_tensors_inside_an_object_are_found_and_it_counts_as_read(tmp_path, write):
    state = trained().state_dict()
    for holder in (
        argparse.Namespace(net=state),
        Pair(state, 3),
        Settings(inner=[state]),
        Attributes(net=state),
        Lists(list, net=state),
    ):
        result = reading(tmp_path, write({"run": holder, "args": argparse.Namespace(a=1)}))
        assert list(result.layers) == ["1", "2.1"]
        assert result.unread == ("argparse.Namespace",)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)
        self.note = argparse.Namespace(a=1)


class Frozen(nn.Module):
    """Four buffers, as other libraries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 7e-4
        for key, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 2.0)):
            self.register_buffer(key, torch.full((3,), value))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        Block(3), nn.Sequential(Block(3)), Frozen(), nn.BatchNorm2d(3, momentum=None), bn.BatchNorm2d(3, act="relu")
    )
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer(torch.randn(4, 3, 2, 2))
    return net


SETTINGS = {
    "0.bn": (1e-3, 0.03),
    "1.0.bn": (1e-3, 0.03),
    "2": (7e-4, None),
    "3": (1e-5, None),
    "4": (1e-5, 0.1),
}


def assert_same(whole: Checkpoint, state: Checkpoint) -> None:
    """All but eps and momentum."""
    assert list(whole.layers) == list(state.layers)
    for name, stored in whole.layers.items():
        plain = state.layers[name]
        assert dataclasses.replace(stored, eps=None, momentum=None) == plain


@EVERY_WAY
def test_a_whole_module_is_read_as_its_state_with_eps_and_momentum(tmp_path, write):
    net = network()
    whole = reading(tmp_path, write(net))
    assert_same(whole, reading(tmp_path, write(net.state_dict())))
    assert {name: (stored.eps, stored.momentum) for name, stored in whole.layers.items()} == SETTINGS
    assert whole.names == ("0.conv.weight", "0.conv.bias", "1.0.conv.weight", "1.0.conv.bias")
    assert whole.unread == ()


@EVERY_WAY
def test_whole_modules_in_a_checkpoint_are_its_copies(tmp_path, write):
    net = network()
    average = copy.deepcopy(net)
    average[0].bn.eps = 0.5
    result = reading(tmp_path, write({"epoch": 3, "model": net, "ema": average.half(), "optimizer": optimizer()}))
    assert list(result.copies) == ["model", "ema"]
    assert [copied["0.bn"].eps for copied in result.copies.values()] == [1e-3, 0.5]
    assert result.copies["ema"]["0.bn"].dtypes["running_var"] == "float16"
    assert result.unread == ("torch.optim.adam.Adam",)


class Trainer:
    def __init__(self, net: nn.Module) -> None:
        self.model = net
        self.lr = 0.1


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda net: net, ""),
        (nn.DataParallel, "module."),
        (torch.optim.swa_utils.AveragedModel, "module."),
        (lambda net: [net], "0."),
        (Trainer, "model."),
        (lambda net: {"model": net, "same": net}, "model."),
        (lambda net: nn.ModuleDict({"module": net}), "module."),
    ],
)
def test_wrapped_modules_have_their_own_names(tmp_path, wrap, prefix):
    result = reading(tmp_path, saved(wrap(network())))
    assert list(result.layers) == list(SETTINGS)
    assert result.prefix == prefix
    assert result.layers["0.bn"].eps == 1e-3


def test_a_part_of_a_module_beside_it_has_its_names_in_any_order(tmp_path):
    net = network()
    for value in ({"part": net[1], "net": net}, {"net": net, "part": net[1]}):
        layers = reading(tmp_path, saved(value)).layers
        assert {name: layers[f"net.{name}"].eps for name in SETTINGS} == {n: eps for n, (eps, _) in SETTINGS.items()}
        assert layers["part.0.bn"].eps == 1e-3


def test_a_layer_that_is_a_file_of_its_own_has_no_name(tmp_path):
    stored = reading(tmp_path, saved(nn.BatchNorm1d(3, eps=0.1, momentum=0.5))).layers[""]
    assert (stored.eps, stored.momentum, stored.channels) == (0.1, 0.5, 3)


@pytest.mark.parametrize("eps", ["a", True, None, [1e-3], float("nan"), 10**400])
def test_settings_that_are_no_numbers_are_not_known(tmp_path, eps):
    layer = nn.BatchNorm1d(3)
    layer.eps = eps
    assert reading(tmp_path, saved(layer)).layers[""].eps is None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("turn", [np.ascontiguousarray, np.asfortranarray, lambda a: a.astype(a.dtype.newbyteorder())])
@pytest.mark.parametrize("write", [pickle.dumps, lambda v, protocol: saved(v, pickle_protocol=protocol)])
def test_arrays_have_the_numbers_that_were_saved(tmp_path, protocol, turn, write):
    state = trained().state_dict()
    arrays = {"model": {name: turn(tensor.numpy()) for name, tensor in state.items()}, "author": "somebody"}
    assert_same(reading(tmp_path, write(arrays, protocol=protocol), "c.pkl"), reading(tmp_path, saved(state)))


def test_axes_of_arrays_keep_their_order(tmp_path):
    values = np.arange(6.0).reshape(1, 6, 1)
    for array in (values, np.asfortranarray(values), np.arange(12.0).reshape(6, 2)[:, :1].T[None].swapaxes(1, 2)):
        stored = reading(tmp_path, pickle.dumps({"running_mean": array})).layers[""]
        assert stored.running_mean.tolist() == array.ravel().tolist()
    grid = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert reading(tmp_path, pickle.dumps({"running_mean": grid})).layers[""].running_mean.tolist() == [*range(6)]


def test_large_arrays_stay_in_the_file(tmp_path):
    """Numbers behind 4096 bytes are read from where they lie, shared ones too."""
    values = np.arange(5000.0)
    stored = reading(tmp_path, pickle.dumps({"a": [values], "running_mean": values, "running_var": values})).layers[""]
    assert stored.running_mean.tolist() == stored.running_var.tolist() == values.tolist()
    data = pickle.dumps({"running_mean": values})
    with pytest.raises(ValueError, match="it was cut off"):
        reading(tmp_path, data[:20_000])


def test_a_counter_of_numpy_is_a_counter(tmp_path):
    data = {"running_mean": np.ones(2), "num_batches_tracked": np.int64(-7)}
    assert reading(tmp_path, pickle.dumps(data)).layers[""].num_batches_tracked == -7


def test_a_plain_pickle_says_so_and_is_not_mended(tmp_path):
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(trained().state_dict()))
    assert read(tmp_path / "c.pkl").format == "pickle"
    with pytest.raises(
        ValueError, match=r"got the plain pickle .*c\.pkl\. Load the file, and save its tensors with torch"
    ):
        plan(tmp_path / "c.pkl")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_module_is_read(tmp_path):
    result = reading(tmp_path, saved(torch.compile(network())))
    assert list(result.layers) == list(SETTINGS)
    assert (result.prefix, result.layers["0.bn"].eps) == ("_orig_mod.", 1e-3)


@pytest.mark.parametrize(
    ("value", "is_plain"),
    [
        (lambda net: net.state_dict(), True),
        (
            lambda net: {"net": net.state_dict(), "best": np.float64(1), "tags": {1}, "device": torch.device("cpu")},
            True,
        ),
        (lambda net: net, False),
        (lambda net: {"net": net.state_dict(), "args": argparse.Namespace()}, False),
        (lambda net: {"net": net.state_dict(), "path": pathlib.PurePosixPath("a")}, False),
        (lambda net: {"net": net.state_dict(), "array": np.ones(3)}, False),
        (lambda net: Pair(net.state_dict(), 1), False),
    ],
)
def test_a_remedy_is_possible_for_its_file(tmp_path, value, is_plain):
    """fix writes what torch.load(weights_only=True) takes; anything else is to be saved anew first."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    net[0].running_var[0] = -1
    (tmp_path / "c.pt").write_bytes(saved(value(net)))
    assert read(tmp_path / "c.pt").is_plain == is_plain
    remedy = next(finding.remedy for finding in examine(tmp_path / "c.pt").findings if finding.code == "BN103")
    command = "batchnorm fix model.py:make_model --weights {} --data data.py:train_loader"
    alone = command.format(tmp_path / "c.pt")
    other = f"torch.save(model.state_dict(), PATH) of the loaded model; then {command.format('PATH')}"
    if read(tmp_path / "c.pt").is_whole:
        assert remedy == "load the model, mend it, and save it again"
    else:
        assert remedy == (alone if is_plain else other)


@pytest.mark.parametrize(
    ("value", "is_whole"),
    [
        (lambda net: net, True),
        (lambda net: {"epoch": 3, "model": net}, True),
        (lambda net: [nn.BatchNorm1d(2).state_dict(), net], True),
        (lambda net: torch.nn.DataParallel(net), True),
        (lambda net: net.state_dict(), False),
        (lambda net: {"net": net.state_dict(), "args": argparse.Namespace(), "loss": nn.MSELoss()}, False),
    ],
)
def test_layers_that_were_pickled_as_modules_are_told_apart_from_states_beside_objects(tmp_path, value, is_whole):
    (tmp_path / "c.pt").write_bytes(saved(value(nn.Sequential(nn.BatchNorm1d(3)))))
    assert read(tmp_path / "c.pt").is_whole is is_whole


SICK = {"net": nn.BatchNorm1d(3).state_dict() | {"running_var": torch.tensor([-1.0, 1, 1])}}


def test_every_format_of_the_doctor_names_what_was_left_unread(tmp_path):
    from batchnorm.doctor.diagnosis_report import report
    from batchnorm.reporting.formats import FORMATS, rendered

    (tmp_path / "c.pt").write_bytes(saved({**SICK, "args": argparse.Namespace(lr=0.1)}))
    diagnosis = examine(tmp_path / "c.pt")
    assert "BN103" in {finding.code for finding in diagnosis.findings}
    assert diagnosis.notes == ("left unread: argparse.Namespace",)
    for name in FORMATS:
        assert ("left unread: argparse.Namespace" in rendered(report(diagnosis), name)) == (name != "jsonl"), name
        assert "left unread" not in rendered(report(dataclasses.replace(diagnosis, notes=())), name), name
