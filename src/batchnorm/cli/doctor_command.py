"""``batchnorm doctor``: examine a file or a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, final

import click

from batchnorm import addresses
from batchnorm.cli import shared_options as options
from batchnorm.cli.model_address import ModelAddress, batches, require_torch, running
from batchnorm.cli.output_files import write
from batchnorm.cli.settings import FAIL_ON, baseline_of, fails, limit_of, read_baseline, refuse_empty, settings
from batchnorm.cli.typed_command import refuse_with_file
from batchnorm.reporting import formats

if TYPE_CHECKING:
    from torch import nn

    from batchnorm.doctor import Diagnosis
    from batchnorm.doctor.examination import Selection


class LoopOptions(TypedDict):
    """Arguments of ``examine``: settings of the training loop, and the number of examples."""

    batch_size: int | None
    accumulation: int
    world_size: int
    max_examples: int


@click.command()
@click.argument("target")
@click.option("--weights", metavar="FILE", help="Checkpoint to load into the model.")
@click.option("--state", default="", metavar="PATH", help="Only this state of a checkpoint.  [default: all]")
@click.option("--data", metavar="ADDRESS", help="Batches to measure on: data.py:loader.")
@options.setting
@click.option("--reference", metavar="TARGET", help="Model or file that TARGET was made from, to compare it with.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples per device and step.  [default: the loader's]")
@click.option("--accumulation", type=click.IntRange(min=1), default=1, help="Batches per optimizer step.")
@click.option("--world-size", type=click.IntRange(min=1), default=1, help="Number of processes that train together.")
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Largest number of examples to measure on.",
)
@options.select
@options.ignore
@click.option("--baseline", metavar="FILE", help="File with known findings, to leave them out.")
@click.option("--write-baseline", metavar="FILE", help="Write the findings of this run as a baseline.")
@click.option("--fail-on", type=click.Choice(FAIL_ON), help="Exit with 1 at this severity or worse.  [default: error]")
@options.output_format
@options.output
@click.option("-v", "--verbose", is_flag=True, help="List the checks that did not run.")
@options.quiet
def doctor(
    target: str, weights: str | None, state: str, given: tuple[str, ...], data: str | None, reference: str | None,
    select: tuple[str, ...], ignore: tuple[str, ...], baseline: str | None, write_baseline: str | None,
    fail_on: str | None, output_format: str | None, output: Path | None, verbose: bool, quiet: bool,
    **loop: Unpack[LoopOptions],
) -> None:  # fmt: skip
    """Examine batch norm in TARGET and report its faults.

    TARGET is a checkpoint (.pt, .pth, .ckpt, .pkl, .safetensors, .onnx) or a model: model.py:make_model,
    package.module:factory. A checkpoint is read without torch, and nothing in it is executed. Every state of a
    checkpoint (averaged copies, target networks) is examined; with a model, every state that fits it. TARGET is not
    changed.

    Exit codes: 0 no finding of the severity --fail-on or worse, 1 findings, 2 the command could not run.
    """
    refuse_empty(
        {"--weights": weights, "--data": data, "--reference": reference, "--baseline": baseline,
         "--write-baseline": write_baseline}
    )  # fmt: skip
    project = settings()
    chosen = formats.chosen(output_format, output, project.output_format)
    baseline = baseline or project.baseline
    known = read_baseline(baseline) if baseline else set()
    asked = DoctorOptions(
        ModelAddress(target, weights, state, given), data, reference, options.selection(select, ignore, project), loop
    )
    diagnosis = _examined(asked)
    if write_baseline:
        write(Path(write_baseline), baseline_of(diagnosis.findings))
    diagnosis, limit = _without(diagnosis, known), limit_of(fail_on or project.fail_on)
    from batchnorm.doctor.diagnosis_report import report

    source = asked.model.source if asked.model.is_code else ""
    document = report(diagnosis, source=source, fail_on=limit, verbose=verbose, command="batchnorm doctor")
    options.emit(document, chosen, output, is_quiet=quiet)
    sys.exit(1 if fails(diagnosis.findings, limit) else 0)


@final
@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """The options of the command line."""

    model: ModelAddress
    data: str | None
    reference: str | None
    selection: Selection
    loop: LoopOptions


def _examined(asked: DoctorOptions) -> Diagnosis:
    from batchnorm.doctor import examine

    if asked.model.is_code:
        return _examined_model(asked)
    target = asked.model.address
    addresses.refuse_code(target)
    refuse_with_file(target, ("--weights", "--data", "--set", "--reference"))
    return examine(target, selection=asked.selection, state=asked.model.state)


def _examined_model(asked: DoctorOptions) -> Diagnosis:
    """The diagnosis of the model with each state of its checkpoint that fits; without --weights, as the model is."""
    from batchnorm.doctor import examine

    named = asked.model
    addresses.refuse_state(named.address, named.weights, named.state)
    require_torch("a model")
    with running(named.address):
        model = named.made()  # made before the data, which take longer
        data, reference = batches(asked.data), _reference(asked.reference)  # each state is measured on them

        def look() -> Diagnosis:
            return examine(model, data, reference=reference, name=str(named), selection=asked.selection, **asked.loop)

        if not named.weights:
            return look()
        from batchnorm.doctor.states_in_turn import examined

        return examined(model, named.weights, named.state, look, asked.selection)


def _reference(reference: str | None) -> nn.Module | str | None:
    return addresses.model(reference) if reference and addresses.is_address(reference) else reference


def _without(diagnosis: Diagnosis, known: set[tuple[str, str]]) -> Diagnosis:
    new = tuple(finding for finding in diagnosis.findings if (finding.code, finding.layer) not in known)
    silenced = diagnosis.silenced + len(diagnosis.findings) - len(new)
    return replace(diagnosis, findings=new, silenced=silenced)
