"""``batchnorm doctor``: examine a file or a model."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm import addresses
from batchnorm.cli.coloring import show
from batchnorm.cli.output_files import write
from batchnorm.cli.settings import (
    FAIL_ON,
    baseline_of,
    codes,
    complete,
    fails,
    read_baseline,
    refuse_empty,
    settings,
)

if TYPE_CHECKING:
    from batchnorm.doctor import Diagnosis

_FORMATS = ("full", "concise", "json", "jsonl", "github", "sarif", "junit", "html", "md")
_SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".sarif": "sarif", ".xml": "junit", ".html": "html", ".md": "md"}
# sentences are hard to read in wider lines
_WIDEST = 100


@click.command()
@click.argument("target")
@click.option("--weights", metavar="FILE", help="Checkpoint to load into the model.")
@click.option("--state", default="", metavar="PATH", help="Only this state of a checkpoint.  [default: all]")
@click.option("--data", metavar="ADDRESS", help="Batches to measure on: data.py:loader.")
@click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help="Argument of the model's function; repeatable."
)
@click.option("--reference", metavar="TARGET", help="What the model was made from, to compare with.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples per device and step.  [default: the loader's]")
@click.option("--accumulation", type=click.IntRange(min=1), default=1, help="Batches per optimizer step.")
@click.option("--world-size", type=click.IntRange(min=1), default=1, help="Processes that train together.")
@click.option("--max-examples", type=click.IntRange(min=1), default=512, show_default=True, help="To measure on.")
@click.option(
    "--select",
    multiple=True,
    metavar="CODES",
    shell_complete=complete,
    help="Only these rules: codes, families (BN1) or names.",
)
@click.option("--ignore", multiple=True, metavar="CODES", shell_complete=complete, help="Not these rules.")
@click.option("--baseline", metavar="FILE", help="Findings that are known and not told again.")
@click.option("--write-baseline", metavar="FILE", help="Write the findings of this run as a baseline.")
@click.option("--fail-on", type=click.Choice(FAIL_ON), help="Exit with 1 from this severity on.  [default: error]")
@click.option("--output-format", type=click.Choice(_FORMATS), help="What is printed.  [default: full]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write it to a file; the suffix tells the format."
)
@click.option("-v", "--verbose", is_flag=True, help="List the checks that did not run.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code tells.")
def doctor(
    target: str, weights: str | None, data: str | None, given: tuple[str, ...], reference: str | None,
    select: tuple[str, ...], ignore: tuple[str, ...], baseline: str | None, write_baseline: str | None,
    fail_on: str | None, output_format: str | None, output: Path | None, verbose: bool, quiet: bool, state: str,
    **measured: Any,
) -> None:  # fmt: skip
    """Examine batch norm in TARGET and say what is wrong.

    TARGET is a checkpoint (.pt, .pth, .ckpt, .pkl, .safetensors, .onnx), which is read without torch and without
    running anything in it, or a model: model.py:make_model, package.module:factory. Every state of a checkpoint
    (averaged copies, target networks) is examined, with a model each that fits it. Nothing is changed.

    Exit codes: 0 nothing at or above --fail-on, 1 findings, 2 it could not run.
    """
    refuse_empty(
        {"--weights": weights, "--data": data, "--reference": reference, "--baseline": baseline,
         "--write-baseline": write_baseline}
    )  # fmt: skip
    project = settings()
    chosen = _chosen_format(output_format, output, project.output_format)
    baseline = baseline or project.baseline
    known = read_baseline(baseline) if baseline else set()
    from batchnorm.doctor.examination import Selection

    selection = Selection(codes(select) or project.select, codes(ignore) + project.ignore, project.per_layer)
    diagnosis = _examined(target, weights, data, given, reference, selection=selection, state=state, **measured)
    if write_baseline:
        write(Path(write_baseline), baseline_of(diagnosis.findings))
    diagnosis = _without(diagnosis, known)
    limit = fail_on or project.fail_on
    text = _text(diagnosis, chosen, limit, verbose=verbose, output=output)
    if output is not None:
        write(output, text.rstrip("\n") + "\n")
    elif not quiet and text:
        show(text)
    sys.exit(1 if fails(diagnosis.findings, limit) else 0)


def _examined(
    target: str,
    weights: str | None,
    data: str | None,
    given: tuple[str, ...],
    reference: str | None,
    *,
    state: str,
    **rest: Any,
) -> Diagnosis:
    from batchnorm.doctor import examine

    if not addresses.is_address(target):
        addresses.refuse_code(target)
        for name, value in (("--weights", weights), ("--data", data), ("--set", given), ("--reference", reference)):
            if value:
                raise ValueError(
                    f"{name} needs a model, got the file {target!r}. "
                    f"Give the model: model.py:make_model --weights {target}"
                )
        return examine(target, selection=rest["selection"], state=state)
    addresses.refuse_state(target, weights, state)
    _require_torch()
    # what the user's code prints must not get into JSON, and what it raises must not end in a traceback
    with contextlib.redirect_stdout(sys.stderr), addresses.told(target):
        model = addresses.model(target, addresses.parsed(given))
        if weights:
            addresses.load_weights(model, weights, state)  # before the data, which take longer
        batches = addresses.data(data) if data else None
        batches = list(batches) if isinstance(batches, Iterator) else batches  # each state is measured on them
        other = _reference(reference) if reference else None
        name = _name(target, weights, given, state)

        def look() -> Diagnosis:
            return examine(model, batches, reference=other, name=name, **rest)

        if not weights:
            return look()
        from batchnorm.doctor.states_in_turn import examined

        return examined(model, weights, state, look, rest["selection"])


def _name(target: str, weights: str | None, given: tuple[str, ...], state: str) -> str:
    """The target with all that it takes to make it again: remedies begin with it."""
    options = ["--weights", weights, *(["--state", state] if state else [])] if weights else []
    return shlex.join([target, *options, *(word for setting in given for word in ("--set", setting))])


def _reference(reference: str) -> Any:
    return addresses.model(reference) if addresses.is_address(reference) else reference


def _require_torch() -> None:
    from batchnorm.cli.terminal import require

    require("torch", "numpy", what="a model", extra="torch")


def _without(diagnosis: Diagnosis, known: set[tuple[str, str]]) -> Diagnosis:
    kept = tuple(finding for finding in diagnosis.findings if (finding.code, finding.layer) not in known)
    silenced = diagnosis.silenced + len(diagnosis.findings) - len(kept)
    return replace(diagnosis, findings=kept, silenced=silenced)


def _chosen_format(asked: str | None, output: Path | None, settled: str | None) -> str:
    """By the option, then the file's suffix, then the project; GitHub's own where its workflow runs."""
    if asked:
        return asked
    if output is not None and output.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[output.suffix.lower()]
    if settled:
        if settled not in _FORMATS:
            raise ValueError(
                f"output-format must be one of {', '.join(_FORMATS)}, got {settled!r}. Choose one of them."
            )
        return settled
    return "github" if os.environ.get("GITHUB_ACTIONS") == "true" else "full"


def _text(diagnosis: Diagnosis, chosen: str, limit: str, *, verbose: bool, output: Path | None) -> str:
    from batchnorm.doctor.formats import FORMATS
    from batchnorm.doctor.junit import junit
    from batchnorm.doctor.text import full
    from batchnorm.rules.finding import Severity

    if chosen == "full":
        columns = 80 if output else min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)
        return full(diagnosis, width=max(columns, 40), verbose=verbose, command="batchnorm doctor")
    if chosen == "junit":
        return junit(diagnosis, None if limit == "never" else Severity[limit.upper()])
    return FORMATS[chosen](diagnosis)
