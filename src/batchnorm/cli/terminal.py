"""What every command shares: a console that may be closed, a progress bar, and what has to be there beforehand."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress


class Talk(Console):
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


def require(*modules: str, what: str, extra: str) -> None:
    """Return if all modules are installed; else say what to run."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {' and '.join(missing)}, not installed here. Run: pip install 'batchnorm[{extra}]'"
        )


def check_writable(output: Path) -> None:
    """Return if a file can be written there; else the reason, before the work and not after it."""
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        if output.exists() and not os.access(output, os.W_OK):
            raise PermissionError(None, "the file is write-protected")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error


def progress_bar(*, quiet: bool) -> Progress:
    """A bar on standard error, on a terminal only."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    off = quiet or not console.is_terminal or os.environ.get("BATCHNORM_PROGRESS") == "0"
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=off)
