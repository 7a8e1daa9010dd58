"""``batchnorm why``: measure the lecture's claims on its networks, or answer its questions for the user's model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import click

from batchnorm import addresses
from batchnorm.checkpoint import model_loading
from batchnorm.cli import shared_options as options
from batchnorm.cli.model_address import ModelAddress, running
from batchnorm.cli.preconditions import check_writable, require
from batchnorm.cli.terminal import Talk, progress_bar
from batchnorm.cli.typed_command import with_model
from batchnorm.lecture import NAMES
from batchnorm.reporting.command_line import number_word
from batchnorm.reporting.text import many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from batchnorm.ablation.answers import Answers
    from batchnorm.ablation.user_model import Subject
    from batchnorm.experiment.judgement import Verdict
    from batchnorm.experiment.outcomes import ClaimOutcome, Verdicts
    from batchnorm.experiment.run_settings import RunSettings

FULL_SEEDS = 20
_LECTURE = ("torch", "numpy", "scipy", "sklearn")
_MODEL = ("torch", "numpy", "scipy")
_DRAWS = 5  # random draws of examples with --no-train


def _rates(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:  # noqa: ARG001
    """Learning rates from a text with commas, in rising order; None without a text."""
    if value is None:
        return None
    try:
        rates = sorted({float(part) for part in value.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 2 or not 0 < rates[0] <= rates[-1] < float("inf"):
        raise click.BadParameter(f"expected two positive numbers or more, got {value!r}. Write for example 0.01,0.1,1.")
    return tuple(rates)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--claim", "names", multiple=True, type=click.Choice(NAMES), help="Run only this claim of the lecture; repeatable."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="First seed.")
@click.option(
    "--seeds", type=click.IntRange(min=2), help="Number of seeds.  [default: 5, or 3 for a slow MODEL; with --full 20]"
)
@click.option("--full", is_flag=True, help=f"{FULL_SEEDS} seeds, for narrower intervals.")
@click.option("--data", metavar="ADDRESS", help="Batches for MODEL: data.py:loader.")
@click.option("--test", metavar="ADDRESS", help="Held-out batches.  [default: every fifth batch of --data]")
@click.option("--set", "given", multiple=True, metavar="KEY=VALUE", help="Argument of MODEL's function; repeatable.")
@click.option("--loss", metavar="ADDRESS", help="loss(output, batch) -> scalar.  [default: chosen by targets]")
@click.option("--weights", metavar="FILE", help="Checkpoint of MODEL, for questions without training.")
@click.option("--state", default="", metavar="PATH", help="State of FILE to load.  [default: the first that fits]")
@click.option("--no-train", is_flag=True, help="Train nothing; measure MODEL as it is.")
@click.option("--steps", type=click.IntRange(min=10), help="Training steps of each run.  [default: about 2 minutes]")
@click.option("--rates", callback=_rates, metavar="R,R,...", help="Learning rates of every arm.  [default: five rates]")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("why.html"), show_default=True,
    help="File of the report; the suffix (.html, .json, .md, ...) decides the format.",
)  # fmt: skip
@options.printed_format
@click.option("--interactive", is_flag=True, help="Interactive charts in the HTML report (larger, needs JavaScript).")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress bar.")
def why(
    model: str | None, names: tuple[str, ...], seed: int, seeds: int | None, full: bool, data: str | None,
    test: str | None, given: tuple[str, ...], loss: str | None, weights: str | None, state: str, no_train: bool,
    steps: int | None, rates: tuple[float, ...] | None, output: Path, output_format: str, interactive: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Measure why batch norm works, and write a report.

    Without MODEL, every claim of the lecture is tested in an experiment on data that come with the package. With a
    MODEL of yours (model.py:make_model --data data.py:loader), the lecture's questions are answered for it. For that
    the model is trained in several arms: with batch norm, without it, with the statistics of the first batch in every
    step, and, if the inputs are not normalized, with normalized inputs only. Criteria are fixed before the runs. The
    same seed gives the same numbers.
    """
    count = seeds or (FULL_SEEDS if full else None)
    asked = WhyOptions(
        ModelAddress(model or "", weights, state, given), seed, count, data, test, loss, no_train, steps, rates
    )
    if model is None:
        asked.refuse_model_options()
    else:
        asked.check(names, full=full)
    _check_output(output, interactive=interactive)
    require(*(_MODEL if model else _LECTURE), what="a model" if model else "the lecture", extra="torch,lecture")
    from batchnorm import report

    if output.suffix.lower() == ".html" or output_format == "html":
        report.require_extra()
    # the stream itself, because sys.stdout is replaced while the user's code runs
    talk = Talk(sys.stdout if output_format == "full" else sys.stderr)
    if model is None:
        verdicts: Verdicts = _lecture(names, seed, count or 5, talk, quiet=quiet)
    else:
        verdicts = _model(asked, talk, quiet=quiet)
    report.write(verdicts, output, interactive=interactive)
    options.emit(report.report(verdicts), output_format)
    talk.say(f"report: {output}", wraps=False)


def _check_output(output: Path, *, interactive: bool) -> None:
    """Refuse a report that cannot be written, before the experiments run."""
    from batchnorm.report import checked_suffix

    checked_suffix(output)
    if interactive and output.suffix.lower() != ".html":
        raise ValueError(f"--interactive needs an .html report, got {str(output)!r}. Leave one of the two out.")
    check_writable(output)


# -- the lecture ----------------------------------------------------------------------------------------------


def _lecture(names: tuple[str, ...], seed: int, seeds: int, talk: Talk, *, quiet: bool) -> Verdicts:
    from batchnorm.experiment.run_settings import RunSettings

    settings = RunSettings(seed, seeds)
    names = tuple(name for name in NAMES if name in names) or NAMES
    return _run_claims(names, settings, talk, _command(names, settings), quiet=quiet)


def _command(names: Iterable[str], settings: RunSettings) -> str:
    """The shortest command that repeats the numbers of this run."""
    claims = "" if tuple(names) == NAMES else "".join(f" --claim {name}" for name in names)
    return f"batchnorm why{claims} --seed {settings.seed} --seeds {settings.seeds}"


def _run_claims(names: tuple[str, ...], settings: RunSettings, talk: Talk, command: str, *, quiet: bool) -> Verdicts:
    from batchnorm import lecture
    from batchnorm.lecture.claim_criteria import CRITERIA
    from batchnorm.lecture.verdicts import LectureVerdicts

    claims = many(len(names), "claim")
    talk.say(f"{claims}, {settings.seeds} seeds each, criteria version {CRITERIA.version} (set before the runs)")
    talk.say()
    outcomes = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("", total=len(names))
        for done, name in enumerate(names):
            _announce(name, talk)
            bar.update(task, description=name, completed=done)
            outcome = lecture.run(name, settings, lambda share, done=done: bar.update(task, completed=done + share))
            talk.say(f"{_line(outcome.main)} ({outcome.seconds:.0f} s)", 2)
            talk.say()
            outcomes.append(outcome)
    return LectureVerdicts(settings, outcomes, command)


def _announce(name: str, talk: Talk) -> None:
    from batchnorm.lecture.claim_criteria import CRITERIA

    talk.say(name)
    for criterion in CRITERIA.of(name):
        talk.say(criterion.question, 2)


# -- the user's model -----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class WhyOptions:
    """The options about a model on the command line."""

    model: ModelAddress
    seed: int
    seeds: int | None
    data: str | None
    test: str | None
    loss: str | None
    no_train: bool
    steps: int | None
    rates: tuple[float, ...] | None

    def refuse_model_options(self) -> None:
        """Refuse options about a model, if no model is given."""
        given = {
            "--data": self.data, "--test": self.test, "--set": self.model.given, "--loss": self.loss,
            "--weights": self.model.weights, "--state": self.model.state, "--no-train": self.no_train,
            "--steps": self.steps, "--rates": self.rates,
        }  # fmt: skip
        for option, value in given.items():
            if value:
                data = "" if self.data else " --data data.py:loader"
                raise click.UsageError(f"{option} needs a model, got none. Name a model: {with_model()}{data}")

    def check(self, claims: tuple[str, ...], *, full: bool) -> None:
        """Refuse options that contradict each other."""
        address = self.model.address
        if claims:
            raise click.UsageError(
                f"--claim is for the lecture's own networks, got {address!r} too. Leave one of them out."
            )
        addresses.refuse_code(address)
        if not addresses.is_address(address):
            raise click.UsageError(
                f"a model is file.py:function or package.module:function, got {address!r}. {_remedy(address)}"
            )
        addresses.refuse_state(address, self.model.weights, self.model.state)
        if not self.data:
            raise click.UsageError("a model needs data. Give the address of its batches: --data data.py:loader.")
        for name, value in (("--steps", self.steps), ("--rates", self.rates), ("--full", full)):
            if self.no_train and value:
                raise click.UsageError(f"{name} is about training, and --no-train was given. Leave one of them out.")

    def command(self, seeds: int, steps: int | None = None) -> str:
        """The command that repeats the numbers, with the seeds and steps that were chosen from the time of a step."""
        options = {"--data": self.data, "--test": self.test, "--loss": self.loss}
        address, *rest = self.model.words
        words = [address, *(word for name, value in options.items() if value for word in (name, value)), *rest]
        words += ["--rates", ",".join(map(number_word, self.rates))] if self.rates else []
        words += ["--no-train"] if self.no_train else []
        words += ["--steps", str(steps)] if steps else []
        return shlex.join(["batchnorm", "why", *words, "--seed", str(self.seed), "--seeds", str(seeds)])


def _remedy(address: str) -> str:
    """What to give in place of a target that is no address of code: a checkpoint needs the model that it belongs to."""
    if not Path(address).is_file():
        return "Add :function to it."
    return f"Give the model that the file belongs to: {with_model(address)}"


def _model(asked: WhyOptions, talk: Talk, *, quiet: bool) -> Answers:
    """The answers for the user's model. Errors in its code are shown with their place; its prints go to stderr."""
    with running(asked.model.address):
        subject = _subject(asked)
        asked, sentence = _with_state(asked, subject)
        if sentence:
            talk.say(sentence)
        answers = (_looked if asked.no_train else _trained)(asked, subject, talk, quiet=quiet)
        return replace(answers, measured={**answers.measured, **({"State": sentence} if sentence else {})})


def _with_state(asked: WhyOptions, subject: Subject) -> tuple[WhyOptions, str]:
    """The options with the loaded state; and a sentence that names the state if there are several, else ""."""
    model = asked.model
    if not model.weights:
        return asked, ""
    name, sentence = model_loading.choice(subject.fresh(asked.seed), model.weights, model.state)
    return replace(asked, model=replace(model, state=name)), sentence


def _subject(asked: WhyOptions) -> Subject:
    from batchnorm.ablation.user_data import Data
    from batchnorm.ablation.user_model import Subject

    loss = addresses.load(asked.loss) if asked.loss else None
    if loss is not None and not callable(loss):
        raise ValueError(f"--loss needs a function of output and batch, got {type(loss).__name__}. Name a function.")
    data = Data.of(addresses.data(asked.data or ""), addresses.data(asked.test) if asked.test else None)
    return Subject(asked.model.address, _factory(asked), data, loss).to_device()


def _factory(asked: WhyOptions) -> Callable[[], nn.Module]:
    """A function that makes or returns the model. The model is made once here, so that errors show before the runs."""
    import torch

    settings = addresses.parsed(asked.model.given)
    model = addresses.model(asked.model.address, settings)
    factory = addresses.load(asked.model.address)
    if not isinstance(factory, torch.nn.Module):
        return lambda: factory(**settings)
    if not asked.no_train:
        raise ValueError(
            f"{asked.model.address} is a model already, but every arm needs new weights. Name the function or class "
            "that makes the model, or give --no-train."
        )
    return lambda: model


def _trained(asked: WhyOptions, subject: Subject, talk: Talk, *, quiet: bool) -> Answers:
    from batchnorm.ablation import train_and_ask
    from batchnorm.ablation.arm_training import RATES
    from batchnorm.ablation.effort import plan

    checkpoint = _checkpoint(asked, subject) if asked.model.weights else None
    schedule = plan(subject, seed=asked.seed, seeds=asked.seeds, steps=asked.steps, rates=asked.rates or RATES)
    command = asked.command(schedule.seeds, schedule.steps)
    train, held = subject.data.counts
    talk.say(
        f"{train:,} examples to train with, {held:,} held out; {len(schedule.arms)} arms, {schedule.seeds} seeds, "
        f"{len(schedule.rates)} learning rates, {schedule.steps} steps of {subject.data.size}: about "
        f"{_duration(schedule.estimate)} ({1000 * schedule.seconds:.0f} ms a step)"
    )
    _announce_questions(talk)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("training", total=1.0)
        return train_and_ask(
            subject, schedule, command, checkpoint=checkpoint,
            advance=lambda share: bar.update(task, completed=share), say=lambda outcome: _say(outcome, talk),
        )  # fmt: skip


def _looked(asked: WhyOptions, subject: Subject, talk: Talk, *, quiet: bool) -> Answers:
    from batchnorm.ablation import look

    draws = range(asked.seed, asked.seed + (asked.seeds or _DRAWS))
    model = _checkpoint(asked, subject)
    talk.say("nothing is trained, so nothing is said about learning")
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("measuring", total=1.0)
        return look(
            subject, model, draws, asked.command(len(draws)),
            advance=lambda share: bar.update(task, completed=share), say=lambda outcome: _say(outcome, talk),
        )  # fmt: skip


def _checkpoint(asked: WhyOptions, subject: Subject) -> nn.Module:
    """The model with --weights; without them, as its function makes it."""
    from batchnorm.population import preserve_state

    model = subject.fresh(asked.seed)
    if asked.model.weights:
        model_loading.load_weights(model, asked.model.weights, asked.model.state)
    with preserve_state(model):
        subject.value(model.eval(), next(subject.data.deal(asked.seed)))  # an error shows at once
    return model


def _announce_questions(talk: Talk) -> None:
    from batchnorm.ablation.question_criteria import CRITERIA

    talk.say(f"criteria version {CRITERIA.version}, set before the runs:")
    talk.say()
    for criterion in CRITERIA.values():
        if not criterion.key.startswith(("depth", "census")):
            talk.say(criterion.question, 2)
    talk.say()


def _say(outcome: ClaimOutcome, talk: Talk) -> None:
    talk.say(outcome.claim.name)
    for verdict in outcome.result.verdicts:
        talk.say(_line(verdict), 2)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _line(verdict: Verdict) -> str:
    from batchnorm.report import GLYPHS

    return f"{GLYPHS[verdict.status]} {verdict.status}  {verdict.statement}"
