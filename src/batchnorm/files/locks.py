"""Locks of files: one writer at a time. The operating system releases the lock of a process that was killed."""

from __future__ import annotations

from contextlib import suppress


def lock(file: int, words: str) -> None:
    """Lock an open file. Does nothing if the operating system or the file system has no locks.

    Raises:
        ValueError: If another open file has the lock; ``words`` is its message.
    """
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(words) from None
        except OSError:
            pass


def unlock(file: int) -> None:
    """Release the lock, also if a forked process still has the file open."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
