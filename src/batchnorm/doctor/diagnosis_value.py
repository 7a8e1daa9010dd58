"""The value of a diagnosis: findings, layers, and which checks ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import final

from batchnorm import __version__
from batchnorm.reporting.json_values import Json, to_json
from batchnorm.reporting.severity import Severity
from batchnorm.rules.finding import Finding

# is increased when a key of to_dict() changes its meaning or is removed
SCHEMA_VERSION = 1


@final
@dataclass(frozen=True, slots=True)
class LayerRow:
    """One row of the table of layers; None if a value is not known. Ranges are those over all channels."""

    name: str
    kind: str
    channels: int
    batches: int | None  # num_batches_tracked
    mean_range: tuple[float, float] | None  # of running_mean
    var_range: tuple[float, float] | None  # of running_var
    gamma_range: tuple[float, float] | None
    eps: float | None
    momentum: float | None
    mode: str  # "train", "eval", "frozen", or "" for a file
    gap: float | None = None  # train/eval gap of the output, in sd of the output


@dataclass(frozen=True, slots=True)
class DiagnosisValue:
    """The data of a ``Diagnosis``, without its text and HTML."""

    target: str
    findings: tuple[Finding, ...]
    layers: tuple[LayerRow, ...]
    checked: tuple[str, ...]
    not_checked: Mapping[str, str]
    data: str = ""  # the data that were used, such as "512 examples in 8 batches"
    seconds: float = 0.0
    silenced: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    states: tuple[str, ...] = ()  # paths of a file's states: dicts that a model can load
    notes: tuple[str, ...] = ()  # further sentences about what was examined

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not self.at_least(Severity.ERROR)

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Findings of this severity or a worse one."""
        return tuple(finding for finding in self.findings if finding.severity >= severity)

    def raise_for_status(self, severity: Severity = Severity.ERROR) -> None:
        """Raise a ValueError that lists findings of ``severity`` or worse, if there are any."""
        if worst := self.at_least(severity):
            lines = "\n".join(f"  {f.code} {f.slug} {f.place}: {f.measured}. {f.remedy}" for f in worst)
            raise ValueError(f"{self.target} has {counted(worst)}, expected none:\n{lines}")

    def to_dict(self) -> dict[str, Json]:
        """Plain values for JSON, as docs/doctor.md and the schema beside this file describe them."""
        return {
            "schema_version": SCHEMA_VERSION,
            "batchnorm": __version__,
            "target": self.target,
            "ok": self.ok,
            "data": self.data,
            "seconds": round(self.seconds, 3),
            "findings": [_as_dict(finding) for finding in self.findings],
            "layers": [asdict(row) for row in self.layers],
            "checked": list(self.checked),
            "not_checked": dict(self.not_checked),
            "silenced": self.silenced,
            "versions": dict(self.versions),
            "states": list(self.states),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON: NaN and infinities as strings, since JSON has none."""
        return to_json(self.to_dict())


def _as_dict(finding: Finding) -> dict[str, Json]:
    return {**asdict(finding), "severity": str(finding.severity), "fixable": str(finding.fixable),
            "channels": list(finding.channels)}  # fmt: skip


def counted(findings: Iterable[Finding]) -> str:
    """The number of findings of each severity, such as "2 errors, 1 warning"; "no findings" without any."""
    severities = [finding.severity for finding in findings]
    words = [
        f"{number} {severity}{'s' if number > 1 and severity is not Severity.INFO else ''}"
        for severity in sorted(Severity, reverse=True)
        if (number := severities.count(severity))
    ]
    return ", ".join(words) or "no findings"


def order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings in order: errors first, then by code, then by the model's order of layers."""
    return tuple(sorted(findings, key=lambda finding: (-finding.severity, finding.code)))


def groups(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Groups of findings with the same rule and consequence, in the order of their first findings."""
    members: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        members[finding.code, finding.consequence].append(finding)
    return list(members.values())


def codes_by_reason(not_checked: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason: the codes of the rules that did not run because of it."""
    codes: dict[str, list[str]] = defaultdict(list)
    for code, reason in not_checked.items():
        codes[reason].append(code)
    return dict(codes)
