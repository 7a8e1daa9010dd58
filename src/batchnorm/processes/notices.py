"""Notices: what a rank leaves in the store of the process group for the other ranks; no rank waits for another.

The store is the one that ``init_process_group`` made, mostly hosted by rank 0. A rank replaces its notices in turn, so
the store keeps the last two of each rank. A rank that ends, or never leaves a notice, is only missing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final
from uuid import uuid4

from torch import distributed

from batchnorm.processes.membership import members

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

_SLOTS = 2  # notices that are kept of each rank, so that a rank can read one while the next is left
_PAUSE = 0.02  # seconds between two looks of a rank that waits


@final
class Notices:
    """The notices that the ranks of a group leave about one subject.

    The first rank of the group begins a series of notices by a new name for it. Notices of earlier series are not read.

    Args:
        group: The process group, with this rank in it.
        subject: A name that is the same on all ranks.

    Attributes:
        rank: The global rank of this process.
        ranks: The global ranks of the group.

    Raises:
        RuntimeError: If the process group has no store.
    """

    def __init__(self, group: ProcessGroup, subject: str) -> None:
        self.rank, self.ranks = distributed.get_rank(), members(group)
        self._prefix = f"batchnorm/notices/{group.group_name}/{subject}"
        self._store = _store()
        if self.is_first:
            self._store.set(f"{self._prefix}/series", uuid4().hex)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first rank of the group."""
        return self.rank == self.ranks[0]

    def leave(self, number: int, content: bytes) -> None:
        """Leave this rank's notice with a number; numbers count up by one."""
        series = self._series()
        self._store.set(self._key(self.rank, number), _mark(series, number) + content)  # type: ignore[arg-type]
        self._store.set(self._key(self.rank), f"{series}/{number}")

    def last(self) -> dict[int, int]:
        """Rank -> the number of its last notice, of the ranks that have left one in this series."""
        present, series = self._present(), self._series()
        found = self._store.multi_get([self._key(rank) for rank in present])
        parts = {rank: each.decode().partition("/") for rank, each in zip(present, found, strict=True)}
        return {rank: int(number) for rank, (own, _, number) in parts.items() if own == series}

    def wait(self, number: int, seconds: float) -> None:
        """Wait until all ranks that have left a notice have left this one, at most for some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(last < number for last in self.last().values()):
            time.sleep(_PAUSE)

    def read(self, number: int) -> dict[int, bytes]:
        """Rank -> its notice with this number, of the ranks whose notice is there and not yet replaced."""
        present = [rank for rank, last in self.last().items() if last >= number]
        contents = {rank: self._store.get(self._key(rank, number)) for rank in present}
        mark = _mark(self._series(), number)
        return {rank: each.removeprefix(mark) for rank, each in contents.items() if each.startswith(mark)}

    def _series(self) -> str:
        key = f"{self._prefix}/series"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _present(self) -> list[int]:
        """The ranks that ever left a notice: one question to the store if all have."""
        if self._store.check([self._key(rank) for rank in self.ranks]):
            return self.ranks
        return [rank for rank in self.ranks if self._store.check([self._key(rank)])]

    def _key(self, rank: int, number: int | None = None) -> str:
        return f"{self._prefix}/{rank}" + ("" if number is None else f"/{number % _SLOTS}")


def _mark(series: str, number: int) -> bytes:
    return f"{series}/{number}/".encode()


def _store() -> Store:
    store = distributed.distributed_c10d._get_default_store()
    if store is None:
        raise RuntimeError("notices need a process group with a store, got one without. Use the backend gloo or nccl.")
    return store
