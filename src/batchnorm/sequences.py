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

    All positions of all sequences are one batch (N, C). With ``own_weight`` or ``ghost_batch_size`` each sequence is an
    example: they are padded for the call. The result is a packed or nested tensor like the input.

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
        return x._replace(data=_of_packed(layer, x) if _is_by_example(layer) else layer(x.data))
    values, offsets = x.values(), x.offsets()
    if not _is_by_example(layer):
        return torch.nested.nested_tensor_from_jagged(layer(values), offsets)
    return torch.nested.nested_tensor_from_jagged(_of_examples(layer, values, _valid(offsets.diff())), offsets)


def _is_by_example(layer: Any) -> bool:
    """Whether a result depends on which positions are of one example."""
    is_measured = layer.training or layer.running_mean is None
    return bool(layer._ghost_batch_size if is_measured else layer._own_weight)


def _valid(lengths: Tensor) -> Tensor:
    """The positions (N, L) before each length."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def _of_packed(layer: Any, x: PackedSequence) -> Tensor:
    """As ``_of_examples``; rows are packed by position, and sequences by length."""
    longest_first = _valid(x.batch_sizes.to(x.data.device)).t()
    rows = longest_first.new_zeros(longest_first.t().shape, dtype=torch.long)
    rows[longest_first.t()] = torch.arange(len(x.data), device=rows.device)
    given = slice(None) if x.unsorted_indices is None else x.unsorted_indices
    valid = longest_first[given]
    order = rows.t()[given][valid]
    return _of_examples(layer, x.data[order], valid)[order.argsort()]


def _of_examples(layer: Any, rows: Tensor, valid: Tensor) -> Tensor:
    """The result for rows (M, C) at the valid positions of sequences (N, L), one sequence after the other."""
    x = rows.new_zeros(*valid.shape, *rows.shape[1:]).index_put((valid,), rows)
    if layer._axis == -1:
        return layer(x, lengths=valid.sum(1), length_axis=1)[valid]
    return layer(x.transpose(1, 2), lengths=valid.sum(1), length_axis=2).transpose(1, 2)[valid]


def _is_jagged(x: Any) -> bool:
    """Whether a tensor is nested, (N, j, C), with a length j of its own for each example."""
    is_nested = isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged
    return is_nested and x.ndim == 3 and not isinstance(x.shape[2], torch.SymInt)
