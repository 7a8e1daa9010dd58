"""check_replicas: the batch norm layers of all ranks, compared in order, settings, shapes and bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, final

import torch
from torch import Tensor, nn

from batchnorm.processes.membership import ranks_as_words, ranks_of, values_by_rank
from batchnorm.processes.stored_differences import differences_in_sd
from batchnorm.replicas.descriptions import Content, Description, compared, described, layers_of

_STATISTICS = ("running_mean", "running_var")


@final
@dataclass(frozen=True)
class Difference:
    """One thing in which the layers of the ranks differ.

    Attributes:
        layer: The path of the layer; "" for the sequence of layers.
        what: "layers", "class", the name of a setting, or the name of a tensor.
        values: What each rank has, in words, in the order of the ranks. For tensors that differ in their bits alone
            "version 1", "version 2" and so on: ranks of one version have the same bits.
        largest: The largest absolute difference of a value of the tensor from that of the first rank; NaN if one is NaN
            where the other is not. None for other things.
        in_sd: For running_mean and running_var, how far the ranks differ in standard deviations of the layer's inputs:
            the rms over channels of ``processes.stored_differences``. NaN if a rank has NaN. None for other things, and
            for complex layers.
    """

    layer: str
    what: str
    values: tuple[str, ...]
    largest: float | None = None
    in_sd: float | None = None

    def words(self, ranks: Sequence[int]) -> str:
        """What each of these ranks has, without the layer: "eps: 1e-05 on rank 0; 0.001 on rank 1"."""
        in_sd = "" if self.in_sd is None else f" ({self.in_sd:.2g} sd)"
        largest = "" if self.largest is None else f", by up to {self.largest:.3g}{in_sd}"
        return f"{self.what}: {values_by_rank(ranks, self.values)}{largest}"


@final
@dataclass(frozen=True)
class Replicas:
    """The comparison of a model's batch norm layers on all ranks; the same on every rank.

    Attributes:
        ranks: The global ranks that were compared.
        count: Number of layers of the first rank.
        differences: What differs.
        unchecked: What could not be compared, with the reason, such as gamma that is spread over ranks.
    """

    ranks: tuple[int, ...]
    count: int
    differences: tuple[Difference, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def are_equal(self) -> bool:
        """Whether everything was compared and nothing differs."""
        return not self.differences and not self.unchecked

    def __str__(self) -> str:
        ranks, different = ranks_as_words(self.ranks), len(self.differences) or "no"
        head = f"{self.count} batch norm layers on {ranks}: {different} differences"
        lines = [f"  {each.layer!r} {each.words(self.ranks)}" if each.layer else f"  {each.words(self.ranks)}"
                 for each in self.differences]  # fmt: skip
        return "\n".join([head, *lines, *(f"  not compared: {each}" for each in self.unchecked)])


def check_replicas(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> Replicas:
    """What differs between the batch norm layers of a model's copies in the processes of a group.

    Every rank of the group must call this; every rank gets the same result. Compared are the sequence of layers, their
    classes, modes and settings, and the shape, type and bits of statistics, gamma and beta. A tensor that is spread
    over ranks (FSDP) is not compared, and is named. The models may differ in any way: what is exchanged first does not
    depend on them. The model is not changed. Without a process group one rank is compared with itself.

    Args:
        model: The copy of this rank; it may be wrapped.
        group: The processes; None: all.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or ``group`` no process group.
        ValueError: If this rank is not in the group, or no process group is initialized.

    Example:
        >>> print(check_replicas(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        1 batch norm layers on rank 0: no differences
    """
    ranks = ranks_of(group, "check_replicas")
    return compare_layers(layers_of(model, "check_replicas"), ranks, group, "check_replicas")


def compare_layers(
    layers: Mapping[str, Any], ranks: Sequence[int], group: torch.distributed.ProcessGroup | None, caller: str
) -> Replicas:
    """``check_replicas`` for layers by path; every rank must call this, with any layers."""
    of_ranks = compared(described(layers, with_bits=True), ranks, group, caller)
    found = [*differences(of_ranks)]
    unequal = {(each.layer, each.what): None for each in found if each.largest is not None}
    if unequal:  # the same on all ranks
        units = [(path, name) for path, what in unequal if what in _STATISTICS for name in _STATISTICS]
        own = {key: _values(layers[key[0]], key[1]) for key in [*unequal, *units]}
        eps = {path: float(getattr(layers[path], "eps", 0.0)) for path, _ in units}
        tensors = compared(own, ranks, group, caller)
        found = [_measured(each, tensors, eps.get(each.layer, 0.0)) for each in found]
    return Replicas(tuple(ranks), len(of_ranks[0]), tuple(found), tuple(_unchecked(of_ranks, ranks)))


def differences(of_ranks: list[list[Description]]) -> Iterator[Difference]:
    """What differs between the layers of the ranks; ``largest`` is 0 for tensors of one form with other bits."""
    for position, row in enumerate(zip_longest(*of_ranks)):
        paths = tuple("no layer" if each is None else f"{each.path!r}" for each in row)
        if len(set(paths)) > 1:
            yield Difference("", f"layer {position + 1} in order", paths)
            break  # every later layer is in another place
    by_path = [{each.path: each for each in layers} for layers in of_ranks]
    for path in by_path[0]:
        if all(path in layers for layers in by_path):
            yield from _of_layer([layers[path] for layers in by_path])


def _of_layer(row: list[Description]) -> Iterator[Difference]:
    path = row[0].path
    values = {"class": tuple(each.kind for each in row)}
    values |= {name: tuple(each.settings[name] for each in row) for name in row[0].settings}
    yield from (Difference(path, what, words) for what, words in values.items() if len(set(words)) > 1)
    for name in row[0].tensors:
        contents = [each.tensors[name] for each in row]
        if len({content.form for content in contents}) > 1:
            yield Difference(path, name, tuple(content.form for content in contents))
        elif len({content.digest for content in contents}) > 1 and not any(content.absence for content in contents):
            yield Difference(path, name, _alike(contents), 0.0)


def _alike(contents: list[Content]) -> tuple[str, ...]:
    """For each rank the version that it has of a tensor; versions are numbered in the order of the ranks."""
    versions = list(dict.fromkeys(content.digest for content in contents))
    return tuple(f"version {1 + versions.index(content.digest)}" for content in contents)


def _values(layer: Any, name: str) -> Tensor | None:
    tensor = getattr(layer, name, None)
    return tensor.detach().cpu() if isinstance(tensor, Tensor) else None


def _measured(found: Difference, tensors: Sequence[Mapping[tuple[str, str], Tensor]], eps: float) -> Difference:
    if found.largest is None:
        return found
    first, *others = (by_key[found.layer, found.what] for by_key in tensors)
    largest = torch.stack([_largest(first, other) for other in others]).max()
    return replace(found, largest=float(largest), in_sd=_in_sd(found, tensors, eps))


def _in_sd(found: Difference, tensors: Sequence[Mapping[tuple[str, str], Tensor]], eps: float) -> float | None:
    if found.what not in _STATISTICS:
        return None
    columns = [[by_key[found.layer, name] for by_key in tensors] for name in _STATISTICS]
    if any(t is None or t.is_complex() or t.shape != columns[0][0].shape for each in columns for t in each):
        return None
    means, variances = (torch.stack(each).double() for each in columns)
    by_means, by_sds = differences_in_sd(means, variances, eps)
    return float((by_means if found.what == _STATISTICS[0] else by_sds).square().mean().sqrt())


def _largest(a: Tensor, b: Tensor) -> Tensor:
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a.double() - b.double()).abs()).max()


def _unchecked(of_ranks: list[list[Description]], ranks: Sequence[int]) -> Iterator[str]:
    """The tensors whose values some rank cannot read, once each."""
    seen: set[tuple[str, str]] = set()
    for rank, layers in zip(ranks, of_ranks, strict=True):
        for layer in layers:
            for name, content in layer.tensors.items():
                if content.absence and (layer.path, name) not in seen:
                    seen.add((layer.path, name))
                    yield f"{layer.path!r} {name} {content.absence} (rank {rank})"
