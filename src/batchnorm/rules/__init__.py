"""The doctor's rules: what may be wrong with batch norm, as small pure functions and their table, ``rules.toml``.

A rule reads ``Evidence`` and yields findings. No rule needs torch. Codes are grouped by family: BN0 mode and state,
BN1 stored statistics, BN2 batches and the training loop, BN3 architecture, BN4 shift, BN5 deployment, BN6
distributed, BN9 environment. A code keeps its meaning for ever. It is not used again if its rule is removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.files.room_tables import room_table
from batchnorm.rules import (
    bn0_state,
    bn1_channels,
    bn1_stale_statistics,
    bn1_stored_statistics,
    bn2_batches,
    bn2_training,
    bn3_architecture,
    bn4_shift,
    bn5_deployment,
    bn6_distributed,
    bn9_environment,
)
from batchnorm.rules.finding import Finding, Fix, Rule, Severity
from batchnorm.rules.rule_evidence import Evidence

if TYPE_CHECKING:
    from batchnorm.rules.finding import Check

__all__ = ["FAMILIES", "RULES", "Evidence", "Finding", "Fix", "Rule", "Severity"]

# Where the rules of a family are.
_FILES = {
    "BN0": [bn0_state],
    "BN1": [bn1_channels, bn1_stale_statistics, bn1_stored_statistics],
    "BN2": [bn2_batches, bn2_training],
    "BN3": [bn3_architecture],
    "BN4": [bn4_shift],
    "BN5": [bn5_deployment],
    "BN6": [bn6_distributed],
    "BN9": [bn9_environment],
}


def _check(code: str, slug: str) -> Check:
    """The function of a rule: it has the name of the rule's slug and is in a file of the rule's family."""
    name = slug.replace("-", "_")
    return next(vars(file)[name] for file in _FILES[code[:3]] if name in vars(file))


# Every rule by its code.
RULES: dict[str, Rule] = {
    code: Rule.of(code, row, _check(code, row["slug"])) for code, row in room_table("rules", "rules").items()
}

# The subject of each family of rules, by the first three characters of its codes.
FAMILIES = {
    "BN0": "mode and state",
    "BN1": "stored statistics",
    "BN2": "batches and training loop",
    "BN3": "architecture",
    "BN4": "shift",
    "BN5": "deployment",
    "BN6": "distributed",
    "BN9": "environment",
}
