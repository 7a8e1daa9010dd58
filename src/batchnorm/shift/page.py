"""A verdict for people: plain text, and an HTML page that stands alone, without a script.

All of them say the same sentences, which are made here once: what was compared, the evidence against its limit in plain
words, when and where it rang, what could not be seen, and what follows.
"""

from __future__ import annotations

import base64
import math
import re
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from batchnorm.shift.verdict import Layer, Picture, Verdict

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_TEMPLATES = Path(__file__).parents[1] / "templates"
_POINTS = 500  # of the line, more than a page has pixels to show apart
_ABOVE = 5  # times the limit, in powers of ten, that the line is drawn to
_RUN = 3  # layers in a row that did not move, beyond which they are one line
_OPENED = 10  # moved layers whose channels are listed
_LISTED, _LISTED_LATER = 20, 8  # channels shown of the first layer that moved, and of the others
_SHOWN = 4  # channels of a layer in a table
_LOST = 7  # powers of ten from which digits of odds mean nothing


# -- sentences ----------------------------------------------------------------------------------------------------


def odds(log_evidence: float) -> str:
    """Evidence x as "1 in x", rounded down to two digits; "none" where there is no evidence."""
    tens = log_evidence / math.log(10)
    if log_evidence <= 0:
        return "none"
    if tens >= _LOST:
        return f"1 in 10^{math.floor(tens)}"
    step = 10 ** max(0, math.floor(tens) - 1)
    least = math.floor(math.exp(log_evidence) * (1 + 1e-9) / step) * step
    return f"1 in {least:,}"


def headline(verdict: Verdict) -> str:
    """What was judged."""
    counted = f"{many(verdict.examples, 'example')} in {many(verdict.batches, 'batch')}"
    return " · ".join(filter(None, [verdict.target, verdict.data, counted]))


def sentence(verdict: Verdict) -> str:
    """The verdict in one sentence, which claims no more than was seen."""
    if verdict.rang is None:
        return f"No shift found in {many(verdict.examples, 'example')}; what could not be seen is listed"
    return "Shift found: these data are not distributed as the reference says"


def facts(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """What is known, as names and sentences."""
    yield "compared with", _reference(verdict)
    yield "evidence", _evidence(verdict)
    if verdict.rang is not None:
        began = f"it began to rise at about {verdict.rise:,}" if verdict.rise else "it rose from the first example on"
        yield "rang", f"after {verdict.rang:,} of {many(verdict.examples, 'example')}; {began}"
        yield "first moved", _first(verdict)
    if verdict.hint:
        yield "hint", _HINTS[verdict.hint]
    yield "neighbours", _neighbours(verdict)
    if verdict.tails:
        yield "tails", f"{verdict.tails}: stored variances may be too small"
    if verdict.left_out:
        what = "it has" if verdict.left_out == 1 else "they have"
        yield "left out", f"{many(verdict.left_out, 'example')}: {what} NaN or infinite activations"


_HINTS = {
    "inputs": "the inputs look different (sensor, scale, preprocessing, noise), or most kinds of them are gone",
    "another mix": "the same inputs in another mix could look like this: perhaps classes come in other shares",
    "late layers only": "early layers hardly moved: perhaps fine noise, perhaps classes that come in other shares",
}


def _reference(verdict: Verdict) -> str:
    if verdict.source == "checkpoint":
        return "the checkpoint's stored statistics alone; nothing was calibrated, so tolerances are wide"
    unit = verdict.unit if verdict.unit in {"example", "batch"} else "observation"
    return f"a reference calibrated with {many(verdict.calibrated, unit)} of clean data"


def _evidence(verdict: Verdict) -> str:
    found = odds(verdict.log_evidence)
    return f"{found} against clean data; limit {odds(verdict.log_limit)}"


def _first(verdict: Verdict) -> str:
    if verdict.first is None:
        return "no layer by itself; all together reach the limit"
    place = [layer.name for layer in verdict.layers].index(verdict.first) + 1
    moved = sum(layer.moved for layer in verdict.layers)
    return f"{verdict.first}, layer {place} of {len(verdict.layers)}; {moved} moved beyond the limit by themselves"


def _neighbours(verdict: Verdict) -> str:
    told = f"correlation {verdict.correlation:.2f} of neighbouring observations"
    if verdict.dependent:
        return f"{told}, too much for unit {verdict.unit!r}: the promise about false alarms does not hold"
    if verdict.observations < 100:
        return f"not judged: fewer than 100 observations of unit {verdict.unit!r}"
    return f"{told}: unit {verdict.unit!r} fits"


def unseen(verdict: Verdict) -> list[str]:
    """What this could not show."""
    least = f"{verdict.sight:.2g} stored sd" if math.isfinite(verdict.sight) else "any distance: too few observations"
    return [
        f"a channel's mean that moved by less than about {least}, and any energy within the tolerance",
        "a change that keeps every channel's mean and every layer's energy",
        *(["a change that averages out within a batch"] if verdict.unit == "batch" else []),
        "whether accuracy fell: that takes labels",
    ]


def follows(verdict: Verdict) -> list[str]:
    """What to make of it."""
    told = []
    if verdict.dependent:
        larger = "batch" if verdict.unit == "example" else "a session or a minute, by ShiftMonitor(unit=function)"
        told.append(f"Neighbours are alike, so this may be a false alarm or chance. Judge again with unit {larger}.")
    if verdict.tails:
        told.append("Stored variances may be too small for such tails. Judge again with --calibrate clean.py:loader.")
    if verdict.rang is None:
        finer = " A calibrated reference sees finer changes." if _is_wide(verdict) else ""
        return [*told, f"Nothing follows: what could not be seen may be there all the same.{finer}"]
    told.append(
        "The distribution moved; whether accuracy fell, labelled examples of these data tell. If it did, prepare "
        "inputs as in training, or measure statistics on the new data: batchnorm.recalibrate."
    )
    if _is_wide(verdict):
        told.append("Stale stored statistics ring as well: the doctor on clean data tells whether they are.")
    return told


def following(verdict: Verdict) -> str:
    """The next command, "" if there is none."""
    model = verdict.command.partition(" --data ")[0]
    if verdict.dependent and verdict.unit == "example":
        return f"{verdict.command} --unit batch"
    if _is_wide(verdict) and verdict.rang is None:
        return f"{verdict.command} --calibrate clean.py:loader"
    if _is_wide(verdict):
        return f"{model.replace('batchnorm shift', 'batchnorm doctor', 1)} --data clean.py:loader"
    return ""


def _is_wide(verdict: Verdict) -> bool:
    return verdict.source == "checkpoint"


def many(number: int, word: str) -> str:
    """A number of things."""
    plural = word + ("es" if word.endswith("ch") else "s")
    return f"{number:,} {word if number == 1 else plural}"


def plain(text: str) -> str:
    """Text without characters that steer a terminal, begin a line, hide, or fit no file."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# -- text ---------------------------------------------------------------------------------------------------------


def concise(verdict: Verdict) -> str:
    """One line."""
    when = (
        ""
        if verdict.rang is None
        else f" after {many(verdict.rang, 'example')}, first at {verdict.first or 'no layer'}"
    )
    word = "no shift found" if verdict.rang is None else "shift found"
    about = f"evidence {odds(verdict.log_evidence)}, limit {odds(verdict.log_limit)}"
    alike = ", neighbours are alike" if verdict.dependent else ""
    return plain(f"{verdict.target}: {word}{when}: {about}, {many(verdict.examples, 'example')}{alike}")


def full(verdict: Verdict, *, width: int = 80) -> str:
    """For people, in ``width`` columns; only a command may be longer."""
    status = "[· info]" if verdict.rang is None else "[✗ error]"
    lines = [*wrapped(headline(verdict), width), "", *wrapped(f"{status} {sentence(verdict)}", width)]
    for name, text in facts(verdict):
        lines += wrapped(f"  {name:<15}{text}", width, 17)
    lines += ["", *_table(verdict, width), "", "not seen:"]
    lines += [line for text in unseen(verdict) for line in wrapped(f"  - {text}", width, 4)]
    lines += ["", *(line for text in follows(verdict) for line in wrapped(text, width))]
    as_page = "" if verdict.rang is None else f"{verdict.command} -o shift.html"
    if command := following(verdict) or as_page:
        lines.append(f"next: {plain(command)}")
    return "\n".join(lines)


def wrapped(text: str, width: int, hang: int = 0) -> list[str]:
    """Plain text in lines: plain before it is wrapped, so that no line begins where a name would have it."""
    return wrap(plain(text), width, subsequent_indent=" " * hang, break_on_hyphens=False)


def _table(verdict: Verdict, width: int) -> Iterator[str]:
    """A line for each layer that moved, and one for the others."""
    moved = [layer for layer in verdict.layers if layer.moved]
    rows = [cells(layer) for layer in moved or _strongest(verdict)]
    space = max(5, min(max(len(row[0]) for row in rows), width - 54))
    head = ("layer", "evidence", "kind", "channels moved", "W2", "KL")
    for name, evidence, kind, channels, w2, kl in [head, *rows]:
        short = name if len(name) <= space else f"…{name[1 - space :]}"
        yield f"{short:<{space}} {evidence:>11} {kind:<14} {channels:<14.14} {w2:>5} {kl:>5}".rstrip()
    if others := len(verdict.layers) - len(rows):
        yield f"{many(others, 'other layer')} did not move beyond the limit"
    yield "W2 and KL are distances for display: sd, and nats"


def _strongest(verdict: Verdict) -> list[Layer]:
    """Of layers that all stayed below the limit, those with most evidence."""
    return sorted(verdict.layers, key=lambda layer: -layer.log_evidence)[:3]


def cells(layer: Layer) -> tuple[str, str, str, str, str, str]:
    """A layer's name, evidence, kind of bet, moved channels, W2 and KL, in words."""
    evidence = odds(layer.log_evidence)
    kind = "–" if evidence == "none" else layer.kind
    return plain(layer.name), evidence, kind, _channels(layer), f"{layer.w2:.2f}", f"{layer.kl:.2f}"


def _channels(layer: Layer) -> str:
    named = [str(channel.index) for channel in layer.channels]
    more = len(named) - _SHOWN
    return ", ".join(named[: _SHOWN - 1]) + f" +{more + 1}" if more > 0 else ", ".join(named) or "–"


# -- the page -----------------------------------------------------------------------------------------------------


def page(verdict: Verdict, png: Callable[[Tensor], bytes] | None = None) -> str:
    """One HTML file that loads nothing.

    Args:
        verdict: What was found.
        png: Makes a file of a picture (3, H, W) with values from 0 to 1; needed if the verdict has pictures.

    Raises:
        ModuleNotFoundError: If jinja2 is missing.
    """
    moved = [layer for layer in verdict.layers if layer.moved]
    return _template().render(
        verdict=verdict,
        version=version("batchnorm"),
        headline=plain(headline(verdict)),
        sentence=sentence(verdict),
        facts=[(name, _raised(text)) for name, text in facts(verdict)],
        cards=_cards(verdict),
        chart=_chart(verdict),
        layers=list(_bars(verdict)),
        moved=[(layer, _moves(layer, _LISTED_LATER if i else _LISTED)) for i, layer in enumerate(moved[:_OPENED])],
        others=max(0, len(moved) - _OPENED),
        pictures=_pictures(verdict.pictures, png) if png else None,
        unseen=unseen(verdict),
        follows=follows(verdict),
        following=plain(following(verdict)),
        command=plain(verdict.command),
    )


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["odds"], environment.filters["plain"] = lambda log: _raised(odds(log)), plain
    return environment.get_template("shift.html")


def _raised(text: str) -> str:
    """Powers of ten as people write them."""
    return re.sub(r"\b10\^(\d+)", lambda match: f"10{match[1].translate(_SUPERSCRIPT)}", text)


def _cards(verdict: Verdict) -> list[tuple[str, str, str]]:
    """What, its figure, and a note."""
    rang = "never" if verdict.rang is None else f"{verdict.rang:,}"
    first = "–" if verdict.rang is None else plain(verdict.first or "none by itself")
    alike = "too much for the unit" if verdict.dependent else "" if verdict.observations < 100 else "the unit fits"
    moved = sum(layer.moved for layer in verdict.layers)
    return [
        ("Evidence against clean data", _raised(odds(verdict.log_evidence)), f"limit {odds(verdict.log_limit)}"),
        ("Rang after examples", rang, f"of {verdict.examples:,}"),
        ("First layer that moved", first, f"{moved} of {len(verdict.layers)} beyond the limit by themselves"),
        ("Correlation of neighbours", f"{verdict.correlation:.2f}", alike),
    ]


def _chart(verdict: Verdict) -> dict[str, Any]:
    """The line of evidence in a frame of 1000 by 1000, with ticks; positions are percentages."""
    tens = [log / math.log(10) for _, log in verdict.trail]
    limit = verdict.log_limit / math.log(10)
    low, top = min(-0.5, *tens), max(1.3 * limit, *tens)
    high = min(top, _ABOVE * limit)

    def up(value: float) -> float:
        return round(100 * (high - value) / (high - low), 2)

    across = 100 / verdict.examples
    path = [(10 * n * across, 10 * up(min(t, high + 1))) for (n, _), t in zip(verdict.trail, tens, strict=True)]
    path.insert(0, (0.0, 10 * up(0.0)))  # no evidence before the first example
    step = math.ceil(len(path) / _POINTS)
    marks = range(0, math.floor(high) + 1, max(1, math.ceil(high / 5)))
    return {
        "path": " ".join(f"{x:.1f},{y:.1f}" for x, y in [*path[::step], path[-1]]),
        "limit": up(limit),
        "rang": None if verdict.rang is None else round(verdict.rang * across, 2),
        "ups": [(up(t), _power(t)) for t in marks if abs(t - limit) > 0.06 * (high - low)],
        "acrosses": [(round(n * across, 2), f"{n:,}") for n in _nice(verdict.examples)],
        "cut": top > high,
    }


def _power(tens: int) -> str:
    return f"1 in {10**tens:,}" if tens < _LOST else _raised(f"1 in 10^{tens}")


def _nice(total: int) -> list[int]:
    """Up to six round numbers from 0 on, none beyond ``total``."""
    step = 10 ** math.floor(math.log10(total))
    step = next(max(1, step // part) for part in (10, 5, 2, 1) if total / max(1, step // part) <= 5 or part == 1)
    return list(range(0, total + 1, step))


def _bars(verdict: Verdict) -> Iterator[tuple[tuple[str, ...], float, bool, str]]:
    """Each layer's cells, the length of its bar in percent of the longest, whether it moved, and how many channels.

    Many layers in a row that did not move are one line, if others did.
    """
    most = max(1e-9, *(layer.log_evidence for layer in verdict.layers))
    for moved, run in groupby(verdict.layers, key=lambda layer: layer.moved):
        layers = list(run)
        if not moved and len(verdict.layers) > len(layers) > _RUN:
            yield _still(layers), 0.0, False, "–"
            continue
        for layer in layers:
            length = round(max(0.0, 100 * layer.log_evidence / most), 1)
            yield tuple(map(_raised, cells(layer))), length, moved, _share(layer)


def _still(layers: list[Layer]) -> tuple[str, ...]:
    """Cells for a row of layers: the largest distances among them."""
    name = f"{plain(layers[0].name)} to {plain(layers[-1].name)}, {len(layers)} layers"
    strongest = odds(max(layer.log_evidence for layer in layers))
    w2, kl = max(layer.w2 for layer in layers), max(layer.kl for layer in layers)
    return name, strongest, "–", "–", f"≤ {w2:.2f}", f"≤ {kl:.2f}"


def _share(layer: Layer) -> str:
    named = len(layer.channels)
    return f"{named}{' or more' if named == _LISTED else ''} of {layer.size}" if named else "–"


def _moves(layer: Layer, most: int) -> list[tuple[str, str, float, float, str, str]]:
    """Channels: name, move in words, start and length of the bar in percent of the widest, energy, evidence."""
    widest = max((abs(channel.moved) for channel in layer.channels), default=1.0) or 1.0
    found = []
    for channel in layer.channels[:most]:
        length = round(50 * abs(channel.moved) / widest, 1)
        start = 50.0 if channel.moved > 0 else 50 - length
        move = f"{channel.moved:+.2f}".replace("-", "−")
        evidence = _raised(odds(channel.log_evidence))
        found.append((str(channel.index), move, start, length, f"× {channel.energy:.2f}", evidence))
    return found


def _pictures(pictures: Iterable[Picture], png: Callable[[Tensor], bytes]) -> dict[str, Any] | None:
    """Small PNG files on one scale of colours, so that a darker picture is shown darker."""
    if not (shown := list(pictures)):
        return None
    low = min(float(picture.pixels.min()) for picture in shown)
    high = max(float(picture.pixels.max()) for picture in shown)
    side = 96 if len(shown) <= 4 else 64 if len(shown) <= 8 else 48  # so that a page stays below 300 kB
    files = [png(_small((p.pixels.float() - low) / ((high - low) or 1.0), side)) for p in shown]
    rows = [(f"{p.example:,}", base64.b64encode(file).decode()) for p, file in zip(shown, files, strict=True)]
    return {"rows": rows, "low": f"{low:.2g}", "high": f"{high:.2g}"}


def _small(picture: Tensor, side: int) -> Tensor:
    """(C, H, W) -> (3, h, w) of at most ``side`` pixels, by averages."""
    from torch.nn.functional import interpolate

    picture = picture.expand(3, -1, -1)[None]
    scale = side / max(picture.shape[-2:])
    if scale < 1:
        picture = interpolate(picture, size=[max(1, round(n * scale)) for n in picture.shape[-2:]], mode="area")
    return picture[0]
