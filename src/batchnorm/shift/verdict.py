"""ShiftVerdict: the result of comparing one data set with a reference, by the evidence of ``ShiftMonitor``.

On data like those of the reference, the probability that the evidence E ever reaches x is at most 1 / x (Ville 1939).
So the largest E over the whole data set needs no correction.
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
_ROUND = 8  # observations per update of the evidence, as in a stream
_AROUND = 32  # examples before the alarm, and as many after it, among which pictures are chosen
_ENOUGH = 100  # observations needed to judge a correlation


@final
@dataclass(frozen=True, slots=True)
class Channel:
    """A channel that moved: the move of its mean in stored sd, its energy divided by clean data's, its log e-value."""

    index: int
    moved: float
    energy: float
    log_evidence: float


@final
@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """A layer with ``size`` channels; ``moved`` if its own evidence reaches the limit. Other fields: ``LayerShift``."""

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
    """The result of ``judge``; it has no reference to the model.

    Args:
        target: The model, in the caller's words.
        data: The data, in the caller's words.
        command: The command that gives the verdict again.
        source: "checkpoint", or "calibrated" with ``calibrated`` observations.
        unit: What one observation is.
        alpha: Largest probability of a false alarm.
        examples: Number of examples, in ``batches`` batches; ``left_out`` of these examples had activations that are
            not finite.
        observations: Number of observations.
        log_evidence: Natural logarithm of the largest evidence over the data.
        trail: (examples, log evidence) after each round.
        rang: Number of examples after which the evidence reached the limit; None if it did not.
        rise: Number of examples after which the evidence began to rise to the limit, roughly; None if it did not.
        first: The first layer in forward order whose own evidence reached the limit; None if no layer's did.
        hint: What the change looked like at the alarm; "" if that is not clear or there was no alarm.
        layers: Every layer. If the evidence is at the limit or above it at the end, distances are measured on the
            examples since it began to rise, else on all examples. If the evidence has fallen below the limit after an
            alarm, the values are those at the alarm.
        correlation: Correlation of neighbouring observations; of those before the evidence rose if these are at least
            100, else of all.
        dependent: Whether that correlation is too large for the unit.
        sight: The smallest move of a channel's mean, in stored sd, that would have raised an alarm with so many
            observations: median over channels. Infinite if no move that was tried would have.
        seconds: Duration of the check.
        pictures: The examples near the alarm that add most to the evidence; () if no pictures were asked for.
        tails: Why a condition of a checkpoint's promise is doubtful; "" if none is, or if calibrated.
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
        """Log evidence at which the alarm is raised."""
        return -math.log(self.alpha)

    def to_dict(self) -> dict[str, Json]:
        """Plain values for JSON, as the schema beside this file describes them; pictures are left out."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in {"pictures", "layers"}}
        layers = [asdict(layer) for layer in self.layers]
        versions = {"torch": str(torch.__version__)}
        head = {"schema_version": SCHEMA_VERSION, "batchnorm": version("batchnorm"), "shift": self.rang is not None}
        return {**head, **fields, "log_limit": self.log_limit, "layers": layers, "versions": versions}

    def to_json(self) -> str:
        """``to_dict`` as JSON; NaN and infinities become strings, because JSON has no such numbers."""
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

    Every example is observed. The monitor's own stream and its model are left as they were, bit for bit.

    Args:
        monitor: The model's monitor; its reference, unit and alpha are used.
        loader: Batches in the forms that ``recalibrate`` accepts, in the order in which they came.
        max_examples: Largest number of examples to use; None uses all.
        pictures: Number of examples near the alarm to keep; the inputs must be pictures.
        target: The model's name in the verdict.
        data: The data's name in the verdict.
        command: The command that gives the verdict again. From a ``CommandLine`` the verdict also derives the next
            command.

    Raises:
        TypeError: If ``loader`` is not an iterable of batches, or ``max_examples`` is not a whole number.
        ValueError: If there is no batch or no observation with finite activations, the reference's numbers are not
            finite, a layer does not run in a pass, layers receive different numbers of examples, or pictures are asked
            for and the inputs are not pictures.
        RuntimeError: If the monitor is observing: these passes would be in its stream.
    """
    if monitor.is_observing:
        raise RuntimeError("judge needs a monitor that is not observing, got one that is. Call monitor.stop() first.")
    start = time.perf_counter()
    stream = Stream(monitor.reference, monitor.unit, alpha=monitor.stream.alpha, arl=None)
    watch = _Watch(stream, _Album(pictures))
    with _unwarned():
        tap = LayerObserver(monitor.layers, monitor.reference)
        with closing(passes(monitor.model, tap, loader, max_examples, "shift")) as batches:
            for inputs, z, q in batches:
                if len(z) != examples_in(inputs):
                    raise ValueError(passes_needed("shift"))
                watch.see(inputs, z, q)
    if not stream.evidence.observations:
        raise ValueError(
            "shift needs one observation or more with finite activations, got none. Give more examples; if activations "
            "are NaN or infinite, look for the cause: batchnorm doctor"
        )
    if any(math.isnan(log) for _, log in watch.trail):
        raise ValueError("shift needs a reference whose numbers are finite, got evidence that is NaN. Calibrate again.")
    names = {"target": target, "data": data, "command": command}
    return _verdict(watch, seconds=time.perf_counter() - start, **names)


def _verdict(watch: _Watch, *, seconds: float, **names: str) -> ShiftVerdict:
    stream, alarm = watch.stream, watch.stream.alarm
    reference = stream.reference
    rise = _rise(watch.trail, alarm)
    correlation, dependent = watch.dependence(rise)
    is_past = alarm is not None and stream.evidence.log < stream.limit
    table = list(alarm.layers) if alarm is not None and is_past else stream.table()
    moved = watch.at_alarm if is_past and watch.at_alarm is not None else (stream.means, stream.evidence.log_channels)
    return ShiftVerdict(
        **names, source=reference.source, calibrated=reference.observations, unit=reference.unit, alpha=stream.alpha,
        examples=stream.passed, batches=watch.batches, left_out=watch.left_out,
        observations=stream.evidence.observations, log_evidence=max(log for _, log in watch.trail),
        trail=tuple(watch.trail), rang=alarm and alarm.examples, rise=rise,
        first=first_moved(table, stream.limit), hint=alarm.hint if alarm else "",
        layers=tuple(_layers(stream, table, *moved)), correlation=correlation,
        dependent=dependent, sight=least_visible_shift(stream.evidence, stream.alpha), seconds=seconds,
        pictures=tuple(watch.album.chosen()), tails=str(stream.tail or ""),
    )  # fmt: skip


def _rise(trail: list[tuple[int, float]], alarm: Alarm | None) -> int | None:
    """Number of examples at the lowest evidence before the alarm: clean data lower it, so the change began near it.

    0 if the evidence was lowest after the first round. None if there was no alarm.
    """
    if alarm is None:
        return None
    before = [(log, -examples) for examples, log in trail if examples <= alarm.examples]
    lowest = -min(before)[1]
    return 0 if lowest == trail[0][0] else lowest


def _layers(stream: Stream, table: list[LayerShift], means: Tensor, log_channels: Tensor) -> Iterator[LayerVerdict]:
    reference = stream.reference
    sizes = list(reference.sizes)
    mean, energy = means
    by_layer = (row.split(sizes) for row in (mean - reference.center, energy / reference.power, log_channels))
    for layer, size, *rows in zip(table, sizes, *by_layer, strict=True):
        channels = tuple(Channel(c, *(float(row[c]) for row in rows)) for c in layer.channels)
        is_moved = layer.log_evidence >= stream.limit
        yield LayerVerdict(layer.name, size, is_moved, layer.log_evidence, layer.kind, channels, layer.w2, layer.kl)


# -- on the way through the data ----------------------------------------------------------------------------------


@final
class _Watch:
    """A stream that gets observations in rounds, and the evidence after each round."""

    def __init__(self, stream: Stream, album: _Album) -> None:
        self.stream, self.album = stream, album
        self.trail: list[tuple[int, float]] = []
        self.at_alarm: tuple[Tensor, Tensor] | None = None  # means, and evidence of channels
        # after each round: correlation of neighbours, whether it is too large, and the number of observations in it
        self._correlations: list[tuple[float, bool, int]] = []
        self.batches = self.left_out = 0

    def see(self, inputs: Batch, z: Tensor, q: Tensor) -> None:
        """Count one batch: with unit "example" in rounds of 8 examples, else as one round."""
        self.batches += 1
        finite = z.isfinite().all(1) & q.isfinite().all(1)
        self.left_out += int((~finite).sum())
        size = _ROUND if self.stream.reference.unit == "example" else len(z)
        for at in range(0, len(z), size):
            part = slice(at, at + size)
            self.album.add(inputs, self.stream.passed, z[part], q[part], at)
            self.stream.passed += len(z[part])
            self.stream.observe(z[part], q[part], inputs)
            self.trail.append((self.stream.passed, self.stream.update()))
            correlation = self.stream.autocorrelation
            self._correlations.append((correlation.r, correlation.is_wrong, correlation.count))
            self.album.note(self.stream)
            if self.at_alarm is None and self.stream.alarm is not None:
                self.at_alarm = self.stream.means, self.stream.evidence.log_channels

    def dependence(self, rise: int | None) -> tuple[float, bool]:
        """Correlation of neighbours, and whether it is too large; before the change if 100 observations came before it.

        A change within the data makes neighbours alike too, although the unit may be right.
        """
        before = [
            row for (n, _), row in zip(self.trail, self._correlations, strict=True) if rise is not None and n <= rise
        ]
        r, is_wrong, _ = before[-1] if before and before[-1][2] >= _ENOUGH else self._correlations[-1]
        return r, is_wrong


@final
class _Album:
    """Examples from shortly before the alarm to shortly after it, and the evidence at the alarm."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._rows: deque[tuple[int, Tensor, Tensor, Tensor]] = deque(maxlen=2 * _AROUND)
        self._evidence: ShiftEvidence | None = None
        self._left = _AROUND  # examples to take after the alarm

    def add(self, inputs: Batch, example: int, z: Tensor, q: Tensor, at: int) -> None:
        """Keep examples near the alarm; their inputs begin at row ``at`` of the batch."""
        if not self._wanted or self._left <= 0:
            return
        if self._evidence is not None:
            self._left -= len(z)
        pixels = _pixels(inputs)[at : at + len(z)]
        rows = zip(range(example, example + len(z)), z, q, pixels, strict=True)
        self._rows.extend((i, z1, q1, x.detach().cpu()) for i, z1, q1, x in rows if bool(z1.isfinite().all()))

    def note(self, stream: Stream) -> None:
        """Store the evidence at the alarm."""
        if self._evidence is None and stream.alarm is not None:
            self._evidence = stream.evidence

    def chosen(self) -> list[Picture]:
        """The examples that would add most to the evidence at the alarm if they came again, the largest gain first."""
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
        raise ValueError(f"pictures need inputs (N, C, H, W) with C = 1 or 3, got {shape}. Ask for 0 pictures.")
    return x


@contextmanager
def _unwarned() -> Iterator[None]:
    """A block without a stream's warnings, because the verdict says the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ShiftMonitor:", RuntimeWarning)
        yield
