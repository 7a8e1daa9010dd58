"""Allocator: makes glibc keep freed memory, so that large tensors cause fewer page faults.

When a block of 32 MB or more is freed, glibc returns it to the system. glibc also returns free memory at the top of its
heap. The next tensor of that size is new memory: the system must clear and map every page (4 KiB) at the first access.
For a layer that reads and writes a tensor only once, that costs more than the arithmetic. The settings here make glibc
keep freed memory for the process (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_MMAP_MAX).
"""

from __future__ import annotations

import ctypes
import platform
from typing import final

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_LARGEST_THRESHOLD = 32 << 20  # the largest allowed value: HEAP_MAX_SIZE / 2 on 64 bits


@final
class Tuning:
    """The result of ``tune_allocator``: True if the settings are in effect.

    ``undo()``, or the end of a with block, reverts them.

    Attributes:
        reason: Why the settings are not in effect; "" if they are.
    """

    def __init__(self, libc: ctypes.CDLL | None, reason: str) -> None:
        self._libc, self.reason = libc, reason

    def __bool__(self) -> bool:
        return self._libc is not None

    def __repr__(self) -> str:
        return f"Tuning({self.reason or 'freed memory is kept'})"

    def undo(self) -> None:
        """Restore glibc's initial settings, and return the kept memory to the system.

        One behaviour is not restored. glibc returns freed blocks above a threshold, 128 KiB at the start, and raises
        the threshold whenever a larger block is freed (up to 32 MB). After ``undo`` the threshold stays at 128 KiB.
        """
        if self._libc is not None:
            _set(self._libc, threshold=128 << 10, trim=128 << 10, blocks=65536)
            self._libc.malloc_trim(0)
        self._libc, self.reason = None, "undone"

    def __enter__(self) -> Tuning:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def tune_allocator() -> Tuning:
    """Makes glibc keep the memory of freed tensors for the next tensors; call it once, before training.

    The whole process is affected, with all its libraries. Training becomes faster after a few steps, when the process
    has memory for all tensors of a step. The process keeps this memory, up to 1.5 times as much as without it; GPU
    memory is not affected. So the user decides: nothing in this package calls this function. Models and results do not
    change.

    Returns:
        A Tuning: True if the settings are in effect. Without glibc (musl, macOS, Windows) nothing is done and
        ``reason`` says why. A replacement such as jemalloc (LD_PRELOAD) ignores these settings and does not need them.

    Example:
        >>> with tune_allocator() as tuning:
        ...     keeps = bool(tuning)
        >>> tuning
        Tuning(undone)
    """
    name, _ = platform.libc_ver()
    if name != "glibc":
        return Tuning(None, f"needs glibc, got {name or platform.system()}: nothing was done")
    libc = ctypes.CDLL(None)
    is_set = _set(libc, threshold=_LARGEST_THRESHOLD, trim=2**31 - 1, blocks=0)
    return Tuning(libc, "") if is_set else Tuning(None, "glibc refused the settings: nothing was done")


def _set(libc: ctypes.CDLL, *, threshold: int, trim: int, blocks: int) -> bool:
    settings = ((_MMAP_THRESHOLD, threshold), (_TRIM_THRESHOLD, trim), (_MMAP_MAX, blocks))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
