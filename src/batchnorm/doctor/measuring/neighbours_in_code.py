"""The modules before and behind each layer in the traced code, and the number of calls of each layer."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.call_types import Batch
from batchnorm.doctor.measuring.layer_inputs import plain
from batchnorm.doctor.measuring.live_layers import layers_of
from batchnorm.kernels import activations
from batchnorm.layers import batch_norms
from batchnorm.population import preserve_state
from batchnorm.population.batches import call, on_device_of
from batchnorm.population.hooks import attached
from batchnorm.rules.bn1_channels import ACTIVE
from batchnorm.rules.rule_evidence import Graph
from batchnorm.surgery import Partner, dataflow, foldable
from batchnorm.surgery.dataflow import Callers, Flow, flows, name_of, observed_arguments, registrations, static_callers
from batchnorm.surgery.folding.eval_graphs import graphs

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BIASED = (nn.modules.conv._ConvNd, nn.Linear)
_DROPOUT_FUNCTIONS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
# if these are between dropout and batch norm, the variance stays larger in train mode than in eval mode
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
_ACTIVATIONS = activations.TABLE.values()
_KEEP = (*(each.module for each in _ACTIVATIONS), nn.Identity, nn.Flatten, *_POOLS)
_KEEP_FUNCTIONS = {torch.flatten, "flatten", *chain(*((*each.functions, *each.methods) for each in _ACTIVATIONS))}


def graph_of(model: nn.Module, example: Batch = None) -> Graph:
    """The neighbours of the layers, and if there is an example, their calls. The model is not changed.

    Raises:
        ValueError: If the model is compiled, does not run on the example, or no forward can be traced.
    """
    paths: dict[nn.Module, str] = {layer: path for path, layer in batch_norms(model).items()}
    closed = dict.fromkeys(layers_of(model).keys() - paths.values(), "torch.fx does not see this layer")
    if not paths:
        return Graph(unread=closed)
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError("the model is compiled: examine it before torch.compile")
    with preserve_state(model), torch.no_grad():
        with nullcontext() if example is None else observed_arguments(model) as arguments:
            calls = _calls(model, paths, example)
        evaluating, both, reasons = _flows_of(model, arguments)
        callers = static_callers(model, both)
        all_nodes = _nodes(model, both, callers)
        eval_nodes = _nodes(model, evaluating, static_callers(model, evaluating))
    count = Counter(map(_module, all_nodes))
    nodes = [
        (paths[layer], node.args[0]) for node in all_nodes if (layer := _module(node)) in paths and len(node.args) == 1
    ]
    names = {module: path for path, module in model.named_modules()}
    once = {module: path for module, path in names.items() if count[module] == len(callers[module]) == 1}
    partners = foldable(model, example)
    return Graph(
        calls=calls,
        biased=_before(nodes, once, lambda module: isinstance(module, _BIASED) and module.bias is not None),
        behind_dropout=_behind_dropout(both, names),
        behind_batch_norm=_before(nodes, once, lambda module: isinstance(module, _BatchNorm)),
        foldable={path: partner.path for path, partner in partners.items() if isinstance(partner, Partner)},
        activations=_activations(eval_nodes, paths),
        filters={path: norms[0] for path, norms in _filters(eval_nodes, paths).items() if len(norms) == 1},
        channel_by_channel=_channel_by_channel(eval_nodes, paths),
        unread=closed
        | {names[module]: why for module, why in reasons.items() if any(part in paths for part in module.modules())},
    )


Flows = dict[nn.Module, Flow]


def _flows_of(model: nn.Module, arguments: dataflow.Arguments | None) -> tuple[Flows, Flows, dict[nn.Module, str]]:
    """The forwards traced in eval mode, those traced in both modes, and why other modules cannot be traced.

    Some modules can be traced in eval mode only, such as blocks that drop paths at random in train mode.
    """
    evaluating, reasons = flows(model, (False,), arguments)
    if not evaluating and reasons:
        raise ValueError(f"its code cannot be traced: {next(iter(reasons.values()))}")
    training, why_not = flows(model, (True,), arguments)
    both = {
        module: Flow(module, {**flow.graphs, **evaluating[module].graphs}, flow.is_bound)
        for module, flow in training.items()
        if module in evaluating
    }
    return evaluating, both, {**why_not, **reasons}


def _nodes(model: nn.Module, known: dict[nn.Module, Flow], callers: Callers) -> list[Node]:
    return [node for graph in graphs(known, registrations(model), callers) for node in graph.nodes]


def _channel_by_channel(nodes: list[Node], paths: dict[nn.Module, str]) -> dict[str, str]:
    """Layers behind a depthwise convolution, with the batch norm layer before it, whose channels correspond one to one.

    The layer before must be followed by an activation that alone reads its result, or apply the activation itself.
    """
    layers = {}
    for node in nodes:
        layer = _module(node)
        source = _input_of_depthwise(next(iter(node.args), None)) if layer in paths else None
        for result in (source, next(iter(source.args), None) if source else None):
            before = _module(result)
            if layer in paths and before in paths and isinstance(result, torch.fx.Node) and _behind(result, before):
                layers[paths[layer]] = paths[before]
    return layers


def _input_of_depthwise(node: Any) -> Node | None:
    module: Any = _module(node)
    is_depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels
    source = node.args[0] if is_depthwise and module.out_channels == module.in_channels and node.args else None
    return source if isinstance(source, torch.fx.Node) else None


def _filters(nodes: list[Node], paths: dict[nn.Module, str]) -> dict[str, list[array[float] | None]]:
    """Layer: for each of its calls, the norms of the weight rows of the module before it."""
    norms: dict[str, list[array[float] | None]] = defaultdict(list)
    for node in nodes:
        layer = _module(node)
        if layer in paths:
            norms[paths[layer]].append(_norms(_module(next(iter(node.args), None))))
    return norms


def _norms(before: object) -> array[float] | None:
    """Norm of the weights of each output channel; None if it is not a convolution or linear layer, or has no values."""
    if not isinstance(before, _BIASED) or before.weight.is_meta:
        return None
    weight = before.weight.detach()
    if isinstance(before, nn.modules.conv._ConvTransposeNd):  # (in, out / groups, ...)
        weight = weight.unflatten(0, (before.groups, -1)).transpose(1, 2).flatten(0, 1)
    return plain(weight.flatten(1).double().norm(dim=1))


def _activations(nodes: list[Node], paths: dict[nn.Module, str]) -> dict[str, str]:
    """Layers whose result is read, in all calls, by one kind of activation and nothing else."""
    behind: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        if (layer := _module(node)) in paths:
            behind[paths[layer]].add(_behind(node, layer))
    return {path: name for path, (name, *others) in behind.items() if name and not others}


def _behind(call: Node, layer: nn.Module | None) -> str:
    """The activation that alone reads a call's result; "" if there is none, or if the call also adds a residual."""
    if len(call.args) != 1 or call.kwargs:
        return ""
    if own := applied_by(layer):
        return own
    names = {_activation(user) for user in call.users}
    return names.pop() if len(names) == 1 else ""


def applied_by(layer: object) -> str:
    """The activation that a layer applies itself: the name or module in its attribute ``act``; "" without any."""
    act = getattr(layer, "act", None)
    return (
        _known_activation(act)
        if isinstance(act, str)
        else _known_activation(type(act).__name__)
        if isinstance(act, nn.Module)
        else ""
    )


def _activation(node: Node) -> str:
    module = _module(node)
    if module is not None:
        return _known_activation(type(module).__name__) if type(module).__module__.startswith("torch.nn.") else ""
    return _known_activation(name_of(node))


def _known_activation(name: str) -> str:
    """ "relu" for "ReLU" and "relu_"; "" for names that are not an activation known to the rules."""
    lower = name.lower().replace("_", "")
    return lower if lower in ACTIVE else ""


def _calls(model: nn.Module, paths: dict[nn.Module, str], example: Batch) -> dict[str, int] | None:
    if example is None:
        return None
    counts: Counter[str] = Counter()
    with attached(layer.register_forward_pre_hook(lambda layer, _: counts.update([paths[layer]])) for layer in paths):
        try:
            call(model.eval(), on_device_of(model, example))
        except Exception as error:
            raise ValueError(f"the model raises {type(error).__name__} on the example: {error}") from error
    return dict(counts)


def _before(nodes: list[tuple[str, Any]], names: dict[nn.Module, str], test: Any) -> dict[str, str]:
    """Layers whose input is the result of a module that passes the test; nothing else may read that result."""
    layers = {}
    for path, source in nodes:
        module = _module(source)
        if module in names and len(source.users) == 1 and test(module):
            layers[path] = names[module]
    return layers


def _behind_dropout(known: dict[nn.Module, Flow], names: dict[nn.Module, str]) -> dict[str, str]:
    """Layers behind dropout, by the graphs of train mode, because eval mode has no dropout."""
    calls = [(flow, node) for flow in known.values() for node in flow.graphs[True].nodes if flow.called(node)]
    count = Counter(flow.called(node) for flow, node in calls)
    sites = {flow.called(node): (flow, node) for flow, node in calls if count[flow.called(node)] == 1}
    layers = {}
    for flow, node in calls:
        layer = flow.called(node)
        if isinstance(layer, _BatchNorm) and (dropout := _dropout(flow, node, known, sites)):
            layers[names[layer]] = dropout if isinstance(dropout, str) else names[dropout]
    return layers


def _dropout(flow: Flow, node: Node, known: dict[nn.Module, Flow], sites: dict[Any, tuple[Flow, Node]]) -> Any:
    """The dropout whose result a call receives, directly or through activations, pooling and modules; None without."""
    source = next(iter(node.args), None)
    while isinstance(source, torch.fx.Node):
        module = flow.called(source)
        if source.op == "placeholder" and flow.module in sites:
            inputs = [each for each in flow.graphs[True].nodes if each.op == "placeholder"]
            flow, caller = sites[flow.module]
            source = dict(zip(inputs, caller.args, strict=False)).get(source)
        elif module in known:
            flow = known[module]
            source = next(each.args[0] for each in flow.graphs[True].nodes if each.op == "output")
        elif isinstance(module, _DROPOUTS) and module.p > 0:
            return module
        elif source.target in _DROPOUT_FUNCTIONS and _drops(*source.args[1:], **source.kwargs):
            return f"F.{source.target.__name__}"
        elif isinstance(module, _KEEP) or source.target in _KEEP_FUNCTIONS:
            source = next(iter(source.args), None)
        else:
            return None
    return None


def _drops(p: object = 0.5, training: object = True, inplace: object = False, **_: object) -> bool:  # noqa: ARG001 - torch's
    """Whether a call of torch's dropout function with these arguments drops anything."""
    return p != 0 and training is not False


def _module(node: object) -> nn.Module | None:
    return node.meta.get("module") if isinstance(node, torch.fx.Node) else None
