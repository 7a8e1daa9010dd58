"""The layers in a state dict, by the names of their tensors, and the names that stay with each state.

A layer's statistics are two or three tensors of one module: ``running_mean`` and ``running_var``, or ``mean``, ``var``
and ``count`` of an ``InputNorm``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.argument_types import kind_of

Names = Mapping[str, str]  # "mean", "var" and "count": the tensor's name in the state

COUNTER = "num_batches_tracked"
# the roles of a layer's tensors, by the last part of their names
_ROLES = {"running_mean": "mean", "running_var": "var"}
_ROLES_OF_INPUTS = {"mean": "mean", "var": "var", "count": "count"}
# what ``local`` may say in place of a path: the tensors of every batch norm layer that it leaves out
_LEAVES = {
    "statistics": {*_ROLES, COUNTER},
    "batch_norm": {*_ROLES, COUNTER, "weight", "bias"},
}


@final
@dataclass(frozen=True, slots=True)
class StatisticsNames:
    """The statistics of the layer at ``path``; names of tensors by their role."""

    path: str
    names: Names

    @property
    def is_complete(self) -> bool:
        """Whether there are both a mean and a variance."""
        return {"mean", "var"} <= self.names.keys()


def statistics_names(names: Iterable[str]) -> list[StatisticsNames]:
    """The statistics of all layers in a state dict with these names."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        path, _, leaf = name.rpartition(".")
        modules[path][leaf] = name
    groups = []
    for path, leaves in modules.items():
        roles = _ROLES_OF_INPUTS if _ROLES_OF_INPUTS.keys() <= leaves.keys() else _ROLES
        if own := {roles[leaf]: name for leaf, name in leaves.items() if leaf in roles}:
            groups.append(StatisticsNames(path, own))
    return groups


def local_names(names: Sequence[str], local: str | Iterable[str]) -> set[str]:
    """The names that ``local`` leaves out of the merged state.

    Raises:
        TypeError: If ``local`` is no text and no texts.
        ValueError: If no name is at or below one of the paths.
    """
    layers = [group.path for group in statistics_names(names) if "count" not in group.names]
    found: set[str] = set()
    for path in [local] if isinstance(local, str) else _texts(local):
        below = {name for name in names if name == path or name.startswith(f"{path}.")}
        if not below and (leaves := _LEAVES.get(path)):
            below = {name for name in names if name.rpartition(".")[0] in layers and name.rpartition(".")[2] in leaves}
        elif not below:
            known = ", ".join(map(repr, layers[:3])) or "none"
            raise ValueError(
                f"local must be 'statistics', 'batch_norm' or paths of modules, got {path!r}, which has no tensors. "
                f"Choose paths of the states; batch norm layers are {known}{', ...' if len(layers) > 3 else ''}."
            )
        found |= below
    return found


def _texts(local: object) -> list[str]:
    texts = list(local) if isinstance(local, Iterable) else [local]
    for path in texts:
        if not isinstance(path, str):
            raise TypeError(
                f"local must be 'statistics', 'batch_norm' or paths of modules, got {kind_of(path)}. Pass "
                "local='statistics', or a list of paths."
            )
    return texts
