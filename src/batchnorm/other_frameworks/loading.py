"""load: puts states of another framework into the batch norm layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import nn

from batchnorm.argument_types import kind_of, require_module
from batchnorm.other_frameworks.layer_state import LayerState, put, require_eps, require_statistics
from batchnorm.surgery.replacement import find

Model = TypeVar("Model", bound=nn.Module)


def load(
    model: Model, states: Mapping[str, LayerState], names: Mapping[str, str] | Literal["order"] | None = None
) -> Model:
    """Put states into the model's batch norm layers, in place, with eps and momentum; returns the model.

    Layers on other axes are not transposed: the model's layers have their channels on axis 1. Nothing is changed if an
    error is raised.

    Args:
        model: Its layers are those that ``find`` lists; they may be ours, torch.nn's, or frozen ones.
        states: From ``read``, or from ``states_of`` another model.
        names: For each path in the model the name of its state. None: the names agree, with "/" in place of ".".
            "order": the n-th layer of the model gets the n-th state. Use it only if both list their layers in the
            order of construction; shapes are compared, but layers of equal width can be confused.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a layer of the model has no state or the other way round, channels differ, a layer stores no
            statistics, lacks a gamma or beta that the state has, or a state's eps is not known.
    """
    require_module(model, "load")
    if not isinstance(states, Mapping) or not all(isinstance(state, LayerState) for state in states.values()):
        raise TypeError(f"load needs a dict of LayerStates, got {kind_of(states)}. Pass the result of read.")
    layers: dict[str, Any] = find(model)
    require_statistics(layers)
    pairs = _pairs(list(layers), states, names)
    for path, state in pairs.items():
        _require_fit(path, layers[path], state)
    for path, state in pairs.items():
        put(state, layers[path])
    return model


def _pairs(
    paths: list[str], states: Mapping[str, LayerState], names: Mapping[str, str] | str | None
) -> dict[str, LayerState]:
    if names == "order":
        chosen = dict(zip(paths, states, strict=False)) if len(paths) == len(states) else {}
    elif isinstance(names, Mapping):
        chosen = {path: name for path, name in names.items() if path in paths and name in states}
    elif names is None:
        known = {name.replace("/", "."): name for name in states}
        chosen = {path: known[path] for path in paths if path in known}
    else:
        raise TypeError(
            f"names must be a dict, 'order' or None, got {kind_of(names)}. Pass {{path: name of the state}}."
        )
    lacking, unused = [p for p in paths if p not in chosen], [n for n in states if n not in chosen.values()]
    if lacking or unused or not paths or len(set(chosen.values())) < len(chosen):
        raise ValueError(
            f"load needs one state for each of {len(paths)} layers, got {len(states)} states; without partner are the "
            f"layers {lacking[:3]} and the states {unused[:3]}. Pass names={{path in the model: name of the state}}, "
            "of all layers and states."
        )
    return {path: states[name] for path, name in chosen.items()}


def _require_fit(path: str, layer: Any, state: LayerState) -> None:
    require_eps(state)
    channels = len(layer.running_mean)
    if channels != state.channels:
        raise ValueError(
            f"load needs as many channels in a layer as in its state, got {channels} at {path!r} and {state.channels} "
            f"in {state.name!r}. Correct names=."
        )
    for key in ("weight", "bias"):
        if getattr(layer, key) is None and getattr(state, key) is not None:
            raise ValueError(
                f"load needs a {key} in layer {path!r} for that of {state.name!r}, got None. Construct the layer with "
                "affine=True."
            )
