"""Layers of Keras and Flax as their users hold them, in code of our own: names, settings and formulas are theirs."""

from __future__ import annotations

from typing import Any

import numpy as np


class Variable:
    """A variable of Keras or Flax: the array is its value."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value


class TensorFlowVariable:
    """A variable of TensorFlow: value and numpy are methods."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def value(self) -> TensorFlowVariable:
        return self

    def numpy(self) -> np.ndarray:
        return self._array


class KerasLayer:
    """keras.layers.BatchNormalization after build; channels last, in eval mode."""

    def __init__(
        self, channels: int, seed: int = 0, *, center: bool = True, scale: bool = True, **settings: Any
    ) -> None:
        g = np.random.default_rng(seed)
        self.name, self.axis = settings.get("name", f"bn_{seed}"), settings.get("axis", -1)
        self.momentum, self.epsilon = settings.get("momentum", 0.99), settings.get("epsilon", 1e-3)
        self.center, self.scale = center, scale
        make = settings.get("variable", Variable)
        draw = {name: g.uniform(0.5, 2, channels).astype(np.float32) for name in ("g", "b", "m", "v")}
        self.gamma = make(draw["g"]) if scale else None
        self.beta = make(draw["b"]) if center else None
        self.moving_mean, self.moving_variance = make(draw["m"]), make(draw["v"])

    def get_config(self) -> dict[str, Any]:
        names = ("name", "axis", "momentum", "epsilon", "center", "scale")
        return {"trainable": True, "dtype": "float32", **{name: getattr(self, name) for name in names}}

    def get_weights(self) -> list[np.ndarray]:
        every = (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        return [array_of(variable) for variable in every if variable is not None]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """In float64."""
        mean, var = (array_of(v).astype(np.float64) for v in (self.moving_mean, self.moving_variance))
        y = (x - mean) / np.sqrt(var + self.epsilon)
        y = y if self.gamma is None else y * array_of(self.gamma).astype(np.float64)
        return y if self.beta is None else y + array_of(self.beta).astype(np.float64)


class KerasModel:
    """A model whose layers may be models."""

    def __init__(self, *layers: Any) -> None:
        self.layers = list(layers)


class FlaxLayer:
    """flax.nnx.BatchNorm."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        g = np.random.default_rng(seed)
        self.scale, self.bias, self.mean, self.var = (
            Variable(g.uniform(0.5, 2, channels).astype(np.float32)) for _ in range(4)
        )
        self.momentum, self.epsilon, self.axis, self.use_running_average = 0.9, 1e-5, -1, True

    def variables(self) -> dict[str, dict[str, np.ndarray]]:
        """As flax.linen stores them."""
        return {
            "params": {"scale": self.scale.value, "bias": self.bias.value},
            "batch_stats": {"mean": self.mean.value, "var": self.var.value},
        }

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """In float64."""
        scale, bias, mean, var = (v.value.astype(np.float64) for v in (self.scale, self.bias, self.mean, self.var))
        return (x - mean) * (scale / np.sqrt(var + self.epsilon)) + bias


def array_of(variable: Any) -> np.ndarray:
    return variable.numpy() if hasattr(variable, "numpy") else variable.value
