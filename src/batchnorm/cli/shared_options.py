"""Options of several commands, and the output of a report: printed, or written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm.cli.coloring import show
from batchnorm.cli.output_files import write
from batchnorm.cli.settings import codes, complete
from batchnorm.reporting import formats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.cli.settings import ProjectSettings
    from batchnorm.doctor.examination import Selection
    from batchnorm.reporting.rows import Report


class FormatChoice(click.Choice):
    """The names in the table of formats. "rich", an old name of some commands, still means "full"."""

    def __init__(self) -> None:
        super().__init__(())

    @property
    def choices(self) -> tuple[str, ...]:
        """All formats that are in the table when a command is called."""
        return tuple(formats.FORMATS)

    @choices.setter
    def choices(self, value: tuple[str, ...]) -> None:
        """Do nothing: click sets the choices when it constructs the type, but the table decides."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name of the format that the user gave."""
        return super().convert("full" if value == "rich" else value, param, ctx)


setting = click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help="Argument of the model's function; repeatable."
)
select = click.option(
    "--select", multiple=True, metavar="CODES", shell_complete=complete,
    help="Run only these rules: codes, families (BN1) or names.",
)  # fmt: skip
ignore = click.option("--ignore", multiple=True, metavar="CODES", shell_complete=complete, help="Skip these rules.")
output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the output to a file; the suffix decides the format."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing; -o still writes its file.")
output_format = click.option(
    "--output-format", type=FormatChoice(), help="Format of the output.  [default: full; in a GitHub workflow github]"
)
printed_format = click.option(
    "--output-format", type=FormatChoice(), default="full", show_default=True, help="Format of the output."
)


def selection(only: Sequence[str], without: Sequence[str], project: ProjectSettings) -> Selection:
    """The rules that run: --select replaces the project's ``select``, --ignore adds to its ``ignore``."""
    from batchnorm.doctor.examination import Selection

    return Selection(codes(only) or project.select, codes(without) + project.ignore, project.per_layer)


def emit(report: Report, name: str, place: Path | None = None, *, is_quiet: bool = False) -> None:
    """Write the report to a file; without a file print it, unless ``is_quiet``."""
    text = formats.rendered(report, name, to_file=place is not None)
    if place is not None:
        write(place, text.rstrip("\n") + "\n")
    elif text and not is_quiet:
        show(text)
