"""``batchnorm fix``: a mended copy of a checkpoint, or what would be in it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm import addresses, checkpoint
from batchnorm.checkpoint.states_in_file import with_state
from batchnorm.cli.settings import codes, refuse_empty, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchnorm.doctor.examination import Selection
    from batchnorm.doctor.mending.mended_checkpoint import Plan
    from batchnorm.doctor.mending.outcome import Outcome
    from batchnorm.rules.finding import Finding

# rules that see in a file what a model that was loaded from it does not show
_OF_FILES = {"BN108", "BN112", "BN115", "BN507"}
_WIDEST = 100


@click.command()
@click.argument("target")
@click.option("--weights", metavar="FILE", help="Checkpoint to load into the model, and to mend.")
@click.option("--state", default="", metavar="PATH", help="Only this state of the checkpoint.  [default: all]")
@click.option("--data", metavar="ADDRESS", help="Training data to measure statistics on: data.py:train_loader.")
@click.option("--unsafe-fixes", "unsafe", is_flag=True, help="Also fixes that change eval outputs without data.")
@click.option("--diff", is_flag=True, help="Show what would change; write nothing.")
@click.option("--in-place", is_flag=True, help="Write over the checkpoint itself.")
@click.option("--force", is_flag=True, help="Write over a file that is in the way.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write.  [default: NAME.fixed.pt]")
@click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help="Argument of the model's function; repeatable."
)
@click.option("--select", multiple=True, metavar="CODES", help="Only these rules: codes, families (BN1) or names.")
@click.option("--ignore", multiple=True, metavar="CODES", help="Not these rules.")
def fix(
    target: str, weights: str | None, data: str | None, unsafe: bool, diff: bool, in_place: bool, force: bool,
    output: Path | None, given: tuple[str, ...], select: tuple[str, ...], ignore: tuple[str, ...], state: str,
) -> None:  # fmt: skip
    """Mend what doctor finds in TARGET, in a copy.

    TARGET is a checkpoint (.pt, .pth, .ckpt, .safetensors) or a model, model.py:make_model, with --weights. Without
    more, only what leaves eval outputs as they are is fixed. With a model and --data, statistics are measured again.
    Every state of the checkpoint is treated, averaged copies too: with a model, each is loaded into it.

    Exit codes: 0 no error is left, 1 errors are left or a state does not fit the model, 2 it could not run.
    """
    refuse_empty({"--weights": weights, "--data": data})
    project = settings()
    from batchnorm.doctor.examination import Selection

    selection = Selection(codes(select) or project.select, codes(ignore) + project.ignore, project.per_layer)
    is_model = addresses.is_address(target)
    if not is_model:
        addresses.refuse_code(target)
        _check_options(target, {"--weights": weights, "--data": data, "--set": given})
    source = weights if is_model else target
    place = _place(target, source, output, in_place=in_place, force=force or diff)
    if is_model:
        outcome, write = _model(target, weights, data, given, state=state, unsafe=unsafe, selection=selection)
    else:
        outcome, write = _file(target, state=state, unsafe=unsafe, selection=selection)
    if not diff and not outcome.is_empty:
        write(place)
    _tell(outcome, place, diff=diff, again=_again(target, source, place, given, data))
    sys.exit(1 if outcome.has_error else 0)


def _check_options(target: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value:
            rest = "" if name == "--weights" else f" {name} {value if isinstance(value, str) else ' '.join(value)}"
            raise ValueError(
                f"{name} needs a model, got the file {target!r}. Give the model that it belongs to: "
                f"batchnorm fix model.py:make_model --weights {target}{rest}"
            )


def _place(target: str, source: str | None, output: Path | None, *, in_place: bool, force: bool) -> Path:
    """Where to write; found out before the work, not after it."""
    if in_place and (output or source is None):
        other = "-o" if output else "a model without --weights"
        raise ValueError(f"--in-place writes over the checkpoint, got {other} as well. Leave one of the two out.")
    if in_place:
        return Path(str(source)).resolve()
    is_safetensors = source is not None and checkpoint.format_of(source) == "safetensors"
    suffix = ".safetensors" if is_safetensors else ".pt"
    place = output or _beside(source, suffix, Path(target.rpartition(":")[0]).stem)
    if (place.suffix.lower() == ".safetensors") != is_safetensors:
        raise ValueError(f"fix keeps the format of {source or target}, got -o {place}. Name it {place.stem}{suffix}.")
    if source and place.exists() and Path(source).exists() and place.samefile(source):
        raise ValueError(f"{place} is the checkpoint itself. Pass --in-place to write over it.")
    if place.is_dir():
        raise ValueError(f"cannot write {place}: it is a folder. Choose another place with -o FILE.")
    if place.exists() and not place.is_file():
        raise ValueError(f"cannot write {place}: it is a pipe or device. Choose another place with -o FILE.")
    if place.exists() and not force:
        raise ValueError(f"{place} is there already. Pass --force to write over it, or another place with -o FILE.")
    return Path(os.path.realpath(place)) if place.is_symlink() else place  # a link stays one


def _beside(source: str | None, suffix: str, name: str) -> Path:
    """NAME.fixed.pt beside NAME.ckpt; in the current folder for a model without weights."""
    return Path(f"{name}.fixed.pt") if source is None else Path(source).with_suffix(f".fixed{suffix}")


def _file(path: str, *, state: str, unsafe: bool, selection: Selection) -> tuple[Outcome, Callable[[Path], None]]:
    from batchnorm.doctor.mending import mended_checkpoint
    from batchnorm.doctor.mending.outcome import Outcome

    plan = mended_checkpoint.plan(path, unsafe=unsafe, selection=selection, state=state)
    if not plan.is_empty and plan.file.format == "pt":
        _require_torch("a file of torch.save")
    outcome = Outcome(path, plan.changes, _prefixes(plan), plan.left, unsafe=unsafe, notes=_states(plan, state))
    return outcome, lambda place: mended_checkpoint.write(plan, place)


def _states(plan: Plan, state: str) -> tuple[str, ...]:
    """Which states were looked at, if there are several."""
    state = with_state(plan.file, state)[1] if state else ""
    rest = [name for name in plan.file.states if state and name != state]
    if len(plan.file.states) < 2:
        return () if plan.file.states or plan.file.layers else ("no batch norm layers",)
    treated = f"treated: {state or ', '.join(plan.file.states)}"
    return (treated, *([f"not treated, since --state asks for another one: {', '.join(rest)}"] if rest else []))


def _prefixes(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plan.prefixes.values()))


def _require_torch(what: str) -> None:
    from batchnorm.cli.terminal import require

    require("torch", "numpy", what=what, extra="torch")


def _model(
    target: str, weights: str | None, data: str | None, given: tuple[str, ...], *, state: str, unsafe: bool,
    selection: Selection,
) -> tuple[Outcome, Callable[[Path], None]]:  # fmt: skip
    _require_torch("a model")
    addresses.refuse_state(target, weights, state)
    with _no_bytecode(), _warnings_told(), addresses.told(target):
        model = addresses.model(target, addresses.parsed(given))
        if weights is not None:
            return _each_state(model, target, weights, data, state=state, unsafe=unsafe, selection=selection)
        return _one_model(model, target, data, unsafe=unsafe, selection=selection)


def _batches(data: str | None) -> Any:
    """Batches that can be read several times."""
    batches = addresses.data(data) if data else None
    return list(batches) if isinstance(batches, Iterator) else batches


def _one_model(
    model: Any, target: str, data: str | None, *, unsafe: bool, selection: Selection
) -> tuple[Outcome, Callable[[Path], None]]:
    from batchnorm.doctor import examine
    from batchnorm.doctor.mending.outcome import Outcome
    from batchnorm.doctor.mending.treatment import differences, treat

    batches = _batches(data)
    found = examine(model, batches, selection=selection, name=target)
    treated = treat(model, found, batches, unsafe=unsafe)
    after = examine(treated, batches, selection=selection, name=target)
    changes = differences(model, treated, found.findings, measured=batches is not None)
    left, in_code = _left(after.findings), _in_code(found.findings)
    outcome = Outcome(target, changes, (), left, in_code, with_data=bool(data), unsafe=unsafe)
    return outcome, lambda place: _write_state(treated, place)


def _each_state(
    model: Any, target: str, weights: str, data: str | None, *, state: str, unsafe: bool, selection: Selection
) -> tuple[Outcome, Callable[[Path], None]]:
    from batchnorm.doctor import examine, states_in_turn
    from batchnorm.doctor.mending import mended_checkpoint
    from batchnorm.doctor.mending.outcome import Outcome

    chosen = states_in_turn.loading(model, weights, state)
    foreign = examine(weights, selection=selection).findings
    asked = {"selection": selection, "name": target}
    done = list(states_in_turn.treated(model, chosen, _batches(data), foreign, unsafe=unsafe, **asked))
    live = {layer: change for each in done for layer, change in each.changes.items()}
    eps = {layer: value for each in done for layer, value in each.eps.items()}
    plan = mended_checkpoint.plan(weights, unsafe=unsafe, selection=selection, live=live, eps=eps, state=state)
    loaded = {layer for name in chosen.loaded if name for layer in chosen.file.states[name].layers.values()}
    of_file = [f for f in plan.left if f.code in _OF_FILES or (f.layer and f.layer not in loaded)]
    left = dict.fromkeys(finding for each in done for finding in _left(each.left))
    in_code = dict.fromkeys(finding for each in done for finding in _in_code(each.found))
    unfit = () if state else tuple(chosen.others)
    outcome = Outcome(
        weights, plan.changes, _prefixes(plan), (*left, *of_file), tuple(in_code), with_data=bool(data), unsafe=unsafe,
        notes=chosen.notes, untreated=unfit,
    )  # fmt: skip
    return outcome, lambda place: mended_checkpoint.write(plan, place)


def _left(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """What is left of a model: the environment is no part of it, and its file is looked at by itself."""
    return tuple(f for f in findings if not f.code.startswith("BN9") and f.code not in _OF_FILES)


def _in_code(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    from batchnorm.doctor.mending.remedies import remedies

    return tuple(f for f in findings if any(remedy.setting for remedy in remedies(f)))


def _write_state(model: Any, place: Path) -> None:
    import torch

    from batchnorm.files.whole import replacing

    with replacing(place) as file:
        torch.save(model.state_dict(), file)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """The user's folder stays as it is: no __pycache__ of their modules."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Warnings as lines on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)):
        click.echo(f"warning: {text}", err=True)


def _again(target: str, source: str | None, place: Path, given: tuple[str, ...], data: str | None) -> str:
    """The command that looks at the result."""
    if source == target:
        return f"batchnorm doctor {shlex.quote(str(place))}"
    options = ["--weights", str(place), *(word for setting in given for word in ("--set", setting))]
    options += ["--data", data] if data else []
    return f"batchnorm doctor {shlex.join([target, *options])}"


def _tell(outcome: Outcome, place: Path, *, diff: bool, again: str) -> None:
    if sys.stdout is None:
        return
    from batchnorm.cli.coloring import spelled
    from batchnorm.doctor.mending import outcome as words

    lines = []
    if outcome.is_empty:
        lines.append(
            f"{outcome.target}: nothing to fix" + (" without more" if outcome.left and _needs(outcome) else "")
        )
    elif diff:
        lines += [f"{outcome.target}", *words.differences(outcome)]
    else:
        lines += [f"{outcome.target}: fixed", *words.summary(outcome)]
    lines[1:1] = outcome.notes
    if outcome.changes:
        lines.append(words.promise(outcome))
    if left := [*words.remainder(outcome), *words.untreated(outcome)]:
        lines += ["not fixed:", *left]
    if not outcome.is_empty:
        lines += [f"would write {place} (--diff: nothing written)"] if diff else [f"wrote {place}", f"next: {again}"]
    width = max(min(shutil.get_terminal_size((80, 24)).columns, _WIDEST), 40)
    try:
        click.echo(spelled(words.wrapped(lines, width)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _needs(outcome: Outcome) -> bool:
    from batchnorm.doctor.mending.outcome import remainder

    return any("needs --" in line for line in remainder(outcome))
