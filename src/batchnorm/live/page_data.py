"""The data that a page gets from a log: plain numbers and short texts, a limited number of each kind.

A look is a line with measurements at one step. It becomes {"step", "values": {quantity: [number or null for each
layer]}, "model": {quantity: number or null}}. Everything else in a line is dropped, so a page need not check its data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from batchnorm.record import Log
from batchnorm.record.log_entry import JsonValue

TIERS = ("free", "probe", "lab")
# Most lines of a kind. A heat map is about 800 pixels wide: a look gets two pixels, and a long log opens at once.
MOST = 400
# More events than anyone reads; the last events show what is wrong.
MOST_EVENTS = 200
_LONGEST = 500  # characters of a text
_LARGEST_STEP = 2**53  # JavaScript's largest exact integer


def new_data(log: Log, seen: Mapping[str, int], *, most: int = MOST) -> dict[str, JsonValue]:
    """Data from the lines after the first ``seen[kind]`` lines of each kind, thinned to ``most`` lines of each kind.

    Events are not thinned: of the last 200 events of the log, the new ones are returned.
    """
    layers = log.layers

    def rows(kind: str, most: int = most) -> list[dict[str, JsonValue]]:
        lines = log.rows(kind, first=seen.get(kind, 0), most=most)
        return [row for row in lines if isinstance(row, dict) and is_step(row.get("step"))]

    new_events = max(seen.get("event", 0), log.count("event") - MOST_EVENTS)
    events = log.rows("event", first=new_events)
    return {
        "layers": [layer[:_LONGEST] for layer in layers],
        "tiers": {tier: [_look(row, len(layers)) for row in rows(tier)] for tier in TIERS},
        "progress": [{"step": row["step"], "values": _scalars(row.get("values"))} for row in rows("progress")],
        "events": [_event(row) for row in events if is_step(row.get("step"))],
        "totals": {kind: log.count(kind) for kind in (*TIERS, "progress", "event", "arrays")},
    }


def number(value: JsonValue) -> float | None:
    """A finite number, unchanged; None for any other value."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        return None
    return value


def text(value: JsonValue) -> str | None:
    """A text, cut to 500 characters; None for any other value."""
    return value[:_LONGEST] if isinstance(value, str) else None


def is_step(value: JsonValue) -> bool:
    """Whether a value is a step number that JavaScript can represent."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_STEP


def _look(row: Mapping[str, JsonValue], layers: int) -> dict[str, JsonValue]:
    values = row.get("values")
    values = values if isinstance(values, Mapping) else {}
    quantities = {str(name)[:_LONGEST]: _numbers(of) for name, of in values.items() if _is_row(of, layers)}
    return {"step": row["step"], "values": quantities, "model": _scalars(row.get("model"))}


def _is_row(values: JsonValue, layers: int) -> TypeGuard[list[object]]:
    return isinstance(values, list) and len(values) == layers


def _numbers(values: list[Any]) -> list[float | None]:
    """``number`` of each value; fast for the usual row of finite numbers."""
    if set(map(type, values)) == {float} and math.isfinite(sum(values)):
        return values
    return [number(value) for value in values]


def _scalars(values: JsonValue) -> dict[str, float | None]:
    if not isinstance(values, Mapping):
        return {}
    return {str(name)[:_LONGEST]: number(value) for name, value in values.items()}


def _event(row: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {"step": row["step"], **{key: text(row.get(key)) for key in ("code", "layer", "message")}}
