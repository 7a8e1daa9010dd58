"""The quantities of a log: title, unit, noise floor, how to read each, when it misleads, and its source.

The instruments derive the formulas. Charts and pages take their words from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.files.room_tables import Table, room_table


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
    tables = room_table("record", "quantities")
    return {name: _quantity(table, tables["shared"]) for name, table in tables.items() if name != "shared"}


def _quantity(table: Table, shared: dict[str, str]) -> Quantity:
    """A quantity from its table, whose texts name shared phrases in braces."""
    values: Table = {key: text.format(**shared) if isinstance(text, str) else text for key, text in table.items()}
    return Quantity(**values)


QUANTITIES: dict[str, Quantity] = _read()
