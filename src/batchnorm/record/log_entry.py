"""A record: the numbers of one measurement, some for each layer and some for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchnorm.record.quantities import QUANTITIES

if TYPE_CHECKING:
    import numpy as np

JsonValue = str | float | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
Line = dict[str, Any]  # a line of a log, parsed from JSON
Described = Mapping[str, Any]  # the description of a layer in the ``start`` line of a log

# significant digits in a log: for the number of a layer, and for a number of the whole model
_DIGITS, _MODEL_DIGITS = 3, 5


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured at one step: numbers and arrays of every batch norm layer, and numbers of the whole model.

    Args:
        step: Number of optimizer steps before the measurement.
        layers: Names of the layers, in the model's order.
        values: Quantity -> one number per layer, None if it could not be measured. The quantities are keys of
            QUANTITIES; a record of tier "lab" may have other names.
        model: Quantity -> number of the whole model.
        tier: "free" (from the running averages), "probe" (a pass over a fixed batch) or "lab" (measured on demand).
        seconds: Unix time of the measurement.
        arrays: Name -> array (layers, ...), such as percentiles.
    """

    step: int
    layers: Sequence[str]
    values: Mapping[str, Sequence[float | None]]
    model: Mapping[str, float | None] = field(default_factory=dict)
    tier: str = "free"
    seconds: float = 0.0
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, quantity: str) -> dict[str, float | None]:
        """Layer -> number, for one quantity.

        Raises:
            KeyError: If the record does not have the quantity.
        """
        if quantity not in self.values:
            raise KeyError(f"expected one of {', '.join(self.values)}, got {quantity!r}.")
        return dict(zip(self.layers, self.values[quantity], strict=True))

    def to_dict(self) -> Line:
        """The record as data for JSON, with rounded numbers, without its layers, tier and arrays.

        None in place of NaN and infinity.
        """
        values = {name: [plain(value) for value in row] for name, row in self.values.items()}
        model = {name: plain(value, _MODEL_DIGITS) for name, value in self.model.items()}
        return {"step": self.step, "seconds": round(self.seconds, 2), "values": values, "model": model}

    def __str__(self) -> str:
        """A table of the layers, and under it those numbers of the whole model whose names are in QUANTITIES."""
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
    """The number rounded to significant digits, as in a log; None if it is None, NaN or infinite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.{_MODEL_DIGITS}g}"
