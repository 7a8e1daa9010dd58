"""broadcast_statistics: the stored statistics of one rank for all ranks, in one message."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from batchnorm.argument_types import require_whole_number
from batchnorm.population.tensor_memory import write
from batchnorm.processes.membership import ranks_of
from batchnorm.replicas.descriptions import STORED, bits, compared, described, layers_of
from batchnorm.replicas.differences import Replicas, differences


def broadcast_statistics(model: nn.Module, src: int = 0, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Give the stored statistics of one rank to all ranks of a group, bit for bit.

    Every rank of the group must call this. Means, variances and counts of batches are written into the buffers of all
    batch norm layers, in place; gamma and beta stay. The ranks compare the shapes of their layers first. Without an
    initialized process group nothing happens.

    Args:
        model: The copy of this rank, which is changed; it may be wrapped.
        src: The global rank whose statistics all ranks get, as in torch.distributed.broadcast.
        group: The processes; None: all.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``src`` no whole number, or ``group`` no process group.
        ValueError: If ``src`` or this rank is not in the group.
        RuntimeError: On every rank, if the layers or the shapes or types of their statistics differ, or the values of
            some cannot be read.
    """
    ranks, layers = ranks_of(group, "broadcast_statistics"), layers_of(model, "broadcast_statistics")
    require_whole_number(src, "src", "Pass a rank.")
    if src not in ranks:
        raise ValueError(
            f"broadcast_statistics needs src to be a global rank of its group, one of {', '.join(map(str, ranks))}, "
            f"got {src}. Pass one of them."
        )
    _require_same_shapes(ranks, layers, group)
    tensors = [t for layer in layers.values() for name in STORED if isinstance(t := getattr(layer, name, None), Tensor)]
    if len(ranks) == 1 or not tensors:
        return
    packed = torch.cat([bits(tensor).to(tensors[0].device) for tensor in tensors])
    distributed.broadcast(packed, src, group=group)
    parts = packed.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        write(tensor, part.clone().view(tensor.dtype).view(tensor.shape).to(tensor.device))


def _require_same_shapes(
    ranks: list[int], layers: dict[str, nn.Module], group: torch.distributed.ProcessGroup | None
) -> None:
    of_ranks = compared(described(layers, with_bits=False), ranks, group, "broadcast_statistics")
    found = tuple(each for each in differences(of_ranks) if each.what != "class")
    absent = [(p.path, name, c.absence) for own in of_ranks for p in own for name, c in p.tensors.items() if c.absence]
    if found:
        raise RuntimeError(
            "broadcast_statistics needs the same layers on every rank, got "
            f"{Replicas(tuple(ranks), len(of_ranks[0]), found)}\nBuild the same model on every rank."
        )
    if absent:
        path, name, why = absent[0]
        raise RuntimeError(f"broadcast_statistics needs statistics with values, got {path!r} whose {name} {why}.")
