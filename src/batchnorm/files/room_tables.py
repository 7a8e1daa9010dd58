"""TOML files that a room keeps beside its code: words, criteria, codes and other constants."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

Table = dict[str, Any]


@cache
def room_table(room: str, name: str) -> Table:
    """The TOML file ``name`` of a package of ours; not to be changed."""
    return tomllib.loads(files(f"batchnorm.{room}").joinpath(f"{name}.toml").read_text(encoding="utf-8"))
