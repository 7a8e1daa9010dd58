"""All claims of one run together: the numbers, and what they were measured with."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from batchnorm.lecture.claim import Status
from batchnorm.lecture.criteria import LEVEL, VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchnorm.lecture.claim import Claim, Result, Settings, Verdict

    Facts = Mapping[str, str]

SCHEMA_VERSION = 1

_FAILED = {
    Status.NOT_SUPPORTED: "not supported",
    Status.OPPOSITE: "opposite",
    Status.INVALID: "could not be tested",
}


@dataclass(frozen=True, slots=True)
class Outcome:
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
    """Every outcome of one run of the lecture.

    Args:
        settings: Seeds and effort.
        outcomes: One for each claim that ran.
        command: The command line that repeats the run.
    """

    settings: Settings
    outcomes: Sequence[Outcome]
    command: str

    @property
    def title(self) -> str:
        """What the page is called."""
        return "Why batch norm works, measured"

    @property
    def level(self) -> float:
        """Level of the intervals that verdicts were read off."""
        return LEVEL

    @property
    def version(self) -> str:
        """Version of the criteria."""
        return VERSION

    @property
    def second(self) -> str:
        """What stands below the headline; "" for nothing."""
        return ""

    @property
    def cards(self) -> Sequence[Card]:
        """Figures at the head of the page."""
        return ()

    @property
    def measured(self) -> Facts:
        """How it was measured, where a run has its own words for it."""
        return {}

    @property
    def unasked(self) -> Facts:
        """Question -> why it was not asked."""
        return {}

    @property
    def headline(self) -> str:
        """One sentence: how many claims held, and which did not."""
        total = len(self.outcomes)
        held = sum(outcome.main.status is Status.SUPPORTED for outcome in self.outcomes)
        noun = "claim" if total == 1 else "claims"
        parts = [f"{held} of {total} {noun} held in these experiments"]
        for status, words in _FAILED.items():
            names = [outcome.claim.name for outcome in self.outcomes if outcome.main.status is status]
            parts += [f"{words}: {', '.join(names)}"] if names else []
        return "; ".join(parts) + "."

    @property
    def seconds(self) -> float:
        """Time that the experiments took together."""
        return sum(outcome.seconds for outcome in self.outcomes)

    def to_markdown(self) -> str:
        """The headline and a table of every verdict."""
        lines = [f"**{self.headline}**", "", "| criterion | verdict | measured |", "|---|---|---|"]
        for outcome in self.outcomes:
            for verdict in outcome.result.verdicts:
                measured = verdict.told.replace("|", "\\|")
                lines.append(f"| {verdict.criterion.key} | {verdict.status} | {measured} |")
        return "\n".join([*lines, "", f"Repeat: `{self.command}`"])

    def to_json(self) -> str:
        """``to_dict`` as text, which every JSON reader takes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data without times, so that two runs with the same settings compare equal."""
        return {
            "schema_version": SCHEMA_VERSION,
            "criteria_version": self.version,
            "level": self.level,
            "headline": self.headline,
            "seeds": list(self.settings.all_seeds),
            "effort": self.settings.effort,
            "environment": environment(),
            "claims": {
                outcome.claim.name: {
                    "title": outcome.claim.title,
                    "sentence": outcome.claim.sentence,
                    "arms": outcome.claim.arms,
                    "how_to_read": outcome.claim.how_to_read,
                    "not_shown": outcome.claim.not_shown,
                    "sources": list(outcome.claim.sources),
                    **_jsonable(outcome.result.to_dict()),
                }
                for outcome in self.outcomes
            },
        }


def _jsonable(value: Any) -> Any:
    """``value`` with None for what JSON has no number for: the open ends of intervals, and NaN."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, str]:
    """Versions and machine that numbers depend on; no host name, no path."""
    from batchnorm.kernels.cpu import INSTRUCTION_SET

    versions = {name: _version(name) for name in ("batchnorm", "torch", "numpy", "scipy", "scikit-learn")}
    return versions | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "kernels": f"native, {INSTRUCTION_SET}" if INSTRUCTION_SET else "reference",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a Linux interface, absent elsewhere
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
