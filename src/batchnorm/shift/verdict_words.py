"""A verdict in words: what was compared, the evidence, when and where the alarm was raised, and what stayed unseen.

Text, tables, pages and the formats for programs use these sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from batchnorm.reporting.blocks import TextTable
from batchnorm.reporting.command_line import CommandLine
from batchnorm.reporting.severity import GLYPHS, Severity
from batchnorm.reporting.text import aligned, many, plain, wrapped
from batchnorm.shift.verdict import LayerVerdict, ShiftVerdict

_CLEAN = "clean.py:loader"
_SHOWN = 4  # number of a layer's channels in a table
LOST = 7  # from this power of ten on, odds are given as a power of ten without digits


def odds(log_evidence: float) -> str:
    """Evidence x as "1 in x", rounded down to two digits, or "1 in 10^n" from 10^7 on; "none" if x is at most 1."""
    tens = log_evidence / math.log(10)
    if log_evidence <= 0:
        return "none"
    if tens >= LOST:
        return f"1 in 10^{math.floor(tens)}"
    step = 10 ** max(0, math.floor(tens) - 1)
    least = math.floor(math.exp(log_evidence) * (1 + 1e-9) / step) * step
    return f"1 in {least:,}"


def headline(verdict: ShiftVerdict) -> str:
    """The model, the data, and the numbers of examples and batches."""
    counted = f"{many(verdict.examples, 'example')} in {many(verdict.batches, 'batch')}"
    return " · ".join(filter(None, [verdict.target, verdict.data, counted]))


def sentence(verdict: ShiftVerdict) -> str:
    """The verdict in one sentence."""
    if verdict.rang is None:
        return f"No shift found in {many(verdict.examples, 'example')}; the list below says what could not be seen"
    return "Shift found: these data are not distributed as the reference says"


def facts(verdict: ShiftVerdict) -> Iterator[tuple[str, str]]:
    """The facts of the verdict: a name and a sentence for each."""
    yield "compared with", _reference(verdict)
    yield "evidence", _evidence(verdict)
    if verdict.rang is not None:
        began = (
            f"the evidence began to rise at about {verdict.rise:,}"
            if verdict.rise
            else "the evidence rose from the start"
        )
        yield "alarm", f"after {verdict.rang:,} of {many(verdict.examples, 'example')}; {began}"
        yield "first moved", _first(verdict)
    if verdict.hint:
        yield "hint", HINTS[verdict.hint]
    yield "neighbours", neighbours(verdict)
    if verdict.tails:
        yield "tails", f"{verdict.tails}: stored variances may be too small"
    if verdict.left_out:
        what = "it has" if verdict.left_out == 1 else "they have"
        yield "left out", f"{many(verdict.left_out, 'example')}: {what} NaN or infinite activations"


HINTS = {
    "inputs": "the inputs look different (sensor, scale, preprocessing, noise), or most kinds of them are gone",
    "another mix": "the same inputs in another mix could look like this: perhaps classes come in other shares",
    "late layers only": "early layers hardly moved: perhaps fine noise, perhaps classes that come in other shares",
}


def _reference(verdict: ShiftVerdict) -> str:
    if verdict.source == "checkpoint":
        return "the checkpoint's stored statistics alone; nothing was calibrated, so tolerances are wide"
    unit = verdict.unit if verdict.unit in {"example", "batch"} else "observation"
    return f"a reference calibrated with {many(verdict.calibrated, unit)} of clean data"


def _evidence(verdict: ShiftVerdict) -> str:
    evidence = odds(verdict.log_evidence)
    return f"{evidence} against clean data; limit {odds(verdict.log_limit)}"


def _first(verdict: ShiftVerdict) -> str:
    if verdict.first is None:
        return "no layer by itself; all together reach the limit"
    place = [layer.name for layer in verdict.layers].index(verdict.first) + 1
    moved = sum(layer.moved for layer in verdict.layers)
    return f"{verdict.first}, layer {place} of {len(verdict.layers)}; {moved} moved beyond the limit by themselves"


def neighbours(verdict: ShiftVerdict) -> str:
    """Whether neighbouring observations are independent enough for the unit."""
    text = f"correlation {verdict.correlation:.2f} of neighbouring observations"
    if verdict.dependent:
        return f"{text}, too much for unit {verdict.unit!r}: the promise about false alarms does not hold"
    if verdict.observations < 100:
        return f"not judged: fewer than 100 observations of unit {verdict.unit!r}"
    return f"{text}: unit {verdict.unit!r} fits"


def unseen(verdict: ShiftVerdict) -> list[str]:
    """The changes that the check could not show."""
    is_finite = math.isfinite(verdict.sight)
    distance = f"less than about {verdict.sight:.2g} stored sd" if is_finite else "any distance (too few observations)"
    return [
        f"a channel's mean that moved by {distance}, and any energy within the tolerance",
        "a change that keeps every channel's mean and every layer's energy",
        *(["a change that averages out within a batch"] if verdict.unit == "batch" else []),
        "whether accuracy fell: labels are needed for that",
    ]


def follows(verdict: ShiftVerdict) -> list[str]:
    """What follows from the verdict, in sentences."""
    advice = []
    if verdict.dependent:
        larger = "batch" if verdict.unit == "example" else "a session or a minute, by ShiftMonitor(unit=function)"
        advice.append(
            f"Neighbours are alike, so the rate of false alarms is not bounded. Judge again with unit {larger}."
        )
    if verdict.tails:
        advice.append("Stored variances may be too small for such tails. Judge again with --calibrate clean.py:loader.")
    if verdict.rang is None:
        finer = " A calibrated reference sees finer changes." if _is_wide(verdict) else ""
        return [*advice, f"This proves nothing about shifts that could not be seen.{finer}"]
    advice.append(
        "The distribution moved. Labelled examples of these data tell whether accuracy fell. If it did, prepare "
        "inputs as in training, or measure statistics on the new data: batchnorm.recalibrate."
    )
    if _is_wide(verdict):
        advice.append(
            "Stale stored statistics raise the alarm too: run the doctor on clean data to see whether they are stale."
        )
    return advice


def following(verdict: ShiftVerdict) -> str:
    """The next command; "" if there is none, or if the verdict's own command is not a ``CommandLine``."""
    command = verdict.command
    if not isinstance(command, CommandLine):
        return ""
    if verdict.dependent and verdict.unit == "example":
        return f"{command} --unit batch"
    if _is_wide(verdict) and verdict.rang is None:
        return f"{command} --calibrate {_CLEAN}"
    return CommandLine("batchnorm doctor", command.target, f"--data {_CLEAN}") if _is_wide(verdict) else ""


def _is_wide(verdict: ShiftVerdict) -> bool:
    return verdict.source == "checkpoint"


# -- text ---------------------------------------------------------------------------------------------------------


def concise(verdict: ShiftVerdict) -> str:
    """The verdict in one line."""
    return plain(": ".join(filter(None, (verdict.target, outcome(verdict)))))


def outcome(verdict: ShiftVerdict) -> str:
    """The result with the evidence."""
    about = (
        f"evidence {odds(verdict.log_evidence)}, limit {odds(verdict.log_limit)}, {many(verdict.examples, 'example')}"
    )
    alike = ", neighbours are alike" if verdict.dependent else ""
    if verdict.rang is None:
        return f"no shift found: {about}{alike}"
    first = verdict.first or "no layer"
    return f"shift found after {many(verdict.rang, 'example')}, first at {first}: {about}{alike}"


def full(verdict: ShiftVerdict, *, width: int = 80) -> str:
    """The text for people, in ``width`` columns; only a command may be longer."""
    severity = Severity.INFO if verdict.rang is None else Severity.ERROR
    status = f"[{GLYPHS[severity]} {severity}]"
    lines = [*wrapped(headline(verdict), width), "", *wrapped(f"{status} {sentence(verdict)}", width)]
    for name, text in facts(verdict):
        lines += wrapped(f"  {name:<15}{text}", width, 17)
    lines += ["", *_layers(verdict, width), "", "not seen:"]
    lines += [line for text in unseen(verdict) for line in wrapped(f"  - {text}", width, 4)]
    lines += ["", *(line for text in follows(verdict) for line in wrapped(text, width))]
    as_page = "" if verdict.rang is None else f"{verdict.command} -o shift.html"
    if command := following(verdict) or as_page:
        lines.append(f"next: {plain(command)}")
    return "\n".join(lines)


def _layers(verdict: ShiftVerdict, width: int) -> Iterator[str]:
    """A line for each layer that moved, or for the three with most evidence if none moved; and one for all others."""
    strongest = sorted(verdict.layers, key=lambda layer: -layer.log_evidence)[:3]
    rows = [cells(layer) for layer in verdict.layers if layer.moved] or [cells(layer) for layer in strongest]
    yield from aligned(table(rows), width)
    if others := len(verdict.layers) - len(rows):
        yield f"{many(others, 'other layer')} did not move beyond the limit"
    yield "W2 and KL are distances for display, in sd and in nats"


def table(rows: Sequence[Sequence[str]]) -> TextTable:
    """Layers as a table."""
    return TextTable(("layer", "evidence", "kind", "channels moved", "W2", "KL"), rows, words=4)


def cells(layer: LayerVerdict) -> tuple[str, str, str, str, str, str]:
    """A layer's name, evidence, kind of bet, moved channels, W2 and KL, in words."""
    evidence = odds(layer.log_evidence)
    kind = "–" if evidence == "none" else layer.kind
    return plain(layer.name), evidence, kind, _channels(layer), f"{layer.w2:.2f}", f"{layer.kl:.2f}"


def _channels(layer: LayerVerdict) -> str:
    named = [str(channel.index) for channel in layer.channels]
    more = len(named) - _SHOWN
    return ", ".join(named[: _SHOWN - 1]) + f" +{more + 1}" if more > 0 else ", ".join(named) or "–"
