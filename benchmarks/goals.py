"""What `make bench` measures, and what the measured ratios are to reach."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

BIG = 6_000_000  # bytes of x from which on a case is memory-bound and counts as big
PARITY = 0.95  # medians of equal code differ by that much between rounds on a shared machine

NCHW = ((32, 64, 56, 56), (128, 16, 32, 32), (32, 256, 14, 14), (64, 512, 7, 7), (64, 64, 56, 56), (64, 64, 112, 112))
LAST = ((32, 64, 56, 56), (128, 16, 32, 32), (64, 64, 56, 56), (64, 64, 112, 112))
HALF = ((32, 64, 56, 56), (128, 16, 32, 32), (32, 256, 14, 14))
COMPILED = {(32, 64, 56, 56), (128, 16, 32, 32), (32, 256, 14, 14)}  # a compilation takes a quarter of a minute
VOLUME, SERIES = (8, 32, 16, 28, 28), (64, 128, 256)


@dataclass(frozen=True)
class Entry:
    """A case of batchnorm.bench with a shape, type and layout; ``quick`` ones are in the quick run."""

    case: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    quick: bool = False

    @property
    def bytes(self) -> int:
        """Size of x."""
        return prod(self.shape) * (2 if self.dtype in {"bfloat16", "float16"} else 4)


def _entries() -> list[Entry]:
    def several(case: str, shapes: Sequence[tuple[int, ...]], *quick: int, **more: Any) -> list[Entry]:
        compilable = case in {"relu", "step"} and more.get("dtype") is None
        return [
            Entry(case, shape, compiled=compilable and shape in COMPILED, quick=i in quick, **more)
            for i, shape in enumerate(shapes)
        ]

    last: dict[str, Any] = {"channels_last": True}
    half: dict[str, Any] = {"dtype": "bfloat16"}
    return [
        *several("forward", NCHW, 0, 1),
        *several("relu", NCHW[:1]),
        *several("step", NCHW, 0, 1, 2),
        *several("residual", NCHW[:-1], 0),
        *several("forward", LAST, 0, **last),
        *several("step", LAST, 0, **last),
        *several("residual", LAST[:1], **last),
        *several("step", HALF, 0, **half),
        *several("step", HALF, **half, **last),
        *several("eval", [NCHW[0], NCHW[-1], (8, 32, 14, 14), (1, 64, 28, 28)], 0, 2),
        *several("eval", LAST[:1], **last),
        *several("forward", [(256, 512), (256, 64)], 0),
        *several("pass", [(256, 512), (256, 64)], 0),
        *several("forward", [VOLUME, SERIES]),
        *several("step", [VOLUME, SERIES], 0),
        *several("step", [VOLUME], **last),
    ]


ENTRIES = _entries()


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio in every row that is chosen.

    Args:
        text: Which rows.
        against: What the ratio compares: the contestant that is divided by ours, or "limit" or "floor", by which
            ours is divided.
        bound: At least, or for limit and floor at most.
        chosen: Whether a row of the results counts.
    """

    text: str
    against: str
    bound: float
    chosen: Callable[[Mapping[str, Any]], bool]

    @property
    def at_most(self) -> bool:
        """Whether small is good."""
        return self.against in {"limit", "floor"}


def _rows(*cases: str, dtype: str = "float32", last: bool | None = False, axes: int = 4, big: bool = False) -> Any:
    def chosen(row: Mapping[str, Any]) -> bool:
        return (
            row["case"] in cases
            and row["dtype"] == dtype
            and last in {None, row["channels_last"]}
            and len(row["shape"]) == axes
            and (not big or row["bytes"] >= BIG)
        )

    return chosen


def _wide(row: Mapping[str, Any]) -> bool:
    return _rows("step")(row) and row["shape"][2:] == [56, 56]


def _flat(case: str) -> Any:
    return lambda row: row["case"] == case and row["shape"] == [256, 512]


def _network(name: str, *, last: bool) -> Any:
    return lambda row: row["case"] == name and row["channels_last"] == last


GOALS = [
    Goal("float32 NCHW train forward", "torch", 3.0, _rows("forward")),
    Goal("float32 NCHW train forward", "limit", 1.3, _rows("forward", big=True)),
    Goal("float32 NCHW BN + ReLU forward + backward", "torch", 2.5, _rows("step")),
    Goal("the same at 56x56", "torch", 3.0, _wide),
    Goal("the same, big", "limit", 1.4, _rows("step", big=True)),
    Goal("float32 NCHW BN + residual + ReLU forward + backward", "torch", 2.2, _rows("residual")),
    Goal("float32 channels_last train forward, big", "torch", 1.8, _rows("forward", last=True, big=True)),
    Goal("float32 channels_last BN + ReLU forward + backward, big", "torch", 2.1, _rows("step", last=True, big=True)),
    Goal("both, two-read floor", "floor", 1.15, _rows("forward", "step", last=True, big=True)),
    Goal("both", "oneDNN", 1.0, _rows("forward", "step", last=True, big=True)),
    Goal("bfloat16 BN + ReLU forward + backward", "torch", 2.0, _rows("step", dtype="bfloat16", last=None)),
    Goal("float32 BN + ReLU forward + backward", "torch.compile", 7.0, _rows("step", last=None)),
    Goal("float32 BN + ReLU forward + backward", "JAX", 2.3, _rows("step", last=None)),
    Goal("float32 eval BN + ReLU, big (parity)", "torch", PARITY, _rows("eval", last=None, big=True)),
    Goal("(256, 512) train forward", "torch", 3.0, _flat("forward")),
    Goal("(256, 512) forward + backward", "torch", 2.0, _flat("pass")),
    Goal("ResNet-20 training step", "torch", 1.3, _network("ResNet-20", last=False)),
    Goal("ResNet-20 training step, channels_last", "torch", 1.2, _network("ResNet-20", last=True)),
]


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with the values that were measured for it; ``reached`` is None where there are none."""
    results = []
    for goal in GOALS:
        values = [value for row in filter(goal.chosen, rows) if (value := _value(row, goal)) is not None]
        reached = [v["median"] <= goal.bound if goal.at_most else v["median"] >= goal.bound for v in values]
        results.append(
            {
                "goal": goal.text,
                "against": goal.against,
                "at_most": goal.at_most,
                "bound": goal.bound,
                "values": values,
                "reached": all(reached) if values else None,
            }
        )
    return results


def _value(row: Mapping[str, Any], goal: Goal) -> dict[str, Any] | None:
    ours = row["contestants"]["ours"]
    spread = ours.get(f"to_{goal.against}") if goal.at_most else row["contestants"].get(goal.against, {}).get("ratio")
    place = {key: row[key] for key in ("case", "shape", "channels_last")}
    return None if spread is None else place | spread
