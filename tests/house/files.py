"""``python -m house.files``: files as users of this package have them, written once by the code of before.

Each must be read for good: pickles name modules of this package by their paths, programs name its operators, the files
beside a checkpoint have formats of its own. ``files/expected.json`` has what each gives when it is read. What is there
is never written again; ``--paths`` lists the names that pickles hold.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn

import batchnorm as bn
from house.comparing import EVIDENCE, FLOAT32, Tolerance
from house.networks import Net, NormAct, images, net, trained

FOLDER = Path(__file__).parent / "files"
_X = images(4, 900)


@dataclass(frozen=True)
class Kind:
    """How a file is written, and what it gives when it is read."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    tolerance: Tolerance = FLOAT32


def plain(value: Any) -> Any:
    """Tensors as lists, for JSON."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- whole modules ----------------------------------------------------------------------------------------------------


def steps(model: nn.Module, x: Tensor = _X) -> dict[str, Any]:
    """What a model computes in eval mode, in train mode, and in eval mode after that; it is not changed."""
    model, found = deepcopy(model), {"eval": model.eval()(x)}
    found["train"] = model.train()(x)
    return found | {"later": model.eval()(x), "modules": [type(part).__name__ for part in model.modules()]}


def module(make: Callable[[], nn.Module], back: Callable[[Any], nn.Module] | None = None) -> Kind:
    """A module saved whole; ``back`` is the way back from what was done to it."""

    def read(path: Path) -> Any:
        loaded = torch.load(path, weights_only=False)
        return steps(loaded) | ({} if back is None else {"back": steps(back(loaded))})

    return Kind(lambda path: torch.save(make(), path), read)


def chain() -> nn.Module:
    """Layers of ours with an activation of their own, one of torch.nn, and activations that are modules."""
    first, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
    ours, theirs = bn.BatchNorm2d(4, act="leaky_relu", act_param=0.2), nn.BatchNorm2d(4)
    return trained(nn.Sequential(first, ours, last, theirs, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def of_others() -> nn.Module:
    return trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), NormAct(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def _write_watched(path: Path) -> None:
    """Saved while it is watched, in the middle of a training."""
    model = bn.convert(net()).train()
    with bn.watch(model, every=1):
        torch.save(model, path)


_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: bn.BatchNorm1d(3, momentum=None),
    "2d": lambda: bn.BatchNorm2d(3, eps=1e-3, act="elu", act_param=0.5, memory="save"),
    "3d": lambda: bn.BatchNorm3d(3, weight=False, act="hardswish"),
    "no statistics": lambda: bn.BatchNorm2d(3, track_running_stats=False),
    "no parameters": lambda: bn.BatchNorm2d(3, affine=False, single_element="population"),
}
_SIZES = {"1d": (8, 3), "3d": (2, 3, 2, 2, 2)}


def _rows(name: str) -> Tensor:
    size = _SIZES.get(name, (2, 3, 2, 2))
    return torch.randn(size, generator=torch.Generator().manual_seed(5)) + 1


def _write_layers(path: Path) -> None:
    made = {name: make() for name, make in _LAYERS.items()}
    for name, layer in made.items():
        layer.train()(_rows(name))
    torch.save(made, path)


def _read_layers(path: Path) -> Any:
    loaded = torch.load(path, weights_only=False)
    return {name: steps(layer, _rows(name)) | {"repr": repr(layer)} for name, layer in loaded.items()}


def _write_values(path: Path) -> None:
    values = torch.arange(12.0).reshape(4, 3)
    torch.save({"moments": bn.Moments.of(values), "norm": bn.InputNorm.fit([values, values.square()])}, path)


def _read_values(path: Path) -> Any:
    loaded, x = torch.load(path, weights_only=False), torch.ones(2, 3)
    moments, norm = loaded["moments"], loaded["norm"]
    return {"count": float(moments.count), "mean": moments.mean, "var": moments.var, "std": (moments + moments).std,
            "normalized": norm(x), "inverse": norm.inverse(x)}  # fmt: skip


# -- states, programs -------------------------------------------------------------------------------------------------


def _read_state(path: Path) -> Any:
    """Loaded strictly into torch.nn's layers and into ours."""
    state = torch.load(path, weights_only=True)
    made: list[nn.Module] = [Net(), bn.convert(Net()), bn.convert(Net(), fuse=True, example=_X)]
    for model in made:
        model.load_state_dict(state, strict=True)
    return [steps(model) for model in made]


def model_of_files() -> nn.Module:
    """The model whose weights, to the bit, the files beside a checkpoint belong to."""
    model = Net()
    model.load_state_dict(torch.load(FOLDER / "state.pt", weights_only=True))
    return model.eval()


class Residual(nn.Module):
    """A layer that adds a residual and applies an activation, as operators of ours take them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = bn.BatchNorm2d(3, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x * 0.5)


def program(make: Callable[[], nn.Module]) -> Kind:
    """An exported program, without the places in the source that torch notes in it."""

    def write(path: Path) -> None:
        exported = torch.export.export(make(), (_X,))
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)

    def read(path: Path) -> Any:
        loaded = torch.export.load(path)
        ops = sorted({str(node.target) for node in loaded.graph.nodes if "batchnorm" in str(node.target)})
        model = loaded.module()
        return {"output": model(_X), "buffers": dict(model.named_buffers()), "operators": ops}

    return Kind(write, read)


# -- files beside a checkpoint ----------------------------------------------------------------------------------------


def _batches() -> list[Tensor]:
    return [images(32, 910 + i) for i in range(8)]


def _monitor(path: Path | None = None) -> bn.ShiftMonitor:
    from batchnorm.shift import Reference

    reference = None if path is None else Reference.load(path)
    return bn.ShiftMonitor(model_of_files(), examples=None, budget=None, reference=reference)


def _observed(monitor: bn.ShiftMonitor, mean: float) -> dict[str, Any]:
    with monitor:
        for i in range(3):
            monitor.model(images(16, 920 + i, mean))
    table = [[layer.name, layer.log_evidence] for layer in monitor.table()]
    alarm = None if monitor.alarm is None else monitor.alarm.to_dict().keys()
    return {"evidence": monitor.log_evidence, "layers": table, "alarm": alarm and sorted(alarm)}


def _calibrated(path: Path) -> Any:
    return _monitor().calibrate(_batches()).save(path)


def _write_stream(path: Path) -> None:
    monitor = _monitor()
    _observed(monitor, 1.0)
    monitor.save(path)


def _read_stream(path: Path) -> Any:
    monitor = _monitor().load(path)
    return [monitor.log_evidence, _observed(monitor, 1.0)]


def _write_bank(path: Path) -> None:
    bank = bn.DomainBank(model_of_files())
    bank.add("bright", [images(32, 930, 1.0)])
    bank.save(path)


def _read_bank(path: Path) -> Any:
    bank = bn.DomainBank(model_of_files()).load(path)
    with bank.using("bright") as model:
        return {"domains": list(bank), "output": model(_X)}


def _write_log(path: Path) -> None:
    from batchnorm.record import Record, Writer

    writer = Writer(path, [{"name": "bn", "channels": 3}], model="Net")
    writer.write(Record(10, ("bn",), {"noise": [0.047]}))
    arrays = {"running_mean": _rows("1d")[:1, :].numpy()}
    writer.write(Record(20, ("bn",), {"noise": [0.05]}, tier="probe", arrays=arrays))
    writer.event(20, "something happened", layer="bn", code="BN009")
    writer.end(30, "finished")


def _read_log(path: Path) -> Any:
    from batchnorm.record import Log

    log = Log(path)
    rows = {kind: log.rows(kind) for kind in ("free", "probe", "arrays", "event", "end")}
    arrays = {name: value.tolist() for name, value in log.arrays(rows["arrays"][0]).items()}
    return {"step": log.step, "rows": rows, "arrays": arrays}


def _baseline(path: Path) -> Any:
    """A baseline of the doctor: what it names is not told again."""
    from click.testing import CliRunner

    from batchnorm.cli import main

    state = model_of_files().state_dict()
    state["bn1.running_var"][0] = -1.0
    option = "--baseline" if path.exists() else "--write-baseline"
    with TemporaryDirectory() as folder:
        torch.save(state, sick := f"{folder}/sick.pt")
        args = ["doctor", sick, option, str(path), "--output-format", "json", "--ignore", "BN9"]
        result = CliRunner().invoke(main, args)
    told = json.loads(result.stdout)
    return {"exit": result.exit_code, "findings": len(told["findings"]), "silenced": told["silenced"]}


KINDS: dict[str, Kind] = {
    "state.pt": Kind(lambda path: torch.save(bn.convert(net()).state_dict(), path), _read_state),
    "layers.pt": Kind(_write_layers, _read_layers),
    "values.pt": Kind(_write_values, _read_values),
    "converted.pt": module(lambda: bn.convert(net()), bn.revert),
    "fused.pt": module(lambda: bn.convert(net(), fuse=True, example=_X), bn.revert),
    "fused_chain.pt": module(lambda: bn.convert(chain(), fuse=True, example=_X), bn.for_export),
    "fused_others.pt": module(lambda: bn.convert(of_others(), fuse=True, example=_X), bn.revert),
    "saving.pt": module(lambda: bn.convert(net(), fuse=True, example=_X, memory="save"), bn.revert),
    "folded.pt": module(lambda: bn.fold(net(), _X, report=None), bn.unfold),
    "folded_chain.pt": module(lambda: bn.fold(bn.convert(chain(), fuse=True, example=_X), _X, report=None), bn.unfold),
    "folded_others.pt": module(lambda: bn.fold(of_others(), _X, report=None), bn.unfold),
    "frozen.pt": module(lambda: bn.freeze(net(), affine=True), bn.unfreeze),
    "frozen_fused.pt": module(lambda: bn.freeze(bn.convert(chain(), fuse=True, example=_X)), bn.unfreeze),
    "group_norm.pt": module(lambda: bn.to_group_norm(chain())),
    "exported.pt": module(lambda: bn.for_export(chain())),
    "watched.pt": Kind(_write_watched, lambda path: steps(torch.load(path, weights_only=False))),
    "train.pt2": program(lambda: bn.convert(nn.Sequential(nn.BatchNorm2d(3))).train()),
    "train_residual.pt2": program(lambda: Residual().train()),
    "eval.pt2": program(lambda: bn.convert(net(), fuse=True, example=_X)),
    "model.bncal.safetensors": Kind(_calibrated, lambda path: _observed(_monitor(path), 1.0), EVIDENCE),
    "stream.bnshift.safetensors": Kind(_write_stream, _read_stream, EVIDENCE),
    "model.bnbank.safetensors": Kind(_write_bank, _read_bank),
    "log": Kind(_write_log, _read_log),
    "baseline.json": Kind(_baseline, _baseline),
}


def expected() -> dict[str, Any]:
    """What each file gave when it was written."""
    path = FOLDER / "expected.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read(name: str) -> Any:
    """What a file gives now."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return json.loads(json.dumps(plain(KINDS[name].read(FOLDER / name))))


def paths(file: Path) -> Iterator[str]:
    """Names of this package that a pickle of torch.save holds."""
    with zipfile.ZipFile(file) as archive:
        for entry in (name for name in archive.namelist() if name.endswith(".pkl")):
            for opcode, argument, _ in pickletools.genops(archive.read(entry)):
                if opcode.name == "GLOBAL" and str(argument).startswith("batchnorm"):
                    yield ".".join(str(argument).split())


@click.command()
@click.option("--paths", "listed", is_flag=True, help="List the names that pickles hold.")
def main(listed: bool) -> None:
    """Write the files that are missing."""
    FOLDER.mkdir(exist_ok=True)
    found = expected()
    for name in () if listed else (name for name in KINDS if not (FOLDER / name).exists()):
        KINDS[name].write(FOLDER / name)
        found[name] = read(name)
        text = json.dumps(found, indent=0, ensure_ascii=False, allow_nan=False)
        (FOLDER / "expected.json").write_text(text + "\n", encoding="utf-8")
        click.echo(f"written: {name}")
    if listed:
        files = sorted(FOLDER.glob("*.pt"))
        for path in sorted({path for file in files if zipfile.is_zipfile(file) for path in paths(file)}):
            click.echo(path)


if __name__ == "__main__":
    main()
