"""Hooks on a model: attached and removed together, and left out of copies and files of an observed model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.call_types import Arguments, Keywords
from batchnorm.channel_axis import channels_second
from batchnorm.layers import input_of
from batchnorm.padded_batches import valid_positions

Seen = TypeVar("Seen", bound=nn.Module)


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """A block with hooks attached; all are removed after it, also if attaching one of them fails.

    Args:
        handles: Handles from registering the hooks; a generator registers them when the block begins.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def detach(handles: list[RemovableHandle]) -> None:
    """Remove hooks that stayed longer than a block, and empty the list."""
    while handles:
        handles.pop().remove()


@contextmanager
def seeing(
    layers: Mapping[str, Seen], see: Callable[[str, Seen, Tensor], object], *, without_padding: bool = False
) -> Iterator[None]:
    """A block in which ``see`` gets each input of a layer, as (N, C, ...), before the layer uses it.

    Args:
        layers: The layers, by path.
        see: Called with the path, the layer and the input.
        without_padding: Whether ``see`` gets the valid positions alone, (M, C), if the call shows padding.
    """

    def hook(path: str, layer: Seen, args: Arguments, kwargs: Keywords) -> None:
        x = channels_second(layer, input_of(args, kwargs))
        see(path, layer, valid_positions(layer, x, kwargs) if without_padding else x)

    handles = (layer.register_forward_pre_hook(partial(hook, path), with_kwargs=True) for path, layer in layers.items())
    with attached(handles):
        yield


@final
class Hook:
    """A hook whose copies, in copies and files of the model, do nothing.

    Args:
        work: Called with the hook's arguments.
        is_always: Whether it also works during compilation, torch.jit.trace or CUDA graph capture.
    """

    def __init__(self, work: Callable[..., None] | None = None, *, is_always: bool = False) -> None:
        self._work, self._is_always = work, is_always

    def __call__(self, *arguments: object) -> None:
        """Call ``work``, but not during compilation, torch.jit.trace or CUDA graph capture unless ``is_always``."""
        if self._work is not None and (self._is_always or not (torch.compiler.is_compiling() or _is_recorded())):
            self._work(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """A hook that does nothing: a copy, such as an average of the weights, is not observed."""
        return Hook()

    def __getstate__(self) -> dict[str, bool | None]:
        """The hook in a saved model, which does nothing."""
        return {"_work": None, "_is_always": False}


def _is_recorded() -> bool:
    return torch.jit.is_tracing() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
