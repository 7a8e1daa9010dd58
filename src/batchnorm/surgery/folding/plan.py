"""What each batch norm layer can be folded into, or why it stays: read from the graphs of the forwards."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules import module as hooks_of_all
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from batchnorm.other_libraries import channels_of, quantized
from batchnorm.population import preserve_state
from batchnorm.population.batches import call
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensor_memory import AbsenceError, absence
from batchnorm.surgery.dataflow import (
    TraceError,
    flows,
    observed_arguments,
    observed_callers,
    registrations,
    set_mode,
    static_callers,
    traced,
)
from batchnorm.surgery.folding import channel_paths
from batchnorm.surgery.folding.arithmetic import RANKS, Affine, Linear, Position, channels, shifts_evenly
from batchnorm.surgery.folding.eval_graphs import graphs
from batchnorm.surgery.layer_maps import Parts, parts_of
from batchnorm.surgery.patterns import is_ours, is_watched
from batchnorm.surgery.replacement import find
from batchnorm.surgery.shape_tracing import observed_inputs, recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from torch.fx import Graph

    from batchnorm.surgery.dataflow import Arguments, Callers, Flow
    from batchnorm.surgery.folding.channel_paths import Channels
    from batchnorm.surgery.shape_tracing import Inputs

    Record = Callable[[nn.Module], Graph]

_SUMS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@final
@dataclass(frozen=True)
class Partner:
    """What a batch norm layer is folded into: a layer ``before`` it or ``behind`` it.

    ``channels`` has for each channel of that layer the one of batch norm that it meets, -1 for none; None if they are
    the same. ``others`` are further layers before it, whose results are concatenated with those of the first.
    """

    path: str
    position: Position
    channels: Channels | None = None
    others: tuple[Partner, ...] = ()

    def __str__(self) -> str:
        return f"{' and '.join(repr(each.path) for each in (self, *self.others))} {self.position} it"


def plan(model: nn.Module, example: Any) -> tuple[dict[str, Partner | str], dict[str, Parts]]:
    """The partner of every batch norm layer, or the reason why it has none, and what each layer with a partner does.

    Folds must be done in this order.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If the model is compiled or does not run on ``example``.
    """
    open_layers = find(model)
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError(
            "fold needs a model before torch.compile, got a compiled one. Fold first, then compile the result."
        )
    with preserve_state(model):
        ranks = arguments = callers = inputs = record = None
        if example is not None:
            callers, ranks, arguments, inputs = _observed(model, example)
            record = partial(recorded, inputs=inputs)
        known, closed = flows(model, (False,), arguments, record)
        callers = static_callers(model, known) if callers is None else callers
        summing = [module for module in model.modules() if isinstance(module, tuple(RANKS))]
        wholes = {module for module in summing if _is_linear(module, record)}
        holding = {module for module in summing if any(module.children()) and _sum_of(module, record)} - wholes
        facts = _facts(model, known, callers, ranks, wholes, holding, _parts(open_layers))
        if inputs is not None:
            _look_at_channels(facts, inputs)
    found: dict[str, Partner | str] = {}
    settled = True
    while settled:  # what is folded is out of the way of what lies beyond it
        settled = False
        for path, layer in list(open_layers.items()):
            found[path] = quantized(model, path) or _answer(facts, layer) or _why_unseen(path, facts, closed)
            if isinstance(found[path], Partner):
                settled = True
                del open_layers[path]
                _take_out(facts.nodes[layer][0], facts.applying)
                found[path] = found.pop(path)  # behind those that were settled before
    known_parts = {path: facts.parts.get(layer) for path, layer in find(model).items()}
    return found, {path: parts for path, parts in known_parts.items() if isinstance(parts, Parts)}


def fresh(example: Any) -> Any:
    """A copy of a batch, which a model may write to."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)


@final
@dataclass(frozen=True)
class _Facts:
    """What was seen of a model. ``ranks`` is None if it was not run; tensors are known by their id."""

    names: dict[nn.Module, str]
    registered: Counter
    callers: Callers
    ranks: dict[nn.Module, set[int]] | None
    nodes: dict[nn.Module, list[Node]]
    owners: Counter
    read: set[int]
    linear: set[nn.Module]  # convolutions and linear layers that do nothing else with their weight and bias
    holding: set[nn.Module]  # those that go on with their sum, such as by a batch norm layer that they hold
    sizes: dict[Node, Any] = field(default_factory=dict, init=False)  # of graphs in which values are moved
    parts: dict[nn.Module, Parts | str]  # what each layer does, or why that is not known

    @property
    def applying(self) -> set[nn.Module]:
        """The layers that do something with what they have normalized."""
        after = {layer for layer, parts in self.parts.items() if isinstance(parts, Parts) and parts.then is not None}
        return after | {layer for layer in self.parts if is_ours(layer) and layer.act is not None}

    def affine(self, layer: nn.Module) -> Affine:
        """What a layer does that can be folded."""
        parts = self.parts[layer]
        assert isinstance(parts, Parts)  # noqa: S101 - the reason why it is not known was given before
        return parts.affine

    def about_calls(self, module: nn.Module) -> str | None:
        """Why a module is not called at one place."""
        nodes, callers = self.nodes.get(module, []), self.callers.get(module, set())
        if self.registered[module] != 1:
            return "has several names" if self.registered[module] else "is the model itself"
        if not callers:
            return "is not called" if self.ranks is None else "did not run on the example"
        if len(nodes) > 1:
            return f"is called {len(nodes)} times"
        if nodes and callers != {nodes[0].meta["caller"]}:
            return "is called by several modules"
        return None

    def about_tensors(self, module: nn.Module) -> str | None:
        """Why a module's tensors are not its own."""
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None and self.owners[id(tensor)] > 1:
                return f"shares its {name} with another module"
            if tensor is not None and id(tensor) in self.read:
                return f"has a {name} that other code reads"
            if tensor is not None and (tensor.is_meta or tensor.layout != torch.strided):
                return f"has a {name} without values" if tensor.is_meta else f"has a {name} that is not dense"
        return None


def _facts(
    model: nn.Module, known: dict[nn.Module, Flow], callers: Callers, ranks: dict[nn.Module, set[int]] | None,
    linear: set[nn.Module], holding: set[nn.Module], parts: dict[nn.Module, Parts | str],
) -> _Facts:  # fmt: skip
    registered = registrations(model)
    tensors = (t for m in model.modules() for table in (m._parameters, m._buffers) for t in table.values())
    read = {
        id(_attribute(flow.module, str(node.target)))
        for flow in known.values()
        if flow.module not in {*linear, *holding, *parts}  # their own forward may read them
        for node in flow.graphs[False].nodes
        if node.op == "get_attr"
    }
    nodes: dict[nn.Module, list[Node]] = defaultdict(list)
    for graph in graphs(known, registered, callers):
        for node in graph.nodes:
            if node.op == "call_module":
                nodes[node.meta["module"]].append(node)
    names = {module: name for name, module in model.named_modules()}
    return _Facts(
        names, registered, callers, ranks, dict(nodes), Counter(map(id, tensors)), read, linear, holding, parts
    )


def _attribute(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _look_at_channels(facts: _Facts, inputs: Inputs) -> None:
    """Find the sizes of graphs that have a batch norm layer next to an operation that moves values."""
    nodes = [node for layer in facts.parts for node in facts.nodes.get(layer, [])]
    near = {node.graph: None for node in nodes if any(map(channel_paths.moves, [*node.all_input_nodes, *node.users]))}
    for graph in near:
        facts.sizes.update(channel_paths.sizes(graph, inputs))


def _observed(model: nn.Module, example: Any) -> tuple[Callers, dict[nn.Module, set[int]], Arguments, Inputs]:
    """Who calls whom with what, and how many axes the inputs of batch norm layers have, when it runs in eval mode."""
    set_mode(model, False)
    seen = (
        observed_callers(),
        _observed_ranks({*find(model).values()}),
        observed_arguments(model),
        observed_inputs(model),
    )
    with seen[0] as callers, seen[1] as ranks, seen[2] as arguments, seen[3] as inputs, torch.no_grad():
        try:
            call(model, fresh(example))
        except AbsenceError:  # another example would not help
            raise
        except Exception as error:
            raise ValueError(
                f"fold needs an example that the model takes in eval mode, got {type(error).__name__}: {error} "
                "Pass a batch, as recalibrate would get it from a loader."
            ) from error
    return callers, ranks, arguments, inputs


@contextmanager
def _observed_ranks(layers: Container[nn.Module]) -> Iterator[dict[nn.Module, set[int]]]:
    ranks: dict[nn.Module, set[int]] = defaultdict(set)

    def look(module: nn.Module, args: Any) -> None:
        if module in layers and args and isinstance(args[0], Tensor):
            ranks[module].add(args[0].ndim)

    handle = hooks_of_all.register_module_forward_pre_hook(look)
    try:
        yield ranks
    finally:
        handle.remove()


def _take_out(node: Node, applying: Container[nn.Module]) -> None:
    """Remove a folded layer from its graph, unless it goes on doing something."""
    if len(node.args) == 1 and node.meta["module"] not in applying:
        node.replace_all_uses_with(node.args[0])  # pyrefly: ignore
        node.graph.erase_node(node)


def _why_unseen(path: str, facts: _Facts, closed: dict[nn.Module, str]) -> str:
    """Why a layer is in no graph."""
    around = [m for m, name in facts.names.items() if m in closed and (name == "" or path.startswith(f"{name}."))]
    if not around:
        return "no code that torch.fx can trace calls it"
    nearest = max(around, key=lambda module: len(facts.names[module]))
    name = facts.names[nearest] or "the model itself"
    return f"the forward of {name!r} ({type(nearest).__name__}) cannot be traced: {closed[nearest]}"


def _answer(facts: _Facts, layer: Any) -> Partner | str | None:
    """The partner, or why there is none; None if the layer is in no graph."""
    if (reason := _about_layer(facts, layer)) or (reason := facts.about_tensors(layer)):
        return f"it {reason}"
    if reason := facts.about_calls(layer):
        return f"it {reason}"
    if layer not in facts.nodes:
        return None
    node = facts.nodes[layer][0]
    source = node.args[0] if node.args else None
    if node.kwargs or not isinstance(source, Node) or len(node.args) > 1 + is_ours(layer):
        return "it is called with other arguments than its input"
    reasons = []
    for position, neighbour in (("before", source), ("behind", _only_user(node))):
        partner = neighbour.meta.get("module") if neighbour is not None else None
        if isinstance(partner, tuple(RANKS)):
            path = facts.names[partner]
            reason = _about_pair(facts, layer, partner, position)
            if reason is None:
                return Partner(path, position)
            reasons.append(reason)
    if (holder := _holder(facts, source)) is not None:
        reason = _about_partner(facts, holder, "before") or _about_axes(facts, layer, holder, "before")
        reason = reason or _about_result(facts, layer, holder, "before")
        others = [_named(facts, user) for user in source.users if user is not node]
        if reason is None and not others:
            return Partner(facts.names[holder], "before")
        reasons.append(reason or f"{facts.names[holder]!r} has a sum that also goes to {others[0]}")
    moved = _through_moves(facts, layer, node) if not reasons else None
    if isinstance(moved, Partner):
        return moved
    return "; ".join([*reasons, *([moved] if moved and reasons else [])]) or "; ".join(
        [_about_neighbours(facts, node, source), *([moved] if moved else [])]
    )


def _holder(facts: _Facts, source: Node) -> nn.Module | None:
    """The convolution or linear layer in whose own forward a sum of its weight is."""
    caller = source.meta.get("caller")
    is_sum = source.op == "call_function" and source.target in _SUMS
    return caller if is_sum and caller in facts.holding else None


def _through_moves(facts: _Facts, layer: Any, node: Node) -> Partner | str | None:
    """The partner beyond operations that only move values, or why there is none; None without such operations."""
    near = [
        position
        for position, nodes in (("before", node.all_input_nodes[:1]), ("behind", node.users))
        if any(map(channel_paths.moves, nodes))
    ]
    if not near:
        return None
    if node not in facts.sizes:
        return "the sizes around it are not known" if facts.ranks is not None else "pass an example to see through"
    axes = {
        theirs: axis
        for partner in facts.linear
        for theirs in facts.nodes.get(partner, [])
        if (axis := _axis(facts, partner, theirs)) is not None
    }
    reasons = []
    for position in near:
        answer = _before(facts, layer, node, axes) if position == "before" else _behind(facts, layer, node, axes)
        if isinstance(answer, Partner):
            return answer
        reasons.append(answer)
    return "; ".join(reasons)


def _axis(facts: _Facts, partner: nn.Module, node: Node) -> int | None:
    """The axis of a partner's channels, if its inputs and results are batches as it was made for."""
    value: Any = facts.sizes.get(node)
    if not isinstance(value, Tensor):
        return None
    if isinstance(partner, nn.Linear):
        return value.ndim - 1
    return 1 if value.ndim == _rank(partner) else None


def _rank(partner: nn.Module) -> int:
    return next(RANKS[kind] for kind in type(partner).__mro__ if kind in RANKS)


def _before(facts: _Facts, layer: Any, node: Node, axes: dict[Node, int]) -> Partner | str:
    found = channel_paths.before(node, facts.sizes, axes)
    if isinstance(found, str):
        return found
    partners = []
    for theirs, met in found.items():
        partner = theirs.meta["module"]
        if reason := _about_partner(facts, partner, "before") or _about_result(facts, layer, partner, "before", met):
            return reason
        partners.append(Partner(facts.names[partner], "before", met))
    first, *others = partners
    return replace(first, others=tuple(others))


def _behind(facts: _Facts, layer: Any, node: Node, axes: dict[Node, int]) -> Partner | str:
    if node in {each for layer in facts.applying for each in facts.nodes.get(layer, [])}:
        return "what is behind it gets the result of an activation"
    found = channel_paths.behind(node, facts.sizes, axes)
    if isinstance(found, str):
        return found
    theirs, channels = found
    partner = theirs.meta["module"]
    if reason := _about_partner(facts, partner, "behind") or _about_result(facts, layer, partner, "behind", channels):
        return reason
    between = channel_paths.path_between(node, theirs)
    if not all(map(channel_paths.is_harmless, between)):
        return f"{facts.names[partner]!r} runs later, when the layer's input may have been written over"
    return Partner(facts.names[partner], "behind", channels)


def _parts(layers: dict[str, Any]) -> dict[nn.Module, Parts | str]:
    """What each layer does that stores statistics and has its own tensors."""
    return {layer: parts_of(layer) for layer in layers.values() if _about_state(layer) is None}


def _about_layer(facts: _Facts, layer: Any) -> str | None:
    """What about a batch norm layer itself keeps it from being folded."""
    if reason := _about_state(layer):
        return reason
    parts = facts.parts[layer]
    if isinstance(parts, str):
        return parts
    if not (parts.affine.scale.isfinite().all() and parts.affine.shift.isfinite().all()):
        return "has statistics or parameters that make NaN or infinity"
    return None


def _about_state(layer: Any) -> str | None:
    """What about a layer's tensors and hooks keeps it from being looked at."""
    if parametrize.is_parametrized(layer):
        return "is parametrized"
    if "forward" in vars(layer) or any(map(is_lazy, [*layer.parameters(), *layer.buffers()])):
        what = "has no size yet" if "forward" not in vars(layer) else "has a forward that may do more than batch norm"
        return f"is a {type(layer).__name__} that {what}"
    if is_watched(layer):
        return "has hooks that see its input or its result"
    if not has_stored_statistics(layer):
        return "stores no statistics"
    if layer.running_mean.is_meta or layer.running_var.is_meta:
        return "has statistics without values"
    if absent := _absent(layer):
        return absent
    if (layer.running_var < 0).any():
        return f"has a negative running_var, {layer.running_var.min():.3g}"
    values = [t for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias) if t is not None]
    if not all(t.isfinite().all() for t in values):
        return "has statistics or parameters that make NaN or infinity"
    return None


def _absent(layer: nn.Module) -> str | None:
    """Which of a layer's tensors cannot be read here, and why."""
    own = {**layer._parameters, **layer._buffers}
    return next((f"has a {name} that {why}" for name, t in own.items() if t is not None and (why := absence(t))), None)


def _about_pair(facts: _Facts, layer: Any, partner: Any, position: Position) -> str | None:
    """What keeps a layer from being folded into a neighbour."""
    if reason := _about_partner(facts, partner, position):
        return reason
    node, theirs = facts.nodes[layer][0], facts.nodes[partner][0]
    if reason := _about_order(facts, node, theirs, position) or _about_axes(facts, layer, partner, position):
        return f"{facts.names[partner]!r} {reason}"
    return _about_result(facts, layer, partner, position)


def _about_partner(facts: _Facts, partner: Any, position: Position) -> str | None:
    """What about a convolution or linear layer keeps it from taking over anything."""
    name = facts.names[partner]
    if absent := _absent(partner):
        return f"{name!r} {absent}"
    if partner not in facts.linear | facts.holding or (type(partner) not in RANKS and position == "behind"):
        return f"{name!r} is a {type(partner).__name__} with a weight or a forward of its own"
    if not isinstance(partner._parameters.get("weight"), nn.Parameter):
        return f"{name!r} has a weight that is computed"
    if not partner.weight.is_floating_point():
        return f"{name!r} has a weight of {partner.weight.dtype}"
    if is_watched(partner):
        return f"{name!r} has hooks that see its input or its result"
    if reason := facts.about_calls(partner) or facts.about_tensors(partner):
        return f"{name!r} {reason}"
    theirs = facts.nodes[partner][0]
    if len(theirs.args) != 1 or theirs.kwargs:
        return f"{name!r} is called with other arguments than its input"
    return None


def _about_result(
    facts: _Facts, layer: Any, partner: Any, position: Position, channels: Channels | None = None
) -> str | None:
    """What about the weights that a partner would have keeps it from being one."""
    name, affine = facts.names[partner], facts.affine(layer).spread(channels)
    if position == "behind" and affine.shift.any() and not shifts_evenly(partner):
        zeros = (
            "makes borders of less than its kernel"
            if isinstance(partner, nn.modules.conv._ConvTransposeNd)
            else "pads with zeros"
        )
        return f"{name!r} {zeros}, which the shift of the layer does not reach"
    joined = Linear.of(partner).joined(affine, position)
    if not all(t.to(partner.weight.dtype).isfinite().all() for t in (joined.weight, joined.bias)):
        return f"{name!r} would have weights that {partner.weight.dtype} cannot hold"
    return None


def _is_linear(module: nn.Module, record: Record | None) -> bool:
    """Whether a convolution or linear layer, also one of a class of its own, is linear in its weight and bias.

    A class of its own may do what it likes with the input before, such as padding it, and nothing behind.
    """
    if type(module) in RANKS:
        return "forward" not in vars(module)
    found = _sum_of(module, record)
    return found is not None and [user.op for user in found.users] == ["output"]


def _sum_of(module: nn.Module, record: Record | None) -> Node | None:
    """The one operation in a forward that reads weight and bias, if it is that of such a layer."""
    if parametrize.is_parametrized(module) or any(map(is_lazy, module.parameters())):
        return None
    weight: Any = module.weight
    bias = module._parameters.get("bias")
    module._parameters["bias"] = nn.Parameter(weight.new_zeros(channels(module, "before")))
    try:  # with a bias, so that one is seen to be used if there is none yet
        flow = _graph_of(module, record)
    except TraceError:
        return None
    finally:
        module._parameters["bias"] = bias
    read = {str(node.target): node for node in flow.nodes if node.op == "get_attr"}
    users = {user for node in read.values() for user in node.users}
    if read.keys() != {"weight", "bias"} or len(users) != 1:
        return None
    [found] = users
    plain = found.op == "call_function" and found.target in _SUMS and not found.kwargs
    return found if plain and found.args[1:3] == (read["weight"], read["bias"]) else None


def _graph_of(module: nn.Module, record: Record | None) -> Graph:
    try:
        return traced(module)
    except TraceError:
        if record is None:
            raise
        return record(module)


def _about_order(facts: _Facts, node: Node, theirs: Node, position: Position) -> str | None:
    """Whether something else sees, or could write, what lies between the two."""
    if position == "before":
        others = [_named(facts, user) for user in theirs.users if user is not node]
        others += ["the sum behind the layer"] if theirs in node.args[1:] else []
        return f"has a result that also goes to {others[0]}" if others else None
    if len(node.args) > 1 or node.meta["module"] in facts.applying:
        return "comes behind an activation that the layer applies"
    following = node.next
    while following.op == "get_attr":
        following = following.next
    return None if following is theirs else "runs later, when the layer's input may have been written over"


def _about_axes(facts: _Facts, layer: Any, partner: Any, position: Position) -> str | None:
    """Whether the channels of both are the same axis."""
    count = channels(partner, position)
    verb = "makes" if position == "before" else "takes"
    if count != channels_of(layer):
        return f"{verb} {count} channels on another axis than the {channels_of(layer)} that the layer normalizes"
    if facts.ranks is None:
        if isinstance(partner, nn.Linear):
            return f"{verb} channels on the last axis, which is axis 1 only of (N, C): pass an example to see"
        return None
    ranks = facts.ranks.get(layer, set())
    if ranks != {_rank(partner)}:
        got = " and ".join(map(str, sorted(ranks)))
        return f"{verb} channels on another axis than the layer normalizes in its inputs of {got} axes"
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _about_neighbours(facts: _Facts, node: Node, source: Node) -> str:
    users = ", ".join(dict.fromkeys(_named(facts, user) for user in node.users)) or "nothing"
    return f"no convolution or linear layer is next to it: {_named(facts, source)} before it, {users} behind it"


def _named(facts: _Facts, node: Node) -> str:
    """What a node is to somebody who knows the model's code."""
    if node.op == "call_module":
        return repr(facts.names[node.meta["module"]])
    if node.op in {"placeholder", "output"}:
        return "an input" if node.op == "placeholder" else "what is returned"
    return str(getattr(node.target, "__name__", node.target))
