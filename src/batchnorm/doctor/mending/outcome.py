"""Outcome: what a treatment of a file or a model changes, what it leaves, and both in words."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, final

from batchnorm.checkpoint.stored import is_below
from batchnorm.doctor.mending.remedies import TENSORS, Change, changed, needs_data, remedies
from batchnorm.doctor.text import GLYPHS, place, plain
from batchnorm.rules.finding import Finding, Fix, Severity
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Mapping

    from batchnorm.checkpoint import Stored

_SHORT = {"running_mean": "mean", "running_var": "var", "weight": "gamma", "bias": "beta"}


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, or would be.

    ``left`` are findings that are there afterwards, in every state of a file; ``in_code`` are settings of layers, which
    no file holds.
    """

    target: str
    changes: Mapping[str, Change]
    prefixes: tuple[str, ...] = ()
    left: tuple[Finding, ...] = ()
    in_code: tuple[Finding, ...] = ()
    with_data: bool = False
    unsafe: bool = False
    notes: tuple[str, ...] = ()  # which states were treated
    untreated: tuple[str, ...] = ()  # states that could not be, though nobody left them out

    @property
    def is_empty(self) -> bool:
        """Whether a file would stay as it is."""
        return not self.changes and not self.prefixes

    @property
    def has_error(self) -> bool:
        """Whether a finding that is an error remains, or a state of which nothing is known."""
        return bool(self.untreated) or any(
            finding.severity >= Severity.ERROR for finding in (*self.left, *self.in_code)
        )


def differences(outcome: Outcome) -> Iterator[str]:
    """Every layer that changes, before and after."""
    for path, change in outcome.changes.items():
        yield f"  {path or 'model'}  {', '.join(change.words)}"
        yield from (f"      {line}" for line in _figures(change))
    yield from (f"  every name  BN507 prefix {prefix!r} taken off" for prefix in outcome.prefixes)


def summary(outcome: Outcome) -> Iterator[str]:
    """What was fixed, in one line for each remedy."""
    layers: dict[str, list[str]] = defaultdict(list)
    for path, change in outcome.changes.items():
        for words in change.words:
            layers[words].append(path)
    yield from (f"  {words}: {listed(paths)}" for words, paths in layers.items())
    yield from (f"  BN507 prefix {prefix!r} taken off every name" for prefix in outcome.prefixes)


def promise(outcome: Outcome) -> str:
    """How far eval outputs move, and what that was reckoned with."""
    effects = [change.effect for change in outcome.changes.values()]
    broken = effects.count(math.inf)
    was = f"those of {broken} layer{'s' if broken > 1 else ''} were NaN, infinite or without limit"
    if broken == len(effects):
        return f"Eval outputs: {was}."
    largest = max(effect for effect in effects if effect < math.inf)
    at_most = f"by at most {largest:.1g} of a standard deviation" if largest else "not at all"
    told = "" if all(change.before.eps for change in outcome.changes.values()) else " (eps taken as 1e-5)"
    text = f"On the same input, eval outputs of these layers change {at_most}{told}"
    return f"{text}; {was}." if broken else f"{text}."


def remainder(outcome: Outcome) -> Iterator[str]:
    """Findings that are left and what each of them needs."""
    needs: dict[tuple[str, str, Severity], list[Finding]] = defaultdict(list)
    for finding in outcome.left:
        if need := _need(finding, outcome):
            needs[finding.code, need, finding.severity].append(finding)
    for finding in outcome.in_code:
        needs[finding.code, f"in your code: {finding.remedy}", finding.severity].append(finding)
    for (code, need, severity), findings in needs.items():
        layers = listed(place(finding) for finding in findings)
        yield f"  {GLYPHS[severity]} {code} {findings[0].slug}  {layers}: {need}"


def untreated(outcome: Outcome) -> Iterator[str]:
    """States that no model was given for."""
    for state in outcome.untreated:
        yield f"  {state}: it does not fit this model. Treat it with its own, or leave it out: --state NAME"


def wrapped(lines: Iterable[str], width: int) -> str:
    """Lines for a terminal, with nothing in them that steers it."""
    return "\n".join(
        part
        for line in lines
        for part in wrap(
            plain(line), width, subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
            break_on_hyphens=False, break_long_words=False,
        ) or [""]
    )  # fmt: skip


def _need(finding: Finding, outcome: Outcome) -> str:
    """What mends a finding that is left; "" if it is only worth knowing."""
    if any(is_below(state, finding.layer) for state in outcome.untreated):
        return "needs its own model, with --data where it is measured anew"
    ways = remedies(finding)
    unsafe = [way.words for way in ways if way.fix is Fix.UNSAFE]
    if needs_data(finding) and not outcome.with_data:
        return "needs --data" + (f", or --unsafe-fixes for {unsafe[0]}" if unsafe and not outcome.unsafe else "")
    if unsafe and not outcome.unsafe:
        return f"needs --unsafe-fixes for {unsafe[0]}"
    return "" if finding.severity is Severity.INFO else finding.remedy


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
