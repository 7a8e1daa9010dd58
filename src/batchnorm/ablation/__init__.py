"""The lecture's questions for the user's own model, which is trained with batch norm, without it, and in other ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from batchnorm.experiment.claim import Result

if TYPE_CHECKING:
    from torch import nn

    from batchnorm.ablation.answers import Answers
    from batchnorm.ablation.effort import StudyPlan
    from batchnorm.ablation.user_model import Subject
    from batchnorm.experiment.claim import Claim
    from batchnorm.experiment.outcomes import ClaimOutcome

Advance = Callable[[float], None]
Say = Callable[["ClaimOutcome"], None]

_TRAINING = 0.93  # training's share of the whole time
_WORDS = 300  # the most characters of an error's message


def train_and_ask(
    subject: Subject, plan: StudyPlan, command: str, *, checkpoint: nn.Module | None = None,
    advance: Advance = lambda _: None, say: Say = lambda _: None,
) -> Answers:  # fmt: skip
    """Train the model in every way of the plan ("arm"), and answer every question.

    Args:
        subject: The model, its data and its loss.
        plan: Arms, seeds, steps and learning rates.
        command: The command line that repeats the study.
        checkpoint: A trained model. If it is not None, the questions that need no training are asked of it, and not of
            the models trained here.
        advance: Called with the finished share of the work, from 0 to 1.
        say: Called with each outcome as soon as it is known.
    """
    from batchnorm.ablation import model_as_it_is
    from batchnorm.ablation.questions import noise_of_layers, test_statistics
    from batchnorm.ablation.questions.input_scales import can_ask, scale
    from batchnorm.ablation.questions.received_shift import shift
    from batchnorm.ablation.questions.smoothness import smooth
    from batchnorm.ablation.questions.speed_and_rates import rates, speed
    from batchnorm.ablation.study import asked_of_trained, study
    from batchnorm.ablation.user_model import undisturbed

    with undisturbed(subject):
        start = time.perf_counter()
        trained = study(subject, plan, lambda share: advance(_TRAINING * share))
        seconds = time.perf_counter() - start
        makers = [speed, rates, *([scale] if can_ask(trained) else []), shift, smooth]
        claims = [make(trained) for make in makers]
        if checkpoint is None:
            claims += [
                asked_of_trained(trained, "noise", noise_of_layers.measure, noise_of_layers.FIGURES),
                asked_of_trained(trained, "test-time", test_statistics.measure, test_statistics.FIGURES),
            ]
        else:
            claims += [c for c in model_as_it_is.claims(subject, checkpoint, plan.all_seeds) if c.name != "scale"]
        outcomes = _asked(claims, plan.seed, plan.seeds, seconds, say)
        advance(1.0)
        answers = _answers(subject, outcomes, command, plan=plan, checkpoint=checkpoint)
    return replace(answers, steps=plan.steps, idle=trained.idle(), late=trained.late(), advice=trained.advice())


def look(
    subject: Subject, model: nn.Module, seeds: range, command: str, *,
    advance: Advance = lambda _: None, say: Say = lambda _: None,
) -> Answers:  # fmt: skip
    """Answer the questions that need no training, for one model, which is not changed."""
    from batchnorm.ablation.model_as_it_is import claims
    from batchnorm.ablation.user_model import undisturbed

    with undisturbed(subject):
        asked = claims(subject, model, seeds)
        outcomes = []
        for done, claim in enumerate(asked, start=1):
            outcomes += _asked([claim], seeds[0], len(seeds), 0.0, say)
            advance(done / len(asked))
        return _answers(subject, outcomes, command, draws=seeds)


def _asked(claims: list[Claim], seed: int, seeds: int, seconds: float, say: Say) -> list[ClaimOutcome]:
    """The outcome of each claim with its seconds; the first outcome's include ``seconds``, the time of the training."""
    from batchnorm.experiment.outcomes import ClaimOutcome
    from batchnorm.experiment.run_settings import RunSettings

    outcomes = []
    for claim in claims:
        start = time.perf_counter()
        try:
            result = claim.run(RunSettings(seed, seeds), lambda _: None)
        except Exception as error:  # noqa: BLE001 - other questions must still be answered
            result = _unanswered(claim.name, error)
        result = replace(result, charts=[chart for chart in result.charts if chart.rows])
        outcomes.append(ClaimOutcome(claim, result, seconds + time.perf_counter() - start))
        say(outcomes[-1])
        seconds = 0.0
    return outcomes


def _unanswered(name: str, error: Exception) -> Result:
    """A result without verdicts, with the error that stopped the measurement as the reason."""
    from batchnorm.ablation.question_criteria import CRITERIA

    words = " ".join(str(error).split())[:_WORDS]
    failed = f"it could not be measured: {type(error).__name__}" + (f": {words}" if words else "")
    return Result(CRITERIA.unjudged(name, failed), [])


def _answers(
    subject: Subject, outcomes: list[ClaimOutcome], command: str, *,
    plan: StudyPlan | None = None, draws: range = range(2), checkpoint: nn.Module | None = None,
) -> Answers:  # fmt: skip
    from batchnorm.ablation.answers import Answers
    from batchnorm.ablation.facts import facts, left_out
    from batchnorm.experiment.run_settings import RunSettings

    seeds = plan.all_seeds if plan else draws
    return Answers(
        RunSettings(seeds[0], len(seeds)),
        outcomes,
        command,
        model=subject.name,
        measured=facts(subject, plan, seeds, checkpoint=checkpoint is not None),
        unasked=left_out(plan),
        trained=plan is not None,
    )
