"""Which kernels compute what: a table, and an environment variable that overrules it.

| tensor | kernels |
|---|---|
| on the CPU, float32, float64, bfloat16 or float16, contiguous or channels_last, not empty | native, where built |
| anything else | reference |

``BATCHNORM_KERNELS=reference`` or ``native`` forces one; it is read when batchnorm is imported.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from batchnorm.kernels import cpu, reference

_FORCED = os.environ.get("BATCHNORM_KERNELS", "")


def kernel_for(x: Tensor) -> ModuleType:
    """The module whose train_forward, train_backward and normalize take ``x``."""
    return cpu if _FORCED != "reference" and cpu.supports(x) else reference


def updates_natively(*statistics: Tensor) -> bool:
    """Whether running statistics and a batch's are moved by the native kernel."""
    return _FORCED != "reference" and cpu.supports_update(*statistics)


def _check_forced() -> None:
    if _FORCED not in {"", "reference", "native"}:
        raise ValueError(
            f"BATCHNORM_KERNELS must be 'reference' or 'native', got {_FORCED!r}. Unset it to choose by table."
        )
    if _FORCED == "native" and cpu.INSTRUCTION_SET is None:
        raise RuntimeError(
            "BATCHNORM_KERNELS=native needs the native kernels, got a package built without them. "
            "Install a C++ compiler and reinstall batchnorm, or unset the variable."
        )


_check_forced()
