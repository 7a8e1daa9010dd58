"""Stream: adds observations to the evidence one after another, and raises the alarm when the limit is reached."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.call_types import Batch
from batchnorm.shift.alarm import SETTLED, Alarm, LayerShift, first_moved, hint, layer_shifts
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.fleet_states import schema_hash
from batchnorm.shift.observation_units import Autocorrelation, Grouping, Unit
from batchnorm.shift.recent_means import RecentMeans
from batchnorm.shift.stream_origin import LiveOrigin
from batchnorm.shift.stream_state import StreamState
from batchnorm.shift.tails import Tail, Tails

LOGGER = logging.getLogger("batchnorm.shift")
LOGGER.addHandler(logging.NullHandler())  # messages go to configured loggers only, not to standard error
_ROUND = 8  # the evidence is updated when so many observations wait: an update takes a millisecond or two


@final
class Stream:
    """Observations so far against one reference, and the evidence from them.

    Args:
        reference: The bounds of clean data.
        unit: What one observation is.
        alpha: Largest probability that clean data ever raise an alarm.
        arl: Smallest average number of observations until a false alarm, used instead of alpha; None uses alpha.
        on_alarm: Called with the alarm, once; exceptions that it raises are logged.
    """

    def __init__(
        self,
        reference: Reference,
        unit: Unit,
        *,
        alpha: float,
        arl: float | None,
        on_alarm: Callable[[Alarm], object] | None = None,
    ) -> None:
        self.reference, self.alpha, self.arl, self.on_alarm = reference, alpha, arl, on_alarm
        self.alarm: Alarm | None = None
        self.evidence = ShiftEvidence.start(reference, is_spread=arl is None)
        self.autocorrelation = Autocorrelation()
        self._tails = Tails(reference)
        self._bounds = reference.digest_of_bounds()
        self.passed = 0  # examples, observed or not
        self.looked = 0  # examples that were observed
        self._grouping = Grouping(unit, reference.examples, is_strict=reference.clean is not None)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._sums = torch.zeros(2, sum(reference.sizes), dtype=torch.float64)  # of z and q, for display
        self._recent = RecentMeans(sum(reference.sizes))
        self._later = RecentMeans(sum(reference.sizes), "later")  # of observations after the alarm
        self._warned: set[str] = set()
        self._origin = LiveOrigin()
        self.lock = threading.RLock()  # held while counting, also while on_alarm runs

    @property
    def limit(self) -> float:
        """Log evidence that raises the alarm."""
        return math.log(self.arl) if self.arl is not None else -math.log(self.alpha)

    def observe(self, z: Tensor, q: Tensor, inputs: Batch = None) -> None:
        """Count examples by their channel means and energies, (n, channels) each, as the layer observer measures them.

        An example with values that are not finite is not evidence of a shift: it is skipped, with one warning. If the
        unit is a function, the examples must be all rows of the inputs.
        """
        with self.lock:
            self._observe(z, q, inputs)

    def missed(self) -> None:
        """Record that examples passed unobserved."""
        with self.lock:
            self._grouping.missed()

    def _observe(self, z: Tensor, q: Tensor, inputs: Batch) -> None:
        rows = None
        self._origin.check_process(self.looked)
        self.looked += len(z)
        if not math.isfinite(float(z.sum() + q.sum())):
            finite = z.isfinite().all(1) & q.isfinite().all(1)
            self.warn("poison", "an example has NaN or infinite activations; such examples are skipped.")
            rows = finite.nonzero()[:, 0].tolist()
            z, q = z[finite], q[finite]
        z, q = self._grouping.of(z, q, inputs, rows)
        if len(z):
            self._waiting.append((z, q))
        if sum(len(rows) for rows, _ in self._waiting) >= _ROUND:
            self.update()

    def update(self) -> float:
        """Add waiting observations to the evidence now, and return its logarithm; at the limit the alarm is raised."""
        with self.lock:
            if self._waiting:
                first, *rest = self._waiting
                z, q = (torch.cat(rows) for rows in zip(*self._waiting, strict=True)) if rest else first
                self._waiting = []
                self._count(z, q)
            return self.evidence.log

    def _count(self, z: Tensor, q: Tensor) -> None:
        self.evidence = self.evidence.after(z, q, learns=self.alarm is None)
        sums = torch.stack([z.sum(0), q.sum(0)])
        self._sums += sums
        self._recent.add(sums, len(z), self._since_clean(self.evidence))
        self.autocorrelation.add(z, self.reference.center, self.reference.spread)
        if self.alarm is not None:
            self._settle(self.alarm, sums, len(z))
        self._judge()
        self._watch_tails(q)

    def _since_clean(self, evidence: ShiftEvidence) -> float:
        """Log evidence; with ``arl`` minus log(observations), because it grows so much on clean data."""
        return evidence.log - (math.log(evidence.observations) if self.arl is not None else 0.0)

    def _judge(self) -> None:
        if self.autocorrelation.is_wrong:
            self.warn(
                "unit",
                f"neighbouring observations are alike (correlation {self.autocorrelation.r:.2f}): the rate of false "
                f"alarms is not kept with unit={self.reference.unit!r}. Use a larger unit, such as 'batch' or keys.",
            )
        if self.alarm is None and self.evidence.log >= self.limit:
            self.alarm = self._alarm(self.evidence, self._means(), self.passed)
            LOGGER.warning("%s", self.alarm)
            self._call(self.alarm)

    def _settle(self, alarm: Alarm, sums: Tensor, n: int) -> None:
        """Set a missing hint: "inputs" once a component moved far, or "another mix" after SETTLED observations."""
        self._later.take(sums, n)
        if alarm.hint or (furthest := self.reference.furthest(*self.means)) is None:
            return
        about = hint(alarm.layers, self.limit, furthest)
        if not about and self._later.count >= SETTLED and self._later.means is not None:
            later = self.reference.furthest(*self._later.means)
            about = hint(alarm.layers, self.limit, later) or "another mix"
        self.alarm = replace(alarm, hint=about)

    def _watch_tails(self, q: Tensor) -> None:
        """Warn if a heavy tail makes the checkpoint's promise doubtful; a calibrated one assumes nothing of tails."""
        if self.alarm is not None or self.reference.clean is not None:
            return
        self._tails.add(self.reference.of_layers(q))
        if tail := self.tail:
            self.warn(
                "tails", f"{tail}: stored variances may be too small, and false alarms too frequent. {tail.remedy}"
            )

    @property
    def tail(self) -> Tail | None:
        """The heavy tail that makes the checkpoint's promise doubtful; None if there is none, or if calibrated."""
        return self._tails.heavy

    def _call(self, alarm: Alarm) -> None:
        try:
            if self.on_alarm is not None:
                self.on_alarm(alarm)
        except Exception:  # a callback must not stop inference
            LOGGER.exception("on_alarm raised")

    def warn(self, kind: str, message: str) -> None:
        """Warn, once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"ShiftMonitor: {message}", RuntimeWarning, stacklevel=5)

    def table(self) -> list[LayerShift]:
        """The evidence for every layer now."""
        with self.lock:
            evidence, means = self.evidence, self._means()
        return layer_shifts(evidence, *means, alpha=self.alpha)

    @property
    def means(self) -> Tensor:
        """Means of z and q, (2, channels): since the evidence began to rise if it is at the limit now, else of all."""
        with self.lock:
            return self._means()

    def furthest(self) -> tuple[float, float] | None:
        """Largest movement of a principal component since the evidence began to rise, or since ``look_anew``.

        Returns:
            The distance, in sd of an observation (see ``Reference.furthest``), and its typical increase by chance:
            sqrt(2 log(2 m) / n), the largest of m components' normal errors after n observations. None without
            observations, or if ``Reference.furthest`` is None.
        """
        with self.lock:
            means, n = self._recent.means, self._recent.count
        far = None if means is None else self.reference.furthest(*means)
        components = 2 * sum(self.reference.sizes)  # of means and of energies
        return None if far is None else (far, math.sqrt(2 * math.log(2 * components) / n))

    def look_anew(self) -> None:
        """Measure movements from now on only, because other inputs came after the alarm."""
        with self.lock:
            self._recent.restart()

    def _means(self) -> Tensor:
        recent = self._recent.means
        if recent is not None and self.evidence.log >= self.limit:
            return recent
        return self._sums / max(1, self.evidence.observations)

    def _alarm(self, evidence: ShiftEvidence, means: Tensor, passed: int) -> Alarm:
        layers = layer_shifts(evidence, *means, alpha=self.alpha)
        furthest = evidence.reference.furthest(*means)
        first, about = first_moved(layers, self.limit), hint(layers, self.limit, furthest)
        return Alarm(evidence.observations, passed, evidence.log, first, about, layers, time.time())

    # -- files and replicas -----------------------------------------------------------------------------------------

    @property
    def kind(self) -> dict[str, Any]:
        """Settings that two streams must share to be pooled or continued."""
        reference = self.reference
        about = {"digest": reference.digest, "source": reference.source, "unit": reference.unit, "bounds": self._bounds}
        return {**about, "alpha": self.alpha, "arl": self.arl}

    def state(self) -> StreamState:
        """Everything that the next observation depends on; ``put`` restores it bit for bit."""
        with self.lock:
            return self._state()

    def _state(self) -> StreamState:
        alarm = None if self.alarm is None else asdict(self.alarm)
        about = {**self.kind, "passed": self.passed, "looked": self.looked, "alarm": alarm}
        about |= {"layers": list(self.reference.layers), "sizes": list(self.reference.sizes)}
        about |= {"schema": schema_hash(about)}
        state = StreamState({"sums": self._sums.clone()}, about, self._origin.at(self.looked))
        waiting = self._waiting or [(self._sums[:0, :], self._sums[:0, :])]
        rows = {f"waiting.{name}": torch.cat([row[i] for row in waiting]) for i, name in enumerate("zq")}
        for part in (
            StreamState.of_evidence(self.evidence),
            StreamState(rows, {}),
            self._grouping.state(),
            self._recent.state(),
            self._later.state(),
            self.autocorrelation.state(),
            self._tails.state(),
        ):
            state = state | part
        return state

    def put(self, state: StreamState) -> None:
        """Continue from a state.

        Raises:
            ValueError: If the state is damaged, or belongs to another reference, unit, alpha or arl.
        """
        self.check(state)
        with self.lock:
            self._put(state)

    def _put(self, state: StreamState) -> None:
        about, tensors = state.about, state.tensors
        self.evidence, self.alarm, self.passed = state.evidence(self.reference), state.alarm, about["passed"]
        self.looked = about.get("looked", 0)  # older files have no such entry
        self._origin.go_on(state.origin, self.looked)
        self._sums = tensors["sums"].clone()
        self._waiting = [(tensors["waiting.z"], tensors["waiting.q"])] if len(tensors["waiting.z"]) else []
        self._grouping.put(state)
        self._recent.put(state)
        self._later.put(state)
        self.autocorrelation.put(state)
        self._tails.put(state)

    def check(self, state: StreamState) -> None:
        """Refuse a state that is damaged or belongs to a stream with other settings.

        Raises:
            ValueError: If the state is damaged, or belongs to another reference, unit, alpha or arl.
        """
        about = state.about
        wrong = [f"{name} {about.get(name)!r}" for name, own in self.kind.items() if about.get(name) != own]
        if wrong:
            raise ValueError(
                f"the state must be of a monitor like this one, got {', '.join(wrong)}. Make the monitor with the same "
                "model, reference, unit, alpha and arl."
            )
        state.check(self.reference)
