"""Failed exchanges: the error says what they were for, and names ranks that did not report a failure to the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import distributed

from batchnorm.processes.membership import members

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

_SECONDS = 1.0  # how long a rank waits for the reports of the others


def about_failure(group: ProcessGroup, need: str, suspicion: str, error: Exception) -> str:
    """The text of the error of a rank whose collective failed.

    Args:
        group: The process group.
        need: What needs which numbers of the group's ranks, as the start of a sentence.
        suspicion: What a silent rank may do other than to end or hang, as words that follow "it has ended, hangs,".
        error: What the backend raised.
    """
    ranks, rank = members(group), distributed.get_rank()
    return (
        f"{need}, and on rank {rank} the exchange failed. {_about_reports(ranks, rank, need, group)} Look first at the "
        f"output of a rank that did not report: it has ended, hangs, {suspicion}. If it only is slow, allow more time: "
        f"init_process_group(timeout=...). The backend says: {str(error).strip()}"
    )


def _about_reports(ranks: list[int], rank: int, need: str, group: ProcessGroup) -> str:
    """Which ranks told the store within ``_SECONDS`` that an exchange of theirs failed too."""
    try:
        store = distributed.distributed_c10d._get_default_store()
        keys = {each: f"batchnorm/failed/{group.group_name}/{each}" for each in ranks}
        store.set(keys[rank], need)
        silent = _silent(store, keys)
    except (RuntimeError, ValueError):
        return "The store of the process group cannot be reached: the process that hosts it, mostly rank 0, has ended."
    if not silent:
        return "All ranks of the group report a failure."
    numbers = ", ".join(map(str, silent))
    return f"Rank{'s' if len(silent) > 1 else ''} {numbers} did not report a failure within {_SECONDS:g} s."


def _silent(store: Store, keys: dict[int, str]) -> list[int]:
    """The ranks whose reports did not come; if the host of the store ends meanwhile, as far as is known by then."""
    end = time.monotonic() + _SECONDS
    silent = [rank for rank, key in keys.items() if not store.check([key])]
    while silent and time.monotonic() < end:
        time.sleep(0.05)
        try:
            silent = [rank for rank in silent if not store.check([keys[rank]])]
        except RuntimeError:
            return silent
    return silent
