"""The autograd graph of one micro-batch, cut at every site, so that its backward pass runs in parts.

Level k of a graph has the result of site k and the nodes that were made behind it, before site k + 1; level -1 has the
nodes before the first site. A tensor without history takes the place of a layer's result, and of each tensor of a lower
level that a function on a higher level reads. Its gradient is collected, and is where the backward pass on the lower
level starts. So each level is passed once, when the gradients of all its results are complete. A function that reads a
tensor unseen is passed several times, with parts of its gradient: the sum is the same.

Graphs of several runs of one forward have the same nodes, which are recognized by their number since the start of the
run, their name and the shape of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.kernels import Layer, Measured, Sample, joined_batches
from batchnorm.kernels.joined_batches import JoinedBatch
from batchnorm.micro_batches import inner_gradients
from batchnorm.micro_batches.joined_layers import LayerCall, Options
from batchnorm.micro_batches.writes_in_place import written_by
from batchnorm.population.observation import EndForward

# a node's number since the start of a run, the number of its result, its name, and the result's shape
Key = tuple[int, int, str, torch.Size]

_LEAF = (1 << 64) - 1  # sequence number of the nodes that add gradients to parameters
# functions that ask about a tensor or watch it: they read no values
_ASKING = {
    "__get__", "__set__", "__delete__", "size", "dim", "numel", "stride", "element_size", "is_contiguous", "data_ptr",
    "is_floating_point", "is_complex", "requires_grad_", "register_hook", "retain_grad", "detach", "__len__",
    "__hash__", "type", "get_device", "storage_offset", "untyped_storage", "register_post_accumulate_grad_hook",
}  # fmt: skip


_ABOUT_WRITES = (
    "step_backward needs tensors as they were in the forward, but {} was modified by an inplace operation. Use an "
    "operation that is not in place."
)


class UncutGraphError(Exception):
    """A graph cannot be cut in this way; the message says why, as the end of a sentence."""


@final
class Collected:
    """The gradient of a tensor that took the place of another.

    Args:
        keeping: Says whether the forward still runs.
    """

    def __init__(self, keeping: _Keeping) -> None:
        self.grad: Tensor | None = None
        self._keeping = keeping

    def add(self, grad: Tensor) -> None:
        """Add a gradient; not while the forward runs."""
        if self._keeping.is_recording:
            raise RuntimeError(inner_gradients.ABOUT)
        self.grad = grad if self.grad is None else self.grad + grad

    def take(self) -> Tensor | None:
        """The gradient so far, which starts anew."""
        grad, self.grad = self.grad, None
        return grad


class _Source(Function):
    """A new tensor whose gradient is collected."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, make: Callable[[], Tensor], collected: Collected) -> Tensor:
        """The tensor that ``make`` returns; the anchor requires a gradient, so that this does."""
        ctx.collected = collected
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # pyrefly: ignore
        ctx.collected.add(grad)
        return None, None, None


class _Renewed(_Source):
    """A tensor that starts anew, in place: its gradient is collected."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, value: Tensor, collected: Collected) -> Tensor:  # pyrefly: ignore
        """The same tensor, which must have no history."""
        ctx.collected = collected
        ctx.mark_dirty(value)
        return value


@final
class Root(NamedTuple):
    """Where a part of the backward pass starts.

    Attributes:
        edge: A node, and which of its results.
        grad: The gradient of the result.
        owner: The result itself, if it keeps the node alive.
    """

    edge: GradientEdge
    grad: Tensor
    owner: Tensor | None = None

    @property
    def number(self) -> int:
        """The node's sequence number."""
        return self.edge.node._sequence_nr()  # type: ignore[attr-defined]


@final
class Cut(NamedTuple):
    """A site in one graph.

    Attributes:
        batch: The layer's input and parameters.
        edges: The edges of the batch's tensors; None for a tensor without a gradient.
        y: The gradient of the layer's result.
        versions: The numbers of writes to the batch's tensors.
    """

    batch: JoinedBatch
    edges: tuple[GradientEdge | None, ...]
    y: Collected
    versions: list[int]
    shape: torch.Size


@final
class CutGraph:
    """The graph of one micro-batch.

    Args:
        first: The lowest level whose tensors are kept for a backward pass.
        last: The site at which the forward ends; None: it does not end early.
        wanted: Gradients of results of these levels, from graphs of other runs.
        has_gates: Whether functions on higher levels read new tensors in place of those of lower levels.
    """

    def __init__(self, first: int, last: int | None, wanted: dict[Key, Tensor], *, has_gates: bool) -> None:
        self._first, self._last, self._wanted, self._has_gates = first, last, wanted, has_gates
        self._anchor = torch.zeros((), requires_grad=True)
        self._start = 0  # the sequence number before the run
        self._starts: list[int] = []  # of the levels from 0 on: the sequence numbers of their sites' results
        self._gates: dict[int, list[tuple[GradientEdge, Collected]]] = {}  # by level
        self._level_gates: dict[int, tuple[Tensor, Tensor]] = {}
        self._keeping = _Keeping(first < 0)
        self.cuts: dict[int, Cut] = {}
        self.roots: list[Root] = []

    # forward

    @property
    def level(self) -> int:
        """The level on which nodes are made now."""
        return len(self._starts) - 1

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A block for the forward of the micro-batch."""
        self._start = (self._anchor + 0).grad_fn._sequence_nr()  # type: ignore[union-attr]
        with _Reading(self), self._keeping.recording():
            if self._first < 0:
                yield
                return
            with torch.autograd.graph.saved_tensors_hooks(self._keeping.keep, _kept):
                yield

    def train(
        self, site: LayerCall, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, options: Options
    ) -> tuple[Tensor, Measured]:
        """The result of a site, without its history."""
        total, adjust = site.moments, options.get("adjust")
        with torch._C.DisableTorchFunction():
            layer = layer if adjust is None else adjust(layer, total)
            batch = JoinedBatch(x, sample, layer, residual, total)
            for t in batch.tensors:
                self.look(t)
            if self.level + 1 == self._last:
                raise EndForward
            return self._cut(batch), total

    def _cut(self, batch: JoinedBatch) -> Tensor:
        self._level_gates.clear()
        self._keeping.is_on = self.level + 1 >= self._first
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in batch.tensors):
            self._starts.append(self._starts[-1] if self._starts else self._start)
            return joined_batches.normalize(batch)
        edges = tuple(
            map(_edge, batch.tensors)
        )  # also where they are not needed: asking for a leaf's edge makes a node
        collected = Collected(self._keeping)
        y = _Source.apply(self._anchor, lambda: joined_batches.normalize(batch), collected)
        self._starts.append(y.grad_fn._sequence_nr())
        self.look(y)
        if self.level >= max(self._first, 0):
            tensors = [t for t in batch.tensors if t is not None]
            self.cuts[self.level] = Cut(batch, edges, collected, [t._version for t in tensors], y.shape)
        return y

    def gated(self, value: Any) -> Any:
        """What a function reads in place of ``value``: a tensor without history if it belongs to a lower level."""
        if not self._is_lower(value):
            return value
        if id(value) not in self._level_gates:
            collected, edge = Collected(self._keeping), get_gradient_edge(value)
            gate = _Source.apply(self._anchor, value.detach, collected)
            self._level_gates[id(value)] = value, gate
            self._collect(edge, collected)
        return self._level_gates[id(value)][1]

    def renew(self, value: Any) -> None:
        """Let a tensor of a lower level start anew, because a function will write to it.

        Raises:
            UncutGraphError: If the tensor is a view of another, whose history cannot be replaced.
        """
        if not self._is_lower(value):
            return
        if value._is_view():
            raise UncutGraphError("an operation in place changes a view of a tensor from before a batch norm layer")
        collected, edge = Collected(self._keeping), get_gradient_edge(value)
        value.detach_()
        _Renewed.apply(self._anchor, value, collected)
        self._collect(edge, collected)

    def _is_lower(self, value: object) -> bool:
        """Whether a value is a tensor of a lower level than that of now, and may start anew."""
        if not isinstance(value, Tensor) or not value.requires_grad or value.grad_fn is None:
            return False
        self.look(value)
        return self._has_gates and self.level >= 0 and value.grad_fn._sequence_nr() < self._starts[-1]

    def _collect(self, edge: GradientEdge, collected: Collected) -> None:
        if self.level >= self._first:
            self._gates.setdefault(self.level, []).append((edge, collected))

    def look(self, value: object) -> None:
        """Start a backward pass at a tensor if its gradient is wanted."""
        if not self._wanted or not isinstance(value, Tensor) or not value.requires_grad or value.grad_fn is None:
            return
        edge = GradientEdge(value.grad_fn, value.output_nr)  # get_gradient_edge would make nodes in this run alone
        grad = self._wanted.pop(self._key(edge, value.shape), None)
        if grad is not None:
            self.roots.append(Root(edge, grad, value))

    # backward

    def start(self, loss: Tensor) -> None:
        """Start the backward pass at a loss; a loss without history has no gradient."""
        if loss.requires_grad:
            self.roots.append(Root(get_gradient_edge(loss), torch.ones_like(loss)))

    def flush(self, level: int) -> None:
        """Run the backward pass on one level, whose roots are complete."""
        start = self._starts[level] if level >= 0 else -1
        now = [root for root in self.roots if root.number >= start]
        self.roots = [root for root in self.roots if root.number < start]
        if now:
            _run_back(now)
        for edge, collected in self._gates.pop(level, ()):
            if (grad := collected.take()) is not None:
                self.roots.append(Root(edge, grad))

    def share(self, site: int) -> tuple[JoinedBatch, Tensor, Any] | None:
        """A site's batch, the gradient of its result, and the first stage of its backward pass; None without a cut."""
        cut = self.cuts.get(site)
        if cut is None:
            return None
        if cut.versions != [t._version for t in cut.batch.tensors if t is not None]:
            raise RuntimeError(_ABOUT_WRITES.format("an input, a parameter or a residual of a batch norm layer"))
        grad = cut.y.take()
        grad = torch.zeros(cut.shape, dtype=cut.batch.x.dtype, device=cut.batch.x.device) if grad is None else grad
        return cut.batch, grad, joined_batches.shares(cut.batch, grad)

    def receive(self, site: int, gradients: joined_batches.Four) -> None:
        """Start backward passes at the tensors of a site's batch."""
        cut = self.cuts.pop(site)
        for edge, grad in zip(cut.edges, gradients, strict=True):
            if edge is not None and grad is not None:
                self.roots.append(Root(edge, grad))

    def leave(self) -> dict[Key, Tensor]:
        """The gradients that lower levels still need, for a graph of another run; parameters receive theirs."""
        leaves = [root for root in self.roots if root.number == _LEAF]
        if leaves:
            _run_back(leaves)
        self._level_gates.clear()
        wanted = dict(self._wanted)
        for root in self.roots:
            if root.number != _LEAF:
                key = self._key(root.edge, root.grad.shape)
                wanted[key] = wanted[key] + root.grad if key in wanted else root.grad
        return wanted

    def require_all(self) -> None:
        """Refuse a run that did not make every wanted result of its levels.

        Raises:
            UncutGraphError: If one is missing.
        """
        start = self._starts[self._first] - self._start if self._first >= 0 else -1
        if any(number >= start for number, *_ in self._wanted):
            raise UncutGraphError("a forward that ran again made other tensors than before")

    def _key(self, edge: GradientEdge, shape: torch.Size) -> Key:
        number = edge.node._sequence_nr() - self._start  # type: ignore[attr-defined]
        return number, edge.output_nr, edge.node.name(), shape


def _run_back(roots: list[Root]) -> None:
    """The backward pass from roots; the graph stays, for parts of gradients that come later."""
    torch.autograd.backward([root.edge for root in roots], [root.grad for root in roots], retain_graph=True)


@final
class _Keeping:
    """Whether tensors are kept for the backward pass, and whether the forward still runs.

    The nodes of a graph own this object, so it must not own them.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on, self.is_recording = is_on, False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A block for the forward."""
        self.is_recording = True
        try:
            yield
        finally:
            self.is_recording = False

    def keep(self, saved: Tensor) -> tuple[Tensor, int] | None:
        """The tensor and the number of writes to it, or None in their place."""
        return (saved.detach(), saved._version) if self.is_on else None  # a result with its history would own itself


def _kept(saved: tuple[Tensor, int] | None) -> Tensor:
    if saved is None:
        raise UncutGraphError("a part of the backward pass needs tensors of an earlier part")
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(_ABOUT_WRITES.format("a tensor that the backward pass needs"))
    return tensor


def _edge(t: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(t) if t is not None and t.requires_grad else None


@final
class _Reading(TorchFunctionMode):
    """Lets every function of torch read what the graph gives it in place of tensors of lower levels."""

    def __init__(self, graph: CutGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or getattr(func, "__name__", "") in _ASKING:
            return func(*args, **kwargs)
        if func in (torch.autograd.grad, Tensor.backward):
            inner_gradients.require_none(tree_leaves((args[:1], kwargs.get("outputs"))))
        self._graph.renew(written_by(func, args, kwargs))
        args, kwargs = tree_map(self._graph.gated, args), tree_map(self._graph.gated, kwargs)
        before = [(gate, gate._version) for _, gate in self._graph._level_gates.values()]
        result = func(*args, **kwargs)
        if any(gate._version != version for gate, version in before):
            raise UncutGraphError("an operation in place changes a tensor from before a batch norm layer")
        for leaf in tree_leaves(result):
            self._graph.look(leaf)
        return result
