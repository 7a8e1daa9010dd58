"""Agreement: the first time in each direction, a layer compares itself with the layers that other ranks call.

Every rank sends a header of fixed size: a digest and a readable description. So layers of different sizes, and a
forward pass that meets a backward pass, are found before messages of different sizes meet, which ends the process on
gloo. Later messages contain a part of the digest: a layer that meets another layer raises an error on every rank, and
no rank normalizes by the moments of another layer.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from batchnorm.processes.collectives import gathered
from batchnorm.processes.layer_names import path_of
from batchnorm.processes.membership import members, values_by_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PROTOCOL = 1  # changes with the contents of the messages
_BYTES, _DIGEST = 512, 8
_SETTINGS = ("eps", "momentum", "track_running_stats", "_act", "_act_param", "_padding", "_single_element")
_log = logging.getLogger("batchnorm.processes")


@final
@dataclass(eq=False)
class LayerInGroup:
    """A layer as the ranks of a group compare it.

    Attributes:
        group: The process group.
        name: The layer's path and class.
        description: The layer's name, settings and types, and the version of the protocol.
        compared: The directions, "forward" and "backward", in which all ranks had the same description.
    """

    group: ProcessGroup
    name: str
    description: str
    compared: set[str] = field(default_factory=set)

    @property
    def fingerprint(self) -> int:
        """A part of the digest of the description; a float32 represents it exactly."""
        return int.from_bytes(_digest(self.description.encode())[:3], "big")

    def compare(self, direction: str, device: torch.device) -> None:
        """Compare the descriptions of all ranks, and the direction of their passes.

        Raises:
            RuntimeError: On every rank, if they differ; if the exchange fails.
        """
        header = _header(f"{self.description} in the {direction} pass").to(device)
        rows = gathered(header, self.group, self.name, direction).cpu()
        if not bool((rows == rows[0]).all()):
            raise RuntimeError(about_difference(members(self.group), [_text(bytes(row.tolist())) for row in rows]))
        _numbers[self.group.group_name] += not self.compared
        self.compared.add(direction)


_layers: weakref.WeakKeyDictionary[nn.Module, LayerInGroup] = weakref.WeakKeyDictionary()
_numbers: Counter[str] = Counter()  # of layers that all ranks have in common, by the name of a group


def layer_in_group(layer: nn.Module, group: ProcessGroup) -> LayerInGroup:
    """The layer as it was described at its first call in this group."""
    found = _layers.get(layer)
    if found is None or found.group is not group:
        found = _layers[layer] = _described(layer, group)
        _log.info("%s is synchronized over ranks %s", found.name, ", ".join(map(str, members(group))))
    return found


def about_difference(ranks: list[int], texts: list[str]) -> str:
    """The error, the same on every rank, for layers that differ; ``texts`` describes the layer of each rank."""
    return (
        "synchronized layers need the same layer on every rank of their group, got "
        f"{values_by_rank(ranks, texts)}. Build the same model on "
        "every rank, and call its layers in the same order; batchnorm.check_replicas(model) lists what differs."
    )


def _described(layer: nn.Module, group: ProcessGroup) -> LayerInGroup:
    """A layer by its path, or by its number in the group if no module calls it."""
    path, kind = path_of(layer), f"{type(layer).__name__}({layer.num_features})"
    number = _numbers[group.group_name] + 1
    name = f"{path!r}, a {kind}," if path else f"{kind}, synchronized layer {number} of its group,"
    tensors = {each: getattr(layer, each) for each in ("weight", "bias", "running_mean")}
    types = [f"{each} {str(t.dtype).removeprefix('torch.')}" for each, t in tensors.items() if t is not None]
    settings = [f"{each.strip('_')}={getattr(layer, each)!r}" for each in _SETTINGS]
    return LayerInGroup(group, name, f"{name} protocol {_PROTOCOL}, {', '.join(settings + types)}")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_DIGEST]


def _header(text: str) -> Tensor:
    """A text as bytes: a digest of the text and one of its part that fits, this part, then zeros."""
    full = text.encode()
    part = full[: _BYTES - 2 * _DIGEST]
    return torch.tensor(list((_digest(full) + _digest(part) + part).ljust(_BYTES, b"\0")), dtype=torch.uint8)


def _text(header: bytes) -> str:
    part = header[2 * _DIGEST :].rstrip(b"\0")
    is_header = _digest(part) == header[_DIGEST : 2 * _DIGEST]
    return part.decode("utf-8", "replace") if is_header else "another exchange"
