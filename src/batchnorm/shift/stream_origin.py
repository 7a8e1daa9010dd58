"""Stream origin: which stream a state belongs to, and whether one state of a stream continues another one.

A stream has a random id, which its files keep. It consists of legs: a leg begins when a monitor loads a file, or when
a process that was forked goes on with a stream. A leg has a random token, and the number of examples that the stream
had observed at its beginning. Within a leg one process counts, so its states follow each other. Two states with the
same first legs share the observations up to the first leg that differs:

- A state whose legs are the first legs of another state is an earlier state, if the next leg began at it or later.
- Two states that share no example belong to different streams, also if their ids are equal: processes that were forked
  before the first example, or copies of an empty file.
- All other pairs are forks: two servers went on with copies of one stream, whose first examples both of them count.

A copy of a running process, such as a virtual machine's, has the same legs. Numbers of examples and sums of energies
cannot decrease within a leg, so two copies are recognized as a fork if some number is larger in one state, and another
number in the other state.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, final

_LAST = 2.5e11  # Unix time of the year 9892, before the last year that dates have


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """The stream of a state.

    Args:
        id: The stream's id.
        legs: For each leg its token, and the number of examples that the stream had observed when it began.
        saved: Unix time of the state.
    """

    id: str
    legs: tuple[tuple[str, int], ...]
    saved: float

    @classmethod
    def of_dict(cls, values: Any) -> Origin:
        """The origin from its dict, also from a dict read from JSON.

        Raises:
            ValueError: If the values are not those of an origin.
        """
        try:
            legs = tuple((str(token), int(start)) for token, start in values["legs"])
            saved = float(values["saved"])
            starts = [start for _, start in legs]
            if legs and starts == sorted(starts) and starts[0] == 0 and 0 <= saved < _LAST:
                return cls(str(values["id"]), legs, saved)
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise ValueError("the state is damaged: its stream's id, legs or time are not whole. Start a new stream.")

    def shared(self, other: Origin, ends: tuple[int, int]) -> int:
        """Number of examples that are in both streams, if legs differ; ``ends`` are the examples of both states."""
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.legs, other.legs, strict=False)))
        if not alike:
            return 0
        return min(
            origin.legs[alike][1] if len(origin.legs) > alike else end
            for origin, end in zip((self, other), ends, strict=True)
        )


@final
class LiveOrigin:
    """The origin of a stream that observes: a new stream, until ``go_on`` is called."""

    def __init__(self) -> None:
        self._id, self._process = uuid.uuid4().hex, os.getpid()
        self._legs: tuple[tuple[str, int], ...] = ((_token(), 0),)

    def at(self, examples: int) -> Origin:
        """The origin of a state with so many observed examples."""
        self.check_process(examples)
        return Origin(self._id, self._legs, time.time())

    def check_process(self, examples: int) -> None:
        """Begin a leg if this process was forked, after so many observed examples."""
        if os.getpid() != self._process:
            self._legs, self._process = (*self._legs, (_token(), examples)), os.getpid()

    def go_on(self, origin: Origin | None, examples: int) -> None:
        """Go on with a state of so many observed examples; it has no origin if an earlier version wrote it."""
        if origin is not None:
            self._id, self._legs = origin.id, (*origin.legs, (_token(), examples))


def _token() -> str:
    return uuid.uuid4().hex[:16]
