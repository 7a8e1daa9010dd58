"""Files to write at addresses that fsspec opens: a reader finds the old file or the new one, on stores that replace."""

from __future__ import annotations

from pathlib import Path

from batchnorm.files.remote import file_system
from batchnorm.files.whole import replacing


def write(address: str, data: bytes) -> None:
    """Write a whole file in one call, which object stores (s3, gs, az) carry out as a whole or not at all.

    On file servers (sftp, smb) a reader may find a part of the file while it is written.

    Raises:
        ValueError: If fsspec does not know the protocol of the address.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
        OSError: If the file cannot be written, or the address cannot be reached.
    """
    system, path = file_system(address)
    try:
        if _is_local(system.protocol):
            with replacing(Path(path)) as file:
                file.write(data)
        else:
            system.pipe_file(path, data)
    except Exception as error:  # each protocol's package has errors of its own
        why = f"{type(error).__name__}: {error}"
        raise OSError(f"{address} cannot be written: {why}. Check the address and the rights to write.") from error


def _is_local(protocol: str | tuple[str, ...]) -> bool:
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)
