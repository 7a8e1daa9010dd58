"""ShiftVerdict: one data set judged offline, by the evidence that a monitor gathers live.

The evidence E is that of ``ShiftMonitor``: on data like those of the reference, the probability that E ever reaches x
is at most 1 / x (Ville 1939). So the greatest E over the whole data set can be quoted as it is.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import final

import torch
from torch import Tensor

from batchnorm.call_types import Batch
from batchnorm.population.tensor_trees import examples_in
from batchnorm.reporting.json_values import Json, to_json
from batchnorm.shift.alarm import Alarm, LayerShift, first_moved
from batchnorm.shift.data_passes import passes, passes_needed
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.layer_observer import LayerObserver
from batchnorm.shift.least_visible_shift import least_visible_shift
from batchnorm.shift.monitor import ShiftMonitor
from batchnorm.shift.stream import Stream

# changes when a key of to_dict() changes its meaning or goes away
SCHEMA_VERSION = 1
_ROUND = 8  # observations of one update, as live
_AROUND = 32  # examples before the alarm, and after it, among which pictures are chosen
_ENOUGH = 100  # observations, before which a correlation is not judged


@final
@dataclass(frozen=True, slots=True)
class Channel:
    """A channel that moved: the move of its mean in stored sd, the ratio of its energy to the old one, the evidence."""

    index: int
    moved: float
    energy: float
    log_evidence: float


@final
@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """One layer. It ``moved`` if its own evidence reaches the limit. See ``LayerShift``."""

    name: str
    size: int
    moved: bool
    log_evidence: float
    kind: str
    channels: tuple[Channel, ...]
    w2: float
    kl: float


@final
@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An example near the alarm: its place in the data, from 0, its pixels (C, H, W), and what it adds to log E."""

    example: int
    gain: float
    pixels: Tensor


@final
@dataclass(frozen=True, slots=True)
class ShiftVerdict:
    """What ``judge`` returns. A value: it holds no model.

    Args:
        target: The model, in the caller's words.
        data: The data, likewise.
        command: What was typed, to be repeated.
        source: "checkpoint", or "calibrated" with ``calibrated`` observations.
        unit: What one observation is.
        alpha: Largest probability of a false alarm.
        examples: How many passed, in ``batches`` batches; ``left_out`` of them had activations that are not finite.
        observations: How many they made.
        log_evidence: Natural logarithm of the greatest evidence on the way.
        trail: (examples, log evidence) after each round.
        rang: Examples after which it reached the limit, or None.
        rise: Examples after which it began to rise to it, roughly.
        first: The first layer in forward order that moved by itself.
        hint: What the change looked like at the alarm, or "".
        layers: Every layer: by examples since the evidence began to rise if there is enough of it, else by all; as of
            the alarm if the evidence has gone since.
        correlation: Of neighbouring observations, before the evidence rose if there were 100 of them.
        dependent: Whether that is too much for the unit.
        sight: The least move of a channel's mean, in stored sd, that so many observations could have shown: the
            median over channels.
        seconds: How long it took.
        pictures: The examples that contribute most around the alarm, as far as they were asked for.
        tails: What makes a condition of the promise doubtful, from a checkpoint alone, or "".
    """

    target: str
    data: str
    command: str
    source: str
    calibrated: int
    unit: str
    alpha: float
    examples: int
    batches: int
    left_out: int
    observations: int
    log_evidence: float
    trail: tuple[tuple[int, float], ...]
    rang: int | None
    rise: int | None
    first: str | None
    hint: str
    layers: tuple[LayerVerdict, ...]
    correlation: float
    dependent: bool
    sight: float
    seconds: float
    pictures: tuple[Picture, ...] = ()
    tails: str = ""

    @property
    def log_limit(self) -> float:
        """Log evidence that raises the alarm."""
        return -math.log(self.alpha)

    def to_dict(self) -> dict[str, Json]:
        """Plain values for JSON, as the schema beside this file describes them; pictures are left out."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in {"pictures", "layers"}}
        layers = [asdict(layer) for layer in self.layers]
        versions = {"torch": str(torch.__version__)}
        head = {"schema_version": SCHEMA_VERSION, "batchnorm": version("batchnorm"), "shift": self.rang is not None}
        return {**head, **fields, "log_limit": self.log_limit, "layers": layers, "versions": versions}

    def to_json(self) -> str:
        """``to_dict`` as JSON: NaN and infinities as strings, since JSON has none."""
        return to_json(self.to_dict())


def judge(
    monitor: ShiftMonitor,
    loader: Iterable[Batch],
    *,
    max_examples: int | None = None,
    pictures: int = 0,
    target: str = "",
    data: str = "",
    command: str = "",
) -> ShiftVerdict:
    """Judge whether a data set is distributed like the data of a monitor's reference.

    Every example is looked at. The monitor keeps its own stream, and its model is left as it was, bit for bit.

    Args:
        monitor: Of the model, with the reference, the unit and alpha to judge by.
        loader: Batches as ``recalibrate`` takes them, in the order in which they came.
        max_examples: At most so many.
        pictures: How many examples to keep from around the alarm; the inputs must be pictures.
        target: What to call the model.
        data: What to call the data.
        command: How to repeat it. Of a ``CommandLine``, the verdict can also say which command to give next.

    Raises:
        ValueError: If no example could be judged, the reference's numbers are not finite, or the inputs are no pictures
            though some were asked for.
        RuntimeError: If the monitor is observing: these passes would be in its stream.
    """
    if monitor.is_observing:
        raise RuntimeError("judge needs a monitor that is not observing, got one that is. Call monitor.stop() first.")
    start = time.perf_counter()
    stream = Stream(monitor.reference, monitor.unit, alpha=monitor.stream.alpha, arl=None)
    watch = _Watch(stream, _Album(pictures))
    with _unwarned():
        tap = LayerObserver(monitor.layers, monitor.reference)
        with closing(passes(monitor.model, tap, loader, max_examples, "shift")) as seen:
            for inputs, z, q in seen:
                if len(z) != examples_in(inputs):
                    raise ValueError(passes_needed("shift"))
                watch.see(inputs, z, q)
    if not stream.evidence.observations:
        raise ValueError("shift needs examples with finite activations, got none. Look for the cause: batchnorm doctor")
    if any(math.isnan(log) for _, log in watch.trail):
        raise ValueError(
            "shift needs a reference whose numbers are finite, got evidence that is none. Calibrate again."
        )
    names = {"target": target, "data": data, "command": command}
    return _verdict(watch, seconds=time.perf_counter() - start, **names)


def _verdict(watch: _Watch, *, seconds: float, **names: str) -> ShiftVerdict:
    stream, alarm = watch.stream, watch.stream.alarm
    known = stream.reference
    rise = _rise(watch.trail, alarm)
    correlation, dependent = watch.dependence(rise)
    is_past = alarm is not None and stream.evidence.log < stream.limit
    table = list(alarm.layers) if alarm is not None and is_past else stream.table()
    moved = watch.at_alarm if is_past and watch.at_alarm is not None else (stream.means, stream.evidence.log_channels)
    return ShiftVerdict(
        **names, source=known.source, calibrated=known.observations, unit=known.unit, alpha=stream.alpha,
        examples=stream.passed, batches=watch.batches, left_out=watch.left_out,
        observations=stream.evidence.observations, log_evidence=max(log for _, log in watch.trail),
        trail=tuple(watch.trail), rang=alarm and alarm.examples, rise=rise,
        first=first_moved(table, stream.limit), hint=alarm.hint if alarm else "",
        layers=tuple(_layers(stream, table, *moved)), correlation=correlation,
        dependent=dependent, sight=least_visible_shift(stream.evidence, stream.alpha), seconds=seconds,
        pictures=tuple(watch.album.chosen()), tails=str(stream.tail or ""),
    )  # fmt: skip


def _rise(trail: list[tuple[int, float]], alarm: Alarm | None) -> int | None:
    """Examples at the least evidence before the alarm. On clean data evidence sinks, so the change came about there."""
    if alarm is None:
        return None
    before = [(log, -examples) for examples, log in trail if examples <= alarm.examples]
    least = -min(before)[1]
    return 0 if least == trail[0][0] else least


def _layers(stream: Stream, table: list[LayerShift], means: Tensor, log_channels: Tensor) -> Iterator[LayerVerdict]:
    known = stream.reference
    sizes = list(known.sizes)
    mean, energy = means
    found = (row.split(sizes) for row in (mean - known.center, energy / known.power, log_channels))
    for layer, size, *rows in zip(table, sizes, *found, strict=True):
        channels = tuple(Channel(c, *(float(row[c]) for row in rows)) for c in layer.channels)
        is_moved = layer.log_evidence >= stream.limit
        yield LayerVerdict(layer.name, size, is_moved, layer.log_evidence, layer.kind, channels, layer.w2, layer.kl)


# -- on the way through the data ----------------------------------------------------------------------------------


@final
class _Watch:
    """A stream that is fed round by round, with the evidence after each."""

    def __init__(self, stream: Stream, album: _Album) -> None:
        self.stream, self.album = stream, album
        self.trail: list[tuple[int, float]] = []
        self.at_alarm: tuple[Tensor, Tensor] | None = None  # means, and evidence of channels
        self._alike: list[tuple[float, bool, int]] = []  # correlation, whether it is too much, of how many
        self.batches = self.left_out = 0

    def see(self, inputs: Batch, z: Tensor, q: Tensor) -> None:
        """Count one batch. Examples are observed in rounds of 8, however large the batches are."""
        self.batches += 1
        finite = z.isfinite().all(1) & q.isfinite().all(1)
        self.left_out += int((~finite).sum())
        size = _ROUND if self.stream.reference.unit == "example" else len(z)
        for at in range(0, len(z), size):
            part = slice(at, at + size)
            self.album.add(inputs, self.stream.passed, z[part], q[part], at)
            self.stream.passed += len(z[part])
            self.stream.observe(z[part], q[part])
            self.trail.append((self.stream.passed, self.stream.update()))
            found = self.stream.autocorrelation
            self._alike.append((found.r, found.is_wrong, found.count))
            self.album.note(self.stream)
            if self.at_alarm is None and self.stream.alarm is not None:
                self.at_alarm = self.stream.means, self.stream.evidence.log_channels

    def dependence(self, rise: int | None) -> tuple[float, bool]:
        """Correlation of neighbours and whether it is too much, before a change if that can be told.

        A change within the data makes neighbours alike too, and is no fault of the unit.
        """
        before = [row for (n, _), row in zip(self.trail, self._alike, strict=True) if rise is not None and n <= rise]
        r, is_wrong, _ = before[-1] if before and before[-1][2] >= _ENOUGH else self._alike[-1]
        return r, is_wrong


@final
class _Album:
    """Examples from shortly before the alarm to shortly after it, and the evidence there."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._rows: deque[tuple[int, Tensor, Tensor, Tensor]] = deque(maxlen=2 * _AROUND)
        self._evidence: ShiftEvidence | None = None
        self._left = _AROUND  # examples to take after the alarm

    def add(self, inputs: Batch, example: int, z: Tensor, q: Tensor, at: int) -> None:
        """Keep these examples, whose inputs begin at ``at``, while they are near."""
        if not self._wanted or self._left <= 0:
            return
        if self._evidence is not None:
            self._left -= len(z)
        pixels = _pixels(inputs)[at : at + len(z)]
        rows = zip(range(example, example + len(z)), z, q, pixels, strict=True)
        self._rows.extend((i, z1, q1, x.detach().cpu()) for i, z1, q1, x in rows if bool(z1.isfinite().all()))

    def note(self, stream: Stream) -> None:
        """Remember the evidence of the alarm."""
        if self._evidence is None and stream.alarm is not None:
            self._evidence = stream.evidence

    def chosen(self) -> list[Picture]:
        """The examples that would add most to the evidence of the alarm if they came again, the largest first."""
        if self._evidence is None:
            return []
        before = self._evidence
        pictures = [
            Picture(i, before.after(z[None], q[None], learns=False).log - before.log, pixels)
            for i, z, q, pixels in self._rows
        ]
        return sorted(pictures, key=lambda picture: -picture.gain)[: self._wanted]


def _pixels(inputs: Batch) -> Tensor:
    """The inputs as pictures, (N, C, H, W) with 1 or 3 channels."""
    x = next(iter(inputs.values()), None) if isinstance(inputs, dict) else inputs
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in {1, 3}:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"pictures need inputs (N, C, H, W) with C = 1 or 3, got {shape}. Leave --images out.")
    return x


@contextmanager
def _unwarned() -> Iterator[None]:
    """A block without a stream's warnings; the verdict says the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ShiftMonitor:", RuntimeWarning)
        yield
