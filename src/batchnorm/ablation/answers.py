"""The answers for one model together: the headline, cards, and what they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log2
from typing import TYPE_CHECKING, Any, final

from batchnorm.ablation.criteria import LEVEL, VERSION, power, share, times
from batchnorm.lecture.claim import Status
from batchnorm.lecture.verdicts import Card, Verdicts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.lecture.claim import Verdict

SCHEMA_VERSION = 1
_WORDS = {
    Status.SUPPORTED: "shown here",
    Status.NOT_SUPPORTED: "not shown",
    Status.OPPOSITE: "the opposite",
    Status.INVALID: "not testable",
}
_SAID = tuple(_WORDS.values())
_EQUAL = 1.5  # the margin of the criterion on steps


@final
@dataclass(frozen=True, slots=True)
class Answers(Verdicts):
    """What was asked of a model, with what came out.

    Args:
        model: The model as the command line has it.
        measured: How it was measured, what -> text.
        unasked: Question -> why it was not asked.
        trained: Whether anything was trained.
        steps: Training steps of each run.
        idle: Of the arms "with" and "without" those that learned at no rate.
        late: Of these arms those of which a seed never reached the target, so that ratios are bounds.
        advice: What would do an arm more justice; "" for nothing.
    """

    model: str = ""
    measured: Mapping[str, str] = field(default_factory=dict)
    unasked: Mapping[str, str] = field(default_factory=dict)
    trained: bool = True
    steps: int = 0
    idle: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    advice: str = ""

    @property
    def found(self) -> dict[str, Verdict]:
        """Every verdict by its key."""
        return {v.criterion.key: v for outcome in self.outcomes for v in outcome.result.verdicts}

    @property
    def title(self) -> str:
        """The question that the page answers."""
        asked = "Does batch norm help {}, and why?" if self.trained else "What batch norm does in {}, as it is"
        return asked.format(self.model)

    @property
    def level(self) -> float:
        """Level of the intervals that verdicts were read off."""
        return LEVEL

    @property
    def version(self) -> str:
        """Version of the criteria."""
        return VERSION

    @property
    def headline(self) -> str:
        """The verdict in a sentence, the unwelcome ones too."""
        return _speed_sentence(self) if self.trained else _snapshot_sentence(self)

    @property
    def second(self) -> str:
        """Which of the reasons hold here, and which do not."""
        rest = [(o.claim.title.lower(), _whole(o.result.verdicts)) for o in self.outcomes if o.claim.name != "speed"]
        parts = [f"{said}: {', '.join(names)}" for said in _SAID if (names := [t for t, how in rest if how == said])]
        parts += [f"{title} in part: {how}" for title, how in rest if how not in _SAID]
        text = "; ".join(parts)
        told = f"{text[:1].upper()}{text[1:]}." if text else ""
        return f"{told} {self.advice}".strip()

    @property
    def cards(self) -> list[Card]:
        """Figures at the head of the page."""
        makers = (_speed_card, _rates_card, _shift_card, _rank_card, _noise_card, _test_card)
        return [card for make in makers if (card := make(self.found)) is not None]

    @property
    def questions(self) -> int:
        """Criteria that were judged."""
        return len(self.found)

    def to_markdown(self) -> str:
        """The headline and a table of every verdict."""
        lines = [f"**{self.headline}**", "", self.second, "", "| criterion | verdict | measured |", "|---|---|---|"]
        for verdict in self.found.values():
            measured = verdict.told.replace("|", "\\|")
            lines.append(f"| {verdict.criterion.key} | {verdict.status} | {measured} |")
        return "\n".join([*lines, "", f"Repeat: `{self.command}`"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data without times, so that two runs with the same settings compare equal."""
        whole = Verdicts.to_dict(self)
        extra = {"model": self.model, "trained": self.trained, "command": self.command, "second": self.second}
        whole |= {"schema_version": SCHEMA_VERSION}
        return {**extra, **whole, "measured": dict(self.measured), "unasked": dict(self.unasked)}


def _whole(verdicts: Sequence[Verdict]) -> str:
    """How a question was answered as a whole; where its criteria differ, by each of them."""
    valid = [v for v in verdicts if v.status is not Status.INVALID]
    if len({v.status for v in valid}) > 1:
        return ", ".join(f"{v.criterion.key} {_WORDS[v.status]}" for v in valid)
    return _WORDS[valid[0].status] if valid else _WORDS[Status.INVALID]


def _speed_sentence(answers: Answers) -> str:
    found = answers.found
    verdict = found["speed-steps"]
    if verdict.status is Status.INVALID or verdict.estimate is None:
        return f"It cannot be told: {verdict.told.rstrip('.')}. Give more --steps, or other --rates."
    mean, low, high = (power(2, x) for x in (verdict.estimate.mean, verdict.estimate.low, verdict.estimate.high))
    # an arm that never arrives counts with the last step
    bound = "at least " if "at least" in verdict.sentence else ""
    interval = f"95% interval {times(low)}× to {times(high)}×"
    if verdict.status is Status.SUPPORTED and answers.idle == ("without",):
        return (
            f"Yes: with batch norm it learns, without it does not in {answers.steps} steps, at any of the rates: it "
            f"takes {bound}{times(mean)}× as many ({interval}){_because(found)}."
        )
    if verdict.status is Status.SUPPORTED:
        return f"Yes: without batch norm it takes {bound}{times(mean)}× as many steps ({interval}){_because(found)}."
    if verdict.status is Status.OPPOSITE:
        back = f"95% interval {times(_inverse(high))}× to {times(_inverse(low))}×"
        bound = "at least " if "at most" in verdict.sentence else ""
        return f"No: with batch norm it takes {bound}{times(_inverse(mean))}× as many steps as without ({back})."
    if answers.idle == ("with",):
        return (
            f"No: without batch norm it learns, with it does not in {answers.steps} steps, at any of the rates "
            f"({times(mean)}× as many steps without, {interval})."
        )
    if not answers.idle and not answers.late and low > 1 / _EQUAL and high < _EQUAL:
        return f"No: without batch norm it learns as fast ({times(mean)}× as many steps, {interval})."
    if answers.idle == ("without",):
        return (
            f"Not shown in {answers.steps} steps: with batch norm it learns, without it does not, at any of the rates, "
            f"so it takes {bound}{times(mean)}× as many steps ({interval}; needed: above {_EQUAL}×). Give more --steps."
        )
    if answers.late and low > 1 / _EQUAL and high < _EQUAL:
        never = " and ".join(f"{arm} batch norm" for arm in answers.late)
        return (
            f"No difference is shown in {answers.steps} steps ({times(mean)}× as many without batch norm, {interval}), "
            f"but {never} a seed never reached the target, and counts with the last step. Give more --steps."
        )
    if mean > 1:
        return (
            f"Not shown: without batch norm it takes {bound}{times(mean)}× as many steps, but the {interval} does not "
            f"lie above {_EQUAL}×."
        )
    return f"No gain: without batch norm it takes {times(mean)}× as many steps ({interval})."


def _inverse(ratio: float) -> float:
    return 1 / ratio if ratio else inf


def _because(found: Mapping[str, Verdict]) -> str:
    instead = found.get("scale-instead")
    if instead is not None and instead.status is Status.SUPPORTED:
        better = instead.estimate is not None and instead.estimate.high < -log2(_EQUAL)
        return f"; normalizing the inputs alone does {'better' if better else 'as well'}"
    once = found.get("speed-once")
    if once is None or once.status is Status.INVALID:
        return ""
    if once.status is Status.SUPPORTED:
        return "; normalizing once, at the start, is not enough"
    if once.status is Status.OPPOSITE:
        return "; normalizing once, at the start, is faster still"
    return "; normalizing once, at the start, may do as well"


def _snapshot_sentence(answers: Answers) -> str:
    parts = []
    stored, noise = answers.found.get("test-time-stored"), answers.found.get("noise-slope")
    if stored is not None and stored.status is Status.SUPPORTED:
        parts.append("its running averages serve as well as exact statistics")
    elif stored is not None and stored.status is Status.OPPOSITE:
        parts.append("its running averages are stale, and recalibrating them lowers the loss")
    if noise is not None and noise.status is not Status.INVALID:
        parts.append(noise.sentence.rstrip(".").replace("The noise power", "the noise of its batches"))
    said = "; ".join(parts) or "nothing could be measured"
    return f"As it is, and without training it: {said}. Whether batch norm helps it learn was not asked."


def _factor(verdict: Verdict | None, what: str, note: str, base: float = 2) -> Card | None:
    if verdict is None:
        return None
    if verdict.estimate is None or verdict.status is Status.INVALID:
        return Card(what, "–", "not comparable here")
    mean, low, high = (power(base, x) for x in (verdict.estimate.mean, verdict.estimate.low, verdict.estimate.high))
    interval = f"{times(low)}× to {times(high)}×, {len(verdict.estimate.values)} seeds"
    bound = "≥ " if "at least" in verdict.sentence else "≤ " if "at most" in verdict.sentence else ""
    return Card(what, f"{bound}{times(mean)}×", f"{note}; {interval}")


def _speed_card(found: Mapping[str, Verdict]) -> Card | None:
    return _factor(found.get("speed-steps"), "Steps to the target", "without / with batch norm")


def _rates_card(found: Mapping[str, Verdict]) -> Card | None:
    return _factor(found.get("rates-largest"), "Largest usable rate", "with / without batch norm")


def _shift_card(found: Mapping[str, Verdict]) -> Card | None:
    return _factor(found.get("shift-drift"), "Shift that layers see", "without / with batch norm")


def _rank_card(found: Mapping[str, Verdict]) -> Card | None:
    return _factor(found.get("depth-rank"), "Stable rank, last / first layer", "over random halves of the examples")


def _noise_card(found: Mapping[str, Verdict]) -> Card | None:
    verdict = found.get("noise-slope")
    if verdict is None or verdict.estimate is None:
        return None
    rate = verdict.sentence.partition("dropout at ")[2].partition(";")[0]
    return Card("Batch noise, as dropout", rate, verdict.sentence.partition(", as much")[0])


def _test_card(found: Mapping[str, Verdict]) -> Card | None:
    verdict = found.get("test-time-stored")
    if verdict is None or verdict.estimate is None:
        return None
    return Card(
        "Eval mode against exact statistics",
        share(verdict.estimate.mean).replace("-", "−"),
        "held-out loss by running averages; 0 is as good",
    )
