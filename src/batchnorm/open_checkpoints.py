"""The activation checkpoints in which a forward runs, as objects that live until autograd frees them.

torch names the checkpoint of a forward nowhere, so it is read from the calls of this thread. A reentrant checkpoint, of
torch or of another library, is a ``torch.autograd.Function``: its context is the first argument of ``forward`` and of
``backward``, the same object both times. One that is not reentrant has a record in torch.utils.checkpoint, which its
generator makes in the first forward and its ``unpack_hook`` holds in the repetition.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch
import torch.utils.checkpoint

_TORCHS = vars(torch.utils.checkpoint)


def open_checkpoints() -> tuple[list[object], object | None]:
    """The checkpoints whose first forward runs, and around them the one that is repeated, or None.

    A checkpoint inside another runs for the first time in each repetition of the outer one.
    """
    first: dict[int, object] = {id(each): each for each in _of_saved_tensors()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (repeated := _repeated_in(frame)) is not None:
            return [each for each in first.values() if each is not repeated], repeated
        if (begun := _begun_in(frame)) is not None:
            first[id(begun)] = begun
        frame = frame.f_back
    return list(first.values()), None


def _repeated_in(frame: FrameType) -> object | None:
    """The checkpoint that this call repeats."""
    if frame.f_code.co_name == "backward":
        return _context(frame)
    if frame.f_code.co_name == "unpack_hook" and frame.f_globals is _TORCHS:
        return frame.f_locals.get("frame")
    return None


def _begun_in(frame: FrameType) -> object | None:
    """The checkpoint whose first forward this call runs."""
    if frame.f_code.co_name == "forward":
        return _context(frame)
    if frame.f_globals is _TORCHS and "gen" in frame.f_code.co_varnames:
        inner = getattr(frame.f_locals.get("gen"), "gi_frame", None)
        return None if inner is None else inner.f_locals.get("new_frame")
    return None


def _context(frame: FrameType) -> object | None:
    """The context of a torch.autograd.Function whose method this call is."""
    names = frame.f_code.co_varnames[:1]
    if not frame.f_code.co_argcount or names == ("self",):
        return None
    found = frame.f_locals.get(names[0])
    return found if isinstance(found, torch._C._FunctionBase) else None


def _of_saved_tensors() -> Iterator[object]:
    """The checkpoint that packs the tensors of this forward, if torch's record of it is at hand."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    cells = () if hooks is None else getattr(hooks[0], "__closure__", None) or ()
    for cell in cells:
        if isinstance(cell.cell_contents, torch.utils.checkpoint._CheckpointFrame):
            yield cell.cell_contents
