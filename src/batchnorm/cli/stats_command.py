"""``batchnorm stats``: statistics of data sets; measured, extended by new files, merged, and compared."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm.cli import shared_options as options
from batchnorm.cli.coloring import show
from batchnorm.cli.preconditions import require
from batchnorm.cli.settings import settings
from batchnorm.cli.stats_options import SUFFIX, StatsOptions
from batchnorm.cli.terminal import progress_bar
from batchnorm.reporting import formats
from batchnorm.reporting.command_line import file_word
from batchnorm.reporting.text import columns as text_width
from batchnorm.reporting.text import many, wrapped

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece, Selection
    from batchnorm.datasets.data_statistics import DataStatistics
    from batchnorm.datasets.ledger import Ledger
    from batchnorm.datasets.measurement import Progress
    from batchnorm.reporting.rows import Report

_LIMIT = 0.1  # LIMIT of datasets.comparison, which --help does without


@click.command()
@click.argument("data", nargs=-1, metavar="DATA...")
@click.option(
    "-o", "--output", "outputs", multiple=True, type=click.Path(path_type=Path),
    help="Write the statistics, FILE.bnstats.safetensors, or the report, by its suffix; repeatable.",
)  # fmt: skip
@click.option("--columns", metavar="A,B", help="Columns to measure.  [default: all of numbers and vectors]")
@click.option("--by", default="", metavar="COLUMN", help="Measure each value of this column as a group too.")
@click.option("--update", metavar="OLD", help="Statistics to which the files of DATA are added; OLD is not read again.")
@click.option("--merge", is_flag=True, help="DATA are files of statistics: merge them.")
@click.option("--compare", is_flag=True, help="Compare two: files of statistics, or data.")
@click.option(
    "--limit", type=click.FloatRange(0, min_open=True), default=_LIMIT, show_default=True,
    help="With --compare: the largest difference, in standard deviations.",
)  # fmt: skip
@click.option("--format", "format_", default="", metavar="NAME", help="Format of DATA.  [default: by suffix]")
@click.option(
    "--delimiter", default="", metavar="CHAR", help="Between cells of CSV files.  [default: comma; tab in .tsv]"
)
@click.option("--no-header", is_flag=True, help="The first line of CSV files has values, not names.")
@click.option(
    "--channel-axis", metavar="AXIS", help="Axis or axes of features in arrays, such as 1 or 1,2; none: one feature."
)
@click.option("--mode", metavar="MODE", help="Mode to which images are converted, such as L.  [default: RGB]")
@click.option("--engine", default="threads", metavar="NAME", help="threads, ray, dask or spark.  [default: threads]")
@click.option("--address", metavar="ADDRESS", help="The cluster of the engine.  [default: local workers]")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads or local workers.  [default: one for each processor]"
)
@click.option("--ledger", metavar="FILE", help="Where finished pieces are noted.  [default: beside the output]")
@click.option("--no-resume", is_flag=True, help="Forget the pieces that an interrupted run has noted.")
@click.option("--force", is_flag=True, help="Write over an existing file of statistics.")
@options.output_format
@options.quiet
def stats(
    data: tuple[str, ...], outputs: tuple[Path, ...], columns: str | None, by: str, update: str | None, merge: bool,
    compare: bool, limit: float, format_: str, delimiter: str, no_header: bool, channel_axis: str | None,
    mode: str | None, engine: str, address: str | None, workers: int | None, ledger: str | None, no_resume: bool,
    force: bool, output_format: str | None, quiet: bool,
) -> None:  # fmt: skip
    """Exact statistics of data: of every feature count, mean, std, extremes, NaN, infinities and missing values.

    DATA are files, folders or patterns: Parquet, CSV, Arrow, .npy, .npz, Zarr, images, tar shards; local, or addresses
    that fsspec opens. Memory stays below 1 GB whatever their size. Columns of lists of one length are vectors: each
    place is a feature.

    \b
      batchnorm stats train/*.parquet -o train.bnstats.safetensors
      batchnorm stats --update train.bnstats.safetensors new/*.parquet -o all.bnstats.safetensors
      batchnorm stats --merge a.bnstats.safetensors b.bnstats.safetensors -o ab.bnstats.safetensors
      batchnorm stats --compare train.bnstats.safetensors serving/*.parquet

    With -o FILE.bnstats.safetensors, each finished piece is noted in a ledger: after Ctrl-C or a crash the same command
    goes on where it was. The result does not depend on that, nor on the engine, to the bit.

    Exit codes: 0 measured, or no difference beyond the limit; 1 a difference beyond it; 2 the command could not run.
    """
    asked = StatsOptions(
        data=data, outputs=outputs, columns=columns, by=by, update=update, merge=merge, compare=compare, limit=limit,
        format=format_, delimiter=delimiter, no_header=no_header, channel_axis=channel_axis, mode=mode, engine=engine,
        address=address, workers=workers, ledger=ledger, no_resume=no_resume, force=force,
    )  # fmt: skip
    asked.check()
    chosen = formats.chosen(output_format, asked.report_place, settings().output_format)
    require("numpy", "safetensors", "fsspec", what="stats", extra="data")
    if chosen == "html":
        require("jinja2", what="the HTML page", extra="report")
    document, is_good = _WORKS[asked.work](asked, quiet)
    options.emit(document, chosen, asked.report_place, is_quiet=quiet)
    sys.exit(0 if is_good else 1)


# -- kinds of work ------------------------------------------------------------------------------------------------


def _measure(asked: StatsOptions, quiet: bool) -> tuple[Report, bool]:
    from batchnorm.datasets.blocks import Selection

    return _measured(asked, Selection(columns=asked.names, by=asked.by), None, quiet)


def _update(asked: StatsOptions, quiet: bool) -> tuple[Report, bool]:
    from batchnorm.datasets.blocks import Selection

    old = _read(str(asked.update))
    return _measured(asked, Selection(columns=tuple(old.columns), by=old.by), old, quiet)


def _merge(asked: StatsOptions, quiet: bool) -> tuple[Report, bool]:  # noqa: ARG001 - reading takes no time
    from batchnorm.datasets.data_statistics import union

    return _written(asked, union([_read(path) for path in asked.data])), True


def _compare(asked: StatsOptions, quiet: bool) -> tuple[Report, bool]:
    from batchnorm.datasets.blocks import Selection
    from batchnorm.datasets.comparison import compare
    from batchnorm.datasets.comparison_report import report

    known = [_read(each) if each.endswith(SUFFIX) else None for each in asked.data]
    usual = next((each for each in known if each), None)  # statistics decide what is measured of data
    columns = asked.names or (tuple(usual.columns) if usual else ())
    by = asked.by or (usual.by if usual else "")
    a, b = (
        each or _of_data(asked, data, Selection(columns=columns, by=by), quiet)
        for each, data in zip(known, asked.data, strict=True)
    )
    result = compare(a, b, limit=asked.limit, columns=asked.names or None)
    return report(result, *asked.data), not result.beyond


_WORKS: Mapping[str, Callable[[StatsOptions, bool], tuple[Report, bool]]] = {
    "measure": _measure, "--update": _update, "--merge": _merge, "--compare": _compare
}  # fmt: skip


def _of_data(asked: StatsOptions, data: str, selection: Selection, quiet: bool) -> DataStatistics:
    from batchnorm.datasets.engines import engine
    from batchnorm.datasets.measurement import measured
    from batchnorm.datasets.sources import pieces

    how = engine(asked.engine, address=asked.address, workers=asked.workers)
    with _reading():
        found = pieces(data, selection, asked.reading())
    with _bar(found, quiet) as progress, _reading():
        return measured(found, selection, how, None, progress)


def _read(path: str) -> DataStatistics:
    """The statistics in a file."""
    from batchnorm.datasets.data_statistics import DataStatistics

    if not path.endswith(SUFFIX):
        raise ValueError(
            f"expected a file of statistics, *{SUFFIX}, got {path}. Make it: batchnorm stats DATA -o FILE{SUFFIX}"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of statistics {path}. Make it: batchnorm stats DATA -o {file_word(path)}")
    with _reading():
        return DataStatistics.load(path)


# -- measuring ----------------------------------------------------------------------------------------------------


def _measured(
    asked: StatsOptions, selection: Selection, old: DataStatistics | None, quiet: bool
) -> tuple[Report, bool]:
    """Measure the data, with a ledger if statistics are written; add old statistics, and write."""
    from batchnorm.datasets.data_statistics import union
    from batchnorm.datasets.engines import engine
    from batchnorm.datasets.measurement import measured, uncounted
    from batchnorm.datasets.sources import pieces

    how = engine(asked.engine, address=asked.address, workers=asked.workers)
    with _reading():
        found = pieces(list(asked.data), selection, asked.reading())
    new = found if old is None else uncounted(found, old)
    if left_out := len({piece.file for piece in found}) - len({piece.file for piece in new}):
        _say(f"{many(left_out, 'file')} left out: {asked.update} has counted them")
    with _noted(asked, selection, found, quiet) as ledger, _bar(new, quiet) as progress:
        with _reading():
            statistics = [measured(new, selection, how, ledger, progress)] if new else []
        merged = union([*([old] if old else []), *statistics])
        document = _written(asked, merged)
        if ledger is not None:
            ledger.remove()
    return document, True


@contextlib.contextmanager
def _noted(asked: StatsOptions, selection: Selection, found: Sequence[Piece], quiet: bool) -> Iterator[Ledger | None]:
    """The ledger. If the block is interrupted or fails, a sentence says how to go on."""
    if (place := asked.ledger_place) is None:
        yield None
        return
    from batchnorm.datasets.ledger import Ledger
    from batchnorm.datasets.measurement import question

    with Ledger(place, question(selection), fresh=asked.no_resume) as ledger:
        if not quiet:
            _say_where(ledger, found)
        try:
            yield ledger
        except BaseException:
            if len(ledger):
                _say(f"{len(ledger):,} of {many(len(found), 'piece')} are noted in {place}; the same command goes on")
            raise


def _say_where(ledger: Ledger, found: Sequence[Piece]) -> None:
    """Say what the ledger of an interrupted run has."""
    changed = ledger.require_files(found)
    if len(ledger) > changed:
        _say(f"going on: {len(ledger) - changed:,} of {many(len(found), 'piece')} are noted in {ledger.path}")
    if changed:
        _say(f"{many(changed, 'noted piece')} left out: their files have changed and are measured again")
    if ledger.damaged_bytes:
        _say(f"the last {many(ledger.damaged_bytes, 'byte')} of {ledger.path} were damaged and are left out")


@contextlib.contextmanager
def _bar(found: Sequence[Piece], quiet: bool) -> Iterator[Progress]:
    """A progress bar on a terminal: bytes, their rate, the time left, and rows."""
    from batchnorm.datasets.measurement import Advance

    with progress_bar(quiet=quiet, measures_bytes=True) as bar:
        task = bar.add_task("0 rows", total=sum(piece.size for piece in found))

        def progress(advance: Advance) -> None:
            bar.update(task, completed=advance.size, description=f"{advance.rows:,} rows")

        yield progress


def _written(asked: StatsOptions, statistics: DataStatistics) -> Report:
    """The report of statistics, which are written if -o says where."""
    from batchnorm.datasets.statistics_report import report

    place, written, following = asked.statistics_place, "", f"add -o train{SUFFIX} to keep these statistics"
    if place:
        statistics.save(place)
        written, following = str(place), f"batchnorm.InputNorm.load({str(place)!r})"
    return report(statistics, " ".join(asked.data), written=written, next_step=following)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """A block that reads. Its errors become errors that the command line prints; other OSErrors are about writing."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error
    except MemoryError as error:
        raise ValueError(f"not enough memory: {error}. Use fewer threads: --workers 1.") from error
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(f"cannot read {error.filename}: {error.strerror}. Check the path and its permissions.") from error


def _say(text: str) -> None:
    """Print a sentence to standard error."""
    show("\n".join(wrapped(text, text_width())), sys.stderr)
