"""Fill a file that lacks statistics of batch norm layers, such as an adapter, with those of the base model's file.

The layers of the base are found in the file by names. Adapters have a prefix in front of the base's names
(``base_model.model.``); it is the prefix under which most modules of the file are modules of the base.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from batchnorm import checkpoint
from batchnorm.checkpoint import Checkpoint, Stored
from batchnorm.checkpoint.averaged_copies import STATISTICS, Entry, Keys, Words
from batchnorm.checkpoint.file_tensors import Tensor
from batchnorm.checkpoint.left_out_statistics import module_of
from batchnorm.doctor.mending.mended_checkpoint import mendable, structure, writer_of
from batchnorm.doctor.mending.tensor_edit import Edit
from batchnorm.files.whole import replacing

Modules = dict[Words, dict[str, Tensor | int]]  # the tensors of each module, by their names in it
_PAIR = ("running_mean", "running_var")


@final
@dataclass(frozen=True, slots=True)
class Filling:
    """The layers that get statistics: place in the file (the keys of its dict, then its name), and the base's layer."""

    file: Checkpoint
    base: Checkpoint
    layers: Mapping[Keys, Stored]
    absent: tuple[str, ...]  # layers without statistics in the file that the base does not have

    @property
    def names(self) -> list[str]:
        """The names of the layers in the file that get statistics."""
        return [str(place[-1]) for place in self.layers]


def plan(path: str | os.PathLike[str], base: str | os.PathLike[str]) -> Filling:
    """The statistics that a file lacks and that the base has.

    Raises:
        ValueError: As ``checkpoint.read``; if ``path`` cannot be written by ``fix``; if the base has no statistics; if
            no module of the file is a module of the base; or if a layer has another number of channels in the base.
    """
    file, donor = mendable(path), checkpoint.read(base)
    donors = {name: layer for name, layer in donor.layers.items() if layer.running_mean and layer.running_var}
    if not donors:
        raise ValueError(
            f"--base needs a file with statistics of batch norm layers, got {base}. Give the base model's."
        )
    layers: dict[Keys, Stored] = {}
    for keys, prefix, modules in _matched(file, donor, structure(Path(file.path))[1]):
        layers |= dict(_missing(keys, prefix, modules, donors, file))
    filled = {".".join(map(str, place)) for place in layers}
    absent = tuple(name for name in file.without_statistics if name not in filled)
    return Filling(file, donor, layers, absent)


def _matched(file: Checkpoint, donor: Checkpoint, tensors: Sequence[Entry]) -> Iterator[tuple[Keys, Words, Modules]]:
    """The dicts of the file with most modules of the base, the prefix of the base's names in each, and its modules."""
    known = {tuple(name.split(".")) for name in donor.layers}
    known |= {tuple(name.split(".")[:-1]) for name in donor.names} - {()}
    modules: dict[Keys, Modules] = defaultdict(lambda: defaultdict(dict))
    for entry in tensors:
        modules[entry.path][entry.words[len(entry.path) :]][entry.leaf] = entry.tensor
    votes = Counter(
        (keys, prefix) for keys, own in modules.items() for words in own for prefix in _prefixes(words, known)
    )
    if not votes:
        raise ValueError(
            f"{file.path} has no module of the base {donor.path}. Give the file of the model that it belongs "
            "to as --base."
        )
    most = max(votes.values())
    for keys, own in modules.items():
        prefixes = [prefix for place, prefix in votes if place == keys and votes[place, prefix] == most]
        if prefixes:  # of the same modules, the shortest one leaves their whole paths
            yield keys, min(prefixes, key=len), own


def _prefixes(words: Words, known: set[Words]) -> Iterator[Words]:
    """What may be in front of a module's path in the base: its words up to where a module of the base begins."""
    for start in range(len(words)):
        if any(words[start:stop] in known for stop in range(start + 1, len(words) + 1)):
            yield words[:start]


def _missing(
    keys: Keys, prefix: Words, modules: Modules, donors: Mapping[str, Stored],
    file: Checkpoint,
) -> Iterator[tuple[Keys, Stored]]:  # fmt: skip
    copies = {module_of(words): words for words in modules}
    for name, layer in donors.items():
        words = (*prefix, *filter(None, name.split(".")))
        words = copies.get(words, words)
        own = modules.get(words, {})
        if any(key in own for key in _PAIR):
            continue
        place = (*keys, ".".join(words))
        for leaf in ("weight", "bias"):
            tensor = own.get(leaf)
            if isinstance(tensor, Tensor) and tensor.numel != layer.channels:
                raise ValueError(
                    f"{file.path}: layer {place[-1]!r} has {tensor.numel} channels, and {layer.channels} in the base. "
                    "Give the file of the model that it belongs to as --base."
                )
        yield place, layer


def write(filling: Filling, output: Path) -> None:
    """Write the whole filled file or nothing; it is read again and compared before it gets its name.

    Raises:
        ValueError: If torch does not load the file as tensors and plain values, or the new file differs from the plan.
        OSError: If ``output`` cannot be written.
        ModuleNotFoundError: If the file is one of torch.save, and torch is not installed.
    """
    source = Path(filling.file.path)
    edits = [edit for place, layer in filling.layers.items() for edit in _edits(place, layer)]
    with replacing(output, like=source) as file:
        writer_of(filling.file)(source, file, edits, {})
        file.flush()
        _verify(filling, file.name)


def _edits(place: Keys, layer: Stored) -> Iterator[Edit]:
    *keys, module = place
    for leaf in STATISTICS:
        key = (*keys, f"{module}.{leaf}" if module else leaf)
        values = getattr(layer, leaf)
        if leaf == "num_batches_tracked":
            if values is not None:
                yield Edit(key, layer.dtypes.get(leaf, "int64"), None, count=values)
        else:
            yield Edit(key, layer.dtypes[leaf], values, tuple(range(len(values))))


def _verify(filling: Filling, written: str) -> None:
    now = checkpoint.read(written)
    every, copies = now.every, structure(Path(written))[0]
    places = {
        found.place: every[now.named(name, layer)]
        for name, copy in zip(now.copies, copies, strict=True)
        for layer, found in copy.layers.items()
    }
    for place, layer in filling.layers.items():
        copy = places.get(place)
        if copy is None or any(getattr(copy, key) != getattr(layer, key) for key in STATISTICS):
            raise ValueError(
                f"{filling.file.path}: layer {place[-1]!r} of a filled copy did not read as written. Nothing was "
                "written. Load both files, copy the statistics, and save the state with torch.save(state, path)."
            )
