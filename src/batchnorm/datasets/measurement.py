"""The statistics of a data set: an engine measures its pieces, a ledger notes them, a fixed tree merges them."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, final

from batchnorm.argument_types import require_callable, require_type
from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.data_statistics import DataStatistics, Source
from batchnorm.datasets.engines import engine as engine_named
from batchnorm.datasets.ledger import Ledger
from batchnorm.datasets.measuring import measure
from batchnorm.datasets.sources import Options, pieces
from batchnorm.files.remote import is_remote
from batchnorm.package_version import VERSION

if TYPE_CHECKING:
    from batchnorm.datasets.blocks import Piece
    from batchnorm.datasets.engines.protocol import Engine, Measure
    from batchnorm.reporting.json_values import Json

Data: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"


@final
@dataclass(frozen=True, slots=True)
class Advance:
    """How far a measurement is.

    Args:
        rows: Number of examples in the finished pieces; pieces of the ledger count.
        size: Bytes of the finished pieces.
        all_bytes: Bytes of all pieces.
    """

    rows: int
    size: int
    all_bytes: int


Progress = Callable[[Advance], None]


def data_statistics(
    data: Data,
    *,
    columns: str | Sequence[str] = (),
    by: str = "",
    options: Options | None = None,
    engine: str = "threads",
    address: str | None = None,
    workers: int | None = None,
    ledger: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> DataStatistics:
    """Exact statistics of every feature of a data set that may be larger than memory.

    For every feature: count, mean, variance, extremes, and the numbers of NaN, infinities and nulls. The bits of the
    result depend on the files and their order alone: not on the engine, the number of workers, or interruptions.

    Args:
        data: A file, a folder, a pattern such as "train/*.parquet", or a list of them; local paths, or addresses that
            fsspec opens. The suffix says the format: Parquet, CSV, Arrow, .npy, .npz, Zarr, images or tar shards.
        columns: Names of columns; by default all columns of numbers and of vectors.
        by: A column; each of its values gets statistics of its own too.
        options: How files are read.
        engine: Where pieces are measured: "threads" of this process; or the workers of "ray", "dask" or "spark", which
            need batchnorm[data] in this version and must be able to open the files.
        address: The cluster, such as "ray://head:10001", "tcp://scheduler:8786" or "spark://master:7077"; None starts
            local workers.
        workers: Number of threads or local workers; None means one for each processor.
        ledger: A file in which each finished piece is noted, so that an interrupted call goes on where it was. It is
            not deleted at the end: delete it when the result is saved.
        progress: Called with an ``Advance`` after each piece.

    Raises:
        OSError: If there is no such file, a file cannot be read, or the cluster cannot be reached.
        ValueError: If a file is damaged or lacks a column, if ``by`` has too many values, if there is no such engine,
            or if the ledger belongs to another question.
        TypeError: If a selected column has no numbers, or an argument has a wrong type.
        ModuleNotFoundError: If a package is missing.

    Example:
        >>> import tempfile, numpy as np
        >>> path = f"{tempfile.mkdtemp()}/x.npy"
        >>> np.save(path, np.arange(6.0).reshape(3, 2))
        >>> statistics = data_statistics(path)
        >>> statistics.total.rows
        3
    """
    _require_types(data, columns, by, options, ledger, progress)
    selection = Selection(columns=(columns,) if isinstance(columns, str) else tuple(columns), by=by)
    how = engine_named(engine, address=address, workers=workers)
    found = pieces(data, selection, options)
    with Ledger(ledger, question(selection)) if ledger is not None else nullcontext() as notes:
        if notes is not None:
            notes.require_files(found)
        return measured(found, selection, how, notes, progress)


def question(selection: Selection) -> Mapping[str, Json]:
    """What a ledger's records answer. The data and how they are read are in the keys of pieces."""
    return {"columns": list(selection.columns), "by": selection.by, "version": VERSION}


def measured(
    found: Sequence[Piece],
    selection: Selection,
    how: Engine,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> DataStatistics:
    """The statistics of the pieces. Those that the ledger has are not measured again.

    Raises:
        ValueError: If a file has two names, or the groups are too many.
    """
    _require_different(found)
    finished = _finished(found, partial(measure, selection=selection), how, ledger)
    rows: Counter[str] = Counter()
    merged = how.merged(_counted(finished, found, rows, progress))
    return replace(merged, sources=_sources(found, rows))


def uncounted(found: Sequence[Piece], old: DataStatistics) -> list[Piece]:
    """The pieces of files that statistics have not counted.

    Raises:
        ValueError: If a counted file has changed since.
    """
    counted = {source.file: source.fingerprint for source in old.sources}
    for piece in found:
        if counted.get(place := _place(piece.file), piece.fingerprint) != piece.fingerprint:
            raise ValueError(
                f"{place} has changed since it was counted: its old values cannot be taken out. Measure all data again."
            )
    return [piece for piece in found if _place(piece.file) not in counted]


def _require_types(
    data: object, columns: object, by: object, options: object, ledger: object, progress: object
) -> None:
    """Refuse arguments of a wrong type.

    Raises:
        TypeError: "<what was expected>, got <type>. <what to do>".
    """
    for each in data if isinstance(data, (list, tuple)) else [data]:
        require_type(each, (str, os.PathLike), "data_statistics needs files", "Pass paths, such as 'train/*.parquet'.")
    require_type(columns, (str, list, tuple), "columns must be names", "Pass columns=['age', 'height'].")
    for name in columns if isinstance(columns, (list, tuple)) else ():
        require_type(name, str, "columns must be names", "Pass columns=['age', 'height'].")
    require_type(by, str, "by must be the name of a column", "Pass by='label'.")
    require_type(options, (Options, type(None)), "options must be Options", "Pass options=Options(format='csv').")
    require_type(ledger, (str, os.PathLike, type(None)), "ledger must be a path", "Pass ledger='train.bnstats.ledger'.")
    if progress is not None:
        require_callable(progress, "progress must be a function", "Pass a function of an Advance.")


def _require_different(found: Sequence[Piece]) -> None:
    """Refuse a file that has two names here, such as a link to it."""
    names = dict.fromkeys(piece.file for piece in found)
    files: dict[str, str] = {}
    for name in names:
        place = name if is_remote(name) else os.path.realpath(name)
        if place in files:
            raise ValueError(f"{name} and {files[place]} are the same file, which would count twice. Name one of them.")
        files[place] = name


def _finished(
    found: Sequence[Piece], task: Measure, how: Engine, ledger: Ledger | None
) -> Iterator[tuple[int, DataStatistics]]:
    """Index and statistics of every piece, nearly in order; those that are measured now are noted in the ledger."""
    pending = [i for i, piece in enumerate(found) if ledger is None or piece.key not in ledger]
    noted = deque(sorted(set(range(len(found))).difference(pending)))
    for k, statistics in how.partials([found[i] for i in pending], task) if pending else ():
        while ledger is not None and noted and noted[0] < pending[k]:
            yield noted[0], ledger[found[noted.popleft()].key]
        if ledger is not None:
            ledger.append(found[pending[k]], statistics)
        yield pending[k], statistics
    while ledger is not None and noted:
        yield noted[0], ledger[found[noted.popleft()].key]


def _counted(
    finished: Iterable[tuple[int, DataStatistics]],
    found: Sequence[Piece],
    rows: Counter[str],
    progress: Progress | None,
) -> Iterator[tuple[int, DataStatistics]]:
    """The same statistics; the rows of each file are counted on the way, and reported."""
    done, everything = 0, sum(piece.size for piece in found)
    for index, statistics in finished:
        rows[found[index].file] += statistics.total.rows
        done += found[index].size
        if progress:
            progress(Advance(rows.total(), done, everything))
        yield index, statistics


def _sources(found: Sequence[Piece], rows: Mapping[str, int]) -> tuple[Source, ...]:
    """The files of the pieces, in their order."""
    sizes: Counter[str] = Counter()
    for piece in found:
        sizes[piece.file] += piece.size
    prints = {piece.file: piece.fingerprint for piece in found}
    return tuple(Source(_place(file), prints[file], sizes[file], rows[file]) for file in prints)


def _place(file: str) -> str:
    """The address of a file, absolute: the same from every folder."""
    return file if is_remote(file) else os.path.abspath(file)  # noqa: PTH100 - Path.absolute keeps ``..``
