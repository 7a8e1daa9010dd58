"""Why a batch norm layer cannot be folded into a neighbour: a reason for the report, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from batchnorm.layer_settings import lost_in_torch
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
    """The number of axes of a convolution's or linear layer's input batches."""
    return next(RANKS[kind] for kind in type(partner).__mro__ if kind in RANKS)


def about_layer(facts: ModelFacts, layer: _BatchNorm) -> str | None:
    """Why a batch norm layer cannot be folded into any neighbour; None if nothing in the layer forbids it."""
    if reason := about_state(layer):
        return reason
    parts = facts.parts[layer]
    if isinstance(parts, str):
        return parts
    if not (parts.affine.scale.isfinite().all() and parts.affine.shift.isfinite().all()):
        return "would scale or shift by NaN or infinity"
    return None


def about_state(layer: Any) -> str | None:
    """Why a layer's parametrization, forward, hooks or tensors forbid folding; None if they do not."""
    if parametrize.is_parametrized(layer):
        return "is parametrized"
    if "forward" in vars(layer) or any(map(is_lazy, [*layer.parameters(), *layer.buffers()])):
        what = "that has no size yet" if "forward" not in vars(layer) else "whose forward may do more than batch norm"
        return f"is a {type(layer).__name__} {what}"
    if is_watched(layer):
        return "has hooks that see its input or its result"
    if settings := lost_in_torch(layer, "eval"):
        return f"has {' and '.join(settings)}, which folding does not know"
    if not has_stored_statistics(layer):
        return "stores no statistics"
    if layer.running_mean.is_meta or layer.running_var.is_meta:
        return "has statistics on the meta device, without values"
    if absent := _absent(layer):
        return absent
    if (layer.running_var < 0).any():
        return f"has a negative running_var, {layer.running_var.min():.3g}"
    values = [t for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias) if t is not None]
    if not all(t.isfinite().all() for t in values):
        return "has statistics or parameters that are NaN or infinite"
    return None


def _absent(layer: nn.Module) -> str | None:
    """Which of a layer's tensors cannot be read, and why; None if all can be read."""
    own = {**layer._parameters, **layer._buffers}
    return next((f"has a {name} that {why}" for name, t in own.items() if t is not None and (why := absence(t))), None)


def about_pair(facts: ModelFacts, layer: _BatchNorm, partner: nn.Module, position: Position) -> str | None:
    """Why a layer cannot be folded into this neighbour; None if it can."""
    if reason := about_partner(facts, partner, position):
        return reason
    node, partner_node = facts.nodes[layer][0], facts.nodes[partner][0]
    if reason := _about_order(facts, node, partner_node, position) or about_axes(facts, layer, partner, position):
        return f"{facts.names[partner]!r} {reason}"
    return about_result(facts, layer, partner, position)


def about_partner(facts: ModelFacts, partner: Any, position: Position) -> str | None:
    """Why no batch norm layer can be folded into this convolution or linear layer; None if that is possible."""
    name = facts.names[partner]
    if absent := _absent(partner):
        return f"{name!r} {absent}"
    if partner not in facts.linear | facts.holding or (type(partner) not in RANKS and position == "behind"):
        return f"{name!r} is a {type(partner).__name__} that may use its weight or input differently from torch.nn"
    if not isinstance(partner._parameters.get("weight"), nn.Parameter):
        return f"{name!r} has a weight that is computed from other tensors"
    if not partner.weight.is_floating_point():
        return f"{name!r} has a weight of type {partner.weight.dtype}"
    if is_watched(partner):
        return f"{name!r} has hooks that see its input or its result"
    if reason := facts.about_calls(partner) or facts.about_tensors(partner):
        return f"{name!r} {reason}"
    partner_node = facts.nodes[partner][0]
    if len(partner_node.args) != 1 or partner_node.kwargs:
        return f"{name!r} is called with more than its input, or with keyword arguments"
    return None


def about_result(
    facts: ModelFacts, layer: _BatchNorm, partner: Any, position: Position, channels: Channels | None = None
) -> str | None:
    """Why folding here would give wrong results, or a weight or bias too large for its type; None if it would not."""
    name, affine = facts.names[partner], facts.affine(layer).spread(channels)
    if position == "behind" and affine.shift.any() and not shifts_evenly(partner):
        zeros = (
            "uses only a part of its kernel for some outputs"
            if isinstance(partner, nn.modules.conv._ConvTransposeNd)
            else "pads with zeros"
        )
        return f"{name!r} {zeros}, so a bias cannot replace the shift of the layer"
    joined = Linear.of(partner).joined(affine, position)
    if not all(t.to(partner.weight.dtype).isfinite().all() for t in (joined.weight, joined.bias)):
        return f"{name!r} would have a weight or bias that is too large for {partner.weight.dtype}"
    return None


def _about_order(facts: ModelFacts, node: Node, partner_node: Node, position: Position) -> str | None:
    """Why other operations on the value between the two layers forbid folding; None if they do not.

    They read the value, may overwrite it, or are an activation or residual of the batch norm layer.
    """
    if position == "before":
        others = [named(facts, user) for user in partner_node.users if user is not node]
        others += ["the layer as its residual"] if partner_node in node.args[1:] else []
        return f"has a result that also goes to {others[0]}" if others else None
    if len(node.args) > 1 or node.meta["module"] in facts.applying:
        return "is behind an activation or a residual of the layer"
    following = node.next
    while following.op == "get_attr":
        following = following.next
    return None if following is partner_node else "runs after other code, which may overwrite the layer's input"


def about_axes(facts: ModelFacts, layer: _BatchNorm, partner: nn.Module, position: Position) -> str | None:
    """Why the channels of both layers are not on the same axis; None if they are."""
    count = channels(partner, position)
    verb = "makes" if position == "before" else "reads"
    if count != channels_of(layer):
        return f"{verb} {count} channels on another axis: the layer normalizes {channels_of(layer)} channels"
    if facts.ranks is None:
        if isinstance(partner, nn.Linear):
            return "has its channels on the last axis, which is axis 1 only in (N, C): pass an example to check this"
        return None
    ranks = facts.ranks.get(layer, set())
    if ranks != {rank(partner)}:
        got = " and ".join(map(str, sorted(ranks)))
        return f"has its channels on another axis than the layer, whose inputs have {got} axes"
    return None


def named(facts: ModelFacts, node: Node) -> str:
    """A node in words: the path of a module, the name of a function or method, "an input" or "the output"."""
    if node.op == "call_module":
        return repr(facts.names[node.meta["module"]])
    if node.op in {"placeholder", "output"}:
        return "an input" if node.op == "placeholder" else "the output"
    return name_of(node)
