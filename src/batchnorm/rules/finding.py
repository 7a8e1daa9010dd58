"""Finding: one fault of one layer or of the whole model. Unknown: why a rule could not judge. Rule: yields both."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from batchnorm.reporting.rows import RuleWords
from batchnorm.reporting.severity import Severity
from batchnorm.rules.phrases import Fix, listed, possible

__all__ = ["AFFINE", "STATISTICS", "Finding", "Fix", "Rule", "Severity", "Unknown", "by_reason"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchnorm.files.room_tables import Table
    from batchnorm.rules.rule_evidence import Evidence

    Check = Callable[[Evidence], Iterable["Finding | Unknown"]]

STATISTICS, AFFINE = ("running_mean", "running_var", "num_batches_tracked"), ("weight", "bias")
READS = {"statistics": STATISTICS, "affine": AFFINE, "all": (*STATISTICS, *AFFINE)}


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: its place, the measured value with its limit, the consequence, and the remedy.

    ``layer`` is a dotted path, "" for the whole model or file. ``channels`` are indices; () means all.
    ``measured`` and ``limit`` are short phrases with numbers and units; ``remedy`` is a command or a line of code.
    If a rule leaves limit, consequence, remedy, fixable, code, slug or severity empty, those of ``rules.toml`` are
    used. A rule sets a severity only if the evidence is weaker; then it is lower than that of ``rules.toml``.
    """

    layer: str
    measured: str
    limit: str = ""
    consequence: str = ""
    remedy: str = ""
    channels: tuple[int, ...] = ()
    fixable: Fix = Fix.NO
    code: str = ""
    slug: str = ""
    severity: Severity = Severity.ERROR
    where: str = ""  # file:line of the layer's class

    @property
    def place(self) -> str:
        """The layer's path, or "model" for the whole model."""
        return self.layer or "model"


@final
@dataclass(frozen=True, slots=True)
class Unknown:
    """Why a rule could not judge a layer, or the whole model (""): a measurement failed, or it proves nothing."""

    layer: str
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: its row of ``rules.toml``, and the function that finds faults.

    ``check`` takes the evidence and yields findings and unknowns. It is called only if the evidence has every part in
    ``needs``. Its docstring is the rule's page. A layer is not judged if one of its values in ``reads`` could not be
    read. A finding without a limit, consequence, remedy or fixable gets the rule's.
    """

    code: str
    slug: str
    severity: Severity
    needs: tuple[str, ...]
    check: Check
    reads: tuple[str, ...] = STATISTICS  # the stored values that the rule reads
    limit: str = ""
    consequence: str = ""
    remedy: str = ""
    fixable: Fix = Fix.NO

    @classmethod
    def of(cls, code: str, row: Table, check: Check) -> Rule:
        """The rule of a row. Names in braces in its limit are replaced by constants of the file of ``check``."""
        constants = vars(sys.modules[check.__module__])
        return cls(
            **row
            | {
                "code": code,
                "check": check,
                "severity": Severity[row["severity"].upper()],
                "needs": tuple(row["needs"]),
                "reads": READS[row.get("reads", "statistics")],
                "limit": row.get("limit", "").format_map(constants),
                "fixable": Fix(row.get("fixable", "no")),
            }
        )

    def findings(self, evidence: Evidence) -> list[Finding]:
        """The findings of this rule, with all their texts."""
        return self.look(evidence)[0]

    def look(self, evidence: Evidence) -> tuple[list[Finding], list[Unknown]]:
        """The findings of this rule, with all their texts, and the layers that it could not judge.

        The layers that it could not judge matter only if there is no finding.
        """
        results = list(self.check(evidence))
        unread = [Unknown(layer, reason) for layer, reason in evidence.unseen(self.needs, self.reads)]
        unknown = [*unread, *(each for each in results if isinstance(each, Unknown))]
        return [self._worded(finding, evidence) for finding in results if isinstance(finding, Finding)], unknown

    def _worded(self, found: Finding, evidence: Evidence) -> Finding:
        usual = self.fixable if found.fixable is Fix.NO else found.fixable
        fixable, remedy = possible(usual, found.remedy or self.remedy, evidence)
        return replace(
            found,
            limit=found.limit or self.limit,
            consequence=found.consequence or self.consequence,
            code=self.code,
            slug=self.slug,
            severity=min(found.severity, self.severity),
            where=found.where or evidence.where(found.layer),
            fixable=fixable,
            remedy=remedy,
        )

    def missing(self, evidence: Evidence) -> list[str]:
        """The reasons why the rule cannot run on this evidence; [] if it can."""
        return [reason for need in self.needs if (reason := evidence.why_not(need))]

    @property
    def page(self) -> str:
        """The rule's page: the docstring of its function."""
        return inspect.cleandoc(self.check.__doc__ or "")

    @property
    def title(self) -> str:
        """First sentence of the page."""
        return self.page.partition("\n")[0]

    @property
    def sections(self) -> list[tuple[str, str]]:
        """The sections of the page, by their titles."""
        parts = re.split(r"^(\w+):$", self.page, flags=re.MULTILINE)
        return [(name, inspect.cleandoc(text)) for name, text in zip(parts[1::2], parts[2::2], strict=True)]

    @property
    def words(self) -> RuleWords:
        """The rule's texts for code scanning (SARIF)."""
        fix = " ".join(dict(self.sections).get("Fix", self.title).split())
        return RuleWords(
            code=self.code, name=self.slug, title=self.title, page=self.page, help=fix, severity=self.severity
        )


def by_reason(unknown: Iterable[Unknown]) -> str:
    """Each reason with its layers in parentheses; no parentheses if it is about the whole model."""
    layers: dict[str, dict[str, None]] = {}
    for item in unknown:
        layers.setdefault(item.reason, {})[item.layer] = None
    return "; ".join(reason if "" in names else f"{reason} ({listed(names)})" for reason, names in layers.items())
