"""``batchnorm fix``: write a mended copy of a checkpoint, or show what would change."""

from __future__ import annotations

import shlex
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import click

from batchnorm import addresses, checkpoint
from batchnorm.checkpoint.states_in_file import with_state
from batchnorm.cli import shared_options as options
from batchnorm.cli.coloring import show
from batchnorm.cli.model_address import ModelAddress, batches, require_torch
from batchnorm.cli.output_files import free
from batchnorm.cli.settings import refuse_empty, settings
from batchnorm.cli.typed_command import option_words, refuse_with_file
from batchnorm.reporting.command_line import file_word
from batchnorm.reporting.text import columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from batchnorm.doctor.examination import Selection
    from batchnorm.doctor.mending.mended_checkpoint import MendingPlan
    from batchnorm.doctor.mending.outcome import MendingOutcome
    from batchnorm.rules.finding import Finding

# rules whose faults show in a file, but not in a model that was loaded from it
_OF_FILES = {"BN108", "BN112", "BN115", "BN507", "BN510"}
_WITHOUT_CHECKPOINT = "a model without --weights", "Give --weights FILE, or leave --in-place out"


@click.command()
@click.argument("target")
@click.option("--weights", metavar="FILE", help="Checkpoint to load into the model, and to mend.")
@click.option("--state", default="", metavar="PATH", help="Only this state of the checkpoint.  [default: all]")
@click.option("--base", metavar="FILE", help="Only copy missing statistics from this file, the base of an adapter.")
@click.option("--data", metavar="ADDRESS", help="Training data to measure statistics on: data.py:train_loader.")
@click.option(
    "--unsafe-fixes", "unsafe", is_flag=True, help="Also apply fixes that need no data but change eval outputs."
)
@click.option("--diff", is_flag=True, help="Show the changes, but write nothing.")
@click.option("--in-place", is_flag=True, help="Write over the checkpoint itself.")
@click.option("--force", is_flag=True, help="Write over an existing file.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: NAME.fixed.pt, or .safetensors]"
)
@options.setting
@options.select
@options.ignore
def fix(
    target: str, weights: str | None, data: str | None, unsafe: bool, diff: bool, in_place: bool, force: bool,
    output: Path | None, given: tuple[str, ...], select: tuple[str, ...], ignore: tuple[str, ...], state: str,
    base: str | None,
) -> None:  # fmt: skip
    """Write a copy of TARGET in which the findings of doctor are mended.

    TARGET is a checkpoint (.pt, .pth, .ckpt, .safetensors) or a model, model.py:make_model. For a model, a copy of the
    file of --weights is written, or without --weights the model's state dict. Without further options, only fixes are
    applied that leave eval outputs as they are. With a model and --data, statistics are measured again. Every state of
    the checkpoint is mended, averaged copies too: if TARGET is a model, each state is loaded into it. With
    --base, statistics that TARGET lacks are copied from another file, and nothing else changes.

    Exit codes: 0 no error is left, 1 errors are left or a state does not fit the model, 2 the command could not run.
    """
    refuse_empty({"--weights": weights, "--data": data, "--base": base})
    chosen = options.selection(select, ignore, settings())
    asked = FixOptions(ModelAddress(target, weights, state, given), data, chosen, unsafe)
    if not asked.model.is_code:
        addresses.refuse_code(target)
        refuse_with_file(target, ("--weights", "--data", "--set"))
    place = _place(target, asked.source, output, in_place=in_place, force=force or diff)
    if base is not None:
        _refuse_with_base(asked)
        sys.exit(_fill(target, base, place, diff=diff))
    outcome, write = (_model if asked.model.is_code else _file)(asked)
    if not diff and not outcome.is_empty:
        write(place)
    _tell(outcome, place, diff=diff, again=_examination(asked, place))
    sys.exit(1 if outcome.has_error else 0)


def _refuse_with_base(asked: FixOptions) -> None:
    if asked.model.is_code:
        raise ValueError(
            f"--base needs a file to fill, got the model {asked.model.address}. Give the file in place of the model: "
            "batchnorm fix FILE --base BASE"
        )
    for name, value in (("--state", asked.model.state), ("--unsafe-fixes", asked.unsafe)):
        if value:
            raise ValueError(f"--base only copies missing statistics, got {name} as well. Run fix again for the rest.")


def _fill(target: str, base: str, place: Path, *, diff: bool) -> int:
    """Write the file with the base's statistics; the exit code."""
    from batchnorm.doctor.mending import filled_checkpoint
    from batchnorm.doctor.mending import outcome as words
    from batchnorm.rules.phrases import listed

    filling = filled_checkpoint.plan(target, base)
    lines = [f"{target}: no statistics are missing"] if not filling.layers and not filling.absent else []
    if filling.layers:
        if filling.file.format == "pt":
            require_torch("a file of torch.save")
        if not diff:
            filled_checkpoint.write(filling, place)
        count = len(filling.layers)
        lines += [
            f"{target}: {'would fill' if diff else 'filled'} {count} layer{'s' * (count != 1)} with the statistics of "
            f"{base}: {listed(filling.names)}",
            "if they changed in training, measure them again: batchnorm.recalibrate(model, loader)",
            f"would write {place} (--diff: nothing written)" if diff else f"wrote {place}",
        ]
    if filling.absent:
        lines.append(f"not filled, since {base} has no statistics of such layers: {listed(filling.absent)}")
    show(words.wrapped(lines, columns()))
    return 1 if filling.absent else 0


@final
@dataclass(frozen=True, slots=True)
class FixOptions:
    """The options about the target and the fixes. The options about the file to write go to ``_place``."""

    model: ModelAddress
    data: str | None
    selection: Selection
    unsafe: bool

    @property
    def source(self) -> str | None:
        """The checkpoint; None for a model without --weights."""
        return self.model.weights if self.model.is_code else self.model.address


def _examination(asked: FixOptions, place: Path) -> str:
    """The command that examines the result, with the user's options that doctor has too."""
    target = [asked.model.address, "--weights", str(place)] if asked.model.is_code else []
    options = shlex.join([*target, *option_words(("--state", "--set", "--data", "--select", "--ignore"))])
    return " ".join(filter(None, ("batchnorm doctor", "" if target else file_word(str(place)), options)))


def _place(target: str, source: str | None, output: Path | None, *, in_place: bool, force: bool) -> Path:
    """The file to write, checked before the work begins."""
    if in_place and (output or source is None):
        other, remedy = ("-o as well", "Leave one of the two out") if output else _WITHOUT_CHECKPOINT
        raise ValueError(f"--in-place writes over the checkpoint, got {other}. {remedy}.")
    if in_place:
        return Path(str(source)).resolve()
    is_safetensors = source is not None and checkpoint.format_of(source) == "safetensors"
    suffix = ".safetensors" if is_safetensors else ".pt"
    place = output or _beside(source, suffix, Path(target.rpartition(":")[0]).stem)
    if (place.suffix.lower() == ".safetensors") != is_safetensors:
        raise ValueError(f"{_format(source, suffix)}, got -o {place}. Name it {place.with_suffix(suffix)}.")
    if source and place.exists() and Path(source).exists() and place.samefile(source):
        raise ValueError(f"{place} is the checkpoint itself. To write over it, pass --in-place and leave -o out.")
    return free(place, force=force)


def _format(source: str | None, suffix: str) -> str:
    return f"fix keeps the format of {source}" if source else f"fix writes the state dict of a model to a {suffix} file"


def _beside(source: str | None, suffix: str, name: str) -> Path:
    """NAME.fixed.pt or NAME.fixed.safetensors beside the checkpoint; in the current folder without a checkpoint."""
    return Path(f"{name}.fixed.pt") if source is None else Path(source).with_suffix(f".fixed{suffix}")


# the outcome, and the function that writes it to a file
Mended = tuple["MendingOutcome", "Callable[[Path], None]"]


def _file(asked: FixOptions) -> Mended:
    from batchnorm.doctor.mending import mended_checkpoint
    from batchnorm.doctor.mending.outcome import MendingOutcome

    path, state = asked.model.address, asked.model.state
    plan = mended_checkpoint.plan(path, unsafe=asked.unsafe, selection=asked.selection, state=state)
    if not plan.is_empty and plan.file.format == "pt":
        require_torch("a file of torch.save")
    outcome = MendingOutcome(
        path, plan.changes, _prefixes(plan), plan.left, unsafe=asked.unsafe, notes=_states(plan, state)
    )
    return outcome, lambda place: mended_checkpoint.write(plan, place)


def _states(plan: MendingPlan, state: str) -> tuple[str, ...]:
    """Sentences that name the mended states if there are several; or a note that the file has no batch norm layers."""
    state = with_state(plan.file, state)[1] if state else ""
    others = [name for name in plan.file.states if state and name != state]
    if len(plan.file.states) < 2:
        return () if plan.file.states or plan.file.layers else ("no batch norm layers",)
    treated = f"treated: {state or ', '.join(plan.file.states)}"
    return (treated, *([f"not treated, since --state asks for another state: {', '.join(others)}"] if others else []))


def _prefixes(plan: MendingPlan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plan.prefixes.values()))


def _model(asked: FixOptions) -> Mended:
    require_torch("a model")
    target, weights = asked.model.address, asked.model.weights
    addresses.refuse_state(target, weights, asked.model.state)
    with _no_bytecode(), _warnings_printed(), addresses.as_address_errors(target):
        model = replace(asked.model, weights=None).made()
        return _one_model(asked, model) if weights is None else _each_state(asked, model, weights)


def _one_model(asked: FixOptions, model: nn.Module) -> Mended:
    from batchnorm.doctor import examine
    from batchnorm.doctor.mending.outcome import MendingOutcome
    from batchnorm.doctor.mending.treatment import differences, treat

    target, data = asked.model.address, batches(asked.data)
    diagnosis = examine(model, data, selection=asked.selection, name=target)
    treated = treat(model, diagnosis, data, unsafe=asked.unsafe)
    after = examine(treated, data, selection=asked.selection, name=target)
    outcome = MendingOutcome(
        target, differences(model, treated, diagnosis.findings, measured=data is not None), left=_left(after.findings),
        in_code=_in_code(diagnosis.findings), with_data=bool(asked.data), unsafe=asked.unsafe,
    )  # fmt: skip
    return outcome, lambda place: _write_state(treated, place)


def _each_state(asked: FixOptions, model: nn.Module, weights: str) -> Mended:
    from batchnorm.doctor import examine, states_in_turn
    from batchnorm.doctor.mending import mended_checkpoint
    from batchnorm.doctor.mending.outcome import MendingOutcome

    state, selection = asked.model.state, asked.selection
    states = states_in_turn.loading(model, weights, state)
    foreign = examine(weights, selection=selection).findings
    results = list(
        states_in_turn.treated(
            model, states, batches(asked.data), foreign, unsafe=asked.unsafe, selection=selection,
            name=asked.model.address,
        )
    )  # fmt: skip
    live = {layer: change for result in results for layer, change in result.changes.items()}
    eps = {layer: value for result in results for layer, value in result.eps.items()}
    plan = mended_checkpoint.plan(weights, unsafe=asked.unsafe, selection=selection, live=live, eps=eps, state=state)
    loaded = {layer for name in states.loaded if name for layer in states.file.states[name].layers.values()}
    of_file = [f for f in plan.left if f.code in _OF_FILES or (f.layer and f.layer not in loaded)]
    remaining = dict.fromkeys(finding for result in results for finding in _left(result.left))
    in_code = dict.fromkeys(finding for result in results for finding in _in_code(result.found))
    outcome = MendingOutcome(
        weights, plan.changes, _prefixes(plan), (*remaining, *of_file), tuple(in_code), with_data=bool(asked.data),
        unsafe=asked.unsafe, notes=states.notes, untreated=() if state else tuple(states.others),
    )  # fmt: skip
    return outcome, lambda place: mended_checkpoint.write(plan, place)


def _left(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings that are left in a model, except those about the environment and those that only a file shows."""
    return tuple(f for f in findings if not f.code.startswith("BN9") and f.code not in _OF_FILES)


def _in_code(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    from batchnorm.doctor.mending.remedies import remedies

    return tuple(f for f in findings if any(remedy.setting for remedy in remedies(f)))


def _write_state(model: nn.Module, place: Path) -> None:
    import torch

    from batchnorm.files.whole import replacing

    with replacing(place) as file:
        torch.save(model.state_dict(), file)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """A block in which Python writes no __pycache__, so that the user's folder stays as it is."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _warnings_printed() -> Iterator[None]:
    """A block whose RuntimeWarnings are printed to standard error, also if it fails. Other warnings are dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            _print(caught)


def _print(caught: Iterable[warnings.WarningMessage]) -> None:
    for text in dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)):
        click.echo(f"warning: {text}", err=True)


def _tell(outcome: MendingOutcome, place: Path, *, diff: bool, again: str) -> None:
    from batchnorm.doctor.mending import outcome as words

    lines = list(outcome.notes)
    if outcome.is_empty:
        lines.insert(0, f"{outcome.target}: nothing to fix{' without other options' if outcome.needs_options else ''}")
    elif diff:
        lines = [outcome.target, *lines, *words.differences(outcome)]
    else:
        lines = [f"{outcome.target}: fixed", *lines, *words.summary(outcome)]
    if outcome.changes:
        lines.append(words.promise(outcome))
    if remaining := [*words.remainder(outcome), *words.untreated(outcome)]:
        lines += ["not fixed:", *remaining]
    if not outcome.is_empty:
        lines += [f"would write {place} (--diff: nothing written)"] if diff else [f"wrote {place}", f"next: {again}"]
    show(words.wrapped(lines, columns()))
