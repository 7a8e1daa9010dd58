"""``batchnorm why``: the lecture's claims, measured on its own networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from batchnorm.cli.terminal import Talk, check_writable, progress_bar, require
from batchnorm.lecture import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchnorm.lecture.claim import Settings, Verdict
    from batchnorm.lecture.verdicts import Outcome, Verdicts

FULL_SEEDS = 20
_GLYPHS = {"SUPPORTED": "✓", "NOT SUPPORTED": "–", "OPPOSITE": "✗", "INVALID": "?"}
_STYLES = {"SUPPORTED": "green", "NOT SUPPORTED": "yellow", "OPPOSITE": "red", "INVALID": "dim"}
_LECTURE = ("torch", "numpy", "scipy", "sklearn")


@click.command()
@click.argument("model", required=False)
@click.option(
    "--claim",
    "names",
    multiple=True,
    type=click.Choice(NAMES),
    help="Run this claim only; may be given again.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="First seed.")
@click.option("--seeds", type=click.IntRange(min=2), help="Number of seeds.  [default: 5; with --full 20]")
@click.option("--full", is_flag=True, help=f"{FULL_SEEDS} seeds, for narrower intervals.")
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
    output: Path, output_format: str, interactive: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure why batch norm works; write a report.

    Every claim of the lecture is an experiment on data that comes with the package, with a criterion fixed
    beforehand. The same seed gives the same numbers.
    """
    if model is not None:
        raise click.UsageError(f"why runs the lecture's own networks only, got {model!r}. Leave the argument out.")
    _check_output(output, interactive=interactive)
    require(*_LECTURE, what="the lecture", extra="torch,lecture")
    from batchnorm import report
    from batchnorm.lecture.claim import Settings

    if output.suffix.lower() == ".html":
        report.require_extra()

    settings = Settings(seed, seeds or (FULL_SEEDS if full else 5))
    names = tuple(name for name in NAMES if name in names) or NAMES
    talk = Talk(stderr=output_format != "rich", highlight=False)
    verdicts = _run_claims(names, settings, talk, _command(names, settings), quiet=quiet)
    report.write(verdicts, output, interactive=interactive)
    _show(verdicts, output_format)
    talk.print(f"report: {output}", soft_wrap=True)


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


def _command(names: Iterable[str], settings: Settings) -> str:
    """The shortest command line that repeats the numbers of this run."""
    claims = "" if tuple(names) == NAMES else "".join(f" --claim {name}" for name in names)
    return f"batchnorm why{claims} --seed {settings.seed} --seeds {settings.seeds}"


def _run_claims(names: tuple[str, ...], settings: Settings, talk: Talk, command: str, *, quiet: bool) -> Verdicts:
    from batchnorm import lecture
    from batchnorm.lecture.criteria import VERSION
    from batchnorm.lecture.verdicts import Verdicts

    claims = "1 claim" if len(names) == 1 else f"{len(names)} claims"
    talk.print(f"{claims}, {settings.seeds} seeds each, criteria version {VERSION} (set before the runs)\n")
    outcomes = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("", total=len(names))
        for done, name in enumerate(names):
            _announce(name, talk)
            bar.update(task, description=name, completed=done)
            outcome = lecture.run(name, settings, lambda share, done=done: bar.update(task, completed=done + share))
            talk.print(Padding(_line(outcome.main, f"{outcome.seconds:.0f} s"), (0, 0, 1, 2)))
            outcomes.append(outcome)
    return Verdicts(settings, outcomes, command)


def _announce(name: str, talk: Talk) -> None:
    from batchnorm.lecture.criteria import criteria_of

    talk.print(f"[bold]{name}[/bold]")
    for criterion in criteria_of(name):
        talk.print(Padding(f"[dim]{escape(criterion.question)}[/dim]", (0, 0, 0, 2)))


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
        Talk(highlight=False).print(_table(verdicts.outcomes), f"\n[bold]{verdicts.headline}[/bold]")


def _table(outcomes: Iterable[Outcome]) -> Table:
    table = Table("criterion", "verdict", "measured", box=SIMPLE, expand=False)
    for outcome in outcomes:
        for verdict in outcome.result.verdicts:
            table.add_row(verdict.criterion.key, _word(verdict), escape(verdict.told))
    return table
