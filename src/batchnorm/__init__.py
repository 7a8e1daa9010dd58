"""Batch normalization for PyTorch, from the first input feature to the deployed model.

Public names are loaded on first use, so that ``import batchnorm`` costs milliseconds and works where
torch is not installed. If torch is already imported, this package registers its operators at once: a program that was
exported in train mode needs these operators, and nothing else of this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from batchnorm.package_version import VERSION

if TYPE_CHECKING:
    from batchnorm.adaptation import Adapter, DomainBank, adapt, adapted
    from batchnorm.allocator import tune_allocator
    from batchnorm.averaging import merge_statistics
    from batchnorm.datasets.measurement import data_statistics
    from batchnorm.doctor import examine, treat
    from batchnorm.inputs import InputNorm
    from batchnorm.instruments import probe, watch
    from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from batchnorm.lazy_layers import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
    from batchnorm.micro_batches import step, step_backward
    from batchnorm.moments import Moments
    from batchnorm.population import freeze, frozen, preserve_state, recalibrate, unfreeze
    from batchnorm.replicas import broadcast_statistics, check_replicas
    from batchnorm.shift import ShiftMonitor
    from batchnorm.surgery import convert, find, fold, for_export, replace, revert, to_group_norm, unfold
    from batchnorm.variants.renorm import Ramp, Renorm
    from batchnorm.weight_decay import parameter_groups

__version__ = VERSION

__all__ = [
    "Adapter",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DomainBank",
    "InputNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Ramp",
    "Renorm",
    "ShiftMonitor",
    "__version__",
    "adapt",
    "adapted",
    "broadcast_statistics",
    "check_replicas",
    "convert",
    "data_statistics",
    "examine",
    "find",
    "fold",
    "for_export",
    "freeze",
    "frozen",
    "merge_statistics",
    "padding",
    "parameter_groups",
    "preserve_state",
    "probe",
    "recalibrate",
    "replace",
    "revert",
    "step",
    "step_backward",
    "to_group_norm",
    "treat",
    "tune_allocator",
    "unfold",
    "unfreeze",
    "watch",
]

_NAMES = {
    "adaptation": ("Adapter", "DomainBank", "adapt", "adapted"),
    "allocator": ("tune_allocator",),
    "averaging": ("merge_statistics",),
    "datasets.measurement": ("data_statistics",),
    "doctor": ("examine", "treat"),
    "inputs": ("InputNorm",),
    "instruments": ("probe", "watch"),
    "layers": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    "micro_batches": ("step", "step_backward"),
    "lazy_layers": ("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
    "moments": ("Moments",),
    "padded_models": ("padding",),
    "population": ("freeze", "frozen", "preserve_state", "recalibrate", "unfreeze"),
    "replicas": ("broadcast_statistics", "check_replicas"),
    "shift": ("ShiftMonitor",),
    "surgery": ("convert", "find", "fold", "for_export", "replace", "revert", "to_group_norm", "unfold"),
    "weight_decay": ("parameter_groups",),
    "variants.renorm": ("Ramp", "Renorm"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "numpy"}:
            raise
        extra = "data" if _HOMES[name].startswith("datasets") else "torch"
        raise ModuleNotFoundError(
            f"batchnorm.{name} needs {error.name}, which is not installed. Run: pip install 'batchnorm[{extra}]'",
            name=error.name,
        ) from None
    globals()[name] = value
    return value


if hasattr(sys.modules.get("torch"), "library"):  # torch is imported completely, not still importing itself
    import_module("batchnorm.kernels")


def __dir__() -> list[str]:
    return sorted(__all__)
