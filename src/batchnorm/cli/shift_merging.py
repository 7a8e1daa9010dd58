"""``batchnorm shift --merge``: judge the replicas of one model together, from their monitors' states."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, NoReturn

from batchnorm.cli import shared_options as options
from batchnorm.cli.preconditions import check_writable, require
from batchnorm.cli.settings import refuse_empty, settings
from batchnorm.cli.typed_command import option_words
from batchnorm.reporting import formats
from batchnorm.reporting.command_line import CommandLine, file_word, number_word

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_OWN = ("--fleet", "--independent", "--within")
_OTHERS = (
    "--data", "--check-assumptions", "--weights", "--state", "--set", "--reference", "--calibrate",
    "--write-reference", "--alpha", "--unit", "--max-examples", "--images",
)  # fmt: skip


def run(
    addresses: Sequence[str], fleet: int | None, independent: bool, within: float | None, output_format: str | None,
    output: Path | None, quiet: bool,
) -> NoReturn:  # fmt: skip
    """Judge the replicas at these addresses, and exit."""
    _check(addresses, output)
    from batchnorm.shift.fleet import WITHIN
    from batchnorm.shift.fleet_report import report
    from batchnorm.shift.fleet_verdict import judge

    words = [*(["--fleet", str(fleet)] if fleet else []), *(["--independent"] if independent else [])]
    words += ["--within", number_word(within)] if within is not None else []
    target = " ".join(map(file_word, addresses))
    verdict = judge(
        addresses, fleet=fleet, independent=independent, within=WITHIN if within is None else within,
        command=CommandLine("batchnorm shift --merge", target, shlex.join(words)),
    )  # fmt: skip
    chosen = formats.chosen(output_format, output, settings().output_format)
    options.emit(report(verdict), chosen, output, is_quiet=quiet)
    sys.exit(1 if verdict.shift else 0)


def refuse_without() -> None:
    """Refuse options of --merge without it."""
    if words := option_words(_OWN):
        raise ValueError(
            f"{words[0]} is for replicas, got no --merge. Give their states: --merge FOLDER {words[0]} ..."
        )


def _check(addresses: Sequence[str], output: Path | None) -> None:
    refuse_empty({"--merge": min(addresses)})
    if words := option_words(_OTHERS):
        raise ValueError(
            f"--merge reads all settings from the states, got {words[0]}. Leave {words[0]} out: "
            f"batchnorm shift --merge {' '.join(map(file_word, addresses))}"
        )
    require("torch", "numpy", "safetensors", what="shift", extra="torch")
    if output is not None and not output.is_dir():
        check_writable(output)
