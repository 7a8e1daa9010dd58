"""The plan of a fold: for each batch norm layer the layer that it is folded into, or the reason why it stays."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import final

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.other_libraries import quantized
from batchnorm.population import preserve_state
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery.dataflow import flows, static_callers
from batchnorm.surgery.folding import channel_paths
from batchnorm.surgery.folding.arithmetic import RANKS, Position
from batchnorm.surgery.folding.channel_paths import Channels
from batchnorm.surgery.folding.model_facts import (
    SUMS,
    ModelFacts,
    gathered,
    is_linear,
    look_at_channels,
    observed,
    sum_of,
)
from batchnorm.surgery.folding.obstacles import (
    about_axes,
    about_layer,
    about_pair,
    about_partner,
    about_result,
    about_state,
    named,
    rank,
)
from batchnorm.surgery.layer_maps import Parts, parts_of
from batchnorm.surgery.patterns import is_ours
from batchnorm.surgery.replacement import find
from batchnorm.surgery.shape_tracing import recorded


@final
@dataclass(frozen=True)
class Partner:
    """The layer that a batch norm layer is folded into: it is ``before`` or ``behind`` batch norm.

    ``channels`` has for each channel of this layer the channel of batch norm that it meets, -1 for none; ``channels``
    is None if both have the same channels. ``others`` are further layers before batch norm, whose results are
    concatenated with the result of this layer.
    """

    path: str
    position: Position
    channels: Channels | None = None
    others: tuple[Partner, ...] = ()

    def __str__(self) -> str:
        return f"{' and '.join(repr(each.path) for each in (self, *self.others))} {self.position} it"


def plan(model: nn.Module, example: Batch) -> tuple[dict[str, Partner | str], dict[str, Parts]]:
    """The partner of each batch norm layer, or the reason why it has none; and what each layer computes, if known.

    Folds must be done in the order of the first dict.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If the model is compiled or does not run on ``example``.
    """
    open_layers = find(model)
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError(
            "fold needs a model before torch.compile, got a compiled one. Fold first, then compile the result."
        )
    facts, closed = _examined(model, example)
    answers: dict[str, Partner | str] = {}
    settled = True
    while settled:  # a folded layer is removed from its graph, so that other layers may get new neighbours
        settled = False
        for path, layer in list(open_layers.items()):
            answers[path] = quantized(model, path) or _answer(facts, layer) or _why_unseen(path, facts, closed)
            if isinstance(answers[path], Partner):
                settled = True
                del open_layers[path]
                _take_out(facts.nodes[layer][0], facts.applying)
                answers[path] = answers.pop(path)  # moved to the end: folds are done in this order
    known_parts = {path: facts.parts.get(layer) for path, layer in find(model).items()}
    return answers, {path: parts for path, parts in known_parts.items() if isinstance(parts, Parts)}


def _examined(model: nn.Module, example: Batch) -> tuple[ModelFacts, dict[nn.Module, str]]:
    """Facts about a model, and for each forward without a graph the reason. The model is not changed."""
    with preserve_state(model):
        ranks = arguments = callers = inputs = record = None
        if example is not None:
            callers, ranks, arguments, inputs = observed(model, example)
            record = partial(recorded, inputs=inputs)
        known, closed = flows(model, (False,), arguments, record)
        callers = static_callers(model, known) if callers is None else callers
        summing = [module for module in model.modules() if isinstance(module, tuple(RANKS))]
        wholes = {module for module in summing if is_linear(module, record)}
        holding = {module for module in summing if any(module.children()) and sum_of(module, record)} - wholes
        facts = gathered(model, known, callers, ranks, wholes, holding, _parts(find(model)))
        if inputs is not None:
            look_at_channels(facts, inputs)
    return facts, closed


def _take_out(node: Node, applying: Container[nn.Module]) -> None:
    """Remove a folded layer from its graph, unless it still applies an activation or adds a residual."""
    if len(node.args) == 1 and node.meta["module"] not in applying:
        node.replace_all_uses_with(node.args[0])  # pyrefly: ignore
        node.graph.erase_node(node)


def _why_unseen(path: str, facts: ModelFacts, closed: dict[nn.Module, str]) -> str:
    """Why a layer is in no graph."""
    around = [m for m, name in facts.names.items() if m in closed and (name == "" or path.startswith(f"{name}."))]
    if not around:
        return "no code that torch.fx can trace calls it"
    nearest = max(around, key=lambda module: len(facts.names[module]))
    name = facts.names[nearest] or "the model itself"
    return f"the forward of {name!r} ({type(nearest).__name__}) cannot be traced: {closed[nearest]}"


def _answer(facts: ModelFacts, layer: _BatchNorm) -> Partner | str | None:
    """The partner of a layer, or why it has none; None if the layer is in no graph."""
    if (reason := about_layer(facts, layer)) or (reason := facts.about_tensors(layer)):
        return f"it {reason}"
    if reason := facts.about_calls(layer):
        return f"it {reason}"
    if layer not in facts.nodes:
        return None
    node = facts.nodes[layer][0]
    source = node.args[0] if node.args else None
    if node.kwargs or not isinstance(source, Node) or len(node.args) > 1 + is_ours(layer):
        return "it is called with more than its input, or with keyword arguments"
    reasons = []
    for answer in chain(_next_to(facts, layer, node, source), _inside(facts, layer, node, source)):
        if isinstance(answer, Partner):
            return answer
        reasons.append(answer)
    if reasons:
        return "; ".join(reasons)
    moved = _through_moves(facts, layer, node)
    if isinstance(moved, Partner):
        return moved
    return "; ".join([_about_neighbours(facts, node, source), *([moved] if moved else [])])


def _next_to(facts: ModelFacts, layer: _BatchNorm, node: Node, source: Node) -> Iterator[Partner | str]:
    """The convolutions and linear layers next to a batch norm layer, each as partner or as reason why it is none."""
    for position, neighbour in (("before", source), ("behind", _only_user(node))):
        partner = neighbour.meta.get("module") if neighbour is not None else None
        if isinstance(partner, tuple(RANKS)):
            yield about_pair(facts, layer, partner, position) or Partner(facts.names[partner], position)


def _inside(facts: ModelFacts, layer: _BatchNorm, node: Node, source: Node) -> Iterator[Partner | str]:
    """The convolution or linear layer that calls a batch norm layer in its own forward, or why it is no partner."""
    if (holder := _holder(facts, source)) is None:
        return
    reason = about_partner(facts, holder, "before") or about_axes(facts, layer, holder, "before")
    reason = reason or about_result(facts, layer, holder, "before")
    others = [named(facts, user) for user in source.users if user is not node]
    others += ["the layer as its residual"] if source in node.args[1:] else []
    if reason is None and others:
        reason = f"{facts.names[holder]!r} computes a sum that also goes to {others[0]}"
    yield reason or Partner(facts.names[holder], "before")


def _holder(facts: ModelFacts, source: Node) -> nn.Module | None:
    """The convolution or linear layer whose forward contains the node ``source``, its sum; None if there is none."""
    caller = source.meta.get("caller")
    is_sum = source.op == "call_function" and source.target in SUMS
    return caller if is_sum and caller in facts.holding else None


def _through_moves(facts: ModelFacts, layer: _BatchNorm, node: Node) -> Partner | str | None:
    """The partner beyond operations that only move values, or why there is none; None without such operations."""
    near = [
        position
        for position, nodes in (("before", node.all_input_nodes[:1]), ("behind", node.users))
        if any(map(channel_paths.moves, nodes))
    ]
    if not near:
        return None
    if node not in facts.sizes:
        return (
            "the sizes of its neighbours' results are not known"
            if facts.ranks is not None
            else "pass an example to follow values through the operations next to it"
        )
    axes = {
        partner_node: axis
        for partner in facts.linear
        for partner_node in facts.nodes.get(partner, [])
        if (axis := _axis(facts, partner, partner_node)) is not None
    }
    reasons = []
    for position in near:
        answer = _before(facts, layer, node, axes) if position == "before" else _behind(facts, layer, node, axes)
        if isinstance(answer, Partner):
            return answer
        reasons.append(answer)
    return "; ".join(reasons)


def _axis(facts: ModelFacts, partner: nn.Module, node: Node) -> int | None:
    """The axis of a partner's channels; None if its results do not have the axes of a batch."""
    value = facts.sizes.get(node)
    if not isinstance(value, Tensor):
        return None
    if isinstance(partner, nn.Linear):
        return value.ndim - 1
    return 1 if value.ndim == rank(partner) else None


def _before(facts: ModelFacts, layer: _BatchNorm, node: Node, axes: dict[Node, int]) -> Partner | str:
    channels_by_node = channel_paths.before(node, facts.sizes, axes)
    if isinstance(channels_by_node, str):
        return channels_by_node
    partners = []
    for partner_node, met in channels_by_node.items():
        partner = partner_node.meta["module"]
        if reason := about_partner(facts, partner, "before") or about_result(facts, layer, partner, "before", met):
            return reason
        partners.append(Partner(facts.names[partner], "before", met))
    first, *others = partners
    return replace(first, others=tuple(others))


def _behind(facts: ModelFacts, layer: _BatchNorm, node: Node, axes: dict[Node, int]) -> Partner | str:
    if len(node.args) > 1 or node in {each for layer in facts.applying for each in facts.nodes.get(layer, [])}:
        return "it applies an activation or adds a residual, so nothing behind it can do its work"
    reader_and_channels = channel_paths.behind(node, facts.sizes, axes)
    if isinstance(reader_and_channels, str):
        return reader_and_channels
    partner_node, channels = reader_and_channels
    partner = partner_node.meta["module"]
    if reason := about_partner(facts, partner, "behind") or about_result(facts, layer, partner, "behind", channels):
        return reason
    between = channel_paths.path_between(node, partner_node)
    if not all(map(channel_paths.is_harmless, between)):
        return f"{facts.names[partner]!r} runs after other code, which may overwrite the layer's input"
    return Partner(facts.names[partner], "behind", channels)


def _parts(layers: dict[str, _BatchNorm]) -> dict[nn.Module, Parts | str]:
    """What each layer computes, or why that is not known; only layers whose tensors and hooks allow folding."""
    return {layer: parts_of(layer) for layer in layers.values() if about_state(layer) is None}


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _about_neighbours(facts: ModelFacts, node: Node, source: Node) -> str:
    users = ", ".join(dict.fromkeys(named(facts, user) for user in node.users)) or "nothing"
    return f"no convolution or linear layer is next to it: {named(facts, source)} before it, {users} behind it"
