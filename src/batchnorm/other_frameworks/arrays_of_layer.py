"""The state of one layer from its arrays: by the names of a framework, or as the weights of a Keras layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.other_frameworks.layer_state import LayerState
from batchnorm.other_frameworks.naming import KERAS, STATISTICS, TENSORS, Framework


def state_of_weights(name: str, weights: Any, config: Mapping[str, object]) -> LayerState:
    """The state of a Keras layer from its configuration and its weights, a list in Keras' order or a dict of names.

    Raises:
        ValueError: If there are fewer weights than the configuration asks for.
    """
    if isinstance(weights, Mapping):
        named = {str(key).rpartition("/")[2].partition(":")[0]: value for key, value in weights.items()}
        return state_of_arrays(name, named, KERAS, config)
    absent = {key for key, word in KERAS.switches.items() if not config.get(word, True)}
    keys = [key for key in TENSORS if key not in absent]
    if len(weights) < len(keys):
        raise ValueError(
            f"layer {name!r} needs {len(keys)} weights ({', '.join(KERAS.tensors[key] for key in keys)}), got "
            f"{len(weights)}. Pass its configuration too, with center and scale."
        )
    own = {KERAS.tensors[key]: value for key, value in zip(keys, weights, strict=False)}
    return state_of_arrays(name, own, KERAS, config)


def state_of_arrays(
    name: str, own: Mapping[str, object], framework: Framework, settings: Mapping[str, object]
) -> LayerState:
    """The state of a layer from its arrays and settings, by the names that the framework gives them.

    Raises:
        ValueError: If a statistic is missing, or the settings name several axes.
    """
    tensors: dict[str, Any] = {ours: own.get(theirs) for ours, theirs in framework.tensors.items()}
    if missing := [framework.tensors[key] for key in STATISTICS if tensors[key] is None]:
        raise ValueError(
            f"layer {name!r} needs both statistics, got no {missing[0]}. Save all variables of the model, or build it."
        )
    return LayerState(name, **tensors, **_settings(settings))


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """eps, torch's momentum and the axis of a configuration, as far as they are there."""
    eps, momentum, axis = (settings.get(key) for key in ("epsilon", "momentum", "axis"))
    axes = list(axis) if isinstance(axis, Sequence) else [axis]
    if len(axes) > 1:
        raise ValueError(f"a layer needs one channel axis, got {axes}. Layers with one value for each position differ.")
    return {
        "eps": None if eps is None else float(eps),
        "momentum": None if momentum is None else 1 - float(momentum),
        "axis": None if axes[0] is None else int(axes[0]),
    }
