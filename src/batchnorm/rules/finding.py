"""Finding: one fault of one layer, or of the whole model; Rule: how it is found."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchnorm.rules.evidence import Evidence


class Severity(IntEnum):
    """How bad a finding is; ordered, so that a limit can be compared with."""

    INFO = 0  # an opportunity, or something to know
    WARNING = 1  # likely to harm results
    ERROR = 2  # results are wrong, or will be

    def __str__(self) -> str:
        return self.name.lower()


class Fix(StrEnum):
    """What it takes to mend a finding."""

    NO = "no"  # a decision, or code that only its owner can change
    SAFE = "safe"  # needs no data, and eval outputs stay the same
    DATA = "data"  # needs examples
    UNSAFE = "unsafe"  # needs no data, and changes eval outputs


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: where, what was measured against which limit, what follows, and what mends it.

    ``layer`` is a dotted path, "" for the whole model or file. ``channels`` are indices, none if all are meant.
    ``measured`` and ``limit`` are short phrases with numbers and units; ``remedy`` is a command or a line of code.
    A rule leaves ``code``, ``fixable`` and ``where`` to the table, and ``severity`` too, unless it is a lesser one than
    the table's: what is found by weaker evidence.
    """

    layer: str
    measured: str
    limit: str
    consequence: str
    remedy: str
    channels: tuple[int, ...] = ()
    fixable: Fix = Fix.NO
    code: str = ""
    slug: str = ""
    severity: Severity = Severity.ERROR
    where: str = ""  # file:line of the layer's class


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table: a rule's code, its name, how bad it is, what it needs to know, and the function.

    ``check`` takes the evidence and yields findings; it is called only if every part named in ``needs`` is there.
    Its docstring is the rule's page.
    """

    code: str
    slug: str
    severity: Severity
    needs: tuple[str, ...]
    check: Callable[[Evidence], Iterable[Finding]]

    def findings(self, evidence: Evidence) -> list[Finding]:
        """What this rule finds, worded in full."""
        return [
            replace(
                found,
                code=self.code,
                slug=self.slug,
                severity=min(found.severity, self.severity),
                where=found.where or evidence.where(found.layer),
            )
            for found in self.check(evidence)
        ]

    def missing(self, evidence: Evidence) -> list[str]:
        """Why the rule cannot run on this evidence: empty if it can."""
        return [reason for need in self.needs if (reason := evidence.why_not(need))]

    @property
    def page(self) -> str:
        """The rule's page: the docstring of its function."""
        return inspect.cleandoc(self.check.__doc__ or "")

    @property
    def title(self) -> str:
        """First sentence of the page."""
        return self.page.partition("\n")[0]
