"""A study: all runs that are trained for one model, from which the questions are answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from batchnorm.ablation.arms import CALLED, WITH, WITHOUT
from batchnorm.ablation.effort import StudyPlan
from batchnorm.ablation.grid import Grid, sweep
from batchnorm.ablation.question_criteria import CRITERIA
from batchnorm.ablation.user_model import Subject
from batchnorm.ablation.watched_runs import WatchedRun, watch
from batchnorm.experiment.claim import Claim, Result, claim
from batchnorm.experiment.figures_in_words import Figure
from batchnorm.experiment.run_settings import Progress, RunSettings

Advance = Callable[[float], None]
# Called with the subject, its models (one for each seed; or only one, if the model is not trained), and the seeds. The
# seeds also choose the examples.
Measure = Callable[["Subject", Sequence[nn.Module], Sequence[int]], Result]
PAIR = (WITHOUT, WITH)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """A model with its runs.

    Args:
        subject: The model, its data and its loss.
        plan: Arms, seeds, steps and learning rates.
        grid: The runs of every arm at every rate.
        watched: The runs that were measured during the training: (arm, index of the rate) -> one run for each seed.
    """

    subject: Subject
    plan: StudyPlan
    grid: Grid
    watched: Mapping[tuple[str, int], list[WatchedRun]]

    def equal(self, arm: str) -> list[WatchedRun]:
        """An arm's runs at the rate at which both arms are compared."""
        return self.watched[arm, self.grid.shared()]

    def best(self, arm: str) -> list[WatchedRun]:
        """An arm's runs at its own best rate."""
        return self.watched[arm, self.grid.best(arm)]

    def idle(self) -> tuple[str, ...]:
        """Those of the two arms (with and without batch norm) that learned at none of the rates."""
        return tuple(arm for arm in PAIR if all(self.grid.unlearned(arm, n) for n in range(len(self.plan.rates))))

    def advice(self) -> str:
        """A setting that would make the comparison fairer; "" for no advice."""
        at = {arm: self.grid.edge(arm) for arm in PAIR if self.grid.edge(arm)}
        if not at:
            return ""
        places = " and ".join(f"{edge} {CALLED[arm]}" for arm, edge in at.items())
        if len(at) == len(PAIR) and len(set(at.values())) == 1:
            places = f"{at[WITH]} with and without batch norm"
        return f"The best learning rate is {places}: a better rate may lie beyond it. Try more with --rates."

    def diverged(self) -> str:
        """Why the models trained with batch norm cannot be measured; "" if they can."""
        finite = all(bool(p.isfinite().all()) for run in self.best(WITH) for p in run.model.state_dict().values())
        return "" if finite else "with batch norm a seed diverged at the best rate"

    def unlearned(self, *, equal: bool) -> str:
        """Why the arms with and without batch norm cannot be compared; "" if they can.

        They are compared at the shared rate if ``equal``, otherwise at each arm's best rate.
        """
        at = {arm: self.grid.shared() if equal else self.grid.best(arm) for arm in PAIR}
        return " and ".join(filter(None, (self.grid.unlearned(arm, at[arm]) for arm in PAIR)))

    def unwatched(self, *, equal: bool) -> str:
        """Why the measurements during the training are incomplete; "" if they are complete.

        They are those at the shared rate if ``equal``, otherwise those at each arm's best rate.
        """
        runs = [run for arm in PAIR for run in (self.equal(arm) if equal else self.best(arm))]
        return next((f"a run could not be measured: {run.failed}" for run in runs if run.failed), "")

    def late(self) -> tuple[str, ...]:
        """Those of the two arms (with and without batch norm) in which a seed missed the target at the best rate."""
        return tuple(arm for arm in PAIR if self.grid.arrival(arm).late)


def asked_of_trained(study: Study, name: str, measure: Measure, figures: Mapping[str, Figure]) -> Claim:
    """A claim about the models that were trained with batch norm at the best rate, one model for each seed."""
    failed = study.diverged()

    def run(_: RunSettings, __: Progress) -> Result:
        if failed:
            return Result(CRITERIA.unjudged(name, failed), [])
        return measure(study.subject, [watched.model for watched in study.best(WITH)], study.plan.all_seeds)

    return claim("ablation", name, run, of_what="Your model as trained with batch norm, for each seed", **figures)


def study(subject: Subject, plan: StudyPlan, advance: Advance = lambda _: None) -> Study:
    """Train all runs of the plan; ``advance`` is called with the finished share of the work."""
    done, total = 0, plan.runs + 4 * plan.seeds

    def one_more() -> None:
        nonlocal done
        done += 1
        advance(done / total)

    grid = sweep(subject, plan.arms, plan.all_seeds, plan.rates, plan.steps, one_more)
    watched: dict[tuple[str, int], list[WatchedRun]] = {}
    for key in dict.fromkeys((arm, rate) for arm in PAIR for rate in (grid.shared(), grid.best(arm))):
        watched[key] = []
        for seed in plan.all_seeds:
            watched[key].append(watch(subject, key[0], seed, plan.rates[key[1]], plan.steps))
            one_more()
    advance(1.0)
    return Study(subject, plan, grid, watched)
