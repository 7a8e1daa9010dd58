"""Fleet states: which states can be combined, and one state of each stream among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from batchnorm.shift.stream_origin import Origin
from batchnorm.shift.stream_state import FILE, StreamState

_SCHEMA = ("layers", "sizes", "digest", "source", "unit", "bounds", "alpha", "arl")
_WORDS = {
    "layers": "the layers' names",
    "sizes": "the layers' numbers of channels",
    "digest": "the model's weights or statistics",
    "source": "the source of the reference",
    "bounds": "the reference",
}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """The state of a replica, with the name of its file, for messages."""

    name: str
    state: StreamState

    @property
    def origin(self) -> Origin:
        """The stream of the state.

        Raises:
            ValueError: If the state has no stream id, because an earlier version wrote it.
        """
        if self.state.origin is None:
            raise ValueError(
                f"{self.name} has no stream id, because an earlier version wrote it: it may be an earlier state of "
                "another file. Load it in its server's monitor, and save it again: monitor.load(path).save(path)."
            )
        return self.state.origin

    @property
    def saved(self) -> float:
        """Unix time of the state."""
        return self.origin.saved


def schema_hash(about: Mapping[str, Any]) -> str:
    """SHA-256 of what states must share to be combined: layers, model, reference, unit, alpha, arl and file version."""
    values = {name: about.get(name) for name in _SCHEMA} | {"version": FILE.version}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_schemas(replicas: Sequence[Replica], *, shares_reference: bool) -> None:
    """Refuse states that are damaged, or differ from the first state in what the schema hash covers.

    Args:
        replicas: States.
        shares_reference: Whether calibrated states must have the same clean observations.

    Raises:
        ValueError: If a state is refused; the message names what differs.
    """
    for replica in replicas:
        _check(replica)
    first = replicas[0]
    for replica in replicas[1:]:
        differing = list(_differing(first.state.about, replica.state.about, shares_reference=shares_reference))
        if differing:
            raise ValueError(
                f"{replica.name} is no replica of {first.name}: {'; '.join(differing)}. Merge the files of one model "
                "with one reference and the same settings."
            )


def _check(replica: Replica) -> None:
    about, _ = replica.state.about, replica.origin
    try:
        replica.state.check_alone()
    except ValueError as error:
        raise ValueError(f"{replica.name} cannot be merged: {error}") from None
    if about.get("schema") != schema_hash(about):
        raise ValueError(
            f"{replica.name} is damaged: its schema hash is not that of its settings. Save the monitor again."
        )


def _differing(first: Mapping[str, Any], other: Mapping[str, Any], *, shares_reference: bool) -> Iterator[str]:
    if first["schema"] == other["schema"]:
        return
    for name in _SCHEMA:
        if first[name] == other[name] or (
            name == "bounds" and not shares_reference and first["source"] == "calibrated"
        ):
            continue
        if name in {"digest", "bounds"}:
            yield f"{_WORDS[name]} {'differ' if name == 'digest' else 'differs'}"
        else:
            yield f"{_WORDS.get(name, name)}: expected {_short(first[name])}, got {_short(other[name])}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_state_each(replicas: Sequence[Replica]) -> tuple[list[Replica], list[str]]:
    """The latest state of each stream, and a sentence for each state that is left out.

    Raises:
        ValueError: If two states are forks of one stream: they share observations, and each has others too.
    """
    by_id: dict[str, list[Replica]] = {}
    left_out: list[str] = []
    for replica in replicas:
        kept = by_id.setdefault(replica.origin.id, [])  # more than one only after forks before the first example
        if (same := next((at for at, other in enumerate(kept) if _are_of_one_stream(other, replica)), None)) is None:
            kept.append(replica)
            continue
        later, earlier = _ordered(kept[same], replica)
        kept[same] = later
        left_out.append(f"{earlier.name} is an earlier state, or a copy, of the stream in {later.name}: it is left out")
    return [replica for kept in by_id.values() for replica in kept], left_out


def _are_of_one_stream(one: Replica, other: Replica) -> bool:
    """Whether the states share observations, or one of them is the empty beginning of the other."""
    fewer, more = sorted((one, other), key=lambda replica: (len(replica.origin.legs), _examples(replica)))
    begins = more.origin.legs[: len(fewer.origin.legs)] == fewer.origin.legs
    shared = one.origin.shared(other.origin, (_examples(one), _examples(other)))
    return shared > 0 or (begins and _examples(fewer) == 0)


def _ordered(one: Replica, other: Replica) -> tuple[Replica, Replica]:
    """The later and the earlier state of one stream."""
    for later, earlier in ((one, other), (other, one)):
        if _continues(later, earlier):
            return later, earlier
    raise ValueError(
        f"{one.name} and {other.name} are two continuations of one stream, which both count its first observations. "
        "Merge one of them only, and let the other server begin a new stream: monitor.reset()."
    )


def _continues(later: Replica, earlier: Replica) -> bool:
    """Whether ``later`` can be a later state of the stream of ``earlier``: its legs are more, and nothing decreased."""
    before, after = earlier.origin.legs, later.origin.legs
    if after[: len(before)] != before or (len(after) > len(before) and after[len(before)][1] < _examples(earlier)):
        return False
    counts = all(later.state.about[name] >= earlier.state.about[name] for name in ("looked", "passed", "observations"))
    energies = (replica.state.tensors["sums"][1] for replica in (later, earlier))  # no energy is negative
    return counts and bool(torch.ge(*energies).all())


def _examples(replica: Replica) -> int:
    return int(replica.state.about["looked"])
