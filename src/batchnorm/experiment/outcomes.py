"""All claims of one run together, as a page, a terminal and a file of numbers show them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from batchnorm.experiment.claim import Claim, Result
from batchnorm.experiment.environment import environment
from batchnorm.experiment.judgement import Criteria, Json, Verdict
from batchnorm.experiment.run_settings import RunSettings

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """A claim, what its experiment measured, and how many seconds that took."""

    claim: Claim
    result: Result
    seconds: float

    @property
    def main(self) -> Verdict:
        """The verdict on the claim itself; the others qualify it."""
        return self.result.verdicts[0]


@dataclass(frozen=True, slots=True)
class Card:
    """One figure at the head of a page: what it is, the figure, and a line on it."""

    what: str
    figure: str
    note: str


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Every outcome of one run; a subclass adds its criteria and a headline.

    Args:
        settings: Seeds and effort.
        outcomes: One for each claim that ran.
        command: The command line that repeats the run.
        measured: How the numbers were measured, topic -> text, where a run has its own words.
        unasked: Question -> reason why it was not asked.
    """

    criteria: ClassVar[Criteria]

    settings: RunSettings
    outcomes: Sequence[ClaimOutcome]
    command: str
    measured: Mapping[str, str] = field(default_factory=dict)
    unasked: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the page is called."""
        raise NotImplementedError

    @property
    def headline(self) -> str:
        """What came out, in one sentence."""
        raise NotImplementedError

    @property
    def second(self) -> str:
        """What stands below the headline; "" for nothing."""
        return ""

    @property
    def cards(self) -> Sequence[Card]:
        """Figures at the head of the page."""
        return ()

    @property
    def level(self) -> float:
        """Level of the intervals that verdicts were read off."""
        return self.criteria.level

    @property
    def version(self) -> str:
        """Version of the criteria."""
        return self.criteria.version

    @property
    def seconds(self) -> float:
        """Time that the experiments took together."""
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def by_key(self) -> dict[str, Verdict]:
        """Every verdict by its key."""
        return {v.criterion.key: v for outcome in self.outcomes for v in outcome.result.verdicts}

    def to_json(self) -> str:
        """``to_dict`` as text, which every JSON reader takes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_dict(self) -> Json:
        """JSON-able data without times, so that two runs with the same settings compare equal."""
        return {
            "schema_version": SCHEMA_VERSION,
            "criteria_version": self.version,
            "level": self.level,
            "headline": self.headline,
            "seeds": list(self.settings.all_seeds),
            "effort": self.settings.effort,
            "environment": environment(),
            "claims": {o.claim.name: _jsonable(o.claim.words() | o.result.to_dict()) for o in self.outcomes},
        }


def _jsonable(value: object) -> object:
    """``value`` with None for what JSON has no number for: the open ends of intervals, and NaN."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
