"""Sequences of different lengths without padding, as torch has them: packed, or nested with layout jagged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.layer_checks import refuse
from batchnorm.tracing import call_whole


def of_sequences(layer: Any, x: Any, residual: object, **options: object) -> Any:
    """The result of a layer for an input that is no plain tensor: packed or nested sequences, or torch.fx's value.

    All positions of all sequences are one batch (N, C). The result is a packed or nested tensor like the input.

    Raises:
        TypeError, ValueError: If the layer cannot normalize such an input, or there are a residual or options too.
    """
    if not isinstance(x, Tensor) and (node := call_whole(layer, x, residual, **options)) is not None:
        return node
    if not (isinstance(layer, nn.BatchNorm1d) and (isinstance(x, PackedSequence) or _is_jagged(x))):
        return refuse(layer, layer._shapes, x)
    if residual is not None or any(value is not None for value in options.values()):
        raise ValueError(
            f"{type(layer).__name__} needs a packed or nested input alone, got further arguments. Add the residual "
            "outside of the layer. Such an input has no padding: leave out mask= and lengths=."
        )
    if isinstance(x, PackedSequence):
        return x._replace(data=layer(x.data))
    return torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets())


def _is_jagged(x: Any) -> bool:
    """Whether a tensor is nested, (N, j, C), with a length j of its own for each example."""
    is_nested = isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged
    return is_nested and x.ndim == 3 and not isinstance(x.shape[2], torch.SymInt)
