"""Stored: the numbers that a file or a model stores for one batch norm layer, in arrays that need no torch."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """One layer's statistics, gamma and beta: one float64 for each channel; None if they are not stored.

    ``running_var`` is the stored number: the unbiased variance in torch's files.
    """

    name: str
    running_mean: array[float] | None = None
    running_var: array[float] | None = None
    weight: array[float] | None = None
    bias: array[float] | None = None
    num_batches_tracked: int | None = None
    # the type of each stored tensor, by its key: {"running_mean": "float32"}
    dtypes: Mapping[str, str] = field(default_factory=dict)
    # known if the file has it (ONNX, pickled modules) or a model was given
    eps: float | None = None
    # torch's momentum: the weight of the new statistics, 1 minus the momentum of ONNX
    momentum: float | None = None
    # tensors that could not be read, by key: the reason and what to do; mean and variance are both read, or neither
    unread: Mapping[str, str] = field(default_factory=dict)
    # type, shape and a hash of the weight that makes the layer's inputs, judged by names; only if another layer of the
    # file has the same statistics, else ""
    fed_by: str = ""

    @property
    def channels(self) -> int:
        """Number of channels; 0 if no tensor of the layer is stored."""
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return max((len(values) for values in tensors if values is not None), default=0)

    @property
    def is_initial(self) -> bool:
        """Whether both statistics are stored and are those of a new layer: mean 0 and variance 1 in every channel."""
        mean, var = self.running_mean, self.running_var
        if not mean or not var:
            return False
        return not any(mean) and all(value == 1 for value in var)

    @property
    def is_silent(self) -> bool:
        """Whether gamma is stored and 0 in every channel, so that the layer returns beta for any input."""
        return bool(self.weight) and not any(self.weight or ())


def with_tensors(layer: Stored, tensors: Mapping[str, array[float]]) -> Stored:
    """The layer with these statistics and parameters, by key; None for keys that are missing."""
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    weight, bias = tensors.get("weight"), tensors.get("bias")
    return replace(layer, running_mean=mean, running_var=var, weight=weight, bias=bias)


@final
@dataclass(frozen=True, slots=True)
class State:
    """A part of a file that a model loads: a dict, or those names of a dict that begin with ``prefix``.

    ``keys`` lead to the dict. ``layers`` maps each layer's name in the model to its name in the file.
    """

    keys: tuple[str | int, ...]
    prefix: str
    layers: Mapping[str, str]
    is_average: bool = False


@final
@dataclass(frozen=True, slots=True)
class Shared:
    """One module that a file has under several names: the statistics of its layers are stored once.

    ``names`` are paths in the file. ``layers`` is the number of batch norm layers in the module. ``is_alias`` is True
    if the weights before these layers are stored once too: then the names may mean one and the same call.
    """

    names: tuple[str, ...]
    layers: int = 1
    is_alias: bool = False
    is_called: bool = False  # whether each name is a call, as for the nodes of an ONNX graph


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The batch norm layers of a file, and what the file says about them.

    A file may have several copies of a model (raw and averaged weights). ``copies`` has all copies by their names in
    the file, and ``layers`` are the layers of the first copy, which is the model's own; if all copies are averages, it
    is the first average. ``states`` are the copies, or parts of copies, that a model can load, by name; the first is
    the model's own. Each layer is in one state.
    """

    path: str
    format: str  # "pt" for both formats of torch.save, "pickle", "safetensors" or "onnx"
    layers: Mapping[str, Stored]
    copies: Mapping[str, Mapping[str, Stored]]
    # the words in front of the names of ``layers`` in the file, such as "state_dict.module." or "_orig_mod."
    prefix: str = ""
    # names of the tensors that belong to no batch norm layer; they show, for example, which convolutions have a bias
    names: tuple[str, ...] = ()
    # ONNX: names of the layers whose nodes are in training mode
    in_train_mode: tuple[str, ...] = ()
    states: Mapping[str, State] = field(default_factory=dict)
    shared: tuple[Shared, ...] = ()
    # for a dict under several paths: its further paths, each with the name of its state
    aliases: Mapping[str, str] = field(default_factory=dict)
    # ONNX: by layer, our name for the activation that is the only reader of its result
    activations: Mapping[str, str] = field(default_factory=dict)
    # ONNX: by layer with a variance near 0, the norm of each row of the weights right before the layer; None if the
    # layer's input is not the result of weights
    filters: Mapping[str, array[float] | None] = field(default_factory=dict)
    # whether some layers were pickled as modules, which only their own code can save again
    is_whole: bool = False
    # torch.save: the version of each layer's class (``_metadata``), by the layer's name in ``every``; only versions
    # above 0
    versions: Mapping[str, int] = field(default_factory=dict)
    # the place of each of ``layers`` in the file: a layer at ("state_dict", "module.bn1") has its mean at
    # data["state_dict"]["module.bn1.running_mean"], a layer at ("",) at data["running_mean"]; for ONNX, the names of
    # the node's tensors
    keys: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    # layers whose names say batch norm and that have gamma and beta but no statistics: path in the file, channels
    without_statistics: Mapping[str, int] = field(default_factory=dict)
    # whether names of tensors are those of an adapter (PEFT, LoRA), which belongs to another model's file
    is_adapter: bool = False
    # classes of objects that were not read, such as argparse.Namespace
    unread: tuple[str, ...] = ()
    # whether the file has only tensors and plain values, so that torch.load(weights_only=True) accepts it
    is_plain: bool = True

    @property
    def every(self) -> dict[str, Stored]:
        """The layers of all copies, by name; for all but the first copy, the copy's name is in front."""
        return {
            (name := self.named(copy, own)): layer if layer.name == name else replace(layer, name=name)
            for copy, layers in self.copies.items()
            for own, layer in layers.items()
        }

    def named(self, copy: str, layer: str) -> str:
        """The name of a copy's layer in ``every``."""
        return layer if copy == next(iter(self.copies), "") else below(copy, layer)

    def shown(self, path: str) -> str:
        """A path in the file without ``prefix``, as the layers of the first copy are named."""
        return path.removeprefix(self.prefix)


def below(*names: str) -> str:
    """The names joined by dots; empty names are left out."""
    return ".".join(filter(None, names))


def is_below(module: str, layer: str) -> bool:
    """Whether the path ``layer`` is the path ``module``, or inside of it."""
    return not module or layer == module or layer.startswith(f"{module}.")
