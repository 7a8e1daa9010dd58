"""The doctor's rules: what may be wrong with batch norm, as small pure functions and their table, ``rules.toml``.

A rule looks at ``Evidence`` and yields findings. None of this needs torch. Codes go by family: BN0 mode and state,
BN1 stored statistics, BN2 batches and the training loop, BN3 architecture, BN4 shift, BN5 deployment, BN6
distributed, BN9 environment. A code keeps its meaning for ever and is not used again when its rule goes.
"""

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

__all__ = ["FAMILIES", "RULES", "Evidence", "Finding", "Fix", "Rule", "Severity"]

_FILES = (
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
_CHECKS = {name: check for file in _FILES for name, check in vars(file).items() if callable(check)}

# Every rule by its code. The function of a rule has the name of its slug.
RULES: dict[str, Rule] = {
    code: Rule.of(code, row, _CHECKS[row["slug"].replace("-", "_")])
    for code, row in room_table("rules", "rules").items()
}

# What the rules of a family are about, by the beginning of their codes.
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
