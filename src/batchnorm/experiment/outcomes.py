"""The outcomes of all claims of one run, as data for the page, the terminal and the JSON file."""

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
    """A claim, the result of its experiment, and the seconds that the experiment took."""

    claim: Claim
    result: Result
    seconds: float

    @property
    def main(self) -> Verdict:
        """The verdict on the claim itself; the other verdicts qualify it."""
        return self.result.verdicts[0]


@dataclass(frozen=True, slots=True)
class Card:
    """A number at the head of a page, with a label and a one-line note."""

    what: str
    figure: str
    note: str


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Every outcome of one run; a subclass adds its criteria and a headline.

    Args:
        settings: Seeds and effort of the run.
        outcomes: One outcome for each claim that ran.
        command: The command line that repeats the run.
        measured: Topic -> text on how the numbers were measured; {} unless the run has such texts.
        unasked: Question -> the reason why the question was not asked.
    """

    criteria: ClassVar[Criteria]

    settings: RunSettings
    outcomes: Sequence[ClaimOutcome]
    command: str
    measured: Mapping[str, str] = field(default_factory=dict)
    unasked: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Title of the page."""
        raise NotImplementedError

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        raise NotImplementedError

    @property
    def second(self) -> str:
        """The line below the headline; "" for no line."""
        return ""

    @property
    def cards(self) -> Sequence[Card]:
        """Figures at the head of the page."""
        return ()

    @property
    def level(self) -> float:
        """Confidence level of the intervals that decide the verdicts."""
        return self.criteria.level

    @property
    def version(self) -> str:
        """Version of the criteria."""
        return self.criteria.version

    @property
    def seconds(self) -> float:
        """Seconds that all experiments took together."""
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def by_key(self) -> dict[str, Verdict]:
        """Every verdict by its key."""
        return {v.criterion.key: v for outcome in self.outcomes for v in outcome.result.verdicts}

    def to_json(self) -> str:
        """The result of ``to_dict`` as strict JSON, without NaN and Infinity."""
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
    """``value`` with None in place of infinite numbers (open ends of intervals) and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
