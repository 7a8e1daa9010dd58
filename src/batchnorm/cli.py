"""The command line: ``why`` and ``bench``. It imports neither torch nor altair before a command needs them."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from batchnorm import __version__
from batchnorm.lecture import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchnorm.lecture.claim import Settings, Verdict
    from batchnorm.lecture.verdicts import Outcome, Verdicts

FULL_SEEDS = 20
_GLYPHS = {"SUPPORTED": "✓", "NOT SUPPORTED": "–", "OPPOSITE": "✗", "INVALID": "?"}
_STYLES = {"SUPPORTED": "green", "NOT SUPPORTED": "yellow", "OPPOSITE": "red", "INVALID": "dim"}
_LECTURE = ("torch", "numpy", "scipy", "sklearn")


class _Talk(Console):
    """A console that falls silent when nobody listens: a closed pipe or a full disk must not cost the experiments."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """As in rich, but an error of the stream ends the talk and nothing else."""
        try:
            super().print(*args, **kwargs)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        """Rich would leave the program here."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits


class _Commands(click.Group):
    """A group whose commands end with cause and remedy instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it raises for the user becomes one message and exit code 2."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if ctx.params.get("debug"):
                raise
            raise click.UsageError(_explained(error)) from error


def _explained(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot write {error.filename}: {error.strerror}. Choose another place with -o FILE."
    return str(error)


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print the version and which kernels are active, and leave."""
    if not asked:
        return
    kernels = "reference, built without a compiler"
    if os.environ.get("BATCHNORM_KERNELS") == "reference":
        kernels = "reference, by BATCHNORM_KERNELS"
    elif find_spec("batchnorm._native"):
        kernels = f"native, {import_module('batchnorm._native').instruction_sets()[0]}"
    click.echo(f"batchnorm {__version__} (CPU kernels: {kernels})")
    ctx.exit()


@click.group(
    "batchnorm", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:  # noqa: ARG001 - _Commands reads it
    """Batch normalization for PyTorch: why it works, measured."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ✓ shows ? beside the word


@main.command()
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
    _require(*_LECTURE, what="the lecture", extra="torch,lecture")
    from batchnorm import report
    from batchnorm.lecture.claim import Settings

    if output.suffix.lower() == ".html":
        report.require_extra()

    settings = Settings(seed, seeds or (FULL_SEEDS if full else 5))
    names = tuple(name for name in NAMES if name in names) or NAMES
    talk = _Talk(stderr=output_format != "rich", highlight=False)
    verdicts = _run_claims(names, settings, talk, _command(names, settings), quiet=quiet)
    report.write(verdicts, output, interactive=interactive)
    _show(verdicts, output_format)
    talk.print(f"report: {output}", soft_wrap=True)


@main.command()
@click.option("--shape", "shapes", multiple=True, help="Sizes as 32x64x56x56; may be given again.  [default: four]")
@click.option("--dtype", default="float32", show_default=True, help="Type of the values: bfloat16, for example.")
@click.option("--channels-last", is_flag=True, help="Channels last in memory.")
@click.option("--threads", type=int, help="Threads of torch.  [default: as many as torch takes]")
@click.option("--rounds", type=int, help="Times that every contestant runs.")
@click.option("--tune", is_flag=True, help="Tune the allocator first: batchnorm.tune_allocator().")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write it as JSON.")
@click.option("--output-format", type=click.Choice(("rich", "json")), default="rich", show_default=True,
              help="What is printed.")  # fmt: skip
def bench(
    shapes: tuple[str, ...], dtype: str, channels_last: bool, threads: int | None, rounds: int | None, tune: bool,
    output: Path | None, output_format: str,
) -> None:  # fmt: skip
    """Time our layers against torch.nn's on this machine.

    Both run in turn, with copies of tensors of the same size as the limit that memory sets.
    """
    _require("torch", "numpy", what="bench", extra="torch")
    from batchnorm import allocator
    from batchnorm import bench as measured
    from batchnorm.rounds import BUSY

    sizes = [measured.parse_shape(shape) for shape in shapes] or None
    if output is not None:
        _check_writable(output)
    if tune and not (tuning := allocator.tune_allocator()):
        raise ValueError(f"--tune {tuning.reason}. Leave it out.")
    talk = _Talk(stderr=output_format == "json", highlight=False)
    with _progress(quiet=False) as bar:
        task = bar.add_task("timing", total=1.0)
        options = {} if rounds is None else {"rounds": rounds}
        data = measured.short_table(
            sizes, dtype, channels_last=channels_last, threads=threads,
            progress=lambda done: bar.update(task, completed=done), **options,
        )  # fmt: skip
    if output is not None:
        measured.write(data, output)
    if output_format == "json":
        click.echo(json.dumps(data, indent=1))
    else:
        talk.print(_bench_table(data))
        if (busy := max(row["others"] for row in data["rows"])) > BUSY:
            talk.print(f"Other programs used up to {busy:.0%} of the machine: repeat this when they are done.")
        talk.print("× torch: how many times as fast as torch.nn; × limit: our time over that of copies.", style="dim")


def _bench_table(data: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("shape", "case"):
        table.add_column(name)
    for name in ("ours ms", "torch ms", "× torch", "× limit"):
        table.add_column(name, justify="right")
    for row in data["rows"]:
        figures = (f"{row['ours_ms']:.3g}", f"{row['torch_ms']:.3g}", f"{row['ratio']:.2f}", f"{row['to_limit']:.2f}")
        table.add_row("×".join(map(str, row["shape"])), row["words"], *figures)
    return table


def _require(*modules: str, what: str, extra: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {' and '.join(missing)}, not installed here. Run: pip install 'batchnorm[{extra}]'"
        )


def _check_output(output: Path, *, interactive: bool) -> None:
    """Find out before the experiments run, not after, that the report cannot be written."""
    from batchnorm.report import SUFFIXES

    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"-o needs a file that ends in {', '.join(SUFFIXES)}, got {str(output)!r}. Name it why.html, for example."
        )
    if interactive and output.suffix.lower() != ".html":
        raise ValueError(f"--interactive needs an .html report, got {str(output)!r}. Leave one of the two out.")
    _check_writable(output)


def _check_writable(output: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        if output.exists() and not os.access(output, os.W_OK):
            raise PermissionError(None, "the file is write-protected")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error


def _command(names: Iterable[str], settings: Settings) -> str:
    """The shortest command line that repeats the numbers of this run."""
    claims = "" if tuple(names) == NAMES else "".join(f" --claim {name}" for name in names)
    return f"batchnorm why{claims} --seed {settings.seed} --seeds {settings.seeds}"


def _run_claims(names: tuple[str, ...], settings: Settings, talk: _Talk, command: str, *, quiet: bool) -> Verdicts:
    from batchnorm import lecture
    from batchnorm.lecture.criteria import VERSION
    from batchnorm.lecture.verdicts import Verdicts

    claims = "1 claim" if len(names) == 1 else f"{len(names)} claims"
    talk.print(f"{claims}, {settings.seeds} seeds each, criteria version {VERSION} (set before the runs)\n")
    outcomes = []
    with _progress(quiet=quiet) as bar:
        task = bar.add_task("", total=len(names))
        for done, name in enumerate(names):
            _announce(name, talk)
            bar.update(task, description=name, completed=done)
            outcome = lecture.run(name, settings, lambda share, done=done: bar.update(task, completed=done + share))
            talk.print(Padding(_line(outcome.main, f"{outcome.seconds:.0f} s"), (0, 0, 1, 2)))
            outcomes.append(outcome)
    return Verdicts(settings, outcomes, command)


def _announce(name: str, talk: _Talk) -> None:
    from batchnorm.lecture.criteria import criteria_of

    talk.print(f"[bold]{name}[/bold]")
    for criterion in criteria_of(name):
        talk.print(Padding(f"[dim]{escape(criterion.question)}[/dim]", (0, 0, 0, 2)))


def _progress(*, quiet: bool) -> Progress:
    """A bar on standard error, on a terminal only."""
    console = Console(stderr=True)
    off = quiet or not console.is_terminal or os.environ.get("BATCHNORM_PROGRESS") == "0"
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=off)


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
        _Talk(highlight=False).print(_table(verdicts.outcomes), f"\n[bold]{verdicts.headline}[/bold]")


def _table(outcomes: Iterable[Outcome]) -> Table:
    table = Table("criterion", "verdict", "measured", box=SIMPLE, expand=False)
    for outcome in outcomes:
        for verdict in outcome.result.verdicts:
            table.add_row(verdict.criterion.key, _word(verdict), escape(verdict.told))
    return table
