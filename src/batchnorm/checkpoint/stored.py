"""Stored: what a file or a model stores of one batch norm layer, as plain numbers that need no torch."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """One layer's statistics, gamma and beta: one float64 for each channel, or None where nothing is stored.

    ``running_var`` is what is stored: unbiased in torch's files.
    """

    name: str
    running_mean: array[float] | None = None
    running_var: array[float] | None = None
    weight: array[float] | None = None
    bias: array[float] | None = None
    num_batches_tracked: int | None = None
    # type of each tensor that is there, by its key: {"running_mean": "float32"}
    dtypes: Mapping[str, str] = field(default_factory=dict)
    # known where the file says it (ONNX) or a model is at hand
    eps: float | None = None
    # torch's: the weight of the new statistics, one minus that of ONNX
    momentum: float | None = None
    # what is there and could not be read, by its key, with the reason and what to do; statistics are read both or none
    unread: Mapping[str, str] = field(default_factory=dict)
    # hash of the weight that makes the layer's inputs, as far as names tell, where another layer of the file stores
    # the same statistics; "" elsewhere
    fed_by: str = ""

    @property
    def channels(self) -> int:
        """Number of channels, 0 if nothing per channel is stored."""
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return max((len(values) for values in tensors if values is not None), default=0)

    @property
    def is_initial(self) -> bool:
        """Whether the statistics are those of a new layer: mean 0 and variance 1, exactly, in every channel."""
        mean, var = self.running_mean, self.running_var
        if not mean or not var:
            return False
        return not any(mean) and all(value == 1 for value in var)

    @property
    def is_silent(self) -> bool:
        """Whether every gamma is 0, so that the layer returns beta whatever comes in."""
        return bool(self.weight) and not any(self.weight or ())


def with_tensors(layer: Stored, tensors: Mapping[str, array[float]]) -> Stored:
    """The same layer with these statistics and parameters, by their keys."""
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    weight, bias = tensors.get("weight"), tensors.get("bias")
    return replace(layer, running_mean=mean, running_var=var, weight=weight, bias=bias)


@final
@dataclass(frozen=True, slots=True)
class State:
    """What a model loads: one dict of a file, or the part of one that is an averaged copy.

    ``keys`` lead to the dict, whose names have ``prefix`` in front. ``layers`` has, by a layer's name in the model, its
    name in the file.
    """

    keys: tuple[str | int, ...]
    prefix: str
    layers: Mapping[str, str]
    is_average: bool = False


@final
@dataclass(frozen=True, slots=True)
class Shared:
    """One module that a file has under several names: layers whose statistics are the same bytes of the file.

    ``layers`` counts those of the module. ``is_alias`` where what is before them is stored once as well, so that the
    names may be two ways to the same call. Names are paths in the file.
    """

    names: tuple[str, ...]
    layers: int = 1
    is_alias: bool = False
    is_called: bool = False  # each name is a call, as a graph's nodes are


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds that concerns batch norm.

    A file may hold several copies of a model (raw and averaged weights). ``layers`` are those of the first one,
    the model's own; ``copies`` has every one by its name in the file, the model's own too. Where all weights are
    averaged ones, the first copy of them stands in. ``states`` says which of them a model loads, or which parts of
    them, by name; the first one is the model's own. Each layer is in one state.
    """

    path: str
    format: str  # "pt" for both formats of torch.save, "pickle", "safetensors" or "onnx"
    layers: Mapping[str, Stored]
    copies: Mapping[str, Mapping[str, Stored]]
    # what the own layers' names had in front in the file, such as "state_dict.module." or "_orig_mod."
    prefix: str = ""
    # other tensors' names: whether convolutions before a layer have a bias, for one
    names: tuple[str, ...] = ()
    # ONNX nodes in training mode, by layer
    in_train_mode: tuple[str, ...] = ()
    states: Mapping[str, State] = field(default_factory=dict)
    shared: tuple[Shared, ...] = ()
    # further paths of a state that is one object under several
    aliases: Mapping[str, str] = field(default_factory=dict)
    # ONNX: the activation that alone reads a layer's result, by our name for it, by layer
    activations: Mapping[str, str] = field(default_factory=dict)
    # ONNX: norm of each row of the weights right before a layer, None where something else is before it; for layers
    # with a variance that is next to nothing
    filters: Mapping[str, array[float] | None] = field(default_factory=dict)
    # some layers were pickled as modules, which only their own code can save again
    is_whole: bool = False
    # of torch.save: the version of each layer's class by its name in ``every``, where the state carries it
    # (``_metadata``)
    versions: Mapping[str, int] = field(default_factory=dict)
    # where each own layer is in the file: ("state_dict", "module.bn1") has its mean at
    # data["state_dict"]["module.bn1.running_mean"], and ("",) at data["running_mean"]; for ONNX, the names of the
    # node's tensors
    keys: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    # classes of objects of which nothing was read, such as argparse.Namespace
    unread: tuple[str, ...] = ()
    # whether it holds tensors and plain values alone, so that torch.load(weights_only=True) takes it
    is_plain: bool = True

    @property
    def every(self) -> dict[str, Stored]:
        """Layers of all copies, by name: the first copy's as in the model, others behind their copy's name."""
        return {
            (name := self.named(copy, own)): layer if layer.name == name else replace(layer, name=name)
            for copy, layers in self.copies.items()
            for own, layer in layers.items()
        }

    def named(self, copy: str, layer: str) -> str:
        """A layer's name in the file."""
        return layer if copy == next(iter(self.copies), "") else below(copy, layer)

    def shown(self, path: str) -> str:
        """A path in the file as layers are named: without what all names of the first copy have in front."""
        return path.removeprefix(self.prefix)


def below(*names: str) -> str:
    """A dotted path of some names, those that are empty left out."""
    return ".".join(filter(None, names))


def is_below(module: str, layer: str) -> bool:
    """Whether a layer is a module or inside of it, by their paths."""
    return not module or layer == module or layer.startswith(f"{module}.")
