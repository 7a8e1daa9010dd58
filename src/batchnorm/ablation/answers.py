"""All answers for one model: the headline, the cards, and the data of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log2
from typing import ClassVar, final

from batchnorm.ablation.question_criteria import CRITERIA
from batchnorm.ablation.questions.noise_of_layers import NOISE, POWER
from batchnorm.experiment.figures_in_words import in_words, times
from batchnorm.experiment.judgement import Bound, Criteria, Json, Status, Verdict
from batchnorm.experiment.outcomes import Card, Verdicts

_WORDS = {
    Status.SUPPORTED: "shown here",
    Status.NOT_SUPPORTED: "not shown",
    Status.OPPOSITE: "the opposite",
    Status.INVALID: "not testable",
}
_SIGNS: dict[Bound, str] = {"": "", "at least": "≥ ", "at most": "≤ "}
_EQUAL = 1.5  # the margin of the criterion on steps


@final
@dataclass(frozen=True, slots=True)
class Answers(Verdicts):
    """The answers to the questions about a model; the other arguments are those of ``Verdicts``.

    Args:
        model: The model's address on the command line.
        trained: Whether models were trained for the answers.
        steps: Number of training steps of each run.
        idle: Of "with" and "without", the arms that did not learn at any rate.
        late: Of "with" and "without", the arms with a seed that never reached the target, so that ratios are bounds.
        advice: A setting that would make the comparison fairer; "" for no advice.
    """

    criteria: ClassVar[Criteria] = CRITERIA

    model: str = ""
    trained: bool = True
    steps: int = 0
    idle: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    advice: str = ""

    @property
    def title(self) -> str:
        """The question that the page answers."""
        asked = "Does batch norm help {}, and why?" if self.trained else "What batch norm does in {}, as it is"
        return asked.format(self.model)

    @property
    def headline(self) -> str:
        """The main verdict in a sentence, whatever it is."""
        return _of_training(self) if self.trained else _of_model_as_it_is(self.by_key)

    @property
    def second(self) -> str:
        """The questions grouped by their outcomes, and the advice."""
        rest = [(o.claim.title.lower(), _whole(o.result.verdicts)) for o in self.outcomes if o.claim.name != "speed"]
        by_outcome = {words: [title for title, how in rest if how == words] for words in _WORDS.values()}
        parts = [f"{words}: {', '.join(titles)}" for words, titles in by_outcome.items() if titles]
        parts += [f"{title} in part: {how}" for title, how in rest if how not in by_outcome]
        text = f"{'; '.join(parts)}." if parts else ""
        return f"{text[:1].upper()}{text[1:]} {self.advice}".strip()

    @property
    def cards(self) -> list[Card]:
        """Figures at the head of the page."""
        ratios = [_ratio_card(self.by_key.get(key), *words) for key, words in _RATIOS.items()]
        return [card for card in (*ratios, _noise_card(self.by_key), _test_card(self.by_key)) if card is not None]

    @property
    def questions(self) -> int:
        """Number of criteria that were judged."""
        return len(self.by_key)

    def to_dict(self) -> Json:
        """Data for JSON without times, so that two runs with the same settings are equal."""
        extra = {"model": self.model, "trained": self.trained, "command": self.command, "second": self.second}
        return {**extra, **Verdicts.to_dict(self), "measured": dict(self.measured), "unasked": dict(self.unasked)}


def _whole(verdicts: Sequence[Verdict]) -> str:
    """The outcome of a question in words; if its criteria differ, the outcome of each criterion."""
    valid = [v for v in verdicts if v.status is not Status.INVALID]
    if len({v.status for v in valid}) > 1:
        return ", ".join(f"{v.criterion.key} {_WORDS[v.status]}" for v in valid)
    return _WORDS[valid[0].status] if valid else _WORDS[Status.INVALID]


# -- the headline ---------------------------------------------------------------------------------------------


def _of_training(answers: Answers) -> str:
    verdict = answers.by_key["speed-steps"]
    if verdict.status is Status.INVALID:
        return f"No answer: {verdict.heading}. Give more --steps, or other --rates."
    mean, low, high = verdict.ratios
    back = verdict.status is Status.OPPOSITE
    ends = (_inverse(high), _inverse(low)) if back else (low, high)
    return in_words(
        _headline(answers, verdict), ratio=_inverse(mean) if back else mean, steps=answers.steps, margin=_EQUAL,
        interval=f"95% interval {times(ends[0])}× to {times(ends[1])}×", because=_because(answers.by_key),
        # a run that never reaches the target counts as reaching it at the last step
        bound="at least " if verdict.bound == ("at most" if back else "at least") else "",
        never=" and ".join(f"{arm} batch norm" for arm in answers.late),
    )  # fmt: skip


def _headline(answers: Answers, verdict: Verdict) -> str:
    """The template of the headline for this verdict, for arms that learned nothing, and for late arms."""
    _, low, high = verdict.ratios
    alike = low > 1 / _EQUAL and high < _EQUAL
    if verdict.status is Status.OPPOSITE:
        return "No: with batch norm the model takes {bound}{ratio:times}× as many steps as without ({interval})."
    if verdict.status is Status.SUPPORTED:
        return _YES_ALONE if answers.idle == ("without",) else _YES
    if answers.idle == ("with",):
        return _NO_ALONE
    if answers.idle == ("without",):
        return _NOT_SHOWN_ALONE
    if alike and answers.late:
        return _LATE
    if alike and not answers.idle:
        return _AS_FAST
    return _NOT_SHOWN if verdict.ratios[0] > 1 else _NO_GAIN


_YES = "Yes: without batch norm the model takes {bound}{ratio:times}× as many steps ({interval}){because}."
_YES_ALONE = (
    "Yes: with batch norm the model learns, without batch norm it does not learn in {steps} steps at any rate: it "
    "takes {bound}{ratio:times}× as many steps ({interval}){because}."
)
_NO_ALONE = (
    "No: without batch norm the model learns, with batch norm it does not learn in {steps} steps at any rate "
    "({ratio:times}× as many steps without, {interval})."
)
_NOT_SHOWN_ALONE = (
    "Not shown in {steps} steps: with batch norm the model learns, without batch norm it does not learn at any rate, "
    "so it takes {bound}{ratio:times}× as many steps ({interval}; needed: above {margin}×). Give more --steps."
)
_AS_FAST = "No: without batch norm the model learns as fast ({ratio:times}× as many steps, {interval})."
_LATE = (
    "No difference is shown in {steps} steps ({ratio:times}× as many without batch norm, {interval}), but {never} a "
    "seed never reached the target, so the last step was counted for it. Give more --steps."
)
_NOT_SHOWN = (
    "Not shown: without batch norm the model takes {bound}{ratio:times}× as many steps, but the {interval} does not "
    "lie above {margin}×."
)
_NO_GAIN = "No gain: without batch norm the model takes {ratio:times}× as many steps ({interval})."
_ONCE = {
    Status.SUPPORTED: "; normalizing once, at the start, is not enough",
    Status.OPPOSITE: "; normalizing once, at the start, is even faster",
    Status.NOT_SUPPORTED: "; normalizing once, at the start, may be enough",
}
_STORED = {
    Status.SUPPORTED: ["its running averages are as good as exact statistics"],
    Status.OPPOSITE: ["its running averages are stale, and recalibrating them lowers the loss"],
}


def _inverse(ratio: float) -> float:
    return 1 / ratio if ratio else inf


def _because(found: Mapping[str, Verdict]) -> str:
    instead, once = found.get("scale-instead"), found.get("speed-once")
    if instead is not None and instead.status is Status.SUPPORTED:
        better = instead.estimate is not None and instead.estimate.high < -log2(_EQUAL)
        return f"; normalizing the inputs alone does {'better' if better else 'as well'}"
    return _ONCE.get(once.status, "") if once is not None else ""


def _of_model_as_it_is(found: Mapping[str, Verdict]) -> str:
    stored, noise = found.get("test-time-stored"), found.get("noise-slope")
    parts = [*_STORED.get(stored.status, ())] if stored is not None else []
    figures = noise.figures if noise is not None and noise.status is not Status.INVALID else {}
    parts += [f"the noise of its batches {NOISE}"] if figures else []
    measured = "; ".join(parts) or "nothing could be measured"
    words = f"The model as it is, without training: {measured}. Whether batch norm helps it learn was not asked."
    return in_words(words, figures)


# -- cards ----------------------------------------------------------------------------------------------------

_RATIOS = {
    "speed-steps": ("Steps to the target", "without / with batch norm"),
    "rates-largest": ("Largest usable rate", "with / without batch norm"),
    "shift-drift": ("Shift of the layers' inputs", "without / with batch norm"),
    "depth-rank": ("Stable rank, last / first layer", "over random halves of the examples"),
}


def _ratio_card(verdict: Verdict | None, what: str, note: str) -> Card | None:
    if verdict is None:
        return None
    if verdict.estimate is None or verdict.status is Status.INVALID:
        return Card(what, "–", "not comparable here")
    mean, low, high = map(times, verdict.ratios)
    interval = f"{low}× to {high}×, {len(verdict.estimate.values)} seeds"
    return Card(what, f"{_SIGNS[verdict.bound]}{mean}×", f"{note}; {interval}")


def _noise_card(found: Mapping[str, Verdict]) -> Card | None:
    verdict = found.get("noise-slope")
    if verdict is None or verdict.estimate is None:
        return None
    note = in_words(f"The noise power {POWER}", verdict.figures)
    return Card("Batch noise, as dropout", in_words("{dropout:.1%}", verdict.figures), note)


def _test_card(found: Mapping[str, Verdict]) -> Card | None:
    verdict = found.get("test-time-stored")
    if verdict is None or verdict.estimate is None:
        return None
    figure = in_words("{more:share}", more=verdict.estimate.mean)
    return Card("Eval mode against exact statistics", figure, "held-out loss by running averages; 0 is equally good")
