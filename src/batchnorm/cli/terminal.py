"""The messages of a running command, and a progress bar."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO, final

from batchnorm.cli.coloring import show
from batchnorm.reporting.text import columns, plain, wrapped

if TYPE_CHECKING:
    from rich.progress import Progress


@final
class Talk:
    """Prints sentences to a stream. After an error such as a full disk it prints nothing, and the experiments go on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def say(self, text: str = "", indent: int = 0, *, wraps: bool = True) -> None:
        """Print a paragraph; without ``wraps`` as one line of any length."""
        if self._stream is None:
            return
        try:
            lines = wrapped(text, columns(), indent, indent=indent) if wraps else [plain(text)]
            show("\n".join(lines), self._stream)
        except OSError:
            self._stream = None


def progress_bar(*, quiet: bool, measures_bytes: bool = False) -> Progress:
    """A progress bar on standard error; disabled if ``quiet``, without a terminal, or by BATCHNORM_PROGRESS=0.

    Args:
        quiet: Show nothing.
        measures_bytes: The work is counted in bytes; the bar shows them, their rate and the time left.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    off = quiet or not console.is_terminal or os.environ.get("BATCHNORM_PROGRESS") == "0"
    times: tuple[ProgressColumn, ...] = (TimeElapsedColumn(),)
    if measures_bytes:
        times = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (BarColumn(), TextColumn("{task.description}"), *times)
    return Progress(*columns, console=console, transient=True, disable=off)
