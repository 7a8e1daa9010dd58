"""The outcomes of the lecture's claims, with the page's title and headline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from batchnorm.experiment.judgement import Criteria, Status
from batchnorm.experiment.outcomes import Verdicts
from batchnorm.lecture.claim_criteria import CRITERIA

_FAILED = {Status.NOT_SUPPORTED: "not supported", Status.OPPOSITE: "opposite", Status.INVALID: "could not be tested"}


@final
@dataclass(frozen=True, slots=True)
class LectureVerdicts(Verdicts):
    """The outcomes of one run of the lecture."""

    criteria: ClassVar[Criteria] = CRITERIA

    @property
    def title(self) -> str:
        """Title of the page."""
        return "Why batch norm works, measured"

    @property
    def headline(self) -> str:
        """How many claims held and which did not, in one sentence."""
        total = len(self.outcomes)
        held = sum(outcome.main.status is Status.SUPPORTED for outcome in self.outcomes)
        noun = "claim" if total == 1 else "claims"
        parts = [f"{held} of {total} {noun} held in these experiments"]
        for status, words in _FAILED.items():
            names = [outcome.claim.name for outcome in self.outcomes if outcome.main.status is status]
            parts += [f"{words}: {', '.join(names)}"] if names else []
        return "; ".join(parts) + "."
