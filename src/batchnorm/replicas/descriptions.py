"""Descriptions: what a rank tells the others of its batch norm layers, as plain values of few bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor, nn

from batchnorm.argument_types import require_module
from batchnorm.model_wrappers import unwrapped
from batchnorm.population.tensor_memory import absence
from batchnorm.processes import group_named
from batchnorm.processes.collectives import of_all_ranks
from batchnorm.surgery.replacement import find

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STORED = ("running_mean", "running_var", "num_batches_tracked")
_TENSORS = (*STORED, "weight", "bias")
_SETTINGS = ("training", "eps", "momentum", "track_running_stats", "act", "act_param", "sync")


@final
class Content(NamedTuple):
    """A tensor of a layer.

    Attributes:
        form: Its shape and type; "none" if the layer has no such tensor.
        digest: A digest of its bits; "" if they cannot be read.
        absence: Why they cannot be read, as the end of a sentence; "" if they can.
    """

    form: str
    digest: str = ""
    absence: str = ""


@final
class Description(NamedTuple):
    """A batch norm layer of one rank.

    Attributes:
        path: Its dotted path in the model, without wrappers.
        kind: Its package and the name of its class, such as torch.BatchNorm2d.
        settings: Its settings in words, by name.
        tensors: Its statistics, gamma and beta.
    """

    path: str
    kind: str
    settings: dict[str, str]
    tensors: dict[str, Content]


def layers_of(model: nn.Module, caller: str) -> dict[str, Any]:
    """The batch norm layers of a model by path, without the wrappers around the model."""
    require_module(model, caller)
    return find(unwrapped(model))


def described(layers: Mapping[str, Any], *, with_bits: bool) -> list[Description]:
    """A description of each layer, in the order of the model; settings and digests only ``with_bits``."""
    return [
        Description(
            path,
            f"{type(layer).__module__.partition('.')[0]}.{type(layer).__name__}",
            {name: repr(getattr(layer, name, None)) for name in _SETTINGS} if with_bits else {},
            {
                name: _content(getattr(layer, name, None), with_bits=with_bits)
                for name in (_TENSORS if with_bits else STORED)
            },
        )
        for path, layer in layers.items()
    ]


def _content(tensor: Tensor | None, *, with_bits: bool) -> Content:
    if not isinstance(tensor, Tensor):
        return Content("none")
    missing = absence(tensor)
    form = "no shape" if "shape yet" in missing else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if missing or not with_bits:
        return Content(form, absence=missing)
    return Content(form, hashlib.sha256(bits(tensor).cpu().numpy().tobytes()).hexdigest())


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor with values, (bytes,)."""
    local = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return local.detach().contiguous().reshape(-1).view(torch.uint8)


def compared(value: object, ranks: Sequence[int], group: ProcessGroup | None, caller: str) -> list[Any]:
    """The values of all ranks, of any size, in rank order; every rank must call this.

    Raises:
        RuntimeError: If the exchange fails.
    """
    everyone = group_named("all" if group is None else group)
    return [value] if len(ranks) == 1 or everyone is None else of_all_ranks(value, everyone, caller, "the layers")
