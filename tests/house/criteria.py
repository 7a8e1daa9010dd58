"""What the criteria of each version say: an experiment's criterion may not change without a new version."""

from __future__ import annotations

import hashlib
import json
import tomllib

from house.surface import ROOT

# lines are added and never changed: results that were published name their version
DIGESTS: dict[str, dict[str, str]] = {
    "lecture": {"1": "e1b42e900b48a103"},
    "ablation": {"1": "d6dfbec09b6522c5"},
}


def version_and_digest(room: str) -> tuple[str, str]:
    """The version of a room's criteria, and a digest of all else that they say, however it is laid out."""
    said = tomllib.loads((ROOT / "src" / "batchnorm" / room / "criteria.toml").read_text(encoding="utf-8"))
    version = said.pop("version")
    return version, hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
