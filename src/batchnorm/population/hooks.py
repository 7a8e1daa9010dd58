"""Hooks on a model that is watched, of which copies and files of the model keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch


@final
class Hook:
    """A hook on a module whose copies, in copies and in files of the model, do nothing.

    Args:
        work: Given what the hook is given.
        is_always: Whether it works also where a compiler traces the call, or a CUDA graph records it.
    """

    def __init__(self, work: Callable[..., None] | None = None, *, is_always: bool = False) -> None:
        self._work, self._is_always = work, is_always

    def __call__(self, *arguments: Any) -> None:
        """Do the work."""
        if self._work is not None and (self._is_always or not (torch.compiler.is_compiling() or _is_recorded())):
            self._work(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """A hook that does nothing: an average of the weights is not what is watched."""
        return Hook()

    def __getstate__(self) -> dict[str, Any]:
        """What a saved model keeps of it."""
        return {"_work": None, "_is_always": False}


def _is_recorded() -> bool:
    return torch.jit.is_tracing() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
