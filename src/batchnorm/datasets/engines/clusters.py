"""Clusters: what the adapters share; whether an address can be reached, and what an engine's own errors mean."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS = 10.0  # for a connection to a scheduler: one that is up answers in milliseconds, also on another continent
_HOST = re.compile(r"(?:(?P<protocol>[a-z]+)://)?(?P<host>\[[^]]+\]|[^:/,\[]+):(?P<port>\d+)", re.IGNORECASE)


def require_reachable(engine: str, address: str) -> None:
    """Try to connect to the scheduler, if the address has a host and a port.

    The engines' clients wait for minutes, or without end, for a scheduler that is not there.

    Raises:
        OSError: If nothing answers within 10 seconds.
    """
    found = _HOST.match(address)
    if found is None:
        return
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise unreachable(engine, address, error) from error


def require_no_address(engine: str, address: str | None) -> None:
    """Refuse an address in a program that has a connection already, which would be used instead.

    Raises:
        ValueError: If there is an address.
    """
    if address is not None:
        raise ValueError(
            f"this program is connected to {engine} already, got the address {address!r}. Leave the address out to use "
            "the connection, or close the connection first."
        )


def unreachable(engine: str, address: str, error: BaseException) -> OSError:
    """The error for a cluster that cannot be reached."""
    why = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
    return ConnectionError(
        f"cannot reach {engine} at {address}: {why.splitlines()[0]}. Check that its scheduler runs and the address, or "
        "leave the address out to start local workers."
    )


@contextmanager
def explained(engine: str) -> Iterator[None]:
    """A block in which an engine measures. Its own errors become errors of ours, without its traceback.

    Raises:
        ModuleNotFoundError: If a worker lacks batchnorm or a package that it needs.
        OSError: If the engine failed in another way, such as a worker that was killed again and again.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, MemoryError):
        raise
    except Exception as error:  # each engine has errors of its own
        text = f"{error}\n{error.__cause__ or ''}"
        if missing := re.search(r"No module named '([\w.]+)'", text):
            raise ModuleNotFoundError(
                f"the workers of {engine} need batchnorm and what it reads data with: {missing[1]} is not installed "
                "there. Run on each of them: pip install 'batchnorm[data]'"
            ) from error
        raise ChildProcessError(
            f"{engine} could not measure every piece: {type(error).__name__}: {_last_line(str(error))}. Read the "
            "logs of its workers, or give them more memory."
        ) from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no reason"
