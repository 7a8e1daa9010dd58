"""The page of a verdict: one HTML file without scripts."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from typing import final

from torch import Tensor

from batchnorm.reporting.page_shell import shell, template
from batchnorm.reporting.png import png
from batchnorm.reporting.text import plain
from batchnorm.shift.verdict import LayerVerdict, Picture, ShiftVerdict
from batchnorm.shift.verdict_words import LOST, cells, facts, following, follows, headline, odds, sentence, unseen

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_POINTS = 500  # points of the evidence line; the page has no pixels for more
_ABOVE = 5  # the chart ends at this multiple of the limit's logarithm
_RUN = 3  # more than this number of layers in a row that did not move become one line
_OPENED = 10  # number of moved layers whose channels are listed
_LISTED, _LISTED_LATER = 20, 8  # number of channels shown of the first moved layer, and of other moved layers


def page(verdict: ShiftVerdict) -> str:
    """One HTML file that loads nothing.

    Raises:
        ModuleNotFoundError: If jinja2 is missing.
    """
    moved = [layer for layer in verdict.layers if layer.moved]
    body = template("shift.html", odds=lambda log: _raised(odds(log))).render(
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
        pictures=_pictures(verdict.pictures),
        unseen=unseen(verdict),
        follows=follows(verdict),
        following=plain(following(verdict)),
        command=plain(verdict.command),
    )
    return shell(f"batchnorm shift: {verdict.target}", body, styles=("shift",))


def _raised(text: str) -> str:
    """The text with raised exponents: 10⁴ for 10^4."""
    return re.sub(r"\b10\^(\d+)", lambda match: f"10{match[1].translate(_SUPERSCRIPT)}", text)


def _cards(verdict: ShiftVerdict) -> list[tuple[str, str, str]]:
    """Title, figure and note of each card."""
    rang = "never" if verdict.rang is None else f"{verdict.rang:,}"
    first = "–" if verdict.rang is None else plain(verdict.first or "none by itself")
    alike = "too much for the unit" if verdict.dependent else "" if verdict.observations < 100 else "the unit fits"
    moved = sum(layer.moved for layer in verdict.layers)
    return [
        ("Evidence against clean data", _raised(odds(verdict.log_evidence)), f"limit {odds(verdict.log_limit)}"),
        ("Examples before the alarm", rang, f"of {verdict.examples:,}"),
        ("First layer that moved", first, f"{moved} of {len(verdict.layers)} beyond the limit by themselves"),
        ("Correlation of neighbours", f"{verdict.correlation:.2f}", alike),
    ]


@final
@dataclass(frozen=True, slots=True)
class _EvidenceLine:
    """The line of evidence in a frame of 1000 by 1000, with ticks; other positions are percentages of the frame."""

    path: str
    limit: float
    rang: float | None
    ups: list[tuple[float, str]]
    acrosses: list[tuple[float, str]]
    cut: bool  # whether the line leaves the frame


def _chart(verdict: ShiftVerdict) -> _EvidenceLine:
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
    return _EvidenceLine(
        path=" ".join(f"{x:.1f},{y:.1f}" for x, y in [*path[::step], path[-1]]),
        limit=up(limit),
        rang=None if verdict.rang is None else round(verdict.rang * across, 2),
        ups=[(up(t), _power(t)) for t in marks if abs(t - limit) > 0.06 * (high - low)],
        acrosses=[(round(n * across, 2), f"{n:,}") for n in _nice(verdict.examples)],
        cut=top > high,
    )


def _power(tens: int) -> str:
    return f"1 in {10**tens:,}" if tens < LOST else _raised(f"1 in 10^{tens}")


def _nice(total: int) -> list[int]:
    """Up to six round numbers from 0 on, none beyond ``total``."""
    step = 10 ** math.floor(math.log10(total))
    step = next(max(1, step // part) for part in (10, 5, 2, 1) if total / max(1, step // part) <= 5 or part == 1)
    return list(range(0, total + 1, step))


def _bars(verdict: ShiftVerdict) -> Iterator[tuple[tuple[str, ...], float, bool, str]]:
    """Each layer's cells, the length of its bar in percent of the longest, whether it moved, and its moved channels.

    More than three layers in a row that did not move become one line, if other layers moved.
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


def _still(layers: list[LayerVerdict]) -> tuple[str, ...]:
    """The cells of one line for several layers, with their largest distances."""
    name = f"{plain(layers[0].name)} to {plain(layers[-1].name)}, {len(layers)} layers"
    strongest = odds(max(layer.log_evidence for layer in layers))
    w2, kl = max(layer.w2 for layer in layers), max(layer.kl for layer in layers)
    return name, strongest, "–", "–", f"≤ {w2:.2f}", f"≤ {kl:.2f}"


def _share(layer: LayerVerdict) -> str:
    named = len(layer.channels)
    return f"{named}{' or more' if named == _LISTED else ''} of {layer.size}" if named else "–"


def _moves(layer: LayerVerdict, most: int) -> list[tuple[str, str, float, float, str, str]]:
    """Channels: name, move in words, start and length of the bar in percent of the widest, energy, evidence."""
    widest = max((abs(channel.moved) for channel in layer.channels), default=1.0) or 1.0
    rows = []
    for channel in layer.channels[:most]:
        length = round(50 * abs(channel.moved) / widest, 1)
        start = 50.0 if channel.moved > 0 else 50 - length
        move = f"{channel.moved:+.2f}".replace("-", "−")
        evidence = _raised(odds(channel.log_evidence))
        rows.append((str(channel.index), move, start, length, f"× {channel.energy:.2f}", evidence))
    return rows


@final
@dataclass(frozen=True, slots=True)
class _Gallery:
    """Example numbers with pictures as PNG files in base64, and the values of the darkest and the brightest colour."""

    rows: list[tuple[str, str]]
    low: str
    high: str


def _pictures(shown: Sequence[Picture]) -> _Gallery | None:
    """Small pictures on one scale of colours, so that a darker picture is shown darker."""
    if not shown:
        return None
    low = min(float(picture.pixels.min()) for picture in shown)
    high = max(float(picture.pixels.max()) for picture in shown)
    side = 96 if len(shown) <= 4 else 64 if len(shown) <= 8 else 48  # so that a page stays below 300 kB
    files = [png(_small((p.pixels.float() - low) / ((high - low) or 1.0), side)) for p in shown]
    rows = [(f"{p.example:,}", base64.b64encode(file).decode()) for p, file in zip(shown, files, strict=True)]
    return _Gallery(rows, f"{low:.2g}", f"{high:.2g}")


def _small(picture: Tensor, side: int) -> Tensor:
    """A picture (C, H, W) as (3, h, w), reduced by averaging to at most ``side`` pixels per side."""
    from torch.nn.functional import interpolate

    picture = picture.expand(3, -1, -1)[None]
    scale = side / max(picture.shape[-2:])
    if scale < 1:
        picture = interpolate(picture, size=[max(1, round(n * scale)) for n in picture.shape[-2:]], mode="area")
    return picture[0]
