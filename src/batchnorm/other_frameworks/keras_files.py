"""The batch norm layers in Keras' files, read as data by pyfive: ``.keras``, ``.weights.h5`` and ``.h5``.

An HDF5 file can name other files (external links, external storage, virtual datasets) and programs (plugins of
filters). pyfive has no code for these, and it gets no path, only a view of the bytes of this one file. Arrays that are
chunked or filtered are refused: Keras writes none. Configurations are JSON; nothing in them is executed.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, final

from batchnorm.checkpoint.refusal import DAMAGED, RefusalError, brief
from batchnorm.other_frameworks.arrays_of_layer import state_of_weights
from batchnorm.other_frameworks.layer_state import LayerState
from batchnorm.other_frameworks.naming import KERAS, KERAS_CLASSES, STATISTICS

_HDF5 = b"\x89HDF\r\n\x1a\n"
_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"
# the group of a layer in .weights.h5 has the name of its class, with a number from the second layer on
_GROUP = re.compile(r"(sync_)?batch_normalization(_v\d)?(_\d+)?")
_MOST_GROUPS, _DEEPEST, _MOST_CHANNELS = 100_000, 64, 1 << 22
_OTHER_FILES = 7  # the type of HDF5's message about data in other files
_LONGEST_CONFIG = 1 << 26  # bytes
_KINDS = "a .keras, .weights.h5 or .h5 file of Keras"

Config = Mapping[str, Any]


def states_in(path: str | os.PathLike[str]) -> list[LayerState]:
    """The states of the batch norm layers in a file.

    Raises:
        ValueError: If it is no such file, is damaged, or has arrays that are not read.
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If pyfive is not installed.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: expected a file, got no such path. Check its spelling.")
    if not place.is_file():
        raise ValueError(f"{place}: expected {_KINDS}, got a folder or device. Give the file.")
    pyfive = _pyfive()
    try:
        with place.open("rb") as file, _hdf5(file) as (part, config):
            layers, configs = _contents(pyfive.File(part), config)
    except (RefusalError, ModuleNotFoundError) as refusal:
        raise ValueError(f"{place}: {refusal}") from None
    except Exception as error:
        raise ValueError(
            f"{place}: expected a whole Keras file, got {type(error).__name__}: {brief(str(error))}. {DAMAGED}"
        ) from error
    try:
        return _states(layers, configs)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _pyfive() -> Any:
    try:
        import pyfive
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading a Keras file needs pyfive, which is not installed. Run: pip install 'batchnorm[keras]'",
            name=error.name,
        ) from None
    return pyfive


@contextmanager
def _hdf5(file: BinaryIO) -> Iterator[tuple[FilePart, object]]:
    """The HDF5 bytes in a file, and the configuration beside them; None if there is none."""
    head = file.read(8)
    size = file.seek(0, os.SEEK_END)
    if head == _HDF5:
        yield FilePart(file, 0, size), None
    elif head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:
            yield _member(archive, file), _json(_config(archive))
    else:
        raise RefusalError(_KINDS, "a file of another format", "Save the model in Keras: model.save('model.keras').")


def _member(archive: zipfile.ZipFile, file: BinaryIO) -> FilePart:
    """The weights in a .keras file, without a copy of them."""
    try:
        info = archive.getinfo(_WEIGHTS)
    except KeyError:
        raise RefusalError(_KINDS, f"a zip file without {_WEIGHTS}", "Save the model in Keras again.") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise RefusalError("weights that are stored", "compressed ones", "Unpack the file, and give model.weights.h5.")
    file.seek(info.header_offset)
    header = file.read(30)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return FilePart(file, start, info.file_size)


def _config(archive: zipfile.ZipFile) -> bytes:
    if _CONFIG not in archive.namelist():
        return b"null"
    with archive.open(_CONFIG) as file:
        return file.read(_LONGEST_CONFIG)


def _json(text: bytes | str) -> object:
    if len(text) >= _LONGEST_CONFIG:
        raise RefusalError("a configuration of at most 64 MiB", "a longer one")
    return json.loads(text)


@final
class FilePart(io.RawIOBase):
    """A part of an open file as a file of its own, without a name: nobody can open another file by it."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place in the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        if self._at < 0:
            raise ValueError(f"expected a place inside of the file, got {self._at}.")
        return self._at

    def tell(self) -> int:
        """The current place in the part."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read bytes up to the end of the part."""
        self._file.seek(self._start + self._at)
        data = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _contents(file: Any, config: object) -> tuple[list[tuple[str, str, object]], dict[str, Config]]:
    """The weights of the layers (``_layers``), and their configurations by name."""
    if config is None and (text := file.attrs.get("model_config")) is not None:
        config = _json(text)
    configs = _configs(config)
    return [*_layers(file, configs)], configs


def _states(layers: list[tuple[str, str, Any]], configs: Mapping[str, Config]) -> list[LayerState]:
    short = Counter(name for name, *_ in layers)
    ordered = sorted(layers, key=lambda layer: _place(layer[0], configs))
    return [
        replace(state_of_weights(name, weights, configs.get(name, {})), name=name if short[name] == 1 else path)
        for name, path, weights in ordered
    ]


def _place(name: str, configs: Mapping[str, Config]) -> int:
    """The place of a layer in the configuration, which lists the layers as they were made."""
    return list(configs).index(name) if name in configs else len(configs)


def _configs(config: object) -> dict[str, Config]:
    """The configurations of batch norm layers by name; not of names that layers with other settings share."""
    found: dict[str, Config] = {}
    shared: set[str] = set()
    for settings in _configs_in(config, 0):
        name = str(settings.get("name"))
        if found.setdefault(name, settings) != settings:
            shared.add(name)
    return {name: settings for name, settings in found.items() if name not in shared}


def _configs_in(value: object, depth: int) -> Iterator[Config]:
    if depth > _DEEPEST:
        return
    if isinstance(value, dict):
        own = value.get("config")
        if value.get("class_name") in KERAS_CLASSES and isinstance(own, dict):
            yield own
        for inner in value.values():
            yield from _configs_in(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _configs_in(inner, depth + 1)


def _layers(file: object, configs: Mapping[str, Config]) -> Iterator[tuple[str, str, object]]:
    """Of each batch norm layer the name, the path in the file, and the weights: by name, or a list in Keras' order."""
    for path, group, arrays in _groups(file):
        words = path.split("/")
        named = {name.partition(":")[0]: name for name in arrays}
        if any(KERAS.tensors[key] in named for key in STATISTICS):
            weights = {short: _values(group, path, name) for short, name in named.items() if short in KERAS.ours}
            yield words[-1], path, weights
        elif words[-1] == "vars" and arrays:
            name = group.attrs.get("name", words[-2] if len(words) > 1 else "")
            name = name.decode() if isinstance(name, bytes) else str(name)
            if name in configs or _GROUP.fullmatch(words[-2] if len(words) > 1 else ""):
                yield name, "/".join(words[:-1]), [_values(group, path, each) for each in sorted(arrays, key=int)]


def _groups(file: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """Every group with its path and the names of its arrays; a group that has several paths is visited at the first."""
    waiting, visited = [("", file)], set()
    while waiting:
        path, group = waiting.pop()
        arrays, inner = [], []
        for name in _hard_links(group):
            item = group.get_lazy_view(name)
            if hasattr(item, "keys"):
                inner.append((f"{path}/{name}".strip("/"), item))
            elif item is not None:
                arrays.append(name)
        yield path, group, arrays
        new = [(place, item) for place, item in inner if place.count("/") < _DEEPEST and _id(item) not in visited]
        visited |= {_id(item) for _, item in new}
        waiting += reversed(new)
        if len(visited) > _MOST_GROUPS:
            raise RefusalError(f"at most {_MOST_GROUPS:,} groups", "more")


def _hard_links(group: Any) -> list[str]:
    """The names of a group's contents, without soft links: Keras writes none, and they may lead in circles."""
    return [name for name in group if not isinstance(group._links[name], str)]


def _id(group: Any) -> int:
    """The identity of a group: pyfive keeps one object for each place in the file."""
    return id(group._dataobjects)


def _values(group: Any, path: str, name: str) -> object:
    array = group.get_lazy_view(name)
    where = f"{path}/{name}"
    if len(array.shape) != 1 or array.shape[0] > _MOST_CHANNELS:
        raise RefusalError("one value for each channel", f"shape {array.shape} in {brief(where)}")
    if array.dtype.kind != "f":
        raise RefusalError("floating-point numbers", f"{array.dtype} in {brief(where)}")
    if array.chunks is not None or array.compression is not None:
        raise RefusalError(
            "plain arrays", f"a chunked or compressed one, {brief(where)}", "Save the model in Keras again."
        )
    if group.file._get_dataobjects(group._links[name]).find_msg_type(_OTHER_FILES):
        raise RefusalError(
            "arrays in this file", f"one in other files, {brief(where)}", "Save the model in Keras again."
        )
    return array[:]
