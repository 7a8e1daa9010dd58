"""LayerState: the tensors and settings of one batch norm layer, for every framework."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.argument_types import require_module
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.other_frameworks.naming import FLAX, KERAS, STATISTICS, TENSORS, Framework
from batchnorm.other_libraries import eps_of
from batchnorm.surgery.replacement import find

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

_LAYERS = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}


@final
@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """One batch norm layer: its statistics, gamma and beta (None if switched off), eps and momentum.

    Args:
        name: The layer's path in its framework.
        running_mean: One value for each channel; also for the other tensors.
        running_var: The number that the framework stores: biased in Keras and Flax, unbiased in torch.
        weight: gamma.
        bias: beta.
        eps: None if the source does not store it.
        momentum: In torch's meaning, the weight of the new statistics; None if the source does not store it.
        axis: The axis of the channels in the layer's inputs, as its framework counts; None if not known. Layers of
            torch.nn and ours have the channels on axis 1.

    Raises:
        TypeError: If a tensor has no floating-point numbers.
        ValueError: If a tensor does not have one axis, or the lengths differ.
    """

    name: str
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    momentum: float | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        for key in TENSORS:
            if (value := getattr(self, key)) is not None:
                object.__setattr__(self, key, _vector(value, f"{key} of layer {self.name!r}"))
        lengths = {key: len(tensor) for key in TENSORS if (tensor := getattr(self, key)) is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"layer {self.name!r} needs tensors of one length, got {lengths}. Pass tensors of one layer, with its "
                "own settings of gamma and beta."
            )

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.running_mean)

    def layer(self, dims: Literal[1, 2, 3], axis: Literal[1, -1] = 1) -> _BatchNorm:
        """A new layer of ours in eval mode with these tensors: ``BatchNorm1d``, ``2d`` or ``3d``.

        Args:
            dims: Number of axes besides those of examples and channels; 1 also for inputs (N, C).
            axis: The axis of the channels in the new layer's inputs; -1 for inputs as Keras and Flax have them.

        Raises:
            ValueError: If ``dims`` or ``axis`` is none of these, or eps is not known.
        """
        if dims not in _LAYERS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}. Use 2 for images.")
        momentum = 0.1 if self.momentum is None else self.momentum
        affine: dict[str, Any] = {key: getattr(self, key) is not None for key in ("weight", "bias")}
        dtype = self.running_mean.dtype
        new = _LAYERS[dims](self.channels, require_eps(self), momentum, dtype=dtype, axis=axis, **affine).eval()
        put(self, new)
        return new

    def keras(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The configuration and the weights for ``keras.layers.BatchNormalization``.

        The weights are in the order of ``layer.set_weights(list(weights.values()))``. The layer's inputs have their
        channels last, unless the state says another axis.

        Raises:
            ValueError: If eps or momentum is not known, or momentum is that of a cumulative average.
        """
        return {"axis": -1 if self.axis is None else self.axis, **self._settings(KERAS)}, self._arrays(KERAS)

    def flax(self) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """The arguments and the variables for ``flax.linen.BatchNorm``; ``nnx.BatchNorm`` has the same names.

        Raises:
            ValueError: As ``keras``.
        """
        variables: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}}
        for name, array in self._arrays(FLAX).items():
            variables[FLAX.collections[FLAX.ours[name]]][name] = array
        return self._settings(FLAX), variables

    def _settings(self, framework: Framework) -> dict[str, object]:
        if self.momentum is None:
            raise ValueError(
                f"layer {self.name!r} needs a momentum for {framework.name}, got None. Set layer.momentum = 0.1 first; "
                "a cumulative average has no counterpart there."
            )
        switches = {word: getattr(self, key) is not None for key, word in framework.switches.items()}
        return {"momentum": 1 - self.momentum, "epsilon": require_eps(self), **switches}

    def _arrays(self, framework: Framework) -> dict[str, np.ndarray]:
        tensors = {theirs: getattr(self, ours) for ours, theirs in framework.tensors.items()}
        return {name: _array(tensor) for name, tensor in tensors.items() if tensor is not None}


def flax_variables(states: Mapping[str, LayerState]) -> dict[str, Any]:
    """The variables of several layers as Flax nests them, by the words of their names: {"params": ..., "batch_stats"}.

    Raises:
        ValueError: As ``LayerState.flax``.
    """
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, state in states.items():
        for collection, arrays in state.flax()[1].items():
            place = variables[collection]
            for word in filter(None, name.replace("/", ".").split(".")):
                place = place.setdefault(word, {})
            place.update(arrays)
    return variables


def states_of(model: nn.Module) -> dict[str, LayerState]:
    """The state of every batch norm layer of a model, by dotted path; frozen layers of other libraries too.

    The tensors are copies. An activation that a layer of ours applies is not part of its state.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If a layer stores no statistics, or has not received its first batch.
    """
    require_module(model, "states_of")
    layers: dict[str, _BatchNorm] = find(model)
    require_statistics(layers)
    return {path: _state_of(path, layer) for path, layer in layers.items()}


def require_statistics(layers: Mapping[str, object]) -> None:
    """Refuse layers without stored statistics."""
    for path, layer in layers.items():
        if any(not isinstance(t := getattr(layer, key), Tensor) or nn.parameter.is_lazy(t) for key in STATISTICS):
            raise ValueError(
                f"a layer needs stored statistics, got {path!r} without. Construct it with track_running_stats=True, "
                "and run a lazy one on a batch first."
            )


def _state_of(path: str, layer: _BatchNorm) -> LayerState:
    tensors: dict[str, Any] = {
        key: None if (t := getattr(layer, key)) is None else t.detach().cpu().clone() for key in TENSORS
    }
    return LayerState(path, **tensors, eps=eps_of(layer), momentum=getattr(layer, "momentum", None))


def require_eps(state: LayerState) -> float:
    """A state's eps; a ValueError if it is not known."""
    if state.eps is None:
        raise ValueError(
            f"layer {state.name!r} needs an eps, which its source does not store. Pass the original's: read(..., "
            "eps=1e-3) for Keras' default, eps=1e-5 for Flax's."
        )
    return state.eps


@torch.no_grad()
def put(state: LayerState, layer: Any) -> None:
    """Copy a state's tensors, eps and momentum into a layer with the same number of channels, in place.

    If the state has no gamma or beta and the layer has, it gets ones or zeros. The counter of batches becomes 0.
    """
    for key, neutral in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        own, value = getattr(layer, key), getattr(state, key)
        if own is not None:
            own.fill_(neutral) if value is None else own.copy_(value)
    layer.eps = require_eps(state)
    if state.momentum is not None:
        layer.momentum = state.momentum
    if getattr(layer, "num_batches_tracked", None) is not None:
        layer.num_batches_tracked.zero_()


def _vector(value: object, what: str) -> Tensor:
    """A value of any framework as a tensor with one axis; bfloat16 arrays become float32."""
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(_numbers(value, what))
    if not tensor.is_floating_point():
        raise TypeError(f"{what} must be floating-point numbers, got {tensor.dtype}. Pass the layer's own arrays.")
    if tensor.ndim != 1:
        raise ValueError(
            f"{what} must have one axis, got shape {tuple(tensor.shape)}. Pass one value for each channel; of "
            "replicated arrays the first replica."
        )
    return tensor


def _numbers(value: object, what: str) -> np.ndarray:
    if callable(convert := getattr(value, "numpy", None)):
        value = convert()
    elif not isinstance(value, np.ndarray) and not callable(inner := getattr(value, "value", value)):
        value = inner
    array = np.array(value)
    if array.dtype.kind == "V" and array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{what} must be floating-point numbers, got {array.dtype}. Pass the layer's own arrays.")
    return array.astype(array.dtype.newbyteorder("="))


def _array(tensor: Tensor) -> np.ndarray:
    """A NumPy array with the tensor's numbers; bfloat16, which NumPy lacks, as float32."""
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return wide.detach().cpu().numpy().copy()


def by_natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them: BatchNorm_2 before BatchNorm_10."""
    return sorted(names, key=lambda name: [(int(w) if w.isdigit() else 0, w) for w in _pieces(name)])


def _pieces(name: str) -> list[str]:
    return re.split(r"(\d+)", name)
