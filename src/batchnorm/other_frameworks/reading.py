"""read: the batch norm layers in files, trees of arrays and layers of Keras, TensorFlow and Flax."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from batchnorm.argument_types import kind_of, require_number
from batchnorm.other_frameworks.layer_state import LayerState, by_natural_order
from batchnorm.other_frameworks.naming import FLAX, FRAMEWORKS, KERAS, STATISTICS, TENSORS, Framework

Words = tuple[str, ...]
_DEEPEST = 64  # levels of dicts


def read(source: Any, *, eps: float | None = None, momentum: float | None = None) -> dict[str, LayerState]:
    """The state of every batch norm layer in ``source``, by the layer's path there.

    Nothing is executed; Keras, TensorFlow and Flax are not imported. Variances are the numbers that are stored.

    Args:
        source: One of

            - the path of a ``.keras``, ``.weights.h5`` or ``.h5`` file, which needs pyfive
              (``pip install 'batchnorm[keras]'``);
            - a Keras model or layer;
            - a tree of arrays: Flax variables {"params": ..., "batch_stats": ...}, the pure dict of an ``nnx.State``,
              or a flat dict of names such as "bn/moving_mean:0";
            - a pair of a Keras configuration and weights: (layer.get_config(), layer.get_weights()).
        eps: eps of layers whose source does not store it: trees, and weights without a configuration.
        momentum: The same for momentum, in the framework's meaning: the weight of the old statistics, such as 0.99.

    Raises:
        TypeError: If ``source`` is of no such kind, or a setting is not a number.
        ValueError: If ``source`` has no batch norm layer; if a layer lacks a statistic, or an array does not have one
            axis; if a file is damaged, or has links, filters or storage that are not read.
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If a file is to be read and pyfive is not installed.
    """
    for name, value in (("eps", eps), ("momentum", momentum)):
        if value is not None:
            require_number(value, name, "Use the original's number, such as 1e-3.")
    states = {state.name: state for state in _states(source)}
    if not states:
        raise ValueError(
            f"read needs batch norm layers, got none in {_named(source)}. Pass what has moving_mean or batch_stats."
        )
    return {name: _completed(state, eps, momentum) for name, state in states.items()}


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"a {kind_of(source)}"


def _completed(state: LayerState, eps: float | None, momentum: float | None) -> LayerState:
    known = 1 - float(momentum) if momentum is not None else None
    return replace(
        state,
        eps=state.eps if state.eps is not None or eps is None else float(eps),
        momentum=known if state.momentum is None else state.momentum,
    )


def _states(source: Any) -> Iterator[LayerState]:
    if isinstance(source, str | os.PathLike):
        from batchnorm.other_frameworks.keras_files import states_in

        yield from states_in(source)
    elif isinstance(source, Mapping):
        yield from _of_tree(source)
    elif isinstance(source, nn.Module):
        raise TypeError(
            f"read needs a source of Keras or Flax, got {kind_of(source)}. Use states_of for torch's models."
        )
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
        yield of_weights(str(source[0].get("name", "")), source[1], source[0])
    elif _framework_of(source) is not None or hasattr(source, "layers"):
        yield from _of_layers(source, set())
    else:
        raise TypeError(
            f"read needs a file, a model or layer of Keras, or a dict of arrays, got {kind_of(source)}. Pass one "
            "of them; for a model of nnx nnx.to_pure_dict(nnx.state(model))."
        )


def _of_tree(tree: Mapping[Any, Any]) -> Iterator[LayerState]:
    """The layers of a tree: modules that have the mean and the variance of a framework."""
    modules: dict[Words, dict[str, Any]] = {}
    for words, value in _leaves(tree, ()):
        collections = set(FLAX.collections.values())
        inside = words[1:] if words[0] in collections and collections & set(tree) else words
        modules.setdefault(inside[:-1], {})[inside[-1].partition(":")[0]] = value
    is_sorted = bool(set(FLAX.collections.values()) & set(tree))  # by JAX, with BatchNorm_10 before BatchNorm_2
    names = {"/".join(words): words for words in modules}
    for name in by_natural_order(names) if is_sorted else names:
        own = modules[names[name]]
        for framework in FRAMEWORKS:
            if any(framework.tensors[key] in own for key in STATISTICS) and (framework is KERAS or _is_layer(own)):
                yield _of_names(name, own, framework, {})


def _is_layer(own: Mapping[str, Any]) -> bool:
    """Whether a module with a "mean" or "var" has both and nothing that Flax' BatchNorm has not."""
    return {"mean", "var"} <= own.keys() <= set(FLAX.tensors.values())


def _leaves(value: Any, words: Words) -> Iterator[tuple[Words, Any]]:
    """The arrays of a tree with the words that lead to them; a name may have "/" in it."""
    if not isinstance(value, Mapping):
        yield words, value
    elif len(words) < _DEEPEST:
        for key, inner in value.items():
            yield from _leaves(inner, (*words, *str(key).strip("/").split("/")))


def _of_names(name: str, own: Mapping[str, Any], framework: Framework, settings: Mapping[str, Any]) -> LayerState:
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


def of_weights(name: str, weights: Any, config: Mapping[str, Any]) -> LayerState:
    """The state of a Keras layer from its configuration and its weights, a list in Keras' order or a dict of names.

    Raises:
        ValueError: If there are fewer weights than the configuration asks for.
    """
    if isinstance(weights, Mapping):
        named = {str(key).rpartition("/")[2].partition(":")[0]: value for key, value in weights.items()}
        return _of_names(name, named, KERAS, config)
    absent = {key for key, word in KERAS.switches.items() if not config.get(word, True)}
    keys = [key for key in TENSORS if key not in absent]
    if len(weights) < len(keys):
        raise ValueError(
            f"layer {name!r} needs {len(keys)} weights ({', '.join(KERAS.tensors[key] for key in keys)}), got "
            f"{len(weights)}. Pass its configuration too, with center and scale."
        )
    own = {KERAS.tensors[key]: value for key, value in zip(keys, weights, strict=False)}
    return _of_names(name, own, KERAS, config)


def _framework_of(layer: Any) -> Framework | None:
    """The framework of a layer object. Arrays have methods mean and var, so all four names of Flax are asked for."""
    needed = {KERAS.name: STATISTICS, FLAX.name: TENSORS}
    return next((f for f in FRAMEWORKS if all(hasattr(layer, f.tensors[key]) for key in needed[f.name])), None)


def _of_layers(layer: Any, visited: set[int]) -> Iterator[LayerState]:
    """The states of a layer, or of the layers inside of it."""
    if id(layer) in visited:
        return
    visited.add(id(layer))
    if (framework := _framework_of(layer)) is not None:
        own = {name: getattr(layer, name, None) for name in framework.tensors.values()}
        settings = {key: getattr(layer, key, None) for key in ("epsilon", "momentum", "axis")}
        yield _of_names(str(getattr(layer, "path", None) or getattr(layer, "name", "")), own, framework, settings)
    for inner in getattr(layer, "layers", ()):
        yield from _of_layers(inner, visited)
