"""Eager mode: compiled models run as they are written, so that hooks inside of them are called."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[object]:
    """A block that runs compiled models eagerly: their code was made without our hooks, and may stumble over them."""
    loaded = "torch._dynamo" in sys.modules  # loading the compiler takes seconds, and no compiled model is without it
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()
