"""Stream state: everything that a stream's next observation depends on, bit for bit, for files and replicas."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from batchnorm.files.sidecar import Sidecar
from batchnorm.shift.alarm import Alarm
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.conformal import CELLS, Bag
from batchnorm.shift.e_processes import EProcesses
from batchnorm.shift.evidence import BETS, ShiftEvidence, shapes, stakes_for

FILE = Sidecar(
    "shift", ".bnshift.safetensors", "a monitor's state", version=3, remedy="Write it with monitor.save(path)."
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class StreamState:
    """A stream's state at one moment, or a part of it; ``|`` joins parts.

    Args:
        tensors: E-processes, sums and observations that are not in the evidence yet, in float64, and the counts of the
            bag, int32.
        about: All other values, as JSON data: counts, the alarm, and the reference and unit of the stream.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def __or__(self, other: StreamState) -> StreamState:
        """The state with both parts."""
        return StreamState(self.tensors | other.tensors, self.about | other.about)

    @classmethod
    def of_evidence(cls, evidence: ShiftEvidence) -> StreamState:
        """The part of a state that stores the evidence."""
        tensors, bets = {}, {}
        for name in BETS:
            wealth: EProcesses | None = getattr(evidence, name)
            if wealth is None:
                continue
            tensors |= {f"{name}.product": wealth.product.clone(), f"{name}.restarted": wealth.restarted.clone()}
            bets[name] = {"updates": wealth.updates, "rest": wealth.rest, "is_spread": wealth.is_spread}
        if evidence.bag is not None:
            tensors["bag"] = evidence.bag.counts.clone()
        return cls(tensors, {"bets": bets, "observations": evidence.observations})

    def evidence(self, reference: Reference) -> ShiftEvidence:
        """The evidence against ``reference``, which must be the reference of the state's stream."""
        bets: dict[str, Any] = dict.fromkeys(BETS)
        for name, about in self.about["bets"].items():
            bets[name] = EProcesses(self.tensors[f"{name}.product"], self.tensors[f"{name}.restarted"], **about)
        bag = Bag.counted(self.tensors["bag"].clone()) if "bag" in self.tensors else None
        return ShiftEvidence(
            reference, **bets, bag=bag, stakes=stakes_for(reference), observations=self.about["observations"]
        )

    @property
    def alarm(self) -> Alarm | None:
        """The alarm; None if there was none."""
        fields = self.about["alarm"]
        return None if fields is None else Alarm.of_dict(fields)

    def check(self, reference: Reference) -> None:
        """Refuse a state that lacks a part, or whose tensors do not fit ``reference``.

        Raises:
            ValueError: If the state is damaged.
        """
        channels, bets = sum(reference.sizes), shapes(reference)
        try:
            expected = {
                f"{name}.{part}": bets[name] for name in self.about["bets"] for part in ("product", "restarted")
            }
            expected |= {
                "sums": (2, channels),
                "recent": (2, channels),
                "later": (2, channels),
                "tails.sums": (2, len(reference.sizes)),
            }
            if "ranks" in bets:
                expected["bag"] = (bets["ranks"][1], CELLS)
            good = all(tuple(self.tensors[name].shape) == shape for name, shape in expected.items())
            good &= all(self.tensors[f"waiting.{name}"].shape[1] == channels for name in "zq")
            good &= self.tensors["tails.largest"].shape[1] == len(reference.sizes)
            good &= set(self.about["bets"]) == set(bets)
            good &= "bag" not in self.tensors or Bag.counted(self.tensors["bag"]).is_whole
            good &= all({"count", "least"} <= set(self.about[name]) for name in ("recent", "later"))
            good &= {"passed", "alarm", "open", "auto", "recent", "observations", "tails"} <= set(self.about)
        except (KeyError, TypeError, AttributeError, IndexError):
            good = False
        if not good:
            raise ValueError("the state is damaged: parts are missing or of other sizes. Start a new stream.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that ends in .bnshift.safetensors; a failed write leaves no part of it.

        Raises:
            ValueError: If the name has another ending, or an open key is neither text nor a number.
            OSError: If the file cannot be written.
        """
        try:
            FILE.write(path, self.about, self.tensors)
        except TypeError as error:
            raise ValueError(
                f"a monitor can be saved if its unit's keys are text or numbers: {error}. Return such keys."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamState:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: If the file is damaged, or of another kind or version.
            OSError: If the file cannot be read.
        """
        about, tensors = FILE.read(path)
        return cls(tensors, about)
