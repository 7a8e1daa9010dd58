"""FleetVerdict: whether the replicas of one model together raise the alarm, from their files, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import final

import torch

from batchnorm.reporting.json_values import Json, to_json
from batchnorm.shift import fleet_files
from batchnorm.shift.fleet import WITHIN, Fleet, combined
from batchnorm.shift.fleet_states import Replica
from batchnorm.shift.observation_units import Autocorrelation

# changes when a key of to_dict() changes its meaning or goes away
SCHEMA_VERSION = 1


@final
@dataclass(frozen=True, slots=True)
class ReplicaVerdict:
    """One replica of a fleet.

    Args:
        file: The file of its latest state.
        stream: The id of its stream.
        saved: Unix time of the state.
        examples: Number of examples that passed, observed or not.
        observations: Number of observations.
        log_evidence: Natural logarithm of its own evidence.
        counted: Whether its evidence is in the combined evidence.
        alarm: Whether it raised an alarm by itself.
        correlation: Correlation of its neighbouring observations.
        dependent: Whether that correlation is too large for the unit.
    """

    file: str
    stream: str
    saved: float
    examples: int
    observations: int
    log_evidence: float
    counted: bool
    alarm: bool
    correlation: float
    dependent: bool


@final
@dataclass(frozen=True, slots=True)
class FleetLayer:
    """A layer with ``size`` channels; ``moved`` if its combined evidence reaches the limit. Others: ``LayerShift``."""

    name: str
    size: int
    moved: bool
    log_evidence: float
    kind: str
    channels: tuple[int, ...]
    w2: float
    kl: float


@final
@dataclass(frozen=True, slots=True)
class FleetVerdict:
    """The result of ``judge``.

    Args:
        target: The addresses of the files.
        command: The command that gives the verdict again.
        source: "checkpoint" or "calibrated".
        unit: What one observation is.
        alpha: Largest probability of a false alarm; not used if ``arl`` is not None.
        arl: Smallest average number of the fleet's observations until a false alarm; None for ``alpha``.
        rule: The rule of combination: "average", "largest", "product" or "sum" (``batchnorm.shift.fleet``).
        fleet: Number of replicas of the fleet, with or without a file.
        declared: Whether this number was declared, and not counted.
        within: Seconds by which times may differ that count as one.
        replicas: The replicas, in the order of their files.
        left_out: For each state that was left out a sentence that says why.
        other_files: Number of files at the addresses that are no states.
        shift: Whether the combined evidence reached the limit.
        examples: Number of examples that passed the counted replicas.
        observations: Number of observations of the counted replicas.
        log_evidence: Natural logarithm of the combined evidence.
        log_limit: Log evidence that raises the alarm.
        first: The first layer in forward order whose combined evidence reached the limit; None if no layer's did.
        hint: What the change looks like; "" if there is no alarm, if that is not clear, or if it needs the reference.
        layers: Every layer.
    """

    target: str
    command: str
    source: str
    unit: str
    alpha: float
    arl: float | None
    rule: str
    fleet: int
    declared: bool
    within: float
    replicas: tuple[ReplicaVerdict, ...]
    left_out: tuple[str, ...]
    other_files: int
    shift: bool
    examples: int
    observations: int
    log_evidence: float
    log_limit: float
    first: str | None
    hint: str
    layers: tuple[FleetLayer, ...]

    def to_dict(self) -> dict[str, Json]:
        """Plain values for JSON, as ``fleet_verdict.schema.json`` describes them."""
        head = {"schema_version": SCHEMA_VERSION, "batchnorm": version("batchnorm")}
        return {**head, **asdict(self), "versions": {"torch": str(torch.__version__)}}

    def to_json(self) -> str:
        """``to_dict`` as JSON; NaN and infinities become strings, because JSON has no such numbers."""
        return to_json(self.to_dict())


def judge(
    addresses: Sequence[str],
    *,
    fleet: int | None = None,
    independent: bool = False,
    within: float = WITHIN,
    command: str = "",
) -> FleetVerdict:
    """Judge whether the replicas whose states are at these addresses together raise the alarm.

    Args:
        addresses: Paths, patterns, folders and addresses of fsspec.
        fleet: Number of replicas that the fleet has, fixed before anyone looks; None: the number of streams found.
        independent: Whether the streams are declared to be independent.
        within: Seconds by which times may differ that count as one.
        command: The command that gives the verdict again.

    Raises:
        TypeError: If ``fleet`` is not a whole number, or ``within`` is not a number.
        ValueError: If a file is damaged or of another kind, the states are not of one fleet, or independence is
            declared and cannot be used. ``combined`` and ``read`` have the whole list.
        ModuleNotFoundError: If fsspec, or the package that it needs for a protocol, is not installed.
        OSError: If there is no file, a file cannot be read, or an address cannot be reached.
    """
    replicas, others = fleet_files.read(addresses)
    found = combined(replicas, fleet=fleet, independent=independent, within=within)
    about, alarm = found.about, found.alarm
    return FleetVerdict(
        target=", ".join(addresses), command=command, source=about["source"], unit=about["unit"], alpha=about["alpha"],
        arl=about["arl"], rule=found.rule, fleet=found.size, declared=fleet is not None, within=found.within,
        replicas=_replicas(found), left_out=found.left_out, other_files=others, shift=alarm is not None,
        examples=found.examples, observations=found.evidence.observations, log_evidence=found.evidence.log,
        log_limit=found.limit, first=alarm.first if alarm else None, hint=alarm.hint if alarm else "",
        layers=_layers(found),
    )  # fmt: skip


def _replicas(found: Fleet) -> tuple[ReplicaVerdict, ...]:
    rows = zip(found.replicas, found.logs.tolist(), found.counted.tolist(), strict=True)
    return tuple(_replica(replica, log, is_counted) for replica, log, is_counted in rows)


def _replica(replica: Replica, log: float, is_counted: bool) -> ReplicaVerdict:
    about, correlation = replica.state.about, Autocorrelation()
    correlation.put(replica.state)
    return ReplicaVerdict(
        replica.name, replica.origin.id, replica.saved, about["passed"], about["observations"], log, is_counted,
        about["alarm"] is not None, correlation.r, correlation.is_wrong,
    )  # fmt: skip


def _layers(found: Fleet) -> tuple[FleetLayer, ...]:
    rows = zip(found.layers, found.evidence.sizes, strict=True)
    return tuple(
        FleetLayer(size=size, moved=layer.log_evidence >= found.limit, **asdict(layer)) for layer, size in rows
    )
