"""One look at a model: for each quantity a number a layer, and a few of the model as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchnorm.record.quantities import QUANTITIES

if TYPE_CHECKING:
    import numpy as np

JsonValue = str | float | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
Line = dict[str, Any]  # a line of a log as JSON has it
Described = Mapping[str, Any]  # a layer, as the start of a log describes it

# digits of a layer's number in a log, whose noise is above a hundredth, and of a model's
_DIGITS, _MODEL_DIGITS = 3, 5


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured of every batch norm layer at one step.

    Args:
        step: Optimizer steps done.
        layers: Names of the layers, in the model's order.
        values: For each quantity of QUANTITIES one number a layer; None where it could not be measured.
        model: Numbers of the whole model, by the name of their quantity.
        tier: "free" (read from buffers), "probe" (a pass over a fixed batch) or "lab" (asked for).
        seconds: Unix time.
        arrays: Further arrays (layers, ...), by name, such as percentiles.
    """

    step: int
    layers: Sequence[str]
    values: Mapping[str, Sequence[float | None]]
    model: Mapping[str, float | None] = field(default_factory=dict)
    tier: str = "free"
    seconds: float = 0.0
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, quantity: str) -> dict[str, float | None]:
        """One quantity of every layer by the layer's name."""
        if quantity not in self.values:
            raise KeyError(f"expected one of {', '.join(self.values)}, got {quantity!r}.")
        return dict(zip(self.layers, self.values[quantity], strict=True))

    def to_dict(self) -> Line:
        """The record as JSON-able data, without its arrays; what is not finite becomes None."""
        values = {name: [plain(value) for value in row] for name, row in self.values.items()}
        model = {name: plain(value, _MODEL_DIGITS) for name, value in self.model.items()}
        return {"step": self.step, "seconds": round(self.seconds, 2), "values": values, "model": model}

    def __str__(self) -> str:
        """A table of the layers, and the model's numbers under it."""
        names = list(self.values)
        width = max([len(layer) for layer in self.layers] + [5])
        head = f"{'layer':<{width}}  " + "  ".join(f"{name:>12}" for name in names)
        rows = [
            f"{layer:<{width}}  " + "  ".join(f"{_cell(self.values[name][i]):>12}" for name in names)
            for i, layer in enumerate(self.layers)
        ]
        tail = [f"{QUANTITIES[name].title}: {_cell(value)}" for name, value in self.model.items() if name in QUANTITIES]
        return "\n".join([head, *rows, *tail])


def plain(value: float | None, digits: int = _DIGITS) -> float | None:
    """A number as a log has it: of few digits, or None where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.{_MODEL_DIGITS}g}"
