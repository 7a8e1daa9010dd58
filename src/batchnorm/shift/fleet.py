"""Fleet: combines the evidence of the replicas of one model, so that the fleet keeps the promise of one monitor.

E_k(t) is the evidence of replica k at time t. It is an e-process: its expectation is at most 1 at every stopping time
of its own stream, so it reaches 1 / alpha with probability at most alpha (Ville 1939). N is the number of replicas,
also of those that replace others; it must be fixed before anyone looks at the evidence. w_k = 1 / N. The rules:

**average** (from a checkpoint). The bounds of clean data are fixed numbers, so E_k is also an e-process given what the
whole fleet has observed, if they hold then too: no replica's next observation can be predicted from earlier
observations of *any* replica. Then M(t) = w_1 E_1(t) + ... + w_N E_N(t), with all e-values read at one time, is an
e-process however much the observations of the same time depend on each other (Vovk and Wang 2021; mirrored requests
are allowed), and

    P(M ever reaches 1 / alpha) <= alpha.

Files are rarely of the same time. Two times count as one if they differ by at most ``within``; this assumes that an
observation cannot be predicted from what other replicas observe up to ``within`` later. Without this, an e-value of
noon and one of ten o'clock could be two looks at one stream, one of them with knowledge of the future. So only
e-values of one time are added, and the largest of these sums is the evidence. A replica without a file, or with an
older one, counts as 0 in the sum of a time. As e-values are never negative, each sum is at most M at this time, and
the largest sum over all times and all readings is at most the largest M: the bound holds for every plan of reading.

**largest** (calibrated). All replicas compare with the same clean observations. If these lie low by chance, early
p-values of all replicas are small: what one replica observed tells about the next p-value of another replica. E_k is
an e-process given its own past only, and an average of such e-processes need not be one (Choe and Ramdas 2024), nor is
their product. So the evidence is the largest w_k w_j E_kj over replicas and scores j (``layer_evidence``). Each
reaches 1 / alpha with probability at most alpha w_k w_j, so that any of them does with probability at most alpha.
Nothing is assumed of the replicas' dependence or of the times of their files.

**product** (if ``independent`` is declared): the products P_kb of a bet b from the start are multiplied over replicas,
and the sums S_kb of later products are averaged (``e_processes``), before the mean over bets. A product of e-processes
is one if the streams are independent: no observation of one replica, earlier or later, tells about an observation of
another one. The reference must not connect them either. Bounds from a checkpoint do not, as long as the stored
statistics are right within the tolerance; if they are not, evidence grows as many times faster as there are replicas.
Clean observations that replicas share do connect them, so each replica needs a calibration of its own, on observations
of its own; others are refused. Replicas without a file count as 1, as before their first observation.

**sum** (from a checkpoint, with ``arl``): S_k minus the number of its observations cannot grow in expectation, so
neither can the sum over replicas minus the number of all observations: the expected number of observations of the
fleet until the sum reaches ``arl`` is at least ``arl`` (Shin, Ramdas and Rinaldo 2023). N is not needed, times count
as for the average. Calibrated, with ``arl``: the largest S_kj without w_k, because replica k reaches c within n_k
observations with probability at most n_k / c, and these probabilities add up to n / c for n observations of the fleet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.argument_types import require_number, require_whole_number
from batchnorm.shift.alarm import Alarm, LayerShift, first_moved, hint, layer_shifts
from batchnorm.shift.e_processes import EProcesses, highest, multiplied, weighted_sum
from batchnorm.shift.fleet_states import Replica, check_schemas, one_state_each
from batchnorm.shift.layer_evidence import LayerEvidence

WITHIN = 600.0  # seconds: servers that save once a minute, or every five minutes, are read at one time
AVERAGE, LARGEST, PRODUCT, SUM = "average", "largest", "product", "sum"
Furthest = Callable[[Tensor, Tensor], float | None]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Fleet:
    """The evidence of a fleet.

    Args:
        replicas: One state of every stream.
        left_out: For each state that was left out a sentence that says why.
        rule: The rule of combination: "average", "largest", "product" or "sum".
        size: Number N of replicas that the fleet has, with or without a state.
        within: Seconds by which times may differ that count as one.
        logs: Log evidence of each replica alone, (replicas,).
        counted: Whether the replica's evidence is in the combined evidence, (replicas,).
        evidence: The combined evidence.
        furthest: ``Reference.furthest``; None if the reference is not at hand.
    """

    replicas: tuple[Replica, ...]
    left_out: tuple[str, ...]
    rule: str
    size: int
    within: float
    logs: Tensor
    counted: Tensor
    evidence: LayerEvidence
    furthest: Furthest | None

    @property
    def about(self) -> dict[str, Any]:
        """The settings that all replicas share."""
        return self.replicas[0].state.about

    @property
    def limit(self) -> float:
        """Log evidence that raises the alarm."""
        arl = self.about["arl"]
        return -math.log(self.about["alpha"]) if arl is None else math.log(arl)

    @property
    def examples(self) -> int:
        """Number of examples that passed, observed or not, of the counted replicas."""
        return sum(replica.state.about["passed"] for replica in self._members)

    @property
    def _members(self) -> list[Replica]:
        return [replica for replica, is_in in zip(self.replicas, self.counted.tolist(), strict=True) if is_in]

    @property
    def means(self) -> Tensor:
        """Means of z and q over the counted replicas, (2, channels): of recent observations if there are any."""
        states = [replica.state for replica in self._members]
        count = sum(state.about["recent"]["count"] for state in states)
        name, count = ("recent", count) if count else ("sums", max(1, self.evidence.observations))
        return torch.stack([state.tensors[name] for state in states]).sum(0) / count

    @cached_property
    def layers(self) -> list[LayerShift]:
        """The combined evidence for every layer."""
        return layer_shifts(self.evidence, *self.means, alpha=self.about["alpha"])

    @property
    def alarm(self) -> Alarm | None:
        """The alarm if the evidence reaches the limit, else None."""
        if not self.evidence.log >= self.limit:
            return None
        first, count = first_moved(self.layers, self.limit), self.evidence.observations
        return Alarm(count, self.examples, self.evidence.log, first, self._hint, self.layers, time.time())

    @property
    def _hint(self) -> str:
        if self.furthest is None and self.about["source"] == "calibrated" and self.about["unit"] == "example":
            return ""  # it needs the reference's components
        return hint(self.layers, self.limit, self.furthest(*self.means) if self.furthest else None)


def combined(
    replicas: Sequence[Replica],
    *,
    fleet: int | None = None,
    independent: bool = False,
    within: float = WITHIN,
    furthest: Furthest | None = None,
) -> Fleet:
    """The combined evidence of replicas of one model; of several states of one stream the latest counts.

    Args:
        replicas: States, in any order.
        fleet: Number of replicas that the fleet has, fixed beforehand; None: the number of streams among ``replicas``.
        independent: Whether the streams are independent, as the rule "product" needs it.
        within: Seconds by which times may differ that count as one.
        furthest: ``Reference.furthest`` of the replicas' reference, for the alarm's hint.

    Raises:
        TypeError: If ``fleet`` is not a whole number, or ``within`` is not a number.
        ValueError: If there are no states, a state is damaged, has no stream id or has another schema, two states are
            forks of one stream, there are more streams than ``fleet``, or independence cannot be or is not used.
    """
    _check(fleet, within)
    if not replicas:
        raise ValueError("expected the state of one replica or more, got none. Save the monitors: monitor.save(path).")
    check_schemas(replicas, shares_reference=not independent)
    kept, left_out = one_state_each(replicas)
    size = fleet or len(kept)
    if len(kept) > size:
        raise ValueError(
            f"expected at most {size} streams, got {len(kept)}. The number must be fixed beforehand: declare as many "
            "as the fleet will ever have. A server that loads its file after a restart keeps its stream."
        )
    rule = _rule(kept, independent=independent)
    parts = [replica.state.layer_evidence for replica in kept]
    logs = torch.tensor([part.log for part in parts], dtype=torch.float64)
    log_weight = 0.0 if kept[0].state.about["arl"] is not None else -math.log(size)
    times = torch.tensor([replica.saved for replica in kept], dtype=torch.float64)
    counted = of_one_time(logs, times, within)[1] if rule in {AVERAGE, SUM} else torch.ones(len(kept), dtype=torch.bool)
    members = [part for part, is_in in zip(parts, counted.tolist(), strict=True) if is_in]
    evidence = _merged(members, rule, log_weight, size)
    return Fleet(
        replicas=tuple(kept), left_out=tuple(left_out), rule=rule, size=size, within=within, logs=logs, counted=counted,
        evidence=evidence, furthest=furthest,
    )  # fmt: skip


def of_one_time(logs: Tensor, times: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """Log of the largest sum of e-values of one time, (...,), and which of them are in the sum, (..., replicas).

    Args:
        logs: Logs of e-values, (..., replicas).
        times: Their times in seconds, (..., replicas).
        within: Seconds by which times may differ that count as one.
    """
    later = times[..., None, :] - times[..., :, None]  # by how much a replica's time is after the window's first time
    windows = ((later >= 0) & (later <= within)).expand(*logs.shape, logs.shape[-1])  # (..., windows, replicas)
    sums = torch.where(windows, logs[..., None, :], -torch.inf).logsumexp(-1)
    largest = sums.max(-1, keepdim=True)
    return largest.values[..., 0], windows.take_along_dim(largest.indices[..., None], -2)[..., 0, :]


def _check(fleet: int | None, within: float) -> None:
    if fleet is not None:
        require_whole_number(fleet, "fleet", "Leave it out for the number of streams.")
        if fleet < 1:
            raise ValueError(f"fleet must be 1 or more, got {fleet}. Give the number of replicas.")
    require_number(within, "within", "Leave it out for the default.")
    if not within >= 0:
        raise ValueError(f"within must be 0 seconds or more, got {within}. Leave it out for {WITHIN:g} seconds.")


def _rule(replicas: Sequence[Replica], *, independent: bool) -> str:
    about = replicas[0].state.about
    is_calibrated = about["source"] == "calibrated"
    if independent:
        _check_independent(replicas)
        return PRODUCT
    if is_calibrated:
        return LARGEST
    return AVERAGE if about["arl"] is None else SUM


def _check_independent(replicas: Sequence[Replica]) -> None:
    about = replicas[0].state.about
    if about["arl"] is not None:
        raise ValueError(
            "independence is of use with alpha, got monitors with arl, whose evidence is added whether they are "
            "independent or not. Leave independence out."
        )
    bounds: dict[str, str] = {}
    for replica in replicas if about["source"] == "calibrated" else ():
        other = bounds.setdefault(replica.state.about["bounds"], replica.name)
        if other != replica.name:
            raise ValueError(
                f"independent replicas need a calibration each, got {other} and {replica.name} with the same "
                "clean observations, whose errors they share. Leave independence out, or calibrate each replica."
            )


def _merged(parts: Sequence[LayerEvidence], rule: str, log_weight: float, size: int) -> LayerEvidence:
    def together(name: str) -> EProcesses:
        bets = [part.bets[name] for part in parts]
        if rule == PRODUCT:
            return multiplied(bets, size)
        return highest(bets, log_weight) if name == "ranks" else weighted_sum(bets, log_weight)

    first, count = parts[0], sum(part.observations for part in parts)
    bets: dict[str, Any] = {name: together(name) for name in first.bets}
    return LayerEvidence(layers=first.layers, sizes=first.sizes, **bets, observations=count)
