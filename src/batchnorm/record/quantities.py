"""The quantities of a log: title, unit, noise floor, how to read each, when it misleads, and its source.

The instruments derive the formulas. Charts and pages take their words from here.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that is measured of a layer, or of a model.

    ``quantities.toml`` has them all.

    Args:
        title: A few words, as over a chart.
        unit: Its unit; "" for a plain ratio.
        tier: "free", "probe" or "lab".
        formula: How it is computed.
        reads: How to read it, with the limits that matter.
        misleads: When it must not be read that way.
        floor: The value that it has by chance alone.
        source: Where it comes from.
        of: "layer" or "model".
        good: The value of a healthy layer, if there is one.
    """

    title: str
    unit: str
    tier: str
    formula: str
    reads: str
    misleads: str
    floor: str
    source: str = ""
    of: str = "layer"
    good: float | None = None


def _read() -> dict[str, Quantity]:
    tables = tomllib.loads(Path(__file__).with_name("quantities.toml").read_text(encoding="utf-8"))
    shared: dict[str, str] = tables.pop("shared")
    numbers = {name: table.pop("good", None) for name, table in tables.items()}
    texts = {name: {key: text.format(**shared) for key, text in table.items()} for name, table in tables.items()}
    return {name: Quantity(**words, good=numbers[name]) for name, words in texts.items()}


QUANTITIES: dict[str, Quantity] = _read()
