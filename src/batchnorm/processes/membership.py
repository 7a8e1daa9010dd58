"""Process groups as settings of a layer: which are accepted, and how they are shown, copied and pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import distributed, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup


def check_process_group(group: object) -> None:
    """Refuse a value that is no process group of which this rank is a member; None is accepted.

    Raises:
        TypeError: If it is no ``ProcessGroup``.
        ValueError: If this rank is not in the group. Outside of a group, ``new_group`` returns a number.
    """
    if group is None or isinstance(group, NamedGroup):
        return
    if not distributed.is_available():
        raise ValueError("process_group needs a torch built with torch.distributed. Leave it out.")
    outside: object = distributed.GroupMember.NON_GROUP_MEMBER
    if type(group) is type(outside) and group == outside:
        raise ValueError(_about_outsider("what new_group returns on a rank outside of the group"))
    if not isinstance(group, distributed.ProcessGroup):
        advice = " A DeviceMesh gives one: mesh.get_group()." if hasattr(group, "get_group") else ""
        raise TypeError(
            f"process_group must be a ProcessGroup of torch.distributed or None, got {type(group).__name__}. Create "
            f"one with torch.distributed.new_group(ranks).{advice}"
        )
    if distributed.is_initialized() and distributed.get_rank(group) < 0:
        raise ValueError(_about_outsider(f"a group of {ranks_in_words(group)}"))


def group_named(group: object) -> ProcessGroup | None:
    """The process group that an argument ``group`` names: "all" is that of all processes.

    None if the argument is None, or "all" without an initialized process group.

    Raises:
        TypeError: If it is neither "all", nor a ``ProcessGroup``, nor None.
        ValueError: If it is another word, if this rank is not in the group, or if no process group is initialized.
    """
    is_running = distributed.is_available() and distributed.is_initialized()
    if isinstance(group, str):
        if group != "all":
            raise ValueError(f'group must be "all", a ProcessGroup or None, got {group!r}. Use "all" for all ranks.')
        return distributed.group.WORLD if is_running else None
    check_process_group(group)
    if group is not None and not is_running:
        raise ValueError("group needs an initialized process group. Call init_process_group first, or leave it out.")
    return group.resolved() if isinstance(group, NamedGroup) else group  # type: ignore[return-value]


def ranks_of(group: ProcessGroup | None, caller: str) -> list[int]:
    """The ranks of a group, None being that of all processes; [0] without a process group.

    Raises:
        TypeError: If ``group`` is no process group.
        ValueError: If there is a group, but no initialized process group, or this rank is not in the group.
    """
    check_process_group(group)
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_process_group_ranks(group)
    if group is not None:
        raise ValueError(f"{caller} needs an initialized process group. Call init_process_group first.")
    return [0]


def _about_outsider(got: str) -> str:
    rank = f"rank {distributed.get_rank()}" if distributed.is_initialized() else "this process"
    return (
        f"process_group must contain {rank}, got {got}. Every rank calls torch.distributed.new_group for every group, "
        "and gives its layers the group that it is in."
    )


def is_synchronized(layer: nn.Module) -> bool:
    """Whether a layer in train mode waits for other processes: torch's SyncBatchNorm, and ours with ``sync``."""
    return isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "_sync", False) is True


def members(group: ProcessGroup) -> list[int]:
    """The global ranks of a group, in the order of their ranks in the group."""
    return distributed.get_process_group_ranks(group)


def ranks_in_words(group: Any) -> str:
    """A group by its global ranks, such as "ranks 0, 1"; by its class if it is no longer registered."""
    if isinstance(group, NamedGroup):
        return repr(group)
    try:
        return f"ranks {', '.join(map(str, members(group)))}"
    except (KeyError, RuntimeError, ValueError):
        return f"<a destroyed {type(group).__name__}>"


def values_by_rank(ranks: Sequence[int], values: Sequence[str]) -> str:
    """What each rank has, in words, such as "True on ranks 0, 2; False on rank 1"."""
    by_value: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        by_value.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on {ranks_as_words(each)}" for value, each in by_value.items())


def ranks_as_words(ranks: Sequence[int]) -> str:
    """Ranks in words, such as "rank 1" or "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@final
class NamedGroup:
    """A process group in the state of a layer that is copied or pickled: torch's groups allow neither.

    A copy in the same process has the same group. A pickle has the group's name and ranks; where it is loaded, the
    group of this name with these ranks is looked up.

    Args:
        group: The process group.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group: ProcessGroup | None = group
        self.name, self.ranks = group.group_name, members(group)

    @staticmethod
    def of(group: ProcessGroup | NamedGroup) -> NamedGroup:
        """A group by its name; a group that is one already stays the same object."""
        return group if isinstance(group, NamedGroup) else NamedGroup(group)

    def resolved(self) -> Any:
        """The process group; this object itself if this process has no such group."""
        if self.group is None and distributed.is_available() and distributed.is_initialized():
            self.group = _registered(self.name, self.ranks)
        return self if self.group is None else self.group

    def __deepcopy__(self, _memo: dict[int, object]) -> NamedGroup:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"group": None, "name": self.name, "ranks": self.ranks}

    def __repr__(self) -> str:
        return f"<ranks {', '.join(map(str, self.ranks))} of another run>"


def _registered(name: str, ranks: list[int]) -> ProcessGroup | None:
    try:
        group: ProcessGroup = distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        return group if members(group) == ranks else None
    except (LookupError, RuntimeError, ValueError):
        return None
