"""fuse: batch norm layers take over the activation that follows them, and the addition of a residual between them.

``dataflow`` traces each module's own forward as a graph, ``patterns`` finds the places that can be fused, and
``rewriting`` puts the new code there. A layer is fused only if it is called at one place: it has one name in the model,
one module calls it, and that module calls it at most once in each mode.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_map

from batchnorm.population import preserve_state
from batchnorm.population.batches import call
from batchnorm.population.tensor_memory import AbsenceError
from batchnorm.population.tensor_trees import Batch, Leaf, copied
from batchnorm.surgery.comparison import example_needed
from batchnorm.surgery.dataflow import (
    MODES,
    Callers,
    Flow,
    flows,
    is_container,
    observed_callers,
    registrations,
    set_mode,
    static_callers,
)
from batchnorm.surgery.patterns import Site, is_ours, sites
from batchnorm.surgery.rewriting import MARK as _MARK
from batchnorm.surgery.rewriting import Absorbed, applied_by, restore, rewrite


def fuse(model: nn.Module, example: Batch) -> None:
    """Fuse layers of the model in place, if they meet the conditions in ``convert``'s docstring.

    Raises:
        ValueError: If the model is compiled, does not run on ``example``, or nothing was fused and some forwards
            cannot be traced.
    """
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError(
            "convert(fuse=True) needs a model before torch.compile, got a compiled one. Convert first, then compile "
            "the result."
        )
    with preserve_state(model):
        known, reasons = flows(model)
        candidates = [places for flow in known.values() for places in _places(flow)]
        callers, fits = (static_callers(model, known), {}) if example is None else _observed(model, candidates, example)
    registered = registrations(model)
    chosen = [places for places in candidates if _is_sole(places, registered, callers) and _fits(places, fits)]
    applied = [places for places in chosen if _apply(places, registered, callers)]
    for flow in {id(places.flow): places.flow for places in applied if places.is_rewritten}.values():
        fused = tuple((_path(p), p.any.act.name) for p in applied if p.is_rewritten and p.flow is flow)
        rewrite(flow.module, flow.graphs[True], flow.graphs[False], fused)
    _report(model, reasons)


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse`` in place: activations and forwards are the original ones again."""
    for module in list(model.modules()):
        layer: Any = module
        restore(module)
        for name, child in module._modules.items():
            if isinstance(child, Absorbed):
                module._modules[name] = child.restored()
        if vars(layer).pop(_MARK, False):
            layer.act, layer.act_param = None, 0.0


def applies_its_own(layer: nn.Module) -> bool:
    """Whether a layer of ours has an activation that ``fuse`` did not give it."""
    return applied_by(layer) is not None and _MARK not in vars(layer)


@final
@dataclass
class _Places:
    """The sites of one layer, one for each mode, in the graphs of the module that calls it."""

    flow: Flow
    sites: dict[bool, Site]
    is_rewritten: bool = False

    @property
    def any(self) -> Site:
        return next(iter(self.sites.values()))


def _places(flow: Flow) -> list[_Places]:
    """The sites of layers that are called at most once in each mode, and can be fused in the same way each time."""
    sites_by_layer = {mode: {site.layer: site for site in sites(flow, flow.graphs[mode])} for mode in MODES}
    calls = {mode: Counter(flow.called(node) for node in flow.graphs[mode].nodes) for mode in MODES}
    places = []
    for layer in dict.fromkeys([*sites_by_layer[True], *sites_by_layer[False]]):
        here = {mode: sites_by_layer[mode][layer] for mode in MODES if layer in sites_by_layer[mode]}
        first = next(iter(here.values()))
        count = sum(calls[mode][first.chain[0]] for mode in MODES)
        alike = all(site.act == first.act and site.chain == first.chain for site in here.values())
        if alike and count == len(here):
            places.append(_Places(flow, here))
    return places


def _is_sole(places: _Places, registered: Counter, callers: Callers) -> bool:
    around = [places.flow.module, *places.any.chain]
    return all(registered[module] == 1 and callers.get(module) == {caller} for caller, module in pairwise(around))


def _fits(places: _Places, fits: dict[Node, bool]) -> bool:
    """Whether a run reached an addition of the layer, and its operands always had one shape, type, device and layout.

    A layer without additions always fits.
    """
    additions = [site.addition for site in places.sites.values() if site.addition is not None]
    return not additions or {fits[node] for node in additions if node in fits} == {True}


def _observed(model: nn.Module, candidates: list[_Places], example: Batch) -> tuple[Callers, dict[Node, bool]]:
    """The callers of each module, and for each addition whether its operands are alike, in a run on ``example``."""
    fits: dict[Node, bool] = {}
    adding: dict[nn.Module, Flow] = {
        places.flow.module: places.flow for places in candidates if any(site.addition for site in places.sites.values())
    }
    nodes = {site.addition for places in candidates for site in places.sites.values() if site.addition}
    for module, flow in adding.items():
        vars(module)["forward"] = _ForwardByFlow(flow, nodes, fits)  # preserve_state restores the forward
    with observed_callers() as callers, torch.no_grad():
        for mode in MODES:
            set_mode(model, mode)
            try:
                call(model, tree_map(copied, example))
            except AbsenceError:  # another example would not help
                raise
            except Exception as error:
                raise ValueError(example_needed(mode, error)) from error
    return callers, fits


@final
class _ForwardByFlow:
    """A forward that runs the graph of a flow and compares the operands of each addition."""

    def __init__(self, flow: Flow, nodes: set[Node], fits: dict[Node, bool]) -> None:
        self.flow, self.nodes, self.fits = flow, nodes, fits
        self.signature = inspect.signature(flow.module.forward)

    def __call__(self, *args: Batch, **kwargs: Batch) -> Batch:
        module = self.flow.module
        run = _AdditionInterpreter(module, graph=self.flow.graphs[module.training])
        run.nodes, run.fits = self.nodes, self.fits
        return run.run(*self.signature.bind(*args, **kwargs).args)


@final
class _AdditionInterpreter(Interpreter):
    nodes: set[Node]
    fits: dict[Node, bool]

    def run_node(self, n: Node) -> Batch:
        if n in self.nodes:
            a, b = self.fetch_args_kwargs_from_env(n)[0]
            self.fits[n] = self.fits.get(n, True) and _alike(a, b)
        return super().run_node(n)


def _alike(a: Leaf, b: Leaf) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)


def _apply(places: _Places, registered: Counter, callers: Callers) -> bool:
    """Fuse one layer; returns False, and changes nothing, if that is impossible.

    It is possible if the activation is a module that can be replaced, or if the forward can be rewritten.
    """
    flow, layer, act = places.flow, places.any.layer, places.any.act
    has_own_place = _has_own_place(places, registered, callers)
    if not has_own_place and not flow.is_writable:
        return False
    layer.act, layer.act_param = act.name, act.parameter
    vars(layer)[_MARK] = True
    if has_own_place:
        path = str(places.any.activation.target)
        parent, _, name = path.rpartition(".")
        placeholder = Absorbed(flow.module.get_submodule(path), flow.module, _path(places), layer)
        flow.module.get_submodule(parent)._modules[name] = placeholder
        return True
    places.is_rewritten = True
    for site in places.sites.values():
        site.fuse()
    return True


def _path(places: _Places) -> tuple[str, ...]:
    """The names that lead from the calling module, through modules that wrap the layer, to the layer."""
    names = str(places.any.call.target).split(".")
    return (*names, *(list(around._modules)[-1] for around in places.any.chain[:-1]))


def _has_own_place(places: _Places, registered: Counter, callers: Callers) -> bool:
    """Whether the activation is a module whose name in the model is used for nothing else."""
    places_of_layer = list(places.sites.values())
    if any(site.addition or site.activation.op != "call_module" for site in places_of_layer):
        return False
    flow, act = places.flow, places.flow.called(places_of_layer[0].activation)
    if any(flow.called(site.activation) is not act for site in places_of_layer) or act is None:
        return False
    if flow.is_chain:
        # each name in a chain is one call, so other chains may call the same activation module under names of theirs
        holders = {module for module in callers if any(child is act for child in module._modules.values())}
        return callers[act] <= holders
    once = all(sum(flow.called(node) is act for node in site.activation.graph.nodes) == 1 for site in places_of_layer)
    return once and registered[act] == 1 and callers[act] == {flow.module}


def _report(model: nn.Module, reasons: dict[nn.Module, str]) -> None:
    """Warn of forwards that call our layers and cannot be traced; raise if nothing was fused."""
    closed = [
        f"{path or 'the model itself'!r} ({type(module).__name__}): {reasons[module]}"
        for path, module in model.named_modules()
        if module in reasons and any(is_ours(child) and _MARK not in vars(child) for child in _direct_children(module))
    ]
    if not closed:
        return
    text = (
        f"convert(fuse=True) needs forwards that torch.fx can trace, got {len(closed)} around batch norm layers that "
        f"it cannot trace: {'; '.join(closed)}. Rewrite these forwards"
    )
    if not any(_MARK in vars(module) for module in model.modules()):
        raise ValueError(f"{text}, or convert without fuse.")
    warnings.warn(f"{text}; until then the layers in them are converted and not fused.", UserWarning, stacklevel=4)


def _direct_children(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    return children + [below for child in children if is_container(child) for below in _direct_children(child)]
