"""examine: collect evidence from a file, a model, or a model with data, and apply every rule that can use it."""

from __future__ import annotations

import fnmatch
import os
import platform
import time
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, final

from batchnorm import checkpoint
from batchnorm.checkpoint.states_in_file import with_state
from batchnorm.checkpoint.stored import is_below
from batchnorm.doctor.diagnosis import Diagnosis
from batchnorm.doctor.diagnosis_value import LayerRow, order
from batchnorm.doctor.measuring.installation import environment
from batchnorm.doctor.mending.remedies import is_same
from batchnorm.rules import RULES
from batchnorm.rules.codes import codes
from batchnorm.rules.finding import by_reason
from batchnorm.rules.phrases import listed
from batchnorm.rules.rule_evidence import Evidence

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from batchnorm.checkpoint import Checkpoint, Stored
    from batchnorm.rules.finding import Finding, Rule, Unknown

# with so many examples, a difference of 0.2 sd in a fully connected layer has a t of more than 4
MAX_EXAMPLES = 512
_MOST_CLASSES = 8  # names of classes in a note


@final
@dataclass(frozen=True, slots=True)
class Selection:
    """Which rules run. Entries are codes, their beginnings ("BN1" is a whole family) or names of rules.

    ``per_layer`` maps patterns of layer names, with * and ?, to the rules that are left out for these layers.

    Raises:
        ValueError: If an entry names no rule. The message offers the most similar name.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "select", codes(self.select))
        object.__setattr__(self, "ignore", codes(self.ignore))
        object.__setattr__(self, "per_layer", {layer: codes(named) for layer, named in self.per_layer.items()})

    def takes(self, code: str) -> bool:
        """Whether a rule is selected and not ignored."""
        return (not self.select or code.startswith(self.select)) and not code.startswith(self.ignore or ("-",))

    def silences(self, finding: Finding) -> bool:
        """Whether ``per_layer`` leaves a finding out."""
        return any(
            fnmatch.fnmatchcase(finding.layer, pattern) and finding.code.startswith(ignored)
            for pattern, ignored in self.per_layer.items()
        )


def examine(
    target: str | os.PathLike[str] | nn.Module, data: Iterable[object] | None = None, *, example: object = None,
    optimizer: torch.optim.Optimizer | None = None, batch_size: int | None = None, accumulation: int = 1,
    world_size: int = 1, reference: nn.Module | str | os.PathLike[str] | None = None,
    selection: Selection | None = None, max_examples: int = MAX_EXAMPLES, name: str = "", state: str = "",
    group: ProcessGroup | Literal["all"] | None = None,
) -> Diagnosis:  # fmt: skip
    """Examine batch norm in a file or model by the rules that ``batchnorm rules`` lists.

    A file is read as data: nothing in it is executed, and torch is not needed. Every state in it is examined: the
    model's own, averaged copies, target networks, members of a list. Layers of the model's own state have their names
    in the model; other layers have the path of their state before their names. If a state repeats the layers of an
    earlier state bit for bit, a note says so, and findings in both are reported once.

    A model is examined as it is. With data it also runs, in eval mode and in train mode. Afterwards its parameters,
    buffers, training flags, hooks, gradients and the random states are as before, bit for bit, also after an error.

    Without ``group`` no rank waits for another, also if the model is wrapped by DistributedDataParallel; only a model
    that is sharded (FSDP) needs the same call on every rank. With ``group`` every rank of it must call ``examine``,
    each with its own data. The ranks' copies and data are compared (BN6), and every rank gets the same diagnosis; its
    findings say on which ranks they are. If a rank raises, the others raise a RuntimeError that names it.

    Args:
        target: A file (.pt, .pth, .ckpt, .pkl, .safetensors, .onnx) or a model.
        data: Batches for the model, such as a DataLoader of the training data. At most ``max_examples`` are used.
        example: One batch, to see which layer follows which; by default the first batch of ``data``.
        optimizer: The torch optimizer that trains the model.
        batch_size: Examples per device and step; by default the loader's.
        accumulation: Batches for each optimizer step.
        world_size: Processes that train together.
        reference: The model or file from which the target was folded, exported or imported.
        selection: Which rules run.
        max_examples: Largest number of examples to measure on.
        name: Name of the target in the result; by default its path or class.
        state: The path of one state of a file; by default all states are examined.
        group: Processes to examine together: "all", or a ``ProcessGroup`` such as torch.distributed.group.WORLD; for a
            model only. ``world_size`` is then the number of its processes. "all" without an initialized process group
            is this process alone.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the target is neither a path nor an ``nn.Module``, or is a model of torch.jit.freeze; if a setting
            is not a whole number; or if the optimizer, the reference, the group or a layer's batchnorm_ignore has a
            wrong type.
        ValueError: If the file is not a checkpoint or has no such state; if data, an example, an optimizer or a
            reference are given for a file, or a state for a model; if a setting is out of range; if a layer's
            batchnorm_ignore names no rule; or if a group is given for a file, without an initialized process group, or
            on a rank outside of it.
        RuntimeError: With ``group``, if another rank raised, or an exchange with the other ranks failed.
        Exception: An error of the model on the data in eval mode.

    Example:
        >>> from torch import nn
        >>> sick = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> _ = sick[1].running_var.fill_(-1)
        >>> [finding.code for finding in examine(sick).findings if finding.layer == "1"]
        ['BN103', 'BN301']
    """
    if group is not None:
        return _of_ranks(
            target, data, group, selection or Selection(), example=example, optimizer=optimizer, batch_size=batch_size,
            accumulation=accumulation, world_size=world_size, reference=reference, max_examples=max_examples,
            name=name, state=state,
        )  # fmt: skip
    started = time.perf_counter()
    _check(batch_size=batch_size, accumulation=accumulation, world_size=world_size, max_examples=max_examples)
    if isinstance(target, (str, os.PathLike)):
        if any(each is not None for each in (data, example, optimizer, reference)):
            raise ValueError(
                f"examine needs a model to use data with, got the file {os.fspath(target)!r}. Load the file into its "
                "model, and pass the model."
            )
        evidence, state, measured_on = *_of_file(target, state, name), ""
    elif state:
        raise ValueError(
            f"state selects a state of a file, got {state!r} for a model. Load that state, or leave state out."
        )
    else:
        from batchnorm.doctor.measuring.model_evidence import of_model

        evidence, measured_on = of_model(
            target, data, example=example, optimizer=optimizer, batch_size=batch_size, accumulation=accumulation,
            world_size=world_size, reference=reference, max_examples=max_examples, name=name,
        )  # fmt: skip
    evidence = replace(evidence, environment=environment())
    diagnosis = _diagnosis(evidence, selection or Selection(), state, measured_on, time.perf_counter() - started)
    return _of_state(diagnosis, evidence.file, state) if state and evidence.file else diagnosis


def _of_ranks(
    target: Any,
    data: Iterable[object] | None,
    group: ProcessGroup | Literal["all"],
    selection: Selection,
    *,
    state: str,
    **settings: Any,
) -> Diagnosis:
    """``examine`` for the copies of a model on all ranks of a group."""
    from batchnorm.doctor.measuring.model_evidence import of_model
    from batchnorm.doctor.rank_diagnoses import of_ranks

    started = time.perf_counter()

    def collect() -> tuple[Evidence, str]:
        _check(**{name: settings[name] for name in ("batch_size", "accumulation", "world_size", "max_examples")})
        if state or isinstance(target, (str, os.PathLike)):
            raise ValueError("examine with group= needs a model on every rank, got a file or a state. Load the file.")
        evidence, measured_on = of_model(target, data, **settings)
        return replace(evidence, environment=environment()), measured_on

    def judge(evidence: Evidence, measured_on: str) -> Diagnosis:
        return _diagnosis(evidence, selection, "", measured_on, time.perf_counter() - started)

    return of_ranks(target, group, collect, judge)


def _of_file(path: str | os.PathLike[str], state: str, name: str) -> tuple[Evidence, str]:
    """The evidence of a file, and the name of the state that was asked for."""
    file = checkpoint.read(path)
    file, state = with_state(file, state) if state else (file, "")
    return Evidence(name or file.path, file.every, file=file, state=state), state


def _check(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}. Leave {name} out for the default.")
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}. Leave {name} out for the default.")


def parts(evidence: Evidence, *, equal: bool = False) -> Iterator[tuple[str, Evidence]]:
    """The evidence in parts of one model each, with names: "" for the model, then each further copy in the file.

    A rule sees one model at a time. Facts about the whole file are in the first part only.

    Args:
        evidence: The evidence of the whole target.
        equal: Also yield states that repeat the layers of an earlier state bit for bit.
    """
    file = evidence.file
    if file is None or len(file.states) < 2:
        yield "", evidence
        return
    left_out = set() if equal else {layer for name in repeats(file) for layer in file.states[name].layers.values()}
    for i, (copy, layers) in enumerate(file.copies.items()):
        names = [name for layer in layers if (name := file.named(copy, layer)) not in left_out]
        some = {name: evidence.stored[name] for name in names}
        alone = replace(file, layers=layers, copies={copy: layers}, prefix="", states={}, shared=(), in_train_mode=())
        if some or not i:
            yield ("", replace(evidence, stored=some)) if not i else (copy, replace(evidence, stored=some, file=alone))


def repeats(file: Checkpoint) -> dict[str, str]:
    """Each state that repeats the layers of an earlier state bit for bit, with the name of that state."""
    stored_by_path, repeated, distinct = file.every, {}, []
    for name, state in file.states.items():
        layers = {layer: stored_by_path[path] for layer, path in state.layers.items()}
        # the versions of layers without a counter: loading a missing counter depends on the version
        refused = {
            file.versions.get(stored.name, 0) for stored in layers.values() if stored.num_batches_tracked is None
        }
        candidates = ((other, others) for other, others, versions in distinct if versions == refused)
        first = next((other for other, others in candidates if _are_same(others, layers)), None)
        if first is None:
            distinct.append((name, layers, refused))
        else:
            repeated[name] = first
    return repeated


def _are_same(some: Mapping[str, Stored], others: Mapping[str, Stored]) -> bool:
    """Whether all stored values were read and are equal."""
    is_read = not any(stored.unread for stored in (*some.values(), *others.values()))
    return is_read and some.keys() == others.keys() and all(is_same(some[name], others[name]) for name in some)


def _is_meant(file: Checkpoint | None, state: str) -> Callable[[Finding | Unknown], bool]:
    """A function that returns whether a finding or an unknown is about ``state``; always True if ``state`` is ""."""
    if file is None or not state:
        return lambda _: True
    layers = set(file.states[state].layers.values())
    is_own = bool(layers & file.layers.keys())

    def is_meant(each: Finding | Unknown) -> bool:
        if each.layer in {"", state}:
            return is_own or each.layer == state
        return any(is_below(each.layer, layer) for layer in layers)

    return is_meant


def _of_state(diagnosis: Diagnosis, file: Checkpoint, name: str) -> Diagnosis:
    """The diagnosis with the layers of one state only, and a note that names the other states."""
    layers = set(file.states[name].layers.values())
    others = [other for other in file.states if other != name]
    return replace(
        diagnosis,
        layers=tuple(row for row in diagnosis.layers if row.name in layers),
        states=(name,),
        notes=(
            *([f"state: {name}; not examined: {', '.join(others)}"] if others else ()),
            *(note for note in diagnosis.notes if note not in _states(file)),
        ),
    )


def _states(file: Checkpoint | None) -> tuple[str, ...]:
    """Sentences about a file's states: their names if there are several, second names, and repeated layers."""
    if file is None:
        return ()
    lines = [f"{name} is {state} itself, under another name" for name, state in file.aliases.items()]
    if len(file.states) > 1:
        own = next(iter(file.copies))
        lines.append(f"states: {', '.join(file.states)}")
        lines += [f"layers without the name of a state belong to {own}"] if own in file.states and file.layers else []
    lines += [
        f"{name} has the batch norm layers of {first}, bit for bit: findings in them are reported once"
        for name, first in repeats(file).items()
    ]
    return tuple(lines)


def _diagnosis(evidence: Evidence, selection: Selection, state: str, measured_on: str, seconds: float) -> Diagnosis:
    rules = [rule for rule in RULES.values() if selection.takes(rule.code)]
    missing = {rule.code: "; ".join(reasons) for rule in rules if (reasons := rule.missing(evidence))}
    ran = [rule for rule in rules if rule.code not in missing]
    is_meant = _is_meant(evidence.file, state)
    found: list[Finding] = []
    unknown: dict[str, list[Unknown]] = {rule.code: [] for rule in ran}
    for copy, part in parts(evidence, equal=bool(state)):
        for rule, findings, unseen in looks(copy, part, ran):
            found += filter(is_meant, findings)
            unknown[rule.code] += filter(is_meant, unseen)
    # a rule that could not judge some layers, and has no findings in others, does not count as checked
    blind = {code: by_reason(each) for code, each in unknown.items() if each and not any(f.code == code for f in found)}
    kept = [finding for finding in found if not _is_silenced(finding, evidence, selection)]
    return Diagnosis(
        target=evidence.target,
        findings=order(kept),
        layers=tuple(_row(name, evidence) for name in evidence.stored),
        checked=tuple(rule.code for rule in ran if rule.code not in blind),
        not_checked={rule.code: why for rule in rules if (why := missing.get(rule.code) or blind.get(rule.code))},
        data=measured_on,
        seconds=seconds,
        silenced=len(found) - len(kept),
        versions=_versions(evidence),
        states=tuple(evidence.file.states if evidence.file else ()),
        notes=(*_states(evidence.file), *_notes(evidence)),
    )


def looks(copy: str, part: Evidence, rules: Iterable[Rule]) -> Iterator[tuple[Rule, list[Finding], list[Unknown]]]:
    """Findings and unknowns of each rule in one part; ``copy`` becomes the layer of those about the whole part."""
    for rule in rules:
        if not rule.missing(part):
            findings, unknown = rule.look(part)
            yield (
                rule,
                [replace(each, layer=each.layer or copy) for each in findings],
                [replace(each, layer=each.layer or copy) for each in unknown],
            )


def _notes(evidence: Evidence) -> Iterator[str]:
    """Sentences about values of the target that were not read, with the reason."""
    if evidence.file is not None and evidence.file.unread:
        yield f"left unread: {listed(evidence.file.unread, most=_MOST_CLASSES)}"
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, stored in evidence.stored.items():
        for why in dict.fromkeys(stored.unread.values()):
            keys = ", ".join(key for key, other in stored.unread.items() if other == why)
            reasons.setdefault((keys, why), []).append(name)
    for (keys, why), names in reasons.items():
        yield f"not checked: {keys} of {listed(names)}: {why}"


def _is_silenced(finding: Finding, evidence: Evidence, selection: Selection) -> bool:
    module = (evidence.modules or {}).get(finding.layer)
    by_owner = module is not None and finding.code.startswith(tuple(module.ignored) or ("-",))
    return by_owner or selection.silences(finding)


def _row(name: str, evidence: Evidence) -> LayerRow:
    stored: Stored = evidence.stored[name]
    module = (evidence.modules or {}).get(name)
    measured = (evidence.measured or {}).get(name)
    return LayerRow(
        name=name,
        kind=module.kind if module else "batch norm",
        channels=stored.channels,
        batches=stored.num_batches_tracked,
        mean_range=_range(stored.running_mean),
        var_range=_range(stored.running_var),
        gamma_range=_range(stored.weight),
        eps=module.eps if module else stored.eps,
        momentum=module.momentum if module else stored.momentum,
        mode="" if module is None else "frozen" if module.frozen else "train" if module.training else "eval",
        gap=measured.gap if measured else None,
    )


def _range(values: array[float] | None) -> tuple[float, float] | None:
    """Lowest and highest value; NaN for both if one is NaN; None without values."""
    if not values:
        return None
    broken = any(value != value for value in values)
    return (float("nan"), float("nan")) if broken else (min(values), max(values))


def _versions(evidence: Evidence) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    if evidence.modules is not None:
        import torch

        versions["torch"] = torch.__version__
    return versions
