"""Repeated forwards: activation checkpointing runs the first forward again inside a backward pass."""

from __future__ import annotations

import torch


def is_repeated() -> bool:
    """Whether autograd runs a backward pass in this thread, so that a forward is the repetition of an earlier forward.

    False while a compiler records: the compiled operators ask again when they run.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
