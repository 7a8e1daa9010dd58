"""Why a batch norm layer cannot be folded into a neighbour: a reason for the report, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from batchnorm.other_libraries import channels_of
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensor_memory import absence
from batchnorm.surgery.dataflow import name_of
from batchnorm.surgery.folding.arithmetic import RANKS, Linear, Position, channels, shifts_evenly
from batchnorm.surgery.folding.channel_paths import Channels
from batchnorm.surgery.folding.model_facts import ModelFacts
from batchnorm.surgery.patterns import is_watched

Record = Callable[[nn.Module], Graph]


def rank(partner: nn.Module) -> int:
    """How many axes a batch of a convolution or linear layer has."""
    return next(RANKS[kind] for kind in type(partner).__mro__ if kind in RANKS)


def about_layer(facts: ModelFacts, layer: _BatchNorm) -> str | None:
    """Why a batch norm layer cannot be folded into any neighbour."""
    if reason := about_state(layer):
        return reason
    parts = facts.parts[layer]
    if isinstance(parts, str):
        return parts
    if not (parts.affine.scale.isfinite().all() and parts.affine.shift.isfinite().all()):
        return "has statistics or parameters that make NaN or infinity"
    return None


def about_state(layer: Any) -> str | None:
    """Why a layer's tensors cannot be read, or its hooks forbid folding."""
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


def about_pair(facts: ModelFacts, layer: _BatchNorm, partner: Any, position: Position) -> str | None:
    """Why a layer cannot be folded into this neighbour."""
    if reason := about_partner(facts, partner, position):
        return reason
    node, theirs = facts.nodes[layer][0], facts.nodes[partner][0]
    if reason := _about_order(facts, node, theirs, position) or about_axes(facts, layer, partner, position):
        return f"{facts.names[partner]!r} {reason}"
    return about_result(facts, layer, partner, position)


def about_partner(facts: ModelFacts, partner: Any, position: Position) -> str | None:
    """Why a convolution or linear layer cannot take over any batch norm layer."""
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


def about_result(
    facts: ModelFacts, layer: _BatchNorm, partner: Any, position: Position, channels: Channels | None = None
) -> str | None:
    """Why the weights after folding would be wrong, or do not fit their type."""
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


def _about_order(facts: ModelFacts, node: Node, theirs: Node, position: Position) -> str | None:
    """Why the value between the two layers may be read or written elsewhere."""
    if position == "before":
        others = [named(facts, user) for user in theirs.users if user is not node]
        others += ["the sum behind the layer"] if theirs in node.args[1:] else []
        return f"has a result that also goes to {others[0]}" if others else None
    if len(node.args) > 1 or node.meta["module"] in facts.applying:
        return "comes behind an activation that the layer applies"
    following = node.next
    while following.op == "get_attr":
        following = following.next
    return None if following is theirs else "runs later, when the layer's input may have been written over"


def about_axes(facts: ModelFacts, layer: _BatchNorm, partner: Any, position: Position) -> str | None:
    """Why the channels of both layers are not on the same axis."""
    count = channels(partner, position)
    verb = "makes" if position == "before" else "takes"
    if count != channels_of(layer):
        return f"{verb} {count} channels on another axis than the {channels_of(layer)} that the layer normalizes"
    if facts.ranks is None:
        if isinstance(partner, nn.Linear):
            return f"{verb} channels on the last axis, which is axis 1 only of (N, C): pass an example to see"
        return None
    ranks = facts.ranks.get(layer, set())
    if ranks != {rank(partner)}:
        got = " and ".join(map(str, sorted(ranks)))
        return f"{verb} channels on another axis than the layer normalizes in its inputs of {got} axes"
    return None


def named(facts: ModelFacts, node: Node) -> str:
    """A node in the words of the model's code."""
    if node.op == "call_module":
        return repr(facts.names[node.meta["module"]])
    if node.op in {"placeholder", "output"}:
        return "an input" if node.op == "placeholder" else "what is returned"
    return name_of(node)
