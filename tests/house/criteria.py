"""What the criteria of each version decide by: a limit or level may not change without a new version."""

from __future__ import annotations

import hashlib
import json
import tomllib

from house.surface import ROOT

# Add lines, and never change one: published results name the version of their criteria.
DIGESTS: dict[str, dict[str, str]] = {
    "lecture": {"1": "00e9f0e727c420ea"},
    "ablation": {"1": "ba2987ed43f69706"},
}


def version_and_digest(room: str) -> tuple[str, str]:
    """The version of a room's criteria, and a digest of their names, keys and numbers. Words may be put better."""
    table = tomllib.loads((ROOT / "src" / "batchnorm" / room / "criteria.toml").read_text(encoding="utf-8"))
    version = table.pop("version")
    return version, hashlib.sha256(json.dumps(_without_texts(table), sort_keys=True).encode()).hexdigest()[:16]


def _without_texts(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_texts(each) for key, each in value.items()}
    return "" if isinstance(value, str) else value
