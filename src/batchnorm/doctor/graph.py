"""Who feeds whom: what stands before and behind each layer, by the traced code, and how often it is called."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import batch_norms
from batchnorm.population import preserve_state
from batchnorm.population.batches import call
from batchnorm.rules.evidence import Graph
from batchnorm.surgery import Partner, foldable
from batchnorm.surgery.dataflow import flows, registrations, static_callers
from batchnorm.surgery.folding_graphs import graphs

if TYPE_CHECKING:
    from torch.fx import Node

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BIASED = (nn.modules.conv._ConvNd, nn.Linear)
# between dropout and batch norm these keep what dropout does to the variance
_POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Identity)


def graph_of(model: nn.Module, example: Any = None) -> Graph:
    """Neighbours of the layers, and calls if there is an example. The model is not changed.

    Raises:
        ValueError: If the model does not run on the example, or no forward can be traced.
    """
    paths: dict[nn.Module, str] = {layer: path for path, layer in batch_norms(model).items()}
    if not paths:
        return Graph()
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError("the model is compiled: examine it before torch.compile")
    with preserve_state(model), torch.no_grad():
        calls = _calls(model, paths, example)
        known, reasons = flows(model)
        if not known and reasons:
            raise ValueError(f"its code cannot be traced: {next(iter(reasons.values()))}")
        nodes = [
            (paths[module], node.args[0])
            for graph in graphs(known, registrations(model), static_callers(model, known))
            for node in graph.nodes
            if (module := node.meta.get("module")) in paths and len(node.args) == 1
        ]
        dropouts = _behind_dropout(known, paths)
    names = {module: path for path, module in model.named_modules()}
    found = foldable(model, example)
    return Graph(
        calls=calls,
        biased=_before(nodes, names, lambda module: isinstance(module, _BIASED) and module.bias is not None),
        behind_dropout={path: names[dropout] for path, dropout in dropouts.items()},
        behind_batch_norm=_before(nodes, names, lambda module: isinstance(module, _BatchNorm)),
        foldable={path: partner.path for path, partner in found.items() if isinstance(partner, Partner)},
    )


def _calls(model: nn.Module, paths: dict[nn.Module, str], example: Any) -> dict[str, int]:
    if example is None:
        return {}
    from batchnorm.doctor.comparison import on_device_of

    counts: Counter[str] = Counter()
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: counts.update([paths[layer]])) for layer in paths
    ]  # fmt: skip
    try:
        call(model.eval(), on_device_of(model, example))
    except Exception as error:
        raise ValueError(f"the model raises {type(error).__name__} on the example: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return dict(counts)


def _before(nodes: list[tuple[str, Any]], names: dict[nn.Module, str], test: Any) -> dict[str, str]:
    """Layers whose input is the result, which nobody else reads, of a module that passes the test."""
    found = {}
    for path, source in nodes:
        module = _module(source)
        if module is not None and len(source.users) == 1 and test(module):
            found[path] = names.get(module, "")
    return found


def _behind_dropout(known: dict, paths: dict[nn.Module, str]) -> dict[str, nn.Module]:
    """Layers with dropout before them in one and the same forward: eval graphs of folding leave dropout out."""
    found: dict[str, nn.Module] = {}
    for flow in known.values():
        for node in flow.graphs[True].nodes:
            if (layer := flow.called(node)) in paths and node.args:
                source = node.args[0]
                while (module := _called(flow, source)) is not None and type(module) in _POINTWISE:
                    source = source.args[0]
                if isinstance(module, _DROPOUTS) and module.p > 0:
                    found[paths[layer]] = module
    return found


def _called(flow: Any, node: Any) -> nn.Module | None:
    return flow.called(node) if isinstance(node, torch.fx.Node) else None


def _module(node: Node | Any) -> nn.Module | None:
    return node.meta.get("module") if isinstance(node, torch.fx.Node) else None
