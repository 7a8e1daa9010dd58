"""``batchnorm shift``: judge offline whether a data set is distributed like the training data of a model."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import click

from batchnorm import addresses
from batchnorm.checkpoint import model_loading
from batchnorm.cli import shared_options as options
from batchnorm.cli import shift_merging as merging
from batchnorm.cli.model_address import ModelAddress, running
from batchnorm.cli.preconditions import check_writable, require
from batchnorm.cli.settings import refuse_empty, settings
from batchnorm.cli.typed_command import with_model
from batchnorm.reporting import formats
from batchnorm.reporting.command_line import CommandLine, number_word

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from batchnorm.reporting.rows import Report
    from batchnorm.shift import Reference, ShiftMonitor

_REFERENCE = ".bncal.safetensors"
_ALPHA, _UNIT = 0.01, "example"


@click.command()
@click.argument("models", metavar="MODEL", nargs=-1)
@click.option("--data", metavar="ADDRESS", help="Batches to judge: data.py:loader.")
@click.option(
    "--check-assumptions", "clean", metavar="ADDRESS",
    help="In place of --data: clean batches on which to check the assumptions of the alarm.",
)  # fmt: skip
@click.option("--weights", metavar="FILE", help="Checkpoint to load into the model.")
@click.option("--state", default="", metavar="PATH", help="State of FILE to load.  [default: the first that fits]")
@options.setting
@click.option(
    "--reference", metavar="FILE", help="A calibrated reference, *.bncal.safetensors.  [default: what MODEL stores]"
)
@click.option("--calibrate", metavar="ADDRESS", help="Batches of clean data, to calibrate a reference first.")
@click.option(
    "--write-reference", metavar="FILE", help="Write the calibrated reference to a file, *.bncal.safetensors."
)
@click.option(
    "--alpha", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=_ALPHA, show_default=True,
    help="Largest probability of a false alarm.",
)  # fmt: skip
@click.option(
    "--unit", type=click.Choice(["example", "batch"]), default=_UNIT, show_default=True,
    help="What counts as one observation; use batch if neighbouring examples are similar.",
)  # fmt: skip
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    help="Largest number of examples, also for --calibrate.  [default: all]",
)
@click.option("--images", type=click.IntRange(1, 12), help="Number of examples near the alarm in the HTML page.")
@click.option(
    "--merge", multiple=True, metavar="FILE...",
    help="In place of MODEL: states of replicas: files, patterns, folders, or addresses such as s3://bucket/states/.",
)  # fmt: skip
@click.option(
    "--fleet", type=click.IntRange(min=1), metavar="N",
    help="With --merge: number of replicas, fixed beforehand.  [default: as many as are found]",
)  # fmt: skip
@click.option("--independent", is_flag=True, help="With --merge: replicas are independent, so evidence is multiplied.")
@click.option(
    "--within", type=click.FloatRange(min=0), metavar="SECONDS",
    help="With --merge: times of files that differ by less count as one.  [default: 600]",
)  # fmt: skip
@options.output_format
@options.output
@options.quiet
def shift(
    models: tuple[str, ...], data: str | None, clean: str | None, weights: str | None, state: str,
    given: tuple[str, ...], reference: str | None, calibrate: str | None, write_reference: str | None, alpha: float,
    unit: str,
    max_examples: int | None, images: int | None, merge: tuple[str, ...], fleet: int | None, independent: bool,
    within: float | None, output_format: str | None, output: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Judge whether data have the same distribution as the training data of MODEL.

    MODEL is code: model.py:make_model, package.module:factory. The command compares the statistics of the data with
    those that the model's batch norm layers store, or with a reference that was calibrated on clean data. The model is
    not changed. Labels are not needed. The result says nothing about accuracy.

    --check-assumptions checks on clean data whether the probability of a false alarm is as promised.

    --merge judges replicas of one model together, from the states that their monitors saved, without the model.

    Exit codes: 0 no shift, or all assumptions hold; 1 a shift, or an assumption is doubtful or broken; 2 the command
    could not run.
    """
    if merge:
        merging.run((*merge, *models), fleet, independent, within, output_format, output, quiet)
    merging.refuse_without()
    model = _model(models)
    in_workflow = "github" if clean is None else "full"
    chosen = formats.chosen(output_format, output, settings().output_format, in_workflow=in_workflow)
    asked = ShiftOptions(
        ModelAddress(model, weights, state, given), _data(data, clean), reference, calibrate, write_reference, alpha,
        unit, max_examples, images,
    )  # fmt: skip
    _check(asked, chosen, "--data" if clean is None else "--check-assumptions")
    require("torch", "numpy", "safetensors", what="shift", extra="torch")
    if chosen == "html" and clean is None:
        require("jinja2", what="the HTML page", extra="report")
    if output is not None:
        _check_place(output)
    document, is_good = _judged(asked) if clean is None else _assumed(asked)
    options.emit(document, chosen, output, is_quiet=quiet)
    sys.exit(0 if is_good else 1)


@final
@dataclass(frozen=True, slots=True)
class ShiftOptions:
    """The options of the command line."""

    model: ModelAddress
    data: str
    reference: str | None
    calibrate: str | None
    write_reference: str | None
    alpha: float
    unit: str
    most: int | None
    images: int | None

    @property
    def command(self) -> CommandLine:
        """The command that gives the same verdict, without options of the output and files to write."""
        words = ["--data", self.data]
        words += ["--reference", self.reference] if self.reference else []
        words += ["--calibrate", self.calibrate] if self.calibrate else []
        words += [] if self.alpha == _ALPHA else ["--alpha", number_word(self.alpha)]
        words += [] if self.unit == _UNIT else ["--unit", self.unit]
        words += ["--max-examples", str(self.most)] if self.most else []
        return CommandLine("batchnorm shift", str(self.model), shlex.join(words))


# -- options ------------------------------------------------------------------------------------------------------


def _model(models: tuple[str, ...]) -> str:
    """The one model; click's own errors for none and for several."""
    context = click.get_current_context()
    if not models:
        raise click.MissingParameter(ctx=context, param=context.command.params[0])
    if len(models) > 1:
        extra = " ".join(models[1:])
        raise click.UsageError(f"Got unexpected extra argument{'s' * (len(models) > 2)} ({extra})", context)
    return models[0]


def _data(data: str | None, clean: str | None) -> str:
    """The address of the data set: --data or --check-assumptions."""
    if clean is not None and data is not None:
        raise ValueError("--check-assumptions takes the place of --data, got both. Leave one of them out.")
    if clean is None and data is None:
        raise ValueError(
            "shift needs data to judge. Give --data data.py:loader, or --check-assumptions clean.py:loader."
        )
    return clean or data or ""


def _check(asked: ShiftOptions, chosen: str, data: str) -> None:
    """Refuse wrong options before the model is made."""
    model = asked.model
    refuse_empty(
        {data: asked.data, "--weights": model.weights, "--reference": asked.reference, "--calibrate": asked.calibrate,
         "--write-reference": asked.write_reference}
    )  # fmt: skip
    if not addresses.is_address(model.address):
        addresses.refuse_code(model.address)
        raise ValueError(
            f"shift needs a model, got {model.address!r}. Give the address of its function: {with_model(model.address)}"
        )
    addresses.refuse_state(model.address, model.weights, model.state)
    if asked.reference and asked.calibrate:
        raise ValueError("--reference and --calibrate are two references, expected one. Leave one of them out.")
    if asked.images and chosen != "html":
        raise ValueError(f"--images needs the HTML page, got format {chosen}. Write the page: -o shift.html")
    _check_files(asked.reference, asked.calibrate, asked.write_reference)


def _check_files(reference: str | None, calibrate: str | None, output: str | None) -> None:
    if reference and not Path(reference).is_file():
        raise FileNotFoundError(
            f"no reference {reference}. Make it: --calibrate clean.py:loader --write-reference model{_REFERENCE}"
        )
    if output and not calibrate:
        raise ValueError("--write-reference needs clean data. Give their address: --calibrate clean.py:loader")
    if output and not output.endswith(_REFERENCE):
        raise ValueError(f"--write-reference needs a file that ends in {_REFERENCE}, got {output!r}. Change the name.")
    if output:
        _check_place(Path(output))


def _check_place(path: Path) -> None:
    if not path.is_dir():  # write() has the message for a folder
        check_writable(path)


# -- results ------------------------------------------------------------------------------------------------------


def _judged(asked: ShiftOptions) -> tuple[Report, bool]:
    """The report; and True if no shift was found."""
    from batchnorm.shift.verdict import judge
    from batchnorm.shift.verdict_report import report

    with running(asked.model.address), _unlogged():
        asked, network = _loaded(asked)
        verdict = judge(
            _monitor(network, asked), addresses.data(asked.data), max_examples=asked.most, pictures=asked.images or 0,
            target=asked.model.address, data=asked.data, command=asked.command,
        )  # fmt: skip
    return report(verdict, source=asked.model.source), verdict.rang is None


def _assumed(asked: ShiftOptions) -> tuple[Report, bool]:
    """The report, and whether all assumptions hold."""
    from batchnorm.shift.assumptions import check
    from batchnorm.shift.assumptions_report import report

    with running(asked.model.address), _unlogged():
        monitor = _monitor(_loaded(asked)[1], asked)
        result = check(
            monitor, addresses.data(asked.data), max_examples=asked.most, target=asked.model.address, data=asked.data
        )
    return report(result, source=asked.model.source), result.hold


def _loaded(asked: ShiftOptions) -> tuple[ShiftOptions, nn.Module]:
    """The options with the loaded state, and the model. If there are several states, the loaded one is printed."""
    model = asked.model
    network = model.made()
    name, sentence = model_loading.choice(network, model.weights, model.state) if model.weights else ("", "")
    if sentence:
        click.echo(sentence, err=True)
    return replace(asked, model=replace(model, state=name)), network


def _monitor(network: nn.Module, asked: ShiftOptions) -> ShiftMonitor:
    from batchnorm.shift import ShiftMonitor

    stored = _read(asked.reference) if asked.reference else None
    monitor = ShiftMonitor(network, asked.alpha, asked.unit, reference=stored, examples=None)
    if asked.calibrate:
        calibrated = monitor.calibrate(addresses.data(asked.calibrate), asked.most)
        if asked.write_reference:
            calibrated.save(asked.write_reference)
    return monitor


def _read(path: str) -> Reference:
    from batchnorm.shift import Reference

    try:
        return Reference.load(path)
    except OSError as error:
        raise ValueError(f"{path} is no reference: {error!r}. Make a reference with --calibrate.") from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """A block in which the alarm is not logged, because the verdict reports it."""
    logger = logging.getLogger("batchnorm.shift")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
