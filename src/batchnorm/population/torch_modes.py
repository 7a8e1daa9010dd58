"""Modes: torch's modes of a thread, saved and restored because in ``lock_step`` several forwards share the thread."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch.autograd import forward_ad


@final
@dataclass(frozen=True, slots=True)
class Modes:
    """The modes of this thread that can be saved and restored.

    Args:
        inference: Whether inference mode is on.
        grad: Whether gradients are recorded.
        forward_mode: Whether forward-mode differentiation is possible; inside an autograd Function it is not.
        autocast: For each kind of device whether autocast is on, and its dtype.
        cuda: Current CUDA device and stream, if CUDA is in use.
    """

    inference: bool
    grad: bool
    forward_mode: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    cuda: tuple[int, int] | None

    @classmethod
    def now(cls) -> Modes:
        """The current modes."""
        kinds = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        cuda = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream) if len(kinds) > 1 else None
        forward_mode = torch._C._is_fwd_grad_enabled()
        return cls(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), forward_mode, autocast, cuda)

    @contextmanager
    def on(self) -> Iterator[None]:
        """A block with these modes, whatever the modes outside."""
        if (now := Modes.now()) == self:
            yield
            return
        with ExitStack() as stack:
            if now.cuda != self.cuda and self.cuda is not None:
                stack.enter_context(torch.cuda.device(self.cuda[0]))
                stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(self.cuda[1])))
            if now.inference != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(forward_ad._set_fwd_grad_enabled(self.forward_mode))
            for before, (kind, enabled, dtype) in zip(now.autocast, self.autocast, strict=False):
                if before != (kind, enabled, dtype):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


def shared_settings() -> tuple[object, ...]:
    """Settings that ``Modes`` cannot restore: those of the process, and modes that observe operators."""
    cudnn = torch.backends.cudnn
    return (
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        len(torch._C._functorch.get_interpreter_stack() or ()),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        id(warnings.filters),
    )
