"""Eager mode: runs compiled models uncompiled, so that hooks inside them are called."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[object]:
    """A block that runs compiled models eagerly: their code was compiled without our hooks, and may fail with hooks."""
    loaded = "torch._dynamo" in sys.modules  # loading the compiler takes seconds, and a compiled model has loaded it
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()
