"""read: the batch norm layers in files, trees of arrays and layers of Keras, TensorFlow and Flax."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from batchnorm.argument_types import kind_of, require_number
from batchnorm.other_frameworks.arrays_of_layer import state_of_arrays, state_of_weights
from batchnorm.other_frameworks.keras_files import states_in
from batchnorm.other_frameworks.layer_state import LayerState, by_natural_order
from batchnorm.other_frameworks.naming import FLAX, FRAMEWORKS, KERAS, STATISTICS, TENSORS, Framework

Words = tuple[str, ...]
_DEEPEST = 64  # levels of dicts


def read(source: object, *, eps: float | None = None, momentum: float | None = None) -> dict[str, LayerState]:
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


def _named(source: object) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"a {kind_of(source)}"


def _completed(state: LayerState, eps: float | None, momentum: float | None) -> LayerState:
    known = 1 - float(momentum) if momentum is not None else None
    return replace(
        state,
        eps=state.eps if state.eps is not None or eps is None else float(eps),
        momentum=known if state.momentum is None else state.momentum,
    )


def _states(source: object) -> Iterator[LayerState]:
    if isinstance(source, str | os.PathLike):
        yield from states_in(source)
    elif isinstance(source, Mapping):
        yield from _of_tree(source)
    elif isinstance(source, nn.Module):
        raise TypeError(
            f"read needs a source of Keras or Flax, got {kind_of(source)}. Use states_of for torch's models."
        )
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
        yield state_of_weights(str(source[0].get("name", "")), source[1], source[0])
    elif _framework_of(source) is not None or hasattr(source, "layers"):
        yield from _of_layers(source, set())
    else:
        raise TypeError(
            f"read needs a file, a model or layer of Keras, or a dict of arrays, got {kind_of(source)}. Pass one "
            "of them; for a model of nnx nnx.to_pure_dict(nnx.state(model))."
        )


def _of_tree(tree: Mapping[object, object]) -> Iterator[LayerState]:
    """The layers of a tree: modules that have the mean and the variance of a framework."""
    modules: dict[Words, dict[str, object]] = {}
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
                yield state_of_arrays(name, own, framework, {})


def _is_layer(own: Mapping[str, object]) -> bool:
    """Whether a module with a "mean" or "var" has both and nothing that Flax' BatchNorm has not."""
    return {"mean", "var"} <= own.keys() <= set(FLAX.tensors.values())


def _leaves(value: object, words: Words) -> Iterator[tuple[Words, object]]:
    """The arrays of a tree with the words that lead to them; a name may have "/" in it."""
    if not isinstance(value, Mapping):
        yield words, value
    elif len(words) < _DEEPEST:
        for key, inner in value.items():
            yield from _leaves(inner, (*words, *str(key).strip("/").split("/")))


def _framework_of(layer: object) -> Framework | None:
    """The framework of a layer object. Arrays have methods mean and var, so all four names of Flax are asked for."""
    needed = {KERAS.name: STATISTICS, FLAX.name: TENSORS}
    return next((f for f in FRAMEWORKS if all(hasattr(layer, f.tensors[key]) for key in needed[f.name])), None)


def _of_layers(layer: object, visited: set[int]) -> Iterator[LayerState]:
    """The states of a layer, or of the layers inside of it."""
    if id(layer) in visited:
        return
    visited.add(id(layer))
    if (framework := _framework_of(layer)) is not None:
        own = {name: getattr(layer, name, None) for name in framework.tensors.values()}
        settings = {key: getattr(layer, key, None) for key in ("epsilon", "momentum", "axis")}
        yield state_of_arrays(str(getattr(layer, "path", None) or getattr(layer, "name", "")), own, framework, settings)
    for inner in getattr(layer, "layers", ()):
        yield from _of_layers(inner, visited)
