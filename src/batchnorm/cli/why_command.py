"""``batchnorm why``: the lecture's claims measured on its own networks, or its questions asked of the user's model."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from batchnorm import addresses
from batchnorm.cli.terminal import Talk, check_writable, progress_bar, require
from batchnorm.lecture import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchnorm.ablation.answers import Answers
    from batchnorm.ablation.user_model import Subject
    from batchnorm.experiment.judgement import Verdict
    from batchnorm.experiment.outcomes import ClaimOutcome, Verdicts
    from batchnorm.experiment.run_settings import RunSettings

FULL_SEEDS = 20
_GLYPHS = {"SUPPORTED": "✓", "NOT SUPPORTED": "–", "OPPOSITE": "✗", "INVALID": "?"}
_STYLES = {"SUPPORTED": "green", "NOT SUPPORTED": "yellow", "OPPOSITE": "red", "INVALID": "dim"}
_LECTURE = ("torch", "numpy", "scipy", "sklearn")
_MODEL = ("torch", "numpy", "scipy")
_DRAWS = 5  # random draws of examples where nothing is trained


def _rates(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:  # noqa: ARG001
    """Learning rates from text with commas, in rising order."""
    if value is None:
        return None
    try:
        rates = sorted({float(part) for part in value.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 2 or not 0 < rates[0] <= rates[-1] < float("inf"):
        raise click.BadParameter(f"two positive numbers or more are needed, got {value!r}. As 0.01,0.1,1.")
    return tuple(rates)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--claim",
    "names",
    multiple=True,
    type=click.Choice(NAMES),
    help="Run this claim of the lecture only; may be given again.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="First seed.")
@click.option("--seeds", type=click.IntRange(min=2), help="Number of seeds.  [default: 5; with --full 20]")
@click.option("--full", is_flag=True, help=f"{FULL_SEEDS} seeds, for narrower intervals.")
@click.option("--data", metavar="ADDRESS", help="Batches for MODEL: data.py:loader.")
@click.option("--test", metavar="ADDRESS", help="Held-out batches.  [default: every fifth of --data]")
@click.option("--set", "given", multiple=True, metavar="KEY=VALUE", help="Argument of MODEL's function; repeatable.")
@click.option("--loss", metavar="ADDRESS", help="loss(output, batch) -> scalar.  [default: by the targets]")
@click.option("--weights", metavar="FILE", help="Checkpoint of MODEL, for what needs no training.")
@click.option("--state", default="", metavar="PATH", help="This state of it.  [default: the first that fits]")
@click.option("--no-train", is_flag=True, help="Only what MODEL shows as it is.")
@click.option("--steps", type=click.IntRange(min=10), help="Training steps of each run.  [default: about 2 minutes]")
@click.option("--rates", callback=_rates, metavar="R,R,...", help="Learning rates of every arm.  [default: five]")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("why.html"), show_default=True,
    help="Report: .html, .json or .md by its suffix.",
)  # fmt: skip
@click.option(
    "--output-format", type=click.Choice(("rich", "json", "md")), default="rich", show_default=True,
    help="What is printed.",
)  # fmt: skip
@click.option("--interactive", is_flag=True, help="Interactive charts in the HTML report (larger, needs JavaScript).")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def why(
    model: str | None, names: tuple[str, ...], seed: int, seeds: int | None, full: bool,
    output: Path, output_format: str, interactive: bool, quiet: bool, **asked: Any,
) -> None:  # fmt: skip
    """Measure why batch norm works; write a report.

    Without MODEL, every claim of the lecture is an experiment on data that comes with the package. With a MODEL of
    yours (model.py:make_model --data data.py:loader), its questions are asked of it: it is trained with batch norm,
    without, and normalized once, and measured. Criteria are fixed beforehand. The same seed gives the same numbers.
    """
    _check_options(model, names, asked, full=full)
    _check_output(output, interactive=interactive)
    require(*(_MODEL if model else _LECTURE), what="a model" if model else "the lecture", extra="torch,lecture")
    from batchnorm import report

    if output.suffix.lower() == ".html":
        report.require_extra()
    # the stream itself: standard output is kept from the user's code while that runs
    talk = Talk(file=sys.stdout if output_format == "rich" else sys.stderr, highlight=False)
    if model is None:
        verdicts: Verdicts = _lecture(names, seed, seeds or (FULL_SEEDS if full else 5), talk, quiet=quiet)
    else:
        verdicts = _model(_Asked(model, seed, seeds or (FULL_SEEDS if full else None), **asked), talk, quiet=quiet)
    report.write(verdicts, output, interactive=interactive)
    _show(verdicts, output_format)
    talk.print(f"report: {output}", soft_wrap=True)


def _check_options(model: str | None, names: tuple[str, ...], asked: dict[str, Any], *, full: bool) -> None:
    """Find options that do not go together."""
    if model is None:
        for name, value in asked.items():
            if value:
                option = "--set" if name == "given" else f"--{name.replace('_', '-')}"
                raise click.UsageError(f"{option} is about a model, got none. Name one: why model.py:make_model.")
        return
    if names:
        raise click.UsageError(f"--claim is for the lecture's own networks, got {model!r} too. Leave one of them out.")
    addresses.refuse_code(model)
    if not addresses.is_address(model):
        raise click.UsageError(
            f"a model is file.py:function or package.module:function, got {model!r}. Name a function."
        )
    addresses.refuse_state(model, asked["weights"], asked["state"])
    if not asked["data"]:
        raise click.UsageError("a model is asked with data. Give its batches: --data data.py:loader.")
    if asked["no_train"]:
        for name, value in (("--steps", asked["steps"]), ("--rates", asked["rates"]), ("--full", full)):
            if value:
                raise click.UsageError(f"{name} is about training, and --no-train was given. Leave one of them out.")


def _check_output(output: Path, *, interactive: bool) -> None:
    """Find out before the experiments run, not after, that the report cannot be written."""
    from batchnorm.report import SUFFIXES

    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"-o needs a file that ends in {', '.join(SUFFIXES)}, got {str(output)!r}. Name it why.html, for example."
        )
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
    """The shortest command line that repeats the numbers of this run."""
    claims = "" if tuple(names) == NAMES else "".join(f" --claim {name}" for name in names)
    return f"batchnorm why{claims} --seed {settings.seed} --seeds {settings.seeds}"


def _run_claims(names: tuple[str, ...], settings: RunSettings, talk: Talk, command: str, *, quiet: bool) -> Verdicts:
    from batchnorm import lecture
    from batchnorm.lecture.claim_criteria import CRITERIA
    from batchnorm.lecture.verdicts import LectureVerdicts

    claims = "1 claim" if len(names) == 1 else f"{len(names)} claims"
    talk.print(f"{claims}, {settings.seeds} seeds each, criteria version {CRITERIA.version} (set before the runs)\n")
    outcomes = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("", total=len(names))
        for done, name in enumerate(names):
            _announce(name, talk)
            bar.update(task, description=name, completed=done)
            outcome = lecture.run(name, settings, lambda share, done=done: bar.update(task, completed=done + share))
            talk.print(Padding(_line(outcome.main, f"{outcome.seconds:.0f} s"), (0, 0, 1, 2)))
            outcomes.append(outcome)
    return LectureVerdicts(settings, outcomes, command)


def _announce(name: str, talk: Talk) -> None:
    from batchnorm.lecture.claim_criteria import CRITERIA

    talk.print(f"[bold]{name}[/bold]")
    for criterion in CRITERIA.of(name):
        talk.print(Padding(f"[dim]{escape(criterion.question)}[/dim]", (0, 0, 0, 2)))


# -- the user's model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the command line says of a model."""

    target: str
    seed: int
    seeds: int | None
    data: str
    test: str | None
    given: tuple[str, ...]
    loss: str | None
    weights: str | None
    state: str
    no_train: bool
    steps: int | None
    rates: tuple[float, ...] | None

    def command(self, seeds: int, steps: int | None = None) -> str:
        """The command line that repeats the numbers, with what was chosen by the time that a step takes."""
        options = {"--data": self.data, "--test": self.test, "--loss": self.loss}
        options |= {"--weights": self.weights, "--state": self.state}
        words = [self.target, *(word for name, value in options.items() if value for word in (name, value))]
        words += [word for setting in self.given for word in ("--set", setting)]
        words += ["--rates", ",".join(f"{rate:g}" for rate in self.rates)] if self.rates else []
        words += ["--no-train"] if self.no_train else []
        words += ["--steps", str(steps)] if steps else []
        return shlex.join(["batchnorm", "why", *words, "--seed", str(self.seed), "--seeds", str(seeds)])


def _model(asked: _Asked, talk: Talk, *, quiet: bool) -> Answers:
    """Ask the user's model; what its code raises is told with its place, and what it prints goes to standard error."""
    with addresses.told(asked.target), contextlib.redirect_stdout(sys.stderr):
        subject = _subject(asked)
        asked, told = _with_state(asked, subject)
        if told:
            talk.print(escape(told))
        answers = (_looked if asked.no_train else _trained)(asked, subject, talk, quiet=quiet)
        return replace(answers, measured={**answers.measured, **({"State": told} if told else {})})


def _with_state(asked: _Asked, subject: Subject) -> tuple[_Asked, str]:
    """What is asked, of the state that is loaded, and a sentence that says which of several it is."""
    if not asked.weights:
        return asked, ""
    name, told = addresses.choice(subject.fresh(asked.seed), asked.weights, asked.state)
    return replace(asked, state=name), told


def _subject(asked: _Asked) -> Subject:
    from batchnorm.ablation.user_data import Data
    from batchnorm.ablation.user_model import Subject

    loss = addresses.load(asked.loss) if asked.loss else None
    if loss is not None and not callable(loss):
        raise ValueError(f"--loss needs a function of output and batch, got {type(loss).__name__}. Name a function.")
    data = Data.of(addresses.data(asked.data), addresses.data(asked.test) if asked.test else None)
    return Subject(asked.target, _factory(asked), data, loss).to_device()


def _factory(asked: _Asked) -> Callable[[], Any]:
    """What makes the model, with its file run once and not for every arm; called once, so that errors come here."""
    from torch import nn

    settings = addresses.parsed(asked.given)
    made = addresses.model(asked.target, settings)
    factory = addresses.load(asked.target)
    if not isinstance(factory, nn.Module):
        return lambda: factory(**settings)
    if not asked.no_train:
        raise ValueError(
            f"{asked.target} is a model already, and every arm needs fresh weights. Name the function or class that "
            "makes it, or give --no-train."
        )
    return lambda: made


def _trained(asked: _Asked, subject: Subject, talk: Talk, *, quiet: bool) -> Answers:
    from batchnorm.ablation import train_and_ask
    from batchnorm.ablation.arm_training import RATES
    from batchnorm.ablation.effort import plan

    checkpoint = _checkpoint(asked, subject) if asked.weights else None
    chosen = plan(subject, seed=asked.seed, seeds=asked.seeds, steps=asked.steps, rates=asked.rates or RATES)
    command = asked.command(chosen.seeds, chosen.steps)
    train, held = subject.data.counts
    talk.print(
        f"{train:,} examples to train with, {held:,} held out; {len(chosen.arms)} arms, {chosen.seeds} seeds, "
        f"{len(chosen.rates)} learning rates, {chosen.steps} steps of {subject.data.size}: about "
        f"{_duration(chosen.estimate)} ({1000 * chosen.seconds:.0f} ms a step)"
    )
    _announce_questions(talk)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("training", total=1.0)
        return train_and_ask(
            subject, chosen, command, checkpoint=checkpoint,
            advance=lambda share: bar.update(task, completed=share), say=lambda outcome: _say(outcome, talk),
        )  # fmt: skip


def _looked(asked: _Asked, subject: Subject, talk: Talk, *, quiet: bool) -> Answers:
    from batchnorm.ablation import look

    draws = range(asked.seed, asked.seed + (asked.seeds or _DRAWS))
    model = _checkpoint(asked, subject)
    talk.print("nothing is trained, so nothing is said about learning")
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("measuring", total=1.0)
        return look(
            subject, model, draws, asked.command(len(draws)),
            advance=lambda share: bar.update(task, completed=share), say=lambda outcome: _say(outcome, talk),
        )  # fmt: skip


def _checkpoint(asked: _Asked, subject: Subject) -> Any:
    """The model as it is, with --weights if given."""
    from batchnorm.population import preserve_state

    model = subject.fresh(asked.seed)
    if asked.weights:
        addresses.load_weights(model, asked.weights, asked.state)
    with preserve_state(model):
        subject.value(model.eval(), next(subject.data.deal(asked.seed)))  # tells at once what does not fit
    return model


def _announce_questions(talk: Talk) -> None:
    from batchnorm.ablation.question_criteria import CRITERIA

    talk.print(f"criteria version {CRITERIA.version}, set before the runs:\n")
    for criterion in CRITERIA.values():
        if not criterion.key.startswith(("depth", "census")):
            talk.print(Padding(f"[dim]{escape(criterion.question)}[/dim]", (0, 0, 0, 2)))
    talk.print()


def _say(outcome: ClaimOutcome, talk: Talk) -> None:
    talk.print(f"[bold]{outcome.claim.name}[/bold]")
    for verdict in outcome.result.verdicts:
        talk.print(Padding(_line(verdict, ""), (0, 0, 0, 2)))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# -- words ----------------------------------------------------------------------------------------------------


def _line(verdict: Verdict, after: str) -> str:
    return f"{_word(verdict)}  {escape(verdict.told)} [dim]{after}[/dim]"


def _word(verdict: Verdict) -> str:
    status = str(verdict.status)
    return f"[{_STYLES[status]}]{_GLYPHS[status]} {status}[/{_STYLES[status]}]"


def _show(verdicts: Verdicts, output_format: str) -> None:
    if output_format == "json":
        click.echo(verdicts.to_json())
    elif output_format == "md":
        click.echo(verdicts.to_markdown())
    else:
        second = getattr(verdicts, "second", "")
        Talk(highlight=False).print(_table(verdicts.outcomes), f"\n[bold]{escape(verdicts.headline)}[/bold]", second)


def _table(outcomes: Iterable[ClaimOutcome]) -> Table:
    table = Table("criterion", "verdict", "measured", box=SIMPLE, expand=False)
    for outcome in outcomes:
        for verdict in outcome.result.verdicts:
            table.add_row(verdict.criterion.key, _word(verdict), escape(verdict.told))
    return table
