"""Hooks on a model: put on and taken off together, and left out of copies and files of a model that is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.call_types import Arguments, Keywords
from batchnorm.layers import input_of

Seen = TypeVar("Seen", bound=nn.Module)


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """A block in which hooks are on; they are removed behind it, also those that are on when another cannot be put on.

    Args:
        handles: What putting the hooks on returns; a generator puts each one on when the block begins.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def detach(handles: list[RemovableHandle]) -> None:
    """Remove hooks that were on for longer than a block; the list is empty behind it."""
    while handles:
        handles.pop().remove()


@contextmanager
def seeing(layers: Mapping[str, Seen], see: Callable[[str, Seen, Tensor], object]) -> Iterator[None]:
    """A block in which ``see`` gets each input of a layer before the layer uses it.

    Args:
        layers: By path.
        see: Called with the path, the layer and the input.
    """

    def hook(path: str, layer: Seen, args: Arguments, kwargs: Keywords) -> None:
        see(path, layer, input_of(args, kwargs))

    puts = (layer.register_forward_pre_hook(partial(hook, path), with_kwargs=True) for path, layer in layers.items())
    with attached(puts):
        yield


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
