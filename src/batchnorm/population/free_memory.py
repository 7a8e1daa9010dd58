"""Free memory: how many bytes a device has left for tensors."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

_UNKNOWN = 1 << 30  # bytes, if the system does not say


def free_memory(device: torch.device | None) -> int:
    """Free bytes for new tensors on a device; on the CPU the smaller number of the machine's and its control group's.

    Args:
        device: None for the CPU. For a device that is neither the CPU nor CUDA, or if the system does not say how much
            memory is free, the result is at most 1 GiB.
    """
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_of_machine(), _of_control_group()) if device is None or device.type == "cpu" else _UNKNOWN


def _of_machine() -> int:
    with suppress(OSError, ValueError, StopIteration):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def _of_control_group() -> int:
    """Bytes that a container may still use; 2^62 if there is no container, or it has no limit that can be read."""
    folder = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(parts["file"]))  # file caches are freed on demand
    return 1 << 62
