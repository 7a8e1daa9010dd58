"""The options of ``batchnorm stats``: which go together, and where the files are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from batchnorm.cli.output_files import free
from batchnorm.cli.preconditions import check_writable
from batchnorm.cli.settings import refuse_empty
from batchnorm.cli.typed_command import option_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchnorm.datasets.sources import Options

SUFFIX = ".bnstats.safetensors"
LEDGER = ".bnstats.ledger"
_READING = ("--format", "--delimiter", "--no-header", "--channel-axis", "--mode")
_RUNNING = ("--engine", "--address", "--workers", "--ledger", "--no-resume")
# the options that each kind of work does not use, and why
_UNUSED = {
    "measure": (("--limit",), "compares nothing: add --compare"),
    "--update": (("--columns", "--by", "--limit"), "measures what OLD has"),
    "--merge": (("--columns", "--by", "--limit", *_READING, *_RUNNING), "reads statistics alone"),
    "--compare": (("--ledger", "--no-resume", "--force"), "writes no statistics"),
}
_EXAMPLES = {
    "measure": "batchnorm stats train/*.parquet",
    "--update": f"batchnorm stats --update old{SUFFIX} new.parquet -o all{SUFFIX}",
    "--merge": f"batchnorm stats --merge a{SUFFIX} b{SUFFIX} -o ab{SUFFIX}",
    "--compare": f"batchnorm stats --compare train{SUFFIX} serving.parquet",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StatsOptions:
    """The options of the command line."""

    data: tuple[str, ...]
    outputs: tuple[Path, ...]
    columns: str | None
    by: str
    update: str | None
    merge: bool
    compare: bool
    limit: float
    format: str
    delimiter: str
    no_header: bool
    channel_axis: str | None
    mode: str | None
    engine: str
    address: str | None
    workers: int | None
    ledger: str | None
    no_resume: bool
    force: bool

    @property
    def work(self) -> str:
        """The kind of work: the option that asks for it, or "measure"."""
        asked = {"--update": self.update is not None, "--merge": self.merge, "--compare": self.compare}
        return next((name for name, is_asked in asked.items() if is_asked), "measure")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of columns."""
        return tuple(self.columns.split(",")) if self.columns else ()

    @property
    def statistics_place(self) -> Path | None:
        """The file of statistics that is written; None if there is none."""
        return next((path for path in self.outputs if path.name.endswith(SUFFIX)), None)

    @property
    def report_place(self) -> Path | None:
        """The file of the report that is written; None if there is none."""
        return next((path for path in self.outputs if not path.name.endswith(SUFFIX)), None)

    @property
    def ledger_place(self) -> Path | None:
        """The ledger: --ledger, or the file beside the statistics; None without both."""
        if self.ledger is not None:
            return Path(self.ledger)
        place = self.statistics_place
        return place.with_name(place.name.removesuffix(SUFFIX) + LEDGER) if place else None

    def reading(self) -> Options:
        """How files are read."""
        from batchnorm.datasets.sources import Options

        usual = Options()
        return Options(
            format=self.format, delimiter=self.delimiter.replace("\\t", "\t"), header=not self.no_header,
            mode=usual.mode if self.mode is None else self.mode,
            channel_axis=usual.channel_axis if self.channel_axis is None else _axes(self.channel_axis),
        )  # fmt: skip

    def check(self) -> None:
        """Refuse options that do not go together, and places that cannot be written.

        Raises:
            ValueError: If options contradict each other, DATA are too few or too many, or a file exists already.
            OSError: If a file cannot be written.
        """
        refuse_empty(
            {"--columns": self.columns, "--update": self.update, "--ledger": self.ledger, "--address": self.address}
        )
        _require_one_work()
        _require_data(self)
        unused, why = _UNUSED[self.work]
        for name in unused:
            if option_words([name]):
                raise ValueError(f"{name} has no effect here, because {_said(self.work)} {why}. Leave {name} out.")
        if any(not name for name in self.names):
            raise ValueError(
                f"--columns needs names with commas between them, got {self.columns!r}. Write --columns a,b."
            )
        if self.channel_axis is not None:
            _axes(self.channel_axis)
        self._check_places()

    def _check_places(self) -> None:
        if self.no_resume and self.ledger_place is None:
            raise ValueError(f"--no-resume needs a ledger, got none. Add -o FILE{SUFFIX} or --ledger FILE.")
        if len(self.outputs) > (self.statistics_place is not None) + (self.report_place is not None):
            raise ValueError("-o names two files of one kind, expected one. Leave one of them out.")
        if self.compare and (place := self.statistics_place):
            raise ValueError(f"--compare writes a report, got {place}. Give a file such as -o differences.html.")
        if (place := self.report_place) and place.suffix == ".safetensors":
            raise ValueError(f"-o needs FILE{SUFFIX} for statistics, got {place}. Rename it {place.stem}{SUFFIX}.")
        if place := self.statistics_place:
            check_writable(free(place, force=self.force))
        if (place := self.report_place) and not place.is_dir():  # ``write`` has the message for a folder
            check_writable(place)


def _said(work: str) -> str:
    return "stats" if work == "measure" else work


def _require_one_work() -> None:
    works = [name for name in ("--update", "--merge", "--compare") if option_words([name])]
    if len(works) > 1:
        raise ValueError(f"{' and '.join(works)} are different commands, expected one. Leave one of them out.")


def _require_data(asked: StatsOptions) -> None:
    """Refuse too few or too many DATA, and the same one twice."""
    number, work = len(asked.data), asked.work
    example = f"For example: {_EXAMPLES[work]}"
    if work == "--compare" and number != 2:
        raise ValueError(f"--compare needs two, statistics or data, got {number}. {example}")
    least = 2 if work == "--merge" else 1
    if number < least:
        what = "two files of statistics or more" if work == "--merge" else "data: files, folders or patterns"
        raise ValueError(f"{_said(work)} needs {what}, got {number}. {example}")
    refuse_empty(dict.fromkeys(("DATA",), "" if "" in asked.data else None))
    if twice := _twice(asked.data):
        raise ValueError(f"{twice} is named twice, expected once: it would count twice. Leave one of them out.")


def _twice(data: Sequence[str]) -> str:
    """The first word that occurs twice; "" if there is none."""
    return next((word for i, word in enumerate(data) if word in data[:i]), "")


def _axes(text: str) -> int | tuple[int, ...] | None:
    """The axes of features: "1", "1,2" or "none"."""
    if text.lower() == "none":
        return None
    try:
        axes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--channel-axis needs a whole number, several with commas, or none, got {text!r}. Write --channel-axis 1."
        ) from None
    return axes[0] if len(axes) == 1 else axes
