"""Eager mode: runs compiled models uncompiled, so that hooks inside them are called, and without other processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from batchnorm.processes import alone


def uncompiled() -> AbstractContextManager[object]:
    """A block that runs compiled models eagerly: their code was compiled without our hooks, and may fail with hooks."""
    loaded = "torch._dynamo" in sys.modules  # loading the compiler takes seconds, and a compiled model has loaded it
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


@contextmanager
def own_run() -> Iterator[None]:
    """A block for passes in train mode that a single process makes: uncompiled, and no layer waits for other ranks."""
    with uncompiled(), alone():
        yield
