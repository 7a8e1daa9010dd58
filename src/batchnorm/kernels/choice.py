"""Which kernels compute what: a table, and an environment variable that overrules it.

| tensor | kernels |
|---|---|
| on the CPU, float32, float64, bfloat16 or float16, contiguous or channels_last, not empty | native, if built |
| on CUDA or ROCm, if faster.json has a row for it | triton |
| other tensors on CUDA or ROCm, in train mode outside of transforms | torch's own batch norm, which calls cuDNN |
| any other tensor | reference |

faster.json has results of ``benchmarks/bench_gpu.py``: for a device, type and layout, the number of values from which
on the Triton kernels were faster than cuDNN's. The variable ``BATCHNORM_KERNELS`` (``reference``, ``native`` or
``triton``) forces kernels for all tensors that they support; it is read when batchnorm is imported.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch._C import _TorchDispatchModeKey
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from batchnorm.kernels import cpu, reference
from batchnorm.kernels.interface import ChannelStatistics, Kernel
from batchnorm.kernels.running_statistics import Running

_FORCED = os.environ.get("BATCHNORM_KERNELS", "")


def kernel_for(x: Tensor) -> Kernel:
    """The kernel that computes with ``x``."""
    if _FORCED == "reference":
        return reference
    if _FORCED == "triton" or x.is_cuda:
        from batchnorm.kernels import triton

        return triton if triton.supports(x) and (_FORCED == "triton" or _faster_by_triton(x)) else reference
    return cpu if cpu.supports(x) else reference


def is_torchs(x: Tensor) -> bool:
    """Whether torch's own batch norm computes with ``x``: on CUDA, unless Triton is faster or kernels are forced."""
    return x.is_cuda and _FORCED in {"", "native"} and not _faster_by_triton(x)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether kernels may use the addresses of tensors: no compiler, tracer, mode or subclass must see the call."""
    if torch.compiler.is_compiling() or _is_watched():
        return False
    for t in tensors:  # noqa: SIM110 - no generator: this runs in every call of a layer
        if t is not None and (type(t) not in _PLAIN or not torch._C._has_storage(t)):
            return False
    return True


def _is_watched() -> bool:
    """Whether a tracer, a transform, a dispatch mode or forward-mode differentiation is active."""
    c = torch._C  # torch has no public functions for this
    return bool(
        c._is_tracing()
        or c._functorch.get_interpreter_stack()
        or c._len_torch_dispatch_stack()
        or c._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or forward_mode._current_level >= 0
    )


def is_recorded(x: Tensor) -> bool:
    """Whether a compiler, an exporter or a tracer records the operations on ``x``, to run them later."""
    if type(x) not in _RECORDED:
        return False  # a subclass may know fewer operators than the plain tensors in it
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(x) not in _PLAIN:
        return True
    return (
        torch._is_functional_tensor(x)
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDERS)
    )


_PLAIN = {Tensor, torch.nn.Parameter}
_RECORDED = {*_PLAIN, FakeTensor, FunctionalTensor}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_RECORDERS = (_TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.FUNCTIONAL)


def update_running(running: Running, statistics: ChannelStatistics, count: int) -> None:
    """Move running statistics of plain tensors towards those of a batch, by the native kernels if they support them."""
    on_cpu = statistics.mean.is_cpu and statistics.var.is_cpu
    natively = _FORCED != "reference" and on_cpu and cpu.supports_update(running)
    (cpu if natively else reference).update_running(running, statistics, count)


def _faster_by_triton(x: Tensor) -> bool:
    rows = _measured().get(torch.cuda.get_device_name(x.device)) if _measured() else None
    if rows is None:
        return False
    layout = "planes" if x.is_contiguous() and x.ndim > 2 else "rows"
    from_values = rows.get(f"{str(x.dtype).removeprefix('torch.')} {layout}")
    return from_values is not None and x.numel() >= from_values


@functools.cache
def _measured() -> dict[str, dict[str, int]]:
    """For each device name {"float32 planes": number of values from which on Triton was faster, ...}."""
    return json.loads((Path(__file__).parent / "faster.json").read_text())


def _check_forced() -> None:
    if _FORCED not in {"", "reference", "native", "triton"}:
        raise ValueError(
            f"BATCHNORM_KERNELS must be 'reference', 'native' or 'triton', got {_FORCED!r}. "
            "Unset it for the fastest kernels."
        )
    if _FORCED == "" and cpu.INSTRUCTION_SET is None:
        warnings.warn(
            "batchnorm was built without a compiler and uses its reference kernels, which are slower. Install a "
            "C++ compiler and reinstall batchnorm, or set BATCHNORM_KERNELS=reference, which hides this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    if _FORCED == "native" and cpu.INSTRUCTION_SET is None:
        raise RuntimeError(
            "BATCHNORM_KERNELS=native needs the native kernels, got a package built without them. "
            "Install a C++ compiler and reinstall batchnorm, or unset the variable."
        )
    if _FORCED == "triton" and find_spec("triton") is None:
        raise RuntimeError(
            "BATCHNORM_KERNELS=triton needs Triton, which is not installed. "
            "Install a torch build for your GPU, or unset the variable."
        )


_check_forced()
