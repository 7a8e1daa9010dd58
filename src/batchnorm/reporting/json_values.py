"""JSON: the type of its values, and their text, which every JSON parser accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"


def to_json(value: Json) -> str:
    """The value as text. NaN and infinities become strings, because JSON has no numbers for them."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def to_json_line(value: Json) -> str:
    """The value as one line of text, with the strings of ``to_json`` for NaN and infinities."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
