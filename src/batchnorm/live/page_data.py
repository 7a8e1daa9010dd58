"""What a page is told of a log: plain numbers and short texts, at most so many of each kind.

Each look becomes {"step", "values": {quantity: [one number or null a layer]}, "model": {quantity: number or null}}.
Whatever else a line holds stays behind, so a page gets nothing that it would have to check again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.record import Log

TIERS = ("free", "probe", "lab")
# A heat map of a usual page has some 800 pixels for its columns: two pixels a look, and a long log opens at once.
MOST = 400
# More events than anyone reads; a log that has more is ill in a way that the last ones show.
MOST_EVENTS = 200
_LONGEST = 500  # letters of a text
_LARGEST_STEP = 2**53  # that JavaScript counts exactly


def told(log: Log, seen: Mapping[str, int], *, most: int = MOST) -> dict[str, Any]:
    """What was appended after the first ``seen[kind]`` lines of each kind, thinned to ``most`` of each."""
    layers = log.layers

    def rows(kind: str, most: int = most) -> list[dict[str, Any]]:
        found = log.rows(kind, first=seen.get(kind, 0), most=most)
        return [row for row in found if isinstance(row, dict) and is_step(row.get("step"))]

    new_events = max(seen.get("event", 0), log.count("event") - MOST_EVENTS)
    events = log.rows("event", first=new_events)
    return {
        "layers": [layer[:_LONGEST] for layer in layers],
        "tiers": {tier: [_look(row, len(layers)) for row in rows(tier)] for tier in TIERS},
        "progress": [{"step": row["step"], "values": _scalars(row.get("values"))} for row in rows("progress")],
        "events": [_event(row) for row in events if is_step(row.get("step"))],
        "totals": {kind: log.count(kind) for kind in (*TIERS, "progress", "event", "arrays")},
    }


def number(value: Any) -> float | None:
    """A finite number as it is; None for everything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        return None
    return value


def text(value: Any) -> str | None:
    """A text, cut where nobody reads on; None for everything else."""
    return value[:_LONGEST] if isinstance(value, str) else None


def is_step(value: Any) -> bool:
    """Whether a number of steps is one that a page can count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_STEP


def _look(row: Mapping[str, Any], layers: int) -> dict[str, Any]:
    values = row.get("values")
    values = values if isinstance(values, Mapping) else {}
    kept = {str(name)[:_LONGEST]: _numbers(of) for name, of in values.items() if _is_row(of, layers)}
    return {"step": row["step"], "values": kept, "model": _scalars(row.get("model"))}


def _is_row(values: Any, layers: int) -> bool:
    return isinstance(values, list) and len(values) == layers


def _numbers(values: list[Any]) -> list[float | None]:
    """Each as ``number``; most rows are all finite numbers, which is seen at once."""
    if set(map(type, values)) == {float} and math.isfinite(sum(values)):
        return values
    return [number(value) for value in values]


def _scalars(values: Any) -> dict[str, float | None]:
    if not isinstance(values, Mapping):
        return {}
    return {str(name)[:_LONGEST]: number(value) for name, value in values.items()}


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": row["step"], **{key: text(row.get(key)) for key in ("code", "layer", "message")}}
