"""The exchange of a layer: merges the moments of all ranks, and adds the sums of their backward passes.

With counts n_r, means m_r and biased variances v_r of the ranks r, and n, m, v those of the union, the gradients of a
loss that depends on m and v, added up over the losses of all ranks, are

    d_m_r = n_r / n (d_m + 2 (m_r - m) d_v)        d_v_r = n_r / n d_v

A complex mean has two components, the real and the imaginary part; the variance is real: that of one added to that of
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor, distributed
from torch.autograd import Function
from torch.nn import functional

from batchnorm.kernels import ChannelStatistics, Measured
from batchnorm.kernels.choice import is_plain
from batchnorm.kernels.reference import exact_dtype
from batchnorm.kernels.shapes import values_per_channel
from batchnorm.moments import merged
from batchnorm.processes.agreement import LayerInGroup, layer_in_group
from batchnorm.processes.collectives import gathered, recorded
from batchnorm.processes.membership import NamedGroup, ranks_in_words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# tensors of several ranks, each (ranks, C)
Stack = tuple[Tensor, ...]
# added to the smallest count of a ghost batch, 0 to 1, that a rank sends in place of its batch's size
_OF_GHOST = -2


@final
class TooFewValuesError(Exception):
    """Raised on every rank if the union of all batches has no variance.

    Attributes:
        measured: The moments of the union.
        ranks: The ranks in words.
        is_empty: Whether all batches are empty: of no examples, not of padding alone.
        in_ghost: The smallest count of a channel of a ghost batch that has no variance; None if all of them have one.
    """

    def __init__(self, measured: Measured, ranks: str, *, is_empty: bool, in_ghost: float | None = None) -> None:
        super().__init__(measured)
        self.measured, self.ranks, self.is_empty, self.in_ghost = measured, ranks, is_empty, in_ghost

    @property
    def least(self) -> float:
        """The smallest count of a channel."""
        return float(self.measured.count.min()) if self.in_ghost is None else self.in_ghost


_is_alone: ContextVar[bool] = ContextVar("batchnorm_is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """A block in which no layer waits for other processes: for runs that this process makes by itself."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def is_alone() -> bool:
    """Whether the code runs inside of ``alone``, or there is no other process."""
    if _is_alone.get() or not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_world_size() == 1


def group_of(layer: Any) -> Any:
    """The process group whose batches a call of the layer is normalized with; None if the batch is alone.

    It is alone in eval mode, without ``sync``, without an initialized process group, in a group of one process, and
    inside of ``alone``.

    Raises:
        RuntimeError: If the layer was loaded with a group that this run does not have.
    """
    if not (layer._sync and layer.training and distributed.is_available() and distributed.is_initialized()):
        return None
    if not torch.compiler.is_compiling() and _is_alone.get():
        return None
    group = layer._process_group
    group = distributed.group.WORLD if group is None else group
    if isinstance(group, NamedGroup) and isinstance(group := group.resolved(), NamedGroup):
        raise RuntimeError(  # noqa: TRY004 - the layer's state is wrong, not an argument
            f"{type(layer).__name__} needs its process group, got {group!r}, which this run does not have. Set "
            "layer.process_group to a group of this run, or to None for all processes."
        )
    return group if distributed.get_world_size(group) > 1 else None


def exchange_of(layer: Any, x: Tensor) -> Exchange | None:
    """The exchange of a layer with the other ranks for the batch ``x``; None if the batch is alone.

    A program of torch.compile does not compare layers: each rank traces it at another time.

    Raises:
        RuntimeError: Inside of vmap or jvp, which have no rule for collectives.
    """
    group = group_of(layer)
    if group is None:
        return None
    if torch.compiler.is_compiling():
        return Exchange(group, values_per_channel(x), None)
    transforms = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    if transforms - {torch._C._functorch.TransformType.Grad}:
        raise RuntimeError(
            f"{type(layer).__name__} needs a call outside of vmap and jvp to exchange moments with other processes, "
            "got one inside. Set layer.sync = False, call eval(), or use torch.func.grad or torch.autograd."
        )
    return Exchange(group, values_per_channel(x), layer_in_group(layer, group))


@final
class Exchange:
    """A ``kernels.Group``: the batches that the ranks of a process group have in one call of a layer.

    Args:
        group: The process group.
        size: Values of each channel in this rank's batch, padding included.
        own: The layer, as the ranks of the group compare it; None in a program, which does not compare.
    """

    def __init__(self, group: ProcessGroup, size: int, own: LayerInGroup | None) -> None:
        self.group, self.size, self.own = group, size, own

    def union(self, own: Measured) -> Measured:
        """The moments of the batches of all ranks; differentiable in ``own``, whose gradient needs one collective.

        Raises:
            RuntimeError: On every rank, if the ranks call different layers; if the exchange fails.
            TooFewValuesError: If a channel of the union has a count of 1 or less; not on accelerators and under
                compilers, which do not know the count.
        """
        (mean, var), count = own
        count = count.expand_as(mean)
        # torch differentiates a program's collective itself, and its compiler warns of our node
        mean, var, count = self.merged(mean, var, count) if self.own is None else _Union.apply(mean, var, count, self)
        return Measured(ChannelStatistics(mean, var), count)

    def refuse(self, own: Measured, least: float) -> None:
        """Raise TooFewValuesError on every rank: a ghost batch of this one has a channel with a count of 1 or less."""
        self.size = least + _OF_GHOST  # type: ignore[assignment] - below 0, as no size is
        self.union(own)

    def total(self, sums: Tensor) -> Tensor:
        """The sums (rows, C) of all ranks, added in rank order, in float64 (float32 on Apple's GPUs).

        Raises:
            RuntimeError: If the exchange fails; on every rank, if the ranks call different layers.
        """
        rows = self._gathered([sums.detach().to(exact_dtype(sums.device)).reshape(-1)], "backward")
        return _folded(_added, (rows,))[0].view_as(sums)

    def merged(self, mean: Tensor, var: Tensor, count: Tensor) -> Stack:
        """Mean, variance and count (C,) of the union, from those of this rank."""
        # without values the moments are NaN, which would become the gradients of other ranks
        mean, var = (torch.where(count == 0, 0, each) for each in (mean, var))
        own = _components(mean)
        rows = self._gathered([var.new_full((1,), self.size), count, var * count, own.reshape(-1)], "forward")
        sizes, counts, m2s, means = rows.split([1, len(count), len(count), own.numel()], 1)
        means = means.unflatten(1, own.shape)  # (ranks, components * C) -> (ranks, components, C)
        counts = counts.detach().unsqueeze(1).expand_as(means)
        m2s = functional.pad(m2s.unsqueeze(1), (0, 0, 0, len(own) - 1))  # those between components' means are added
        count, means, m2s = _folded(merged, (counts, means, m2s))
        measured = Measured(ChannelStatistics(_joined(means), m2s.sum(0) / count[0]), count[0])
        if rows.is_cpu and is_plain(rows) and count.numel():
            _require_variances(measured, sizes, self.group)
        return *measured.statistics, measured.count

    def _gathered(self, parts: list[Tensor], direction: str) -> Tensor:
        """The parts of all ranks in one collective: (ranks, K), in rank order; a header precedes the first one."""
        own = self.own
        if own is None:
            return recorded(torch.cat(parts), self.group)
        if direction not in own.compared:
            own.compare(direction, parts[0].device)
        marked = torch.cat([parts[0].new_full((1,), own.fingerprint), *parts])
        rows = gathered(marked, self.group, own.name, direction)
        if rows.is_cpu and is_plain(rows) and not bool((rows[:, 0] == own.fingerprint).all()):
            own.compare(direction, rows.device)
        return rows[:, 1:]


def _require_variances(union: Measured, sizes: Tensor, group: Any) -> None:
    smallest = float(sizes.min())
    if smallest < 0 or not bool((union.count > 1).all()):
        in_ghost = smallest - _OF_GHOST if smallest < 0 else None
        raise TooFewValuesError(union, ranks_in_words(group), is_empty=not sizes.any(), in_ghost=in_ghost)


def _components(values: Tensor) -> Tensor:
    """Real values (C,) as (1, C); the real and imaginary parts of complex values as (2, C)."""
    return torch.stack([values.real, values.imag]) if values.is_complex() else values.unsqueeze(0)


def _joined(components: Sequence[Tensor] | Tensor) -> Tensor:
    """The inverse of ``_components``."""
    return components[0] if len(components) == 1 else torch.complex(components[0], components[1])


def _added(a: Stack, b: Stack) -> Stack:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _folded(combine: Callable[[Stack, Stack], Stack], parts: Stack) -> Stack:
    """The parts of all ranks combined, neighbours first: (ranks, ...) -> (...); only the ranks decide the order."""
    while (ranks := len(parts[0])) > 1:
        even = ranks - ranks % 2
        pairs = combine(tuple(p[0:even:2] for p in parts), tuple(p[1:even:2] for p in parts))
        parts = tuple(torch.cat([new, old[even:]]) for new, old in zip(pairs, parts, strict=True))
    return tuple(p[0] for p in parts)


class _Context(Protocol):
    """The object in which a node keeps what its backward pass needs."""

    saved_tensors: tuple[Tensor, ...]
    exchange: Exchange
    save_for_backward: Callable[..., None]
    mark_non_differentiable: Callable[..., None]


class _Union(Function):
    """The moments of the union, differentiable any number of times in those of this rank."""

    @staticmethod
    def forward(mean: Tensor, var: Tensor, count: Tensor, exchange: Exchange) -> Stack:  # pyrefly: ignore
        """Mean, variance and count of the union."""
        return exchange.merged(mean, var, count)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Stack) -> None:  # pyrefly: ignore
        """Keep what the backward pass needs."""
        mean, _, count, ctx.exchange = inputs
        ctx.save_for_backward(mean, count, output[0], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: _Context, d_mean: Tensor, d_var: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        own_mean, own_count, mean, count = ctx.saved_tensors
        *d_means, d_var = _RankSums.apply(torch.cat([_components(d_mean), d_var.unsqueeze(0)]), ctx.exchange).unbind()
        distance = torch.where(own_count == 0, 0, own_mean - mean)
        share = own_count / torch.where(count == 0, 1, count)
        return share * (_joined(d_means) + 2 * distance * d_var), share * d_var, None, None


class _RankSums(Function):
    """Sums over all ranks: a rank's summand is in the sums of all, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(sums: Tensor, exchange: Exchange) -> Tensor:  # pyrefly: ignore
        """As ``Exchange.total``."""
        return exchange.total(sums)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004  # pyrefly: ignore
        """Keep the exchange."""
        ctx.exchange = inputs[1]

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        return _RankSums.apply(grad, ctx.exchange), None
