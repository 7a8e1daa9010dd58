"""Files to read: a local path, a pattern with * and ?, or an address that fsspec opens, such as s3://bucket/runs/*."""

from __future__ import annotations

import glob
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, final

Address = str | os.PathLike[str]

# what stores call the version of a file, best first: tags and checksums, then times of change
_VERSIONS = (
    "ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "CRC", "generation", "VersionId",
    "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created",
)  # fmt: skip

# at least two letters: a single letter is a drive of Windows
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]+(://|::.*://)", re.IGNORECASE)


def is_remote(address: Address) -> bool:
    """Whether fsspec opens the address (``protocol://...``); other addresses are local paths."""
    return bool(_PROTOCOL.match(os.fspath(address)))


def path_part(address: str) -> str:
    """The part of an address that has the path of the file.

    It is ``zip://a.csv`` of ``zip://a.csv::s3://b/c.zip``, ``s3://b/a.csv`` of ``simplecache::s3://b/a.csv``, and the
    whole address if nothing is chained.
    """
    parts = address.split("::") if is_remote(address) else [address]
    return next((part for part in parts if "://" in part), address)


def listed(address: Address) -> list[str]:
    """The files at an address, sorted: the file itself, all files below a folder, or all that match a pattern.

    A folder that matches a pattern counts as the files below it. Files and folders whose names begin with a dot are
    left out below folders. A local file whose name has the characters of a pattern is found by its name. In addresses
    of http and https, ? is no pattern.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If fsspec does not know the protocol of the address.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
        OSError: If the address cannot be reached.
    """
    name = os.fspath(address)
    found = sorted(set(_remote(name) if is_remote(name) else _local(name)))
    if not found:
        raise FileNotFoundError(
            f"expected a file, a folder with files, or a pattern that matches files, got {name}, where there is no "
            "file. Check the address."
        )
    return found


def opened(address: Address, *, ahead: bool = True) -> BinaryIO:
    """The file at an address, open for reading bytes; the file can seek.

    Args:
        address: A path or an address.
        ahead: Whether a store is asked for more bytes than are read, because the next bytes are read soon.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If fsspec does not know the protocol of the address.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
        OSError: If the file cannot be read, or the address cannot be reached.
    """
    name = os.fspath(address)
    if not is_remote(name):
        return Path(name).open("rb")
    with reaching(name):
        system, path = file_system(name)
        file = system.open(path, "rb")
        if not ahead:
            _read_exactly(file)
    weakref.finalize(file, bool, system)  # keeps the system: an archive is closed with its system, not with its files
    return file


def _read_exactly(file: Any) -> None:
    """Every read of a file of a store fetches its bytes, and no others."""
    from fsspec.caching import BaseCache
    from fsspec.spec import AbstractBufferedFile

    if isinstance(file, AbstractBufferedFile) and file.cache is not None:
        file.cache = BaseCache(int(file.blocksize), file._fetch_range, file.size)


@final
@dataclass(frozen=True, slots=True, order=True)
class Details:
    """Bytes of a file, and what changes with its content: its time of change, or the store's own tag or checksum."""

    size: int
    version: str


def details(address: Address) -> Details:
    """Size and version of a file as it is now; version "" if the store does not say it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If fsspec does not know the protocol of the address.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
        OSError: If the address cannot be reached.
    """
    name = os.fspath(address)
    if not is_remote(name):
        about = Path(name).stat()
        return Details(about.st_size, str(about.st_mtime_ns))
    with reaching(name):
        system, path = file_system(name)
        system.invalidate_cache(path)
        return _details(system.info(path))


def _details(about: dict[str, Any]) -> Details:
    version = next((str(about[key]) for key in _VERSIONS if about.get(key)), "")
    return Details(int(about.get("size") or about.get("file_size") or 0), version)


def tree(address: Address) -> list[tuple[str, Details]]:
    """All files below a folder, also those whose names begin with a dot, with their details, sorted by name.

    Raises:
        OSError: If the address cannot be reached.
    """
    name = os.fspath(address)
    if not is_remote(name):
        files = (each for each in Path(name).rglob("*") if each.is_file())
        return sorted((each.relative_to(name).as_posix(), details(each)) for each in files)
    with reaching(name):
        system, path = file_system(name)
        system.invalidate_cache(path)
        return sorted(
            (each.removeprefix(path), _details(about)) for each, about in system.find(path, detail=True).items()
        )


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """A block that uses a remote file; an error of the protocol's package that is no OSError becomes one."""
    try:
        yield
    except FileNotFoundError as error:
        why = error.__cause__  # http raises FileNotFoundError also if the server cannot be reached
        if why is None or isinstance(why, FileNotFoundError):
            raise FileNotFoundError(
                f"expected a file, got {address}, where there is none. Check the address."
            ) from error
        raise OSError(_unreadable(address, why)) from error
    except (ModuleNotFoundError, ValueError):
        raise
    except Exception as error:  # each protocol's package has errors of its own
        raise OSError(_unreadable(address, error)) from error


def _unreadable(address: str, why: BaseException) -> str:
    return f"{address} cannot be read: {type(why).__name__}: {why}. Check the address, the network and the credentials."


def _local(name: str) -> Iterator[str]:
    for path in [name] if Path(name).exists() else glob.glob(name, recursive=True):  # noqa: PTH207 - of absolute ones
        if Path(path).is_dir():
            files = (each for each in Path(path).rglob("*") if each.is_file())
            yield from (str(each) for each in files if _is_visible(each.relative_to(path).as_posix()))
        else:
            yield path


def _remote(name: str) -> Iterator[str]:
    first, chain, rest = name.partition("::")
    if "://" not in first:  # a cache before an address: simplecache::s3://bucket/a.csv
        yield from (f"{first}::{each}" for each in listed(rest))
        return
    with reaching(name):
        system, path = file_system(name)
        for each in system.glob(path) if is_pattern(first) else [path]:
            yield from (system.unstrip_protocol(found) + chain + rest for found in _below(system, each))


def _below(system: Any, path: str) -> Iterator[str]:
    """The path itself if it is a file; the files below it if it is a folder."""
    if system.info(path)["type"] == "file":
        yield path
    else:
        top = path.rstrip("/") + "/"
        yield from (each for each in system.find(path) if _is_visible(each.removeprefix(top)))


def _is_visible(path: str) -> bool:
    return not any(part.startswith(".") for part in PurePosixPath(path).parts)


def is_pattern(address: str) -> bool:
    """Whether an address has characters of a pattern. In addresses of http and https, ? is none."""
    return bool(re.search(r"[*\[]" if address.lower().startswith("http") else r"[*?\[]", address))


def file_system(name: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        ValueError: If fsspec does not know the protocol of the address.
        ModuleNotFoundError: If fsspec, or the package that it needs for the protocol, is not installed.
    """
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"the address {name} needs fsspec, which is not installed. Run: pip install 'batchnorm[data]'"
        ) from None
    try:
        return fsspec.url_to_fs(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the address {name} needs another package: {error}. Install that package with pip."
        ) from error
    except ValueError as error:
        known = "s3://, gs://, az:// or https://"
        raise ValueError(
            f"expected a path, or an address of a protocol of fsspec such as {known}, got {name}: {error}. Check the "
            "address."
        ) from error
