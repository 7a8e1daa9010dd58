"""Prints the population statistics that three estimators store, beside the true ones, and what an interrupt leaves.

Run: python benchmarks/statistics_table.py
Estimators: torch.optim.swa_utils.update_bn, fvcore.nn.precise_bn.update_bn_stats, batchnorm.recalibrate.
Every model is one BatchNorm1d over one feature, fresh and in train mode. The true values are computed with NumPy in
80-bit extended precision, two passes over all examples; the variance is the unbiased one, as running_var is.
"""

from __future__ import annotations

import platform
import warnings
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from batchnorm import recalibrate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fvcore.nn.precise_bn import update_bn_stats

if TYPE_CHECKING:
    from collections.abc import Callable

    Estimator = Callable[[nn.Module, Any], object]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class InterruptedAfterOne(list):
    def __iter__(self):
        yield self[0]
        raise KeyboardInterrupt


ESTIMATORS: dict[str, Estimator] = {
    "update_bn": lambda model, batches: update_bn(batches, model),
    "fvcore": lambda model, batches: update_bn_stats(model, batches, len(batches)),
    "ours": recalibrate,
}


def normal(count: int, mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, 1, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def cases() -> dict[str, list[Any]]:
    uneven = torch.tensor([0.0] * 98 + [100.0] * 2)[:, None]
    x = normal(65, 3, 2, torch.float32)
    return {
        "batches of 98 (zeros) and 2 (hundreds)": list(uneven.split(98)),
        "64 and a last batch of 1": list(x.split(64)),
        'dict batches {"x": ...}': [{"x": part} for part in x[:64].split(16)],
        "mean 1e6, std 1e-3, float64": list(normal(6400, 1e6, 1e-3, torch.float64).split(64)),
        "mean 1000, std 0.01, float32": list(normal(6400, 1000, 0.01, torch.float32).split(64)),
    }


def tensors(batches: list[Any]) -> list[torch.Tensor]:
    return [batch["x"] if isinstance(batch, dict) else batch for batch in batches]


def truth(batches: list[Any]) -> str:
    values = torch.cat(tensors(batches)).numpy().astype(np.longdouble)
    return cell(float(values.mean()), float(values.var(ddof=1)))


def cell(mean: float, var: float) -> str:
    return f"{mean:.10g} / {var:.5g}"


def estimate(estimator: Estimator, batches: list[Any]) -> str:
    model = Model(tensors(batches)[0].dtype)
    try:
        estimator(model, batches)
    except (ValueError, AttributeError, AssertionError) as error:
        return type(error).__name__
    return cell(model.norm.running_mean.item(), model.norm.running_var.item())


def left_by_interrupt(estimator: Estimator, *, training: bool) -> str:
    """What Ctrl-C in the second batch leaves changed; fvcore finds layers in train mode only."""
    model = Model(torch.float32).train(training)
    layer = model.norm
    momentum = layer.momentum
    with suppress(KeyboardInterrupt):
        estimator(model, InterruptedAfterOne([normal(8, 3, 2, torch.float32)] * 2))
    found = {
        "train mode": model.training != training,
        f"momentum {layer.momentum}": layer.momentum != momentum,
        "statistics": (layer.running_mean.item(), layer.running_var.item()) != (0, 1),
        "hooks": bool(layer._forward_pre_hooks),
    }
    return ", ".join(name for name, changed in found.items() if changed) or "nothing"


def rows() -> list[list[str]]:
    table = [["mean / unbiased variance", "true", *ESTIMATORS]]
    for name, batches in cases().items():
        table.append([name, truth(batches), *(estimate(estimator, batches) for estimator in ESTIMATORS.values())])
    for mode in ("train", "eval"):
        changed = [left_by_interrupt(estimator, training=mode == "train") for estimator in ESTIMATORS.values()]
        table.append([f"changed by Ctrl-C in {mode} mode", "nothing", *changed])
    return table


def main() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "fvcore", "batchnorm"))
    print(f"{packages}, Python {platform.python_version()}, {platform.machine()}\n")
    table = rows()
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
