"""Planning: which files there are, whether they agree, and into which pieces they are cut."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from batchnorm.datasets.blocks import Piece, Selection
from batchnorm.datasets.sources import zarr_stores
from batchnorm.datasets.sources.formats import ZARR, Format, by_suffix, format_named, format_of, supported
from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.plans import together
from batchnorm.datasets.sources.schemas import measured
from batchnorm.datasets.sources.stored_files import StoredFile
from batchnorm.files.remote import Address, is_pattern, is_remote, listed, path_part

Data = Address | Sequence[Address]


def pieces(data: Data, selection: Selection | None = None, options: Options | None = None) -> list[Piece]:
    """The pieces of a data set, in a fixed order: files sorted by address, pieces in the order of the file.

    Args:
        data: A file, a folder, a pattern, or a list of them: local paths, or addresses that fsspec opens. Below
            folders, files of no known format and names that begin with a dot or _ are left out.
        selection: Which columns are measured, and which column has the groups; all columns of numbers by default.
        options: How files are read.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a file or address cannot be read.
        ValueError: If a file is empty, damaged or of no known format, if formats are mixed, or if files differ in the
            columns that are measured.
        TypeError: If a column that is measured has no numbers, or ``data`` is no address.
        ModuleNotFoundError: If a package that reads the format is not installed.
    """
    selection, options = selection or Selection(), options or Options()
    found = _addresses(data, options)
    addresses, stores = sorted(found), {address for address, is_folder in found.items() if is_folder}
    files = together(lambda each: zarr_stores.stored_at(each) if each in stores else StoredFile.at(each), addresses)
    format_ = _one_format(files, options)
    plans = format_.plan(files, options)
    shapes = measured([each.schema for each in plans], selection)
    return [piece for each in plans for piece in each.cut(shapes)]


def _addresses(data: Data, options: Options) -> dict[str, bool]:
    """Addresses of files, and whether each is a folder that counts as a file: a store of Zarr."""
    given = _given(data)
    return {file: is_folder for each in given for file, is_folder in _files_at(os.fspath(each), options).items()}


def _given(data: Data) -> list[Address]:
    """The addresses that the user named."""
    several = isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping | os.PathLike)
    given = list(data) if several else [data]
    for each in given:
        if not isinstance(each, str | os.PathLike):
            raise TypeError(
                f"expected a path or an address, or a list of them, got {type(each).__name__}. Name files of data."
            )
    if not given or "" in given:
        raise ValueError(
            f"expected a file, a folder or a pattern, or a list of them, got {data!r}. Name a file of data."
        )
    return given


def _files_at(address: str, options: Options) -> dict[str, bool]:
    """The file at an address; the files of known formats, if the address is a folder or a pattern."""
    if not is_pattern(address) and by_suffix(address) in {None, ZARR} and zarr_stores.is_store(address):
        return {address.rstrip("/"): True}
    files = listed(address)
    if files == [address] or (len(files) == 1 and not _is_folder(address)):
        suited = files
    else:
        visible = [file for file in files if not _name(file).startswith(("_", "."))]
        suited = [file for file in visible if _has_format(file, options)]
        suited = suited or [file for file in visible if "." not in _name(file)]  # their first bytes say the format
    if not suited:
        raise ValueError(
            f"expected files with data, got {address} with {len(files)} files, none of them of a known format, such as "
            f"{files[0]}. {supported()}"
        )
    stores = {file: zarr_stores.store_of(file) for file in suited}
    return {store or file: store is not None for file, store in stores.items()}


def _is_folder(address: str) -> bool:
    return not is_remote(address) and Path(address).is_dir()


def _name(file: str) -> str:
    return PurePosixPath(path_part(file).replace("\\", "/")).name


def _has_format(file: str, options: Options) -> bool:
    found = ZARR if zarr_stores.store_of(file) else by_suffix(file)
    return found is not None and options.format in {"", found.name}


def _one_format(files: Sequence[StoredFile], options: Options) -> Format:
    if options.format:
        return format_named(options.format)
    formats = together(format_of, files)
    kinds = {each.name: (each, file) for each, file in zip(formats, files, strict=True)}
    if len(kinds) > 1:
        counts = (
            f"{sum(each.name == name for each in formats)} of {name}, such as {file.address}"
            for name, (_, file) in kinds.items()
        )
        raise ValueError(
            f"expected files of one format, got {'; '.join(counts)}. Give a pattern such as folder/*"
            f"{next(iter(kinds.values()))[0].suffixes[0]}, or say the format (format, --format)."
        )
    return formats[0]
