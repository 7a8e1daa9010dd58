"""The outcome of mending a file or model: the changes, the findings that are left, and sentences about both."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.checkpoint import Stored
from batchnorm.checkpoint.stored import is_below
from batchnorm.doctor.mending.remedies import TENSORS, Change, changed, needs_data, remedies
from batchnorm.reporting import text
from batchnorm.reporting.severity import GLYPHS
from batchnorm.rules.finding import Finding, Fix, Severity
from batchnorm.rules.phrases import listed

_SHORT = {"running_mean": "mean", "running_var": "var", "weight": "gamma", "bias": "beta"}


@final
@dataclass(frozen=True, slots=True)
class MendingOutcome:
    """The changes that were made, or would be made, and the findings that are left.

    ``left`` are the findings that remain, in all states of a file. ``in_code`` are findings about settings of layers,
    which are in the user's code and in no file.
    """

    target: str
    changes: Mapping[str, Change]
    prefixes: tuple[str, ...] = ()
    left: tuple[Finding, ...] = ()
    in_code: tuple[Finding, ...] = ()
    with_data: bool = False
    unsafe: bool = False
    notes: tuple[str, ...] = ()  # which states were treated
    untreated: tuple[str, ...] = ()  # states that do not fit the model, although the user did not exclude them

    @property
    def is_empty(self) -> bool:
        """Whether a file would stay as it is."""
        return not self.changes and not self.prefixes

    @property
    def needs_options(self) -> bool:
        """Whether the command would mend more with other options."""
        return any(_need(finding, self).is_option for finding in self.left)

    @property
    def has_error(self) -> bool:
        """Whether an error is left, or a state could not be treated."""
        return bool(self.untreated) or any(
            finding.severity >= Severity.ERROR for finding in (*self.left, *self.in_code)
        )


def differences(outcome: MendingOutcome) -> Iterator[str]:
    """Lines about every layer that changes, with its values before and after."""
    for path, change in outcome.changes.items():
        yield f"  {path or 'model'}  {', '.join(change.words)}"
        yield from (f"      {line}" for line in _figures(change))
    yield from (f"  every name  BN507 prefix {prefix!r} taken off" for prefix in outcome.prefixes)


def summary(outcome: MendingOutcome) -> Iterator[str]:
    """One line for each remedy that was applied, with its layers."""
    layers: dict[str, list[str]] = defaultdict(list)
    for path, change in outcome.changes.items():
        for words in change.words:
            layers[words].append(path)
    yield from (f"  {words}: {listed(paths)}" for words, paths in layers.items())
    yield from (f"  BN507 prefix {prefix!r} taken off every name" for prefix in outcome.prefixes)


def promise(outcome: MendingOutcome) -> str:
    """A sentence that bounds the change of eval outputs."""
    effects = [change.effect for change in outcome.changes.values()]
    broken = effects.count(math.inf)
    was = f"those of {broken} layer{'s' if broken > 1 else ''} were NaN, infinite or without limit"
    if broken == len(effects):
        return f"Eval outputs: {was}."
    largest = max(effect for effect in effects if effect < math.inf)
    at_most = f"by at most {largest:.1g} of a standard deviation" if largest else "not at all"
    note = "" if all(change.before.eps for change in outcome.changes.values()) else " (eps taken as 1e-5)"
    text = f"On the same input, eval outputs of these layers change {at_most}{note}"
    return f"{text}; {was}." if broken else f"{text}."


def remainder(outcome: MendingOutcome) -> Iterator[str]:
    """Findings that are left and what each of them needs."""
    needs: dict[tuple[str, str, Severity], list[Finding]] = defaultdict(list)
    for finding in outcome.left:
        if need := _need(finding, outcome).words:
            needs[finding.code, need, finding.severity].append(finding)
    for finding in outcome.in_code:
        needs[finding.code, f"in your code: {finding.remedy}", finding.severity].append(finding)
    for (code, need, severity), findings in needs.items():
        layers = listed(finding.place for finding in findings)
        yield f"  {GLYPHS[severity]} {code} {findings[0].slug}  {layers}: {need}"


def untreated(outcome: MendingOutcome) -> Iterator[str]:
    """Lines for the states that do not fit the model."""
    for state in outcome.untreated:
        remedy = "Treat it with its own model, or choose another state: --state NAME"
        yield f"  {state}: it does not fit this model. {remedy}"


def wrapped(lines: Sequence[str], width: int) -> str:
    """Lines for a terminal, escaped; paths and commands are not broken."""
    hang = [len(line) - len(line.lstrip()) + 4 for line in lines]
    return "\n".join(
        part
        for line, spaces in zip(lines, hang, strict=True)
        for part in text.wrapped(line, width, spaces, breaks=False) or [""]
    )


@final
@dataclass(frozen=True, slots=True)
class _Need:
    """What a finding that is left needs, "" if nothing; and whether an option of the command provides it."""

    words: str
    is_option: bool = False


def _need(finding: Finding, outcome: MendingOutcome) -> _Need:
    if any(is_below(state, finding.layer) for state in outcome.untreated):
        return _Need("needs its own model, and --data if statistics are measured again")
    unsafe = [way.words for way in remedies(finding) if way.fix is Fix.UNSAFE and not outcome.unsafe]
    if needs_data(finding) and not outcome.with_data:
        either = f", or --unsafe-fixes for {unsafe[0]}" if unsafe else ""
        return _Need(f"needs --data{either}", is_option=True)
    if unsafe:
        return _Need(f"needs --unsafe-fixes for {unsafe[0]}", is_option=True)
    return _Need("" if finding.severity is Severity.INFO else finding.remedy)


def _figures(change: Change) -> Iterator[str]:
    before, after = change.before, change.after
    for key in TENSORS:
        if channels := changed(before, after, key):
            some = f"{len(channels)} of {after.channels} channels"
            yield f"{_SHORT[key]}  {_range(getattr(before, key))} → {_range(getattr(after, key))}  ({some})"
        old, new = before.dtypes.get(key), after.dtypes.get(key)
        if old != new:
            yield f"{_SHORT[key]}  {old} → {new}"
    if before.num_batches_tracked != after.num_batches_tracked:
        yield f"batches  {_count(before)} → {_count(after)}"
    yield f"eval output  {_effect(change)}"


def _count(stored: Stored) -> str:
    return "no counter" if stored.num_batches_tracked is None else str(stored.num_batches_tracked)


def _effect(change: Change) -> str:
    if change.effect == math.inf:
        return "was NaN, infinite or without limit"
    return f"changes by at most {change.effect:.1g} sd" if change.effect else "stays the same"


def _range(values: array[float] | None) -> str:
    """Least and greatest finite value, and how many are not finite."""
    finite = [value for value in values or () if math.isfinite(value)]
    broken = len(values or ()) - len(finite)
    text = f"{min(finite):.3g} … {max(finite):.3g}" if finite else ""
    return ", ".join(filter(None, (text, f"{broken} not finite" if broken else "")))
