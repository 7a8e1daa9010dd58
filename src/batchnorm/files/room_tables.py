"""TOML files beside the code of a package of ours (a room): words, criteria, codes and other constants."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

Table = dict[str, Any]


@cache
def room_table(room: str, name: str) -> Table:
    """The table in ``name``.toml of the package batchnorm.``room``. It is cached: do not change it."""
    return tomllib.loads(files(f"batchnorm.{room}").joinpath(f"{name}.toml").read_text(encoding="utf-8"))
