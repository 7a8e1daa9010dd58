"""Fleet files: reads the states of many replicas from paths, patterns, folders and addresses of fsspec."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.files.remote import listed
from batchnorm.shift.fleet_states import Replica
from batchnorm.shift.stream_state import FILE, StreamState


def read(addresses: Sequence[str]) -> tuple[list[Replica], int]:
    """The states at all addresses, and the number of other files there, which are not read.

    Raises:
        FileNotFoundError: If an address has no file, or no monitor's state.
        ValueError: If a file is damaged, of another kind or version, or fsspec does not know a protocol.
        ModuleNotFoundError: If fsspec, or the package that it needs for a protocol, is not installed.
        OSError: If a file cannot be read, or an address cannot be reached.
    """
    names: dict[str, None] = {}
    others = 0
    for address in addresses:
        states, more = _states(address)
        names |= dict.fromkeys(states)
        others += more
    return [Replica(name, _loaded(name)) for name in names], others


def _states(address: str) -> tuple[list[str], int]:
    """Files at one address that end as states do, and the number of other files; a single file may have any ending."""
    found = listed(address)
    states = [name for name in found if name.endswith(FILE.suffix)]
    if not states and len(found) > 1:
        raise FileNotFoundError(
            f"expected files that end in {FILE.suffix}, got {len(found)} other files at {address}. Save the monitors "
            f"there: monitor.save(...{FILE.suffix})."
        )
    return (states, len(found) - len(states)) if states else (found, 0)


def _loaded(name: str) -> StreamState:
    try:
        return StreamState.load(name)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(f"{name} cannot be read: {error.strerror}. Check the file and the rights to read it.") from error
