"""Models with one fault each, one or more for every rule, and healthy models."""

from __future__ import annotations

import copy
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.doctor import Diagnosis, examine

CHANNELS = 8
LAYERS = ("stem.1", "body.1")


class Net(nn.Module):
    """Two convolutions with batch norm and ReLU, and a linear layer behind them."""

    def __init__(self, norm: Any = nn.BatchNorm2d, *, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, bias=bias), norm(CHANNELS), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, bias=bias), norm(CHANNELS), nn.ReLU())
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def images(count: int = 256, *, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 10, 10, generator=generator) + mean


def batches(x: torch.Tensor | None = None, size: int = 32) -> list[torch.Tensor]:
    return list((images() if x is None else x).split(size))


def loader(x: torch.Tensor, size: int, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(x), size, **settings)


def trained(model: nn.Module | None = None, *, updates: int = 100, data: Any = None) -> Any:
    """A model with affine parameters and statistics as training leaves them, in eval mode."""
    if model is None and data is None:  # most tests begin with this one
        made, random = _trained_once(updates)
        torch.set_rng_state(random)
        return copy.deepcopy(made)
    torch.manual_seed(1)
    return _trained(Net() if model is None else model, updates, _training_data() if data is None else data)


@cache
def _trained_once(updates: int) -> tuple[nn.Module, torch.Tensor]:
    """The model, and the random numbers' state behind its initialization."""
    torch.manual_seed(1)
    return _trained(Net(), updates, _training_data()), torch.get_rng_state()


@cache
def _training_data() -> list[torch.Tensor]:
    return batches(images(2048, seed=2))


def _trained(model: nn.Module, updates: int, data: Any) -> nn.Module:
    for layer in bn.find(model).values():
        if layer.weight is not None:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    model.train()
    with torch.no_grad():
        for step in range(updates):
            model(data[step % len(data)])
    return model.eval()


def layer_of(model: nn.Module) -> Any:
    return next(iter(bn.find(model).values()))


def changed(**values: Any) -> Any:
    """A trained model whose first layer's channel 3 has other values."""
    model = trained()
    for name, value in values.items():
        getattr(layer_of(model), name).data[3] = value
    return model


def with_attribute(**values: Any) -> Any:
    model = trained()
    for name, value in values.items():
        setattr(layer_of(model), name, value)
    return model


def saved(path: Any, state: Any) -> str:
    torch.save(state, path)
    return str(path)


# -- one fault for each rule: a function of a folder that returns what examine is called with -------------------


def bn001(_: Any) -> dict:
    model = trained().train()
    layer_of(model).eval()
    return {"target": model}


def bn002(_: Any) -> dict:
    model = trained().train()
    layer_of(model).requires_grad_(False)
    return {"target": model}


def bn003(_: Any) -> dict:
    model = bn.freeze(trained()).train()
    layer_of(model).weight.requires_grad_(True)
    return {"target": model}


def bn004(_: Any) -> dict:
    return {"target": with_attribute(track_running_stats=False)}


def bn005(_: Any) -> dict:
    model = trained()
    model.body[1] = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    return {"target": model.eval()}


def bn006(_: Any) -> dict:
    return {"target": with_attribute(momentum=None)}


def bn007(_: Any) -> dict:
    return {"target": with_attribute(momentum=0.0)}


def bn008(_: Any) -> dict:
    return {"target": with_attribute(momentum=0.99)}


def bn009(_: Any) -> dict:
    model = trained(Net(bn.BatchNorm2d)).train()
    poison = images(8)
    poison[0, 0, 0, 0] = float("nan")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model(poison)
    return {"target": model.eval()}


def bn010(_: Any) -> dict:
    model = trained()
    model.body[1] = nn.LazyBatchNorm2d()
    return {"target": model.eval()}


def bn101(_: Any) -> dict:
    model = trained()
    layer_of(model).reset_running_stats()
    return {"target": model}


def bn105(_: Any) -> dict:
    return {"target": changed(running_var=0.0, running_mean=0.0, weight=1.0)}


def bn107(_: Any) -> dict:
    return {"target": changed(weight=float("nan"))}


def bn108(folder: Any) -> dict:
    state = trained().state_dict()
    state = {key: value.half() if "running" in key else value for key, value in state.items()}
    return {"target": saved(folder / "half.pt", state)}


def bn109(folder: Any) -> dict:
    state = trained().state_dict()
    del state["stem.1.running_var"]
    return {"target": saved(folder / "incomplete.pt", state)}


def bn111(_: Any) -> dict:
    model = trained()
    nn.init.zeros_(model.body[1].weight)
    return {"target": model}


def bn112(folder: Any) -> dict:
    state = trained().state_dict()
    for name in LAYERS:
        del state[f"{name}.num_batches_tracked"]  # its versions still say that there is one
    return {"target": saved(folder / "uncounted.pt", state)}


def bn113(_: Any) -> dict:
    return {"target": Net()}


def bn114(_: Any) -> dict:
    return {"target": trained(updates=5), "data": batches()}


def bn115(folder: Any) -> dict:
    model = trained()
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        averaged.head.weight.mul_(1.1)
        averaged.stem[0].weight.mul_(1.1)
    return {"target": saved(folder / "ema.pt", {"model": model.state_dict(), "model_ema": averaged.state_dict()})}


def bn115_averaged_model(_: Any) -> dict:
    averaged, later = torch.optim.swa_utils.AveragedModel(trained()), trained()
    for layer in (later.stem[0], later.body[0]):
        layer.weight.data *= 3
    averaged.update_parameters(trained())
    averaged.update_parameters(later)
    return {"target": averaged.eval()}


def bn116(_: Any) -> dict:
    model = trained()
    with torch.no_grad():
        model.body[1].running_mean += 0.5 * model.body[1].running_var.sqrt()
    return {"target": model, "data": batches()}


def bn201(_: Any) -> dict:
    return {"target": trained(), "data": loader(images(), 4, shuffle=True)}


def bn202(_: Any) -> dict:
    return {"target": trained(), "data": loader(images(65), 32, shuffle=True)}


def bn203(_: Any) -> dict:
    return {"target": trained(), "batch_size": 8, "accumulation": 4}


def bn204(_: Any) -> dict:
    x = images() + torch.linspace(-1, 1, 256)[:, None, None, None]  # by brightness, as an album is
    mixed = list(x[torch.randperm(256, generator=torch.Generator().manual_seed(3))].split(32))
    return {"target": trained(data=mixed), "data": batches(x)}


class Recomputed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(checkpoint(self.stem, x, use_reentrant=False)).mean((2, 3)))


def bn205(_: Any) -> dict:
    return {"target": trained(Recomputed()).train(), "data": batches()}


def bn206(_: Any) -> dict:
    model = trained()
    return {"target": model, "optimizer": torch.optim.AdamW(model.parameters(), weight_decay=0.05)}


def bn207(_: Any) -> dict:
    x = torch.randn(256, 5, 40, generator=torch.Generator().manual_seed(4)) + 3
    for row, length in enumerate(torch.randint(10, 40, (256,), generator=torch.Generator().manual_seed(5))):
        x[row, :, length:] = 0
    model = nn.Sequential(nn.Conv1d(5, CHANNELS, 1, bias=False), nn.BatchNorm1d(CHANNELS), nn.ReLU())
    return {"target": trained(model, data=list(x.split(32))), "data": list(x.split(32))}


def bn208(_: Any) -> dict:
    x = images()
    x[17, 0, 0, 0] = float("inf")
    return {"target": trained(), "data": batches(x)}


def bn209(_: Any) -> dict:
    model = trained()
    model.body[1].running_var /= 9  # a larger one may belong to rare examples
    return {"target": model, "data": batches()}


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.BatchNorm2d(CHANNELS)


def bn210(_: Any) -> dict:
    model = trained(Unused())
    model.spare.running_mean += 0.1
    return {"target": model, "data": batches()}


def bn211(_: Any) -> dict:
    model = trained(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), data=[torch.randn(32, 3)])
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(6))
    x[:, 1] = 0.25
    return {"target": model, "data": list(x.split(32))}


class Fails(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.requires_grad is False and len(self.stem) == 3 and self.head.weight.requires_grad:
            raise RuntimeError("no labels given")
        return super().forward(x)


def bn212(_: Any) -> dict:
    model = trained()
    model.__class__ = Fails
    return {"target": model, "data": batches()}


def bn213(_: Any) -> dict:
    model = trained()
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("stem.1")]
    return {"target": model, "optimizer": torch.optim.SGD(rest, lr=0.1)}


def bn301(_: Any) -> dict:
    return {"target": trained(Net(bias=True)), "data": batches()}


class Shared(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.head(self.stem[1](self.body[0](y)).mean((2, 3)))


def bn302(_: Any) -> dict:
    model = Shared()
    del model.body[1]
    return {"target": trained(model), "data": batches()}


def bn303(_: Any) -> dict:
    model = Net()
    model.body.insert(0, nn.Dropout(0.3))
    model.body[1], model.body[0] = model.body[0], model.body[1]
    return {"target": trained(model), "data": batches()}


def bn304(_: Any) -> dict:
    model = Net()
    model.stem.insert(2, nn.BatchNorm2d(CHANNELS))
    return {"target": trained(model), "data": batches()}


def bn401(_: Any) -> dict:
    return {"target": trained(), "data": batches(images(mean=4.0))}


def bn402(_: Any) -> dict:
    x = torch.rand(256, 2, generator=torch.Generator().manual_seed(7)) * torch.tensor([1.0, 1000.0])
    model = nn.Sequential(nn.Linear(2, CHANNELS, bias=False), nn.BatchNorm1d(CHANNELS), nn.ReLU())
    return {"target": trained(model, data=list(x.split(32))), "data": list(x.split(32))}


def bn501(_: Any) -> dict:
    return {"target": trained(), "data": batches()}


def bn502(_: Any) -> dict:
    model = trained()
    wrong = copy.deepcopy(model)
    wrong.stem[0].weight.data *= 1.05
    return {"target": wrong, "reference": model, "data": batches()}


def bn503(_: Any) -> dict:
    model = Net()
    model.body.append(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS)))
    trained(model).body[1].eps = 1e-3
    return {"target": model}


def bn504(folder: Any) -> dict:
    import onnx
    from onnx import TensorProto, helper

    names = ("weight", "bias", "running_mean", "running_var")
    values = {name: torch.rand(4).add(0.5).tolist() for name in names}
    node = helper.make_node(
        "BatchNormalization", ["x", *(f"bn.{name}" for name in names)], ["y", "m", "v"], name="bn", training_mode=1
    )
    graph = helper.make_graph(
        [node], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 3, 3])],
        [helper.make_tensor(f"bn.{name}", TensorProto.FLOAT, [4], values[name]) for name in names],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "trains.onnx")
    return {"target": str(folder / "trains.onnx")}


class Functional(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(self.stem(x))
        return self.head(nn.functional.batch_norm(y, None, None, training=True).mean((2, 3)))


def bn505(_: Any) -> dict:
    return {"target": trained(Functional()), "data": batches()}


class Standardizes(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x - x.mean()) / x.std())


def bn506(_: Any) -> dict:
    return {"target": trained(Standardizes()), "data": batches()}


def bn507(folder: Any) -> dict:
    state = {f"module.{key}": value for key, value in trained().state_dict().items()}
    return {"target": saved(folder / "wrapped.pt", state)}


def bn508(folder: Any) -> dict:
    return {"target": changed(running_mean=2.0), "reference": saved(folder / "model.pt", trained().state_dict())}


def bn509(_: Any) -> dict:
    model = trained(nn.Sequential(nn.Conv2d(3, CHANNELS, 3), bn.BatchNorm2d(CHANNELS, act="relu")), data=batches())
    model[1].__class__ = nn.BatchNorm2d
    return {"target": model}


def bn510(folder: Any) -> dict:
    state = trained().state_dict()
    return {"target": saved(folder / "adapter.pt", {
        "base_model.model.conv.lora_A.weight": state["stem.0.weight"],
        "base_model.model.bn1.weight": state["stem.1.weight"], "base_model.model.bn1.bias": state["stem.1.bias"],
    })}  # fmt: skip


def bn601(_: Any) -> dict:
    return {"target": trained(), "batch_size": 4, "world_size": 8}


def bn602(_: Any) -> dict:
    return {"target": nn.SyncBatchNorm.convert_sync_batchnorm(trained())}


def bn603(_: Any) -> dict:
    # constructed without a process group: only its settings are looked at
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = trained()
    wrapped.broadcast_buffers = False
    return {"target": wrapped.eval()}


FAULTS = {
    "BN001": bn001, "BN002": bn002, "BN003": bn003, "BN004": bn004, "BN005": bn005, "BN006": bn006, "BN007": bn007,
    "BN008": bn008, "BN009": bn009, "BN010": bn010, "BN101": bn101,
    "BN102": lambda _: {"target": changed(running_var=float("nan"))},
    "BN102 infinite": lambda _: {"target": changed(running_mean=float("inf"))},
    "BN103": lambda _: {"target": changed(running_var=-0.5)},
    "BN103 rounding": lambda _: {"target": changed(running_var=-1e-14)},
    "BN104": lambda _: {"target": changed(running_var=1e-40, bias=1)},
    "BN105": bn105,
    "BN106": lambda _: {"target": changed(weight=1e-6, bias=-1.0)},
    "BN107": bn107, "BN108": bn108, "BN109": bn109,
    "BN110": lambda _: {"target": changed(running_mean=1e6)},
    "BN111": bn111, "BN112": bn112, "BN113": bn113, "BN114": bn114, "BN115": bn115,
    "BN115 averaged model": bn115_averaged_model, "BN116": bn116, "BN201": bn201, "BN202": bn202, "BN203": bn203,
    "BN204": bn204, "BN205": bn205, "BN206": bn206, "BN207": bn207, "BN208": bn208, "BN209": bn209, "BN210": bn210,
    "BN211": bn211, "BN212": bn212, "BN213": bn213, "BN301": bn301, "BN302": bn302, "BN303": bn303, "BN304": bn304,
    "BN401": bn401, "BN402": bn402, "BN501": bn501, "BN502": bn502, "BN503": bn503, "BN504": bn504, "BN505": bn505,
    "BN506": bn506, "BN507": bn507, "BN508": bn508, "BN509": bn509, "BN510": bn510, "BN601": bn601,
    "BN602": bn602, "BN603": bn603,
}  # fmt: skip


@cache
def diagnosis_of(name: str) -> Diagnosis:
    """What examine says of a planted fault."""
    with tempfile.TemporaryDirectory() as folder:
        return examine(**FAULTS[name](Path(folder)))
