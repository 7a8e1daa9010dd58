"""Prometheus: metrics of a live ``ShiftMonitor``, read at each scrape.

    batchnorm_shift_log_evidence       natural log of the evidence E against clean data
    batchnorm_shift_limit              natural log of the evidence that raises the alarm
    batchnorm_shift_alarm              1 after an alarm, otherwise 0
    batchnorm_shift_layer_log_evidence{layer}, ...

A scrape changes nothing. It uses the monitor's lock only while it copies the means of the layers, and only if the
evidence is new. It may have to wait while the monitor counts a batch. The monitor collects at least eight observations
(examples or whole batches) before it updates the evidence. So a scrape may lack the last seven observations. The
evidence is replaced as a whole, so a scrape during a forward pass reads the old or the new evidence, never a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import TYPE_CHECKING, final
from weakref import WeakKeyDictionary

from batchnorm.integrations.missing_packages import needed

with needed("prometheus_client", "'batchnorm[prometheus]'"):
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from batchnorm.shift import LayerShift, ShiftMonitor
    from batchnorm.shift.evidence import ShiftEvidence

_PREFIX = "batchnorm_shift_"
# alert rules use these names and labels: they do not change
_GAUGES: dict[str, tuple[str, Callable[[ShiftMonitor], float]]] = {
    "log_evidence": ("Natural logarithm of the evidence against clean data.", lambda m: m.stream.evidence.log),
    "limit": ("Natural logarithm of the evidence at which the alarm is raised.", lambda m: m.limit),
    "alarm": ("1 after an alarm, until it is reset; otherwise 0.", lambda m: float(m.alarm is not None)),
    "alarm_timestamp_seconds": (
        "Unix time of the alarm; 0 without an alarm.",
        lambda m: m.alarm.seconds if m.alarm else 0.0,
    ),
    "cost_ratio": ("Time of observing divided by the other time of inference.", lambda m: m.cost),
    "autocorrelation": ("Correlation of neighbouring observations.", lambda m: m.stream.autocorrelation.r),
}
_COUNTERS: dict[str, tuple[str, Callable[[ShiftMonitor], float]]] = {
    "observations": ("Observations from which the evidence is computed.", lambda m: m.stream.evidence.observations),
    "examples": ("Examples that passed through the model.", lambda m: m.stream.passed),
    "examples_looked": ("Examples that the monitor observed.", lambda m: m.stream.looked),
}
_LAYERS: dict[str, tuple[str, Callable[[LayerShift], float]]] = {
    "layer_log_evidence": ("Natural logarithm of a layer's own evidence.", lambda layer: layer.log_evidence),
    "layer_distance": (
        "2-Wasserstein distance from the stored distribution, in sd, for display.",
        lambda layer: layer.w2,
    ),
}
_collectors: WeakKeyDictionary[CollectorRegistry, _Collector] = WeakKeyDictionary()
_joining = Lock()


def register(
    monitor: ShiftMonitor, registry: CollectorRegistry = REGISTRY, labels: Mapping[str, str] | None = None
) -> Callable[[], None]:
    """Adds a monitor to ``registry``, so that every scrape includes it; returns a function that removes it.

    Args:
        monitor: The monitor; it need not observe its model yet.
        registry: The registry with the other metrics of the process.
        labels: Constant labels, such as {"model": "cats"}. Monitors in one registry have the same label names and
            different values.

    Raises:
        ValueError: If a monitor with these labels is registered already, other monitors have different label names, or
            a label is named "layer".
        ModuleNotFoundError: If prometheus_client is not installed.
    """
    with _joining:
        if registry not in _collectors:
            _collectors[registry] = _Collector(registry)
        return _collectors[registry].add(monitor, dict(labels or {}))


@final
class _Collector:
    """All monitors of one registry, because a metric has one description for all models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._monitors: dict[tuple[str, ...], ShiftMonitor] = {}
        self._tables: dict[tuple[str, ...], tuple[ShiftEvidence, list[LayerShift]]] = {}
        self._names: tuple[str, ...] = ()
        registry.register(self)

    def add(self, monitor: ShiftMonitor, labels: dict[str, str]) -> Callable[[], None]:
        """Add this monitor under these labels; the returned function removes it."""
        names, values = tuple(labels), tuple(str(value) for value in labels.values())
        if "layer" in names:
            raise ValueError("labels must have other names than 'layer', got 'layer'. Name the label model or stage.")
        if self._monitors and set(names) != set(self._names):
            raise ValueError(
                f"labels must have the names {sorted(self._names)} of the registry's other monitors, got "
                f"{sorted(names)}. Use the same names."
            )
        self._names = self._names if self._monitors else names
        values = tuple(str(labels[name]) for name in self._names)
        if values in self._monitors:
            raise ValueError(f"a monitor with labels {labels} is registered already. Give it other labels.")
        self._monitors = {**self._monitors, values: monitor}  # a new dict: a scrape may be reading the old one
        return lambda: self._remove(values)

    def _remove(self, values: tuple[str, ...]) -> None:
        with _joining:
            self._monitors = {key: monitor for key, monitor in self._monitors.items() if key != values}
            self._tables.pop(values, None)

    def describe(self) -> list[Metric]:
        """Every metric without samples, so that the registry knows the names."""
        gauges = [GaugeMetricFamily(_PREFIX + name, about) for name, (about, _) in (_GAUGES | _LAYERS).items()]
        return [*gauges, *(CounterMetricFamily(_PREFIX + name, about) for name, (about, _) in _COUNTERS.items())]

    def collect(self) -> Iterator[Metric]:
        """Every metric with the monitors' current values."""
        monitors, names = self._monitors, self._names
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (about, value_of) in table.items():
                family = kind(_PREFIX + name, about, labels=names)
                for values, monitor in monitors.items():
                    family.add_metric(values, value_of(monitor))
                yield family
        layers = [(values, layer) for values, monitor in monitors.items() for layer in self._table(values, monitor)]
        for name, (about, number) in _LAYERS.items():
            family = GaugeMetricFamily(_PREFIX + name, about, labels=(*names, "layer"))
            for values, layer in layers:
                family.add_metric((*values, layer.name), number(layer))
            yield family

    def _table(self, values: tuple[str, ...], monitor: ShiftMonitor) -> list[LayerShift]:
        """The evidence of every layer, computed again only if there is new evidence."""
        evidence = monitor.stream.evidence
        old_evidence, table = self._tables.get(values, (None, []))
        if old_evidence is not evidence:
            table = monitor.table()
            self._tables[values] = evidence, table
        return table
