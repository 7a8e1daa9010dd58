"""The quantities of a log: title, unit, noise floor, how to read it, when it misleads, and its source.

The formulas are derived in the modules of ``instruments``. Charts and pages show these texts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache

from batchnorm.files.room_tables import Table, room_table


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity that is measured for a layer or for a model; all quantities are in ``quantities.toml``.

    Args:
        title: Title of a few words, as above a chart.
        unit: Its unit; "" if it has no unit.
        tier: "free", "probe" or "lab".
        formula: How it is computed.
        reads: How to read it, with the limits that matter.
        misleads: When this reading is wrong.
        floor: The value that chance alone gives.
        source: The paper or the statistics behind it; "" if there is none.
        of: "layer" or "model".
        good: The value of a healthy layer; None if there is no such value.
        merges: How values of replicas are joined when their logs are merged: "mean", "rms", "harmonic", "odds" or
            "largest", which ``joined_values`` defines; "each" if only the replica itself has a meaningful value.
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
    merges: str = "each"


def _read() -> dict[str, Quantity]:
    tables = room_table("record", "quantities")
    return {name: _quantity(table, tables["shared"]) for name, table in tables.items() if name != "shared"}


def _quantity(table: Table, shared: dict[str, str]) -> Quantity:
    """A quantity from its table; ``shared`` phrases replace the names in braces in its texts."""
    values: Table = {key: text.format(**shared) if isinstance(text, str) else text for key, text in table.items()}
    return Quantity(**values)


QUANTITIES: dict[str, Quantity] = _read()


@cache
def quantities_hash() -> str:
    """A digest of the names, units and tiers of all quantities, and of how they are merged."""
    table = [(name, q.unit, q.tier, q.of, q.merges) for name, q in sorted(QUANTITIES.items())]
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16]
