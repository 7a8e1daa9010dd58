"""How many digits are right: python benchmarks/bench_accuracy.py [--quick] [--huge].

Errors against float64 arithmetic on the same inputs, written to benchmarks/results/accuracy.json: of y the largest
error divided by the largest |y|, of running_var (momentum 1: the batch's own) the largest relative error. --huge adds
2.2e9 bfloat16 values, which needs 11 GB of memory and three minutes.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from report import save
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench import SCHEMA_VERSION
from batchnorm.experiment.environment import environment

if TYPE_CHECKING:
    from collections.abc import Callable

EPS = 1e-5
GOAL = 1e-6  # of max |y|, in any layout, up to mean / std of 1e5
PIECE = 1 << 24  # rows of a long tensor that are in float64 at a time
SHAPE = (64, 8, 28, 28)
SIDES = ("ours", "torch", "torch.compile")


@dataclass(frozen=True)
class Data:
    """Inputs that are hard for some way to sum."""

    words: str
    make: Callable[[], Tensor]
    goal: bool = False  # whether it is one of the goal's
    quick: bool = True


def normal(shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=source, dtype=dtype).mul_(std).add_(mean)


def _first_image_zero() -> Tensor:
    x = normal(SHAPE, 1e4)
    x[0] = 0
    return x


def _outlier() -> Tensor:
    x = normal(SHAPE)
    x[3, :, 5, 7] = 1e6
    return x


IMAGES = [
    Data("mean 0, sd 1", lambda: normal(SHAPE), goal=True),
    Data("mean 1e3, sd 1", lambda: normal(SHAPE, 1e3), goal=True),
    Data("mean 1e4, sd 1", lambda: normal(SHAPE, 1e4), goal=True),
    Data("mean 1e5, sd 1", lambda: normal(SHAPE, 1e5), goal=True),
    Data("mean 1, sd 1e-3", lambda: normal(SHAPE, 1, 1e-3), goal=True),
    Data("mean 1e4, first image zero", _first_image_zero),
    Data("one value of 1e6 a channel", _outlier),
    Data("sd 1e20", lambda: normal(SHAPE, 0, 1e20)),
]
LONG = [
    Data("67,108,864 rows, mean 3", lambda: normal((67_108_864, 1), 3), goal=True, quick=False),
    Data("67,108,864 rows, 2 channels, mean 3", lambda: normal((67_108_864, 2), 3), goal=True, quick=False),
]
HUGE = Data(
    "1.1e9 rows, 2 channels, mean 1, bfloat16", lambda: normal((1_100_000_000, 2), 1, dtype=torch.bfloat16), quick=False
)


def main() -> None:
    quick, huge = "--quick" in sys.argv, "--huge" in sys.argv
    torch.set_num_threads(2)
    rows = []
    for data in [*IMAGES, *LONG, *([HUGE] if huge else [])]:
        if quick and not data.quick:
            continue
        x = data.make()
        layouts = ("NCHW", "channels_last") if x.ndim == 4 else ("NC",)
        rows += [_tell(_row(data, x, layout, compiled=x.ndim == 4 and not quick)) for layout in layouts]
    reached = all(_error(row, "ours") <= GOAL for row in rows if row["goal"])
    print(f"goal: errors of ours at most {GOAL:g} of max |y|: {'reached' if reached else 'NOT reached'}")
    skipped = [] if huge else [f"{HUGE.words}: it takes --huge, 11 GB of memory and three minutes"]
    result = {"environment": environment(), "quick": quick, "bound": GOAL, "reached": reached, "rows": rows}
    result |= {"schema_version": SCHEMA_VERSION, "not_measured": skipped}
    save("accuracy-quick" if quick else "accuracy", result)


def _row(data: Data, x: Tensor, layout: str, *, compiled: bool) -> dict[str, Any]:
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    mean, var = truth(x)
    sides = {side: _measured(side, x, mean, var) for side in SIDES if compiled or side != "torch.compile"}
    place = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "layout": layout}
    return {"data": data.words, "goal": data.goal, **place, "sides": sides}


def _measured(side: str, x: Tensor, mean: Tensor, var: Tensor) -> dict[str, Any]:
    home, name = (bn if side == "ours" else nn), "BatchNorm2d" if x.ndim == 4 else "BatchNorm1d"
    layer = getattr(home, name)(x.shape[1], eps=EPS, momentum=1.0)
    torch._dynamo.reset()
    run = torch.compile(layer, dynamic=False) if side == "torch.compile" else layer
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # ours says that a variance of 1e40 is not stored
        y = run(x)
    count = x.numel() // x.shape[1]
    unbiased = var * (count / (count - 1))
    stored = ((layer.running_var.double() - unbiased).abs() / unbiased).max().item()
    found = {"y": _finite(largest_error(y, x, mean, var)), "running_var": _finite(stored)}
    if (unbiased > torch.finfo(torch.float32).max).any():  # no float32 is right: being finite is all there is to ask
        del found["running_var"]
    return found | {"running_var_is_finite": bool(layer.running_var.isfinite().all())}


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for results that are not finite."""
    return value if value < float("inf") else None


def pieces(*tensors: Tensor) -> Any:
    """The tensors in float64, some rows at a time."""
    for parts in zip(*(t.split(PIECE) for t in tensors), strict=True):
        yield tuple(part.double() for part in parts)


def truth(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel in float64, in two passes."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = x.numel() // x.shape[1]
    mean = sum(part.sum(axes) for (part,) in pieces(x)) / count
    var = sum((part - along(mean, x)).square_().sum(axes) for (part,) in pieces(x)) / count
    return mean, var


def along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))  # (C,) -> (C, 1, 1) beside (N, C, H, W)


def largest_error(y: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> float:
    """max |y - y64| / max |y64|; infinite where y is not finite."""
    error, size = 0.0, 0.0
    scale = (var + EPS).rsqrt()
    for got, given in pieces(y, x):
        right = (given - along(mean, x)) * along(scale, x)
        gap = (got - right).abs().max().item()
        error, size = (max(error, gap) if gap == gap else float("inf")), max(size, right.abs().max().item())
    return error / size


def _error(row: dict[str, Any], side: str) -> float:
    value = row["sides"][side]["y"]
    return float("inf") if value is None else value


def _tell(row: dict[str, Any]) -> dict[str, Any]:
    told = (f"{side} {as_text(e, 'y')} / {as_text(e, 'running_var')}" for side, e in row["sides"].items())
    print(f"{row['data']:<40} {row['layout']:<14} y / running_var:  {'   '.join(told)}", flush=True)
    return row


def as_text(errors: dict[str, Any], name: str) -> str:
    if name not in errors:
        return "finite" if errors[f"{name}_is_finite"] else "not finite"
    return "not finite" if errors[name] is None else f"{errors[name]:.1e}"


if __name__ == "__main__":
    main()
