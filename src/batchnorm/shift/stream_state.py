"""Stream state: everything that a stream's next observation depends on, bit for bit, for files and replicas."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

from batchnorm.files.sidecar import Sidecar
from batchnorm.shift.alarm import Alarm
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.conformal import CELLS, Bag
from batchnorm.shift.e_processes import EProcesses
from batchnorm.shift.evidence import ShiftEvidence, shapes
from batchnorm.shift.layer_evidence import LayerEvidence, bet_shapes
from batchnorm.shift.stream_origin import Origin

FILE = Sidecar(
    "shift", ".bnshift.safetensors", "a monitor's state", version=3, remedy="Write it with monitor.save(path)."
)
DAMAGED = "the state is damaged: parts are missing or of other sizes. Start a new stream."


@final
@dataclass(frozen=True, slots=True, eq=False)
class StreamState:
    """A stream's state at one moment, or a part of it; ``|`` joins parts.

    Args:
        tensors: E-processes, sums and observations that are not in the evidence yet, in float64, and the counts of the
            bag, int32.
        about: All other values, as JSON data: counts, the alarm, and the reference, layers and unit of the stream.
        origin: The stream that the state belongs to; None for a part, and for files of versions before streams had ids.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]
    origin: Origin | None = None

    def __or__(self, other: StreamState) -> StreamState:
        """The state with both parts."""
        return StreamState(self.tensors | other.tensors, self.about | other.about, self.origin or other.origin)

    @classmethod
    def of_evidence(cls, evidence: ShiftEvidence) -> StreamState:
        """The part of a state that stores the evidence."""
        tensors, bets = {}, {}
        for name, wealth in evidence.bets.items():
            tensors |= {f"{name}.product": wealth.product.clone(), f"{name}.restarted": wealth.restarted.clone()}
            bets[name] = {"updates": wealth.updates, "rest": wealth.rest, "is_spread": wealth.is_spread}
        if evidence.bag is not None:
            tensors["bag"] = evidence.bag.counts.clone()
        return cls(tensors, {"bets": bets, "observations": evidence.observations})

    def evidence(self, reference: Reference) -> ShiftEvidence:
        """The evidence against ``reference``, which must be the reference of the state's stream."""
        bag = Bag.counted(self.tensors["bag"].clone()) if "bag" in self.tensors else None
        return ShiftEvidence.of_bets(reference, self._bets, bag, self.about["observations"])

    @property
    def layer_evidence(self) -> LayerEvidence:
        """The evidence for the model, its layers and channels, to which no observation can be added."""
        places: dict[str, Any] = {name: tuple(self.about[name]) for name in ("layers", "sizes")}
        return LayerEvidence(**places, **self._bets, observations=self.about["observations"])

    @property
    def _bets(self) -> dict[str, Any]:
        return {
            name: EProcesses(self.tensors[f"{name}.product"], self.tensors[f"{name}.restarted"], **about)
            for name, about in self.about["bets"].items()
        }

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
        if not self._fits(reference.sizes, shapes(reference)):
            raise ValueError(DAMAGED)

    def check_alone(self) -> None:
        """Refuse a state that does not fit the layers that it names itself, or whose evidence is not a number.

        Raises:
            ValueError: If the state is damaged.
        """
        try:
            names = ("ranks", "marks") if self.about["source"] == "calibrated" else ("mean", "up", *self._down)
            sizes = tuple(self.about["sizes"])
            good = len(self.about["layers"]) == len(sizes) and all(isinstance(size, int) and size > 0 for size in sizes)
            good = good and self._fits(sizes, bet_shapes(sizes, names)) and self._is_sound
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            good = False
        if not good:
            raise ValueError(DAMAGED)

    @property
    def _down(self) -> tuple[str, ...]:
        return ("down",) if "down" in self.about["bets"] else ()

    @property
    def _is_sound(self) -> bool:
        """Whether counts, limits and evidence have values that a stream can have."""
        counts = [self.about[name] for name in ("passed", "looked", "observations")]
        counts += [self.about[name]["count"] for name in ("recent", "auto")]
        bets = list(self.about["bets"].values())
        logs = [self.tensors[f"{name}.{part}"] for name in self.about["bets"] for part in ("product", "restarted")]
        alpha, arl = self.about["alpha"], self.about["arl"]
        return (
            all(isinstance(count, int) and count >= 0 for count in counts)
            and all(about.keys() == {"updates", "rest", "is_spread"} for about in bets)
            and all(0 <= about["rest"] <= 1 and about["is_spread"] == (arl is None) for about in bets)
            and isinstance(self.about["unit"], str)
            and all(isinstance(name, str) for name in self.about["layers"])
            and math.isfinite(self.about["auto"]["sum"])
            and all(bool((log < torch.inf).all()) for log in logs)  # neither infinite nor NaN
            and 0 < alpha < 1
            and (arl is None or 1 < arl < math.inf)
        )

    def _fits(self, sizes: tuple[int, ...], bets: dict[str, tuple[int, ...]]) -> bool:
        """Whether no part is missing, and every tensor has its shape."""
        channels = sum(sizes)
        try:
            expected = {
                f"{name}.{part}": bets[name] for name in self.about["bets"] for part in ("product", "restarted")
            }
            expected |= dict.fromkeys(("sums", "recent", "later"), (2, channels))
            expected |= {"tails.sums": (2, len(sizes))}
            if "ranks" in bets:
                expected["bag"] = (bets["ranks"][1], CELLS)
            good = all(tuple(self.tensors[name].shape) == shape for name, shape in expected.items())
            good &= all(self.tensors[f"waiting.{name}"].shape[1] == channels for name in "zq")
            good &= self.tensors["tails.largest"].shape[1] == len(sizes)
            good &= set(self.about["bets"]) == set(bets)
            good &= "bag" not in self.tensors or Bag.counted(self.tensors["bag"]).is_whole
            good &= all({"count", "least"} <= set(self.about[name]) for name in ("recent", "later"))
            good &= {"passed", "alarm", "open", "auto", "recent", "observations", "tails"} <= set(self.about)
        except (KeyError, TypeError, AttributeError, IndexError):
            return False
        return good

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that ends in .bnshift.safetensors; a failed write leaves no part of it.

        Raises:
            ValueError: If the name has another ending, or an open key is neither text nor a number.
            OSError: If the file cannot be written.
        """
        try:
            origin = {} if self.origin is None else {"stream": asdict(self.origin)}
            FILE.write(path, self.about | origin, self.tensors)
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
        stream = about.pop("stream", None)
        return cls(tensors, about, None if stream is None else Origin.of_dict(stream))
