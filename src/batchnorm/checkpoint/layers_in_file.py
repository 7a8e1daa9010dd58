"""Reads the batch norm layers from a file's tensors."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from batchnorm.checkpoint.averaged_copies import (
    OF_A_LAYER,
    Copy,
    Entry,
    LayerTensors,
    Words,
    averaged_roots,
    entries,
    find_copies,
    find_layers,
    find_states,
    same_objects,
)
from batchnorm.checkpoint.feeding_weights import Feeders
from batchnorm.checkpoint.file_tensors import Tensor, first_bytes, numbers
from batchnorm.checkpoint.formats import other_files
from batchnorm.checkpoint.formats.checked_records import Source
from batchnorm.checkpoint.identical_parts import statistics_of
from batchnorm.checkpoint.left_out_statistics import is_adapter, without_statistics
from batchnorm.checkpoint.pickled.allowed_names import VERSIONS
from batchnorm.checkpoint.pickled.name import in_words
from batchnorm.checkpoint.pickled.unknown_classes import (
    Object,
    Saved,
    SavedSettings,
    has_objects,
    is_of_module,
    settings,
    unread,
)
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief
from batchnorm.checkpoint.shared_modules import find_shared
from batchnorm.checkpoint.states_in_file import ROOT, parted
from batchnorm.checkpoint.stored import Checkpoint, Shared, State, Stored, below, with_tensors

_MOST_VALUES = 1 << 24  # of all layers together: 128 MiB of float64


def checkpoint(path: str, kind: str, saved: Saved, source: Source) -> Checkpoint:
    """The Checkpoint of a file; ``saved`` is the object that was read from it."""
    tensors = _tensors(kind, saved)
    layers = find_layers(tensors)
    _bounded(layers)
    copies = find_copies(layers, tensors)
    if len({_name(copy.prefix) for copy in copies}) < len(copies) or sum(len(c.layers) for c in copies) < len(layers):
        raise RefusalError("a different name for each layer", "the same name twice", "Save the model's own state dict.")
    file = _file(path, kind, saved, tensors, copies, source)
    named = {file.named(_name(copy.prefix), name): layer for copy in copies for name, layer in copy.layers.items()}
    feeders = Feeders(tensors)
    states = _states(file, copies, tensors)
    at = {state.keys: name for name, state in states.items()}
    whole = replace(
        _with_feeders(file, named, feeders, source),
        states=states,
        versions={name: version for name, layer in named.items() if (version := _version(saved, layer))},
        aliases={_name(tuple(map(str, path))): at[first] for path, first in same_objects(saved) if first in at},
        shared=tuple(each for copy in copies for each in _shared(copy, tensors, feeders)),
    )
    return parted(whole)


def _tensors(kind: str, saved: Saved) -> list[Entry]:
    """The tensors in ``saved``, with the keys that lead to them.

    Raises:
        RefusalError: If ``saved`` is not a dict, list or tuple, belongs to another framework
            (``other_files.of_value``), or is a whole object or a plain pickle without tensors.
    """
    if not isinstance(saved, dict | list | tuple):
        raise RefusalError("a dict of tensors", in_words(saved), RESAVE)
    tensors = list(entries(saved))
    if named := other_files.of_value(saved):
        raise RefusalError("a torch model's state", *named)
    if isinstance(saved, Object) and not tensors:
        raise RefusalError("a state dict", f"a whole pickled object, {in_words(saved)}, without tensors", RESAVE)
    if kind == "pickle" and not tensors:
        raise RefusalError("a file of torch.save", f"a plain pickle of {in_words(saved)}, without tensors", RESAVE)
    return tensors


def _file(
    path: str, kind: str, saved: Saved, tensors: Sequence[Entry], copies: Sequence[Copy], source: Source
) -> Checkpoint:
    """The Checkpoint with the layers of all copies, but without states, versions, aliases, shared and fed_by."""
    own = copies[0] if copies else Copy((), {})
    layers = [layer for copy in copies for layer in copy.layers.values()]
    stored = {_name(copy.prefix): _stored(copy, saved, source) for copy in copies}
    left = unread(saved, [layer.path for layer in layers])
    return Checkpoint(
        path,
        kind,
        layers=stored.get(_name(own.prefix), {}),
        copies=stored,
        prefix="".join(f"{word}." for word in own.prefix),
        names=tuple(_names(tensors, copies or [own], layers)),
        keys={name: layer.place for name, layer in own.layers.items()},
        without_statistics=without_statistics(tensors),
        is_adapter=is_adapter(entry.key for entry in tensors),
        unread=left,
        is_plain=kind != "pickle" and not left and not has_objects(saved) and not any(map(_is_array, tensors)),
        is_whole=any(is_of_module(saved, layer.path) for layer in layers),
    )


def _shared(copy: Copy, tensors: Sequence[Entry], feeders: Feeders) -> tuple[Shared, ...]:
    return find_shared(
        {below(_name(copy.prefix), name): layer for name, layer in copy.layers.items()}, tensors, feeders
    )


def _states(file: Checkpoint, copies: Sequence[Copy], tensors: Sequence[Entry]) -> dict[str, State]:
    states: dict[str, State] = {}
    for part, copy, is_average in find_states(copies, averaged_roots(tensors)):
        name = _name(part.prefix) or ROOT
        if name in states:
            raise RefusalError("each state once", f"two states named {brief(name)}", "Save the model's own state dict.")
        names = {entry.place: file.named(_name(copy.prefix), layer) for layer, entry in copy.layers.items()}
        keys = next(iter(part.layers.values())).path
        prefix = "".join(f"{word}." for word in part.prefix[len(keys) :])
        layers = {layer: names[entry.place] for layer, entry in part.layers.items()}
        states[name] = State(keys, prefix, layers, is_average)
    return states


def _with_feeders(file: Checkpoint, named: Mapping[str, LayerTensors], feeders: Feeders, source: Source) -> Checkpoint:
    """The file with ``fed_by`` for each layer whose statistics equal those of another layer; "" for the others."""
    counts = Counter(map(statistics_of, file.every.values()))
    copies = {
        copy: {
            name: replace(layer, fed_by=_fed_by(named[file.named(copy, name)], layer, feeders, source))
            if (bits := statistics_of(layer)) and counts[bits] > 1
            else layer
            for name, layer in layers.items()
        }
        for copy, layers in file.copies.items()
    }
    return replace(file, copies=copies, layers=next(iter(copies.values()), {}))


def _fed_by(layer_tensors: LayerTensors, layer: Stored, feeders: Feeders, source: Source) -> str:
    """Type, shape, strides and a hash of the first values of the weight before a layer; "" if there is no weight.

    Two hashes can be compared only if type, shape and strides are equal.
    """
    weight = feeders.of(layer_tensors, layer.channels)
    if weight is None:
        return ""
    return f"{weight.dtype} {weight.size} {weight.stride}:{first_bytes(source, weight):08x}"


def _is_array(entry: Entry) -> bool:
    return isinstance(entry.tensor, Tensor) and entry.tensor.storage.held is not None


def _version(saved: Saved, layer: LayerTensors) -> int:
    """The version number of a layer's class in the ``_metadata`` of its state dict; 0 if ``_metadata`` has none."""
    for key in layer.path:
        saved = saved[key]
    metadata = saved.get(VERSIONS, {}) if isinstance(saved, dict) else {}
    own = metadata.get(".".join(layer.words[len(layer.path) :]))
    version = own.get("version") if isinstance(own, dict) else None
    return version if type(version) is int else 0


def _name(words: Words) -> str:
    return ".".join(words)


def _bounded(layers: Sequence[LayerTensors]) -> None:
    total = sum(tensor.numel for layer in layers for tensor in _of_channels(layer).values())
    if total > _MOST_VALUES:
        raise RefusalError(
            f"at most {_MOST_VALUES:,} values in batch norm layers", brief(total), "Save fewer models in one file."
        )


def _stored(copy: Copy, saved: Saved, source: Source) -> dict[str, Stored]:
    all_settings = {name: settings(saved, layer.path, layer.words) for name, layer in copy.layers.items()}
    return {name: _layer(name, layer, all_settings[name], source) for name, layer in copy.layers.items()}


def _layer(name: str, layer_tensors: LayerTensors, layer_settings: SavedSettings, source: Source) -> Stored:
    unread = _unread(layer_tensors.tensors)
    tensors = {key: tensor for key, tensor in _of_channels(layer_tensors).items() if key not in unread}
    values = {key: array("d", numbers(source, tensor)) for key, tensor in tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    counter, count = layer_tensors.tensors.get("num_batches_tracked"), None
    if counter is not None and "num_batches_tracked" not in unread:
        count = _count(source, counter)
        dtypes["num_batches_tracked"] = counter.dtype if isinstance(counter, Tensor) else "int64"
    stored = Stored(
        name,
        num_batches_tracked=count,
        dtypes=dtypes,
        eps=layer_settings.eps,
        momentum=layer_settings.momentum,
        unread=unread,
    )
    return with_tensors(stored, values)


def _unread(tensors: Mapping[str, Tensor | int]) -> dict[str, str]:
    """The tensors of a layer whose numbers cannot be read, each with the reason."""
    return in_pairs({key: tensor.why for key, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.why})


def in_pairs(unread: dict[str, str]) -> dict[str, str]:
    """If one of running_mean and running_var is in ``unread``, add the other one to it: neither is useful alone."""
    for key, other in (("running_mean", "running_var"), ("running_var", "running_mean")):
        if other in unread:
            unread.setdefault(key, f"of no use without {other}.")
    return unread


def _of_channels(layer: LayerTensors) -> dict[str, Tensor]:
    """The tensors with one value for each channel; without readable statistics, all tensors with one axis.

    A module with both a convolution and batch norm may store the convolution's weight under the same name: it has
    another size and is left out.

    Raises:
        RefusalError: If running_mean and running_var have different shapes; axes of length 1 do not count.
    """
    tensors = {
        key: tensor
        for key, tensor in layer.tensors.items()
        if isinstance(tensor, Tensor) and key != "num_batches_tracked"
    }
    mean, var = (_readable(tensors.get(key)) for key in ("running_mean", "running_var"))
    if mean is not None and var is not None and _axes(mean) != _axes(var):
        raise RefusalError(
            f"as many variances as means in layer {brief(_name(layer.words))}",
            f"{var.shape} and {mean.shape}",
            "Correct running_var or running_mean and save the file again.",
        )
    statistics = mean if mean is not None else var
    channels = None if statistics is None else statistics.numel
    return {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.numel == channels or (channels is None and len(tensor.size) == 1)
    }


def _readable(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.why else tensor


def _axes(tensor: Tensor) -> list[int]:
    """The shape of a tensor without axes of length 1: statistics may have the shape (1, C, 1, 1)."""
    return [length for length in tensor.size if length != 1]


def _count(source: Source, counter: Tensor | int) -> int | None:
    """num_batches_tracked; None if it is NaN, infinite or not a single number."""
    if not isinstance(counter, Tensor):
        return counter
    if counter.numel != 1:
        return None
    value = numbers(source, counter)[0]
    return int(value) if abs(value) < float("inf") else None


def _names(tensors: Sequence[Entry], copies: Sequence[Copy], layers: Sequence[LayerTensors]) -> Iterator[str]:
    """The names of the first copy's tensors that belong to no batch norm layer."""
    normalized = {(layer.path, layer.words) for layer in layers}
    prefixes = {copy.prefix for copy in copies}
    for entry in tensors:
        words = entry.words
        if (entry.path, words) in normalized and entry.leaf in OF_A_LAYER:
            continue
        # the longest prefix first: an empty prefix, which the model's own copy may have, fits every name
        prefix = next((words[:n] for n in range(len(words), -1, -1) if words[:n] in prefixes), None)
        if prefix == copies[0].prefix and isinstance(entry.tensor, Tensor):
            yield _name((*words[len(prefix) :], entry.leaf))
