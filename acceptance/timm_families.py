"""`make acceptance`: fold and convert on one small model of each family of timm that has batch norm.

    python acceptance/timm_families.py PACKAGES [FAMILY ...]

PACKAGES is a folder that holds timm without what it depends on. What timm imports besides torch and numpy is for
data sets and downloads and is replaced by empty modules, torchvision among it. Weights are drawn and statistics moved
by batches in train mode, so that a wrong fold shows. Writes timm_families.json: for each family the layers, how many
were folded and converted, why others stayed, and the largest difference of outputs in float64, relative to the largest
output.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.machinery
import json
import sys
import time
import types
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn

HERE = Path(__file__).parent

# The smallest model with batch norm of each family of timm 1.0.31.
MODELS = {
    "byoanet": "halonet_h1", "byobnet": "test_byobnet", "convmixer": "convmixer_768_32", "cpubone": "cpubone_nano",
    "cspnet": "cs3darknet_focus_s", "cspnext": "cspnext_tiny", "densenet": "densenet121", "dla": "dla46x_c",
    "dpn": "dpn48b", "efficientformer": "efficientformer_l1", "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet", "efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0", "fasternet": "fasternet_t0", "fastvit": "fastvit_t8",
    "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t", "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small", "levit": "levit_128s",
    "lowformer": "lowformer_b0", "maxxvit": "test_coatnet", "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs", "nasnet": "nasnetalarge", "nextvit": "nextvit_small", "pnasnet": "pnasnet5large",
    "regnet": "regnetx_002", "repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net": "res2next50",
    "resnest": "resnest14d", "resnet": "test_resnet", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100",
    "selecsls": "selecsls42", "senet": "legacy_seresnet18", "shvit": "shvit_s1", "sknet": "skresnet18",
    "starnet": "starnet_s050", "swiftformer": "swiftformer_xs", "tiny_vit": "tiny_vit_5m_224", "tresnet": "tresnet_m",
    "vgg": "vgg11_bn", "visformer": "visformer_tiny", "vision_transformer_hybrid": "vit_small_resnet50d_s16_224",
    "volo": "volo_d1_224", "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception",
    "xception_aligned": "xception41p", "xcit": "xcit_nano_12_p8_224",
}  # fmt: skip
SMALLER = {"vgg": {"mlp_ratio": 1 / 64}}  # 130 million weights otherwise
SIZES = (64, 96, 128, 224, 256, 331)  # the first that a model takes


def main(families: list[str]) -> None:
    table = {}
    for family in families or MODELS:
        started = time.perf_counter()
        try:
            table[family] = surveyed(family)
        except Exception as error:  # noqa: BLE001 - a family that fails is a row of the table
            table[family] = {"model": MODELS[family], "error": f"{type(error).__name__}: {error}"[:400]}
        table[family]["seconds"] = round(time.perf_counter() - started, 1)
        print(family, json.dumps(table[family]), flush=True)
    if not families:
        write(HERE / "timm_families.json", {"total": total(table), "families": table})


def total(table: dict[str, dict]) -> dict:
    """How many families fold and convert all layers, some and none."""
    found = {"families": len(table), "failed": sum("error" in row for row in table.values())}
    for what in ("folded", "converted"):
        rows = [row for row in table.values() if "error" not in row]
        counts = Counter(
            "all" if row[what] == row["layers"] else "in part" if row[what] else "none" for row in rows
        )  # fmt: skip
        found[what] = dict(counts)
        found[f"layers {what}"] = f"{sum(row[what] for row in rows)} of {sum(row['layers'] for row in rows)}"
    return found


def surveyed(family: str) -> dict:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(MODELS[family], num_classes=10, **SMALLER.get(family, {}))
    model, x = fitting(model, family)
    settle(model, x)
    model, x = model.double(), x.double()
    row = {"model": MODELS[family], "size": x.shape[-1], "layers": len(bn.find(model))}
    kinds = Counter(type(layer).__name__ for layer in bn.find(model).values())
    return row | {"kinds": dict(kinds)} | folded(model, x) | converted(model, x)


def fitting(model: nn.Module, family: str) -> tuple[nn.Module, torch.Tensor]:
    """The model and the smallest images that it takes, made for another size if need be."""
    import timm

    own = model.default_cfg["input_size"][-1]
    for size in (*SIZES, own):
        x = torch.randn(3, 3, size, size)
        with contextlib.suppress(Exception), torch.no_grad():
            model.eval()(x[:2])
            return model, x
        with contextlib.suppress(Exception), torch.no_grad():
            other = timm.create_model(MODELS[family], num_classes=10, img_size=size)
            other.eval()(x[:2])
            return other, x
    raise ValueError(f"no size fits {MODELS[family]}")


def settle(model: nn.Module, x: torch.Tensor) -> None:
    """Weights of batch norm that are not 1 and 0, and statistics of some batches."""
    with torch.no_grad():
        for layer in bn.find(model).values():
            for name, center in (("weight", 1.0), ("bias", 0.0)):
                if getattr(layer, name) is not None:
                    nn.init.normal_(getattr(layer, name), center, 0.2)
        model.train()
        for _ in range(3):
            model(x + torch.randn_like(x))
    model.eval()


def folded(model: nn.Module, x: torch.Tensor) -> dict:
    reports: list = []
    small = bn.fold(model, x, report=reports.append)
    left = {path: reason for path, reason in reports[0].layers.items() if isinstance(reason, str)}
    return {
        "folded": len(reports[0].layers) - len(left),
        "fold error": difference(model, small, x),
        "stayed": dict(Counter(general(reason) for reason in left.values()).most_common()),
    }


def converted(model: nn.Module, x: torch.Tensor) -> dict:
    before = {path: type(layer) for path, layer in bn.find(model).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = bn.convert(model, fuse=True, example=x)
        except ValueError as error:  # nothing to fuse
            warnings.warn(str(error), stacklevel=1)
            result = bn.convert(model, example=x)
    after = bn.find(result)
    ours = [
        path for path, layer in after.items() if isinstance(layer, (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d))
    ]
    back = {path: type(layer) for path, layer in bn.find(bn.revert(result)).items()}
    return {
        "converted": len(ours),
        "with activation": sum(getattr(after[path], "act", None) is not None for path in ours),
        "convert error": difference(model, result, x),
        "left": dict(Counter(before[path].__name__ for path in after if path not in ours)),
        "said": [str(getattr(w, "message", w))[:300] for w in caught][:2],
        "revert gives the classes of before": back == before,
    }


def difference(model: nn.Module, result: nn.Module, x: torch.Tensor) -> float:
    """Of eval-mode outputs, relative to the largest."""
    with torch.no_grad():
        a, b = (copy.deepcopy(m).eval()(x) for m in (model, result))
    return float((a - b).abs().max() / a.abs().max())


def general(reason: str) -> str:
    """A reason without the names of layers, so that equal ones are counted together."""
    words = reason.split("'")
    return "…".join(words[::2])[:200]


def write(path: Path, value: dict) -> None:
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


class _Named(type):
    """A class whose attributes are their names, as those of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Absent:
    """Finds modules that are not installed and makes empty ones, in which every name is an empty class."""

    def __init__(self, *roots: str) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:  # noqa: ARG002
        known = name.partition(".")[0] in self.roots
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._made
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it empty."""

    @staticmethod
    def _made(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (nn.Module,) if "Norm" in name else (), {})


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    sys.meta_path.append(Absent("torchvision", "PIL", "huggingface_hub", "safetensors", "yaml"))
    torch.set_num_threads(1)
    main(sys.argv[2:])
