"""Facts about a model for a fold: its callers, shared tensors, and layers that are linear in their weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.modules import module as hooks_of_all
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from batchnorm.population.batches import call
from batchnorm.population.hooks import attached
from batchnorm.population.tensor_memory import AbsenceError
from batchnorm.population.tensor_trees import Batch, copied
from batchnorm.surgery.dataflow import (
    Arguments,
    Callers,
    Flow,
    TraceError,
    observed_arguments,
    observed_callers,
    registrations,
    set_mode,
    traced,
)
from batchnorm.surgery.folding import channel_paths
from batchnorm.surgery.folding.arithmetic import RANKS, Affine, channels
from batchnorm.surgery.folding.channel_paths import Sizes
from batchnorm.surgery.folding.eval_graphs import graphs
from batchnorm.surgery.layer_maps import Parts
from batchnorm.surgery.patterns import is_ours
from batchnorm.surgery.replacement import find
from batchnorm.surgery.shape_tracing import InputShapes, observed_inputs

Record = Callable[[nn.Module], Graph]


SUMS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


def fresh(example: Batch) -> Batch:
    """A copy of a batch, so that a model may change it in place."""
    return tree_map(copied, example)


@final
@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model.

    ``ranks`` has the numbers of axes of each batch norm layer's inputs; None if the model was not run. ``owners``
    counts the names of each tensor, and ``read`` has the tensors that code outside of the forwards of convolutions,
    linear layers and batch norm layers reads; both are by ``id``.
    """

    names: dict[nn.Module, str]
    registered: Counter
    callers: Callers
    ranks: dict[nn.Module, set[int]] | None
    nodes: dict[nn.Module, list[Node]]
    owners: Counter
    read: set[int]
    linear: set[nn.Module]  # convolutions and linear layers that return their sum unchanged, see is_linear
    holding: set[nn.Module]  # convolutions and linear layers that process the sum further, such as by batch norm inside
    sizes: Sizes = field(default_factory=dict, init=False)  # in graphs with operations that only move values
    parts: dict[nn.Module, Parts | str]  # what each batch norm layer does, or why that is not known

    @property
    def applying(self) -> set[nn.Module]:
        """The batch norm layers that process the normalized values further, such as by an activation."""
        after = {layer for layer, parts in self.parts.items() if isinstance(parts, Parts) and parts.then is not None}
        return after | {layer for layer in self.parts if is_ours(layer) and layer.act is not None}

    def affine(self, layer: nn.Module) -> Affine:
        """The affine map of a batch norm layer, which is the part that can be folded."""
        parts = self.parts[layer]
        assert isinstance(parts, Parts)  # noqa: S101 - about_layer has returned the reason before
        return parts.affine

    def about_calls(self, module: nn.Module) -> str | None:
        """Why a module is not called at exactly one place; None if it is, or if only code without a graph calls it."""
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
        """Why a module's tensors cannot be changed, such as that they are shared; None if they can be changed."""
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None and self.owners[id(tensor)] > 1:
                return f"shares its {name} with another module"
            if tensor is not None and id(tensor) in self.read:
                return f"has a {name} that other code reads"
            if tensor is not None and (tensor.is_meta or tensor.layout != torch.strided):
                return f"has a {name} without values" if tensor.is_meta else f"has a {name} that is not dense"
        return None


def gathered(
    model: nn.Module, known: dict[nn.Module, Flow], callers: Callers, ranks: dict[nn.Module, set[int]] | None,
    linear: set[nn.Module], holding: set[nn.Module], parts: dict[nn.Module, Parts | str],
) -> ModelFacts:  # fmt: skip
    """The facts about a model, from its flows and from a run on the example, if there was one."""
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
    return ModelFacts(
        names=names, registered=registered, callers=callers, ranks=ranks, nodes=dict(nodes),
        owners=Counter(map(id, tensors)), read=read, linear=linear, holding=holding, parts=parts,
    )  # fmt: skip


def _attribute(value: nn.Module, path: str) -> object:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def look_at_channels(facts: ModelFacts, inputs: InputShapes) -> None:
    """Add the sizes of graphs in which a batch norm layer is next to an operation that moves values."""
    nodes = [node for layer in facts.parts for node in facts.nodes.get(layer, [])]
    near = {node.graph: None for node in nodes if any(map(channel_paths.moves, [*node.all_input_nodes, *node.users]))}
    for graph in near:
        facts.sizes.update(channel_paths.sizes(graph, inputs))


def observed(model: nn.Module, example: Batch) -> tuple[Callers, dict[nn.Module, set[int]], Arguments, InputShapes]:
    """One run in eval mode: callers, numbers of axes at batch norm layers, optional arguments, and input shapes."""
    set_mode(model, False)
    logs = (
        observed_callers(),
        _observed_ranks({*find(model).values()}),
        observed_arguments(model),
        observed_inputs(model),
    )
    with logs[0] as callers, logs[1] as ranks, logs[2] as arguments, logs[3] as inputs, torch.no_grad():
        try:
            call(model, fresh(example))
        except AbsenceError:  # another example would not help
            raise
        except Exception as error:
            raise ValueError(
                f"fold needs an example on which the model runs in eval mode, got {type(error).__name__}: {error} "
                "Pass a batch, as a loader for recalibrate returns it."
            ) from error
    return callers, ranks, arguments, inputs


@contextmanager
def _observed_ranks(layers: Container[nn.Module]) -> Iterator[dict[nn.Module, set[int]]]:
    ranks: dict[nn.Module, set[int]] = defaultdict(set)

    def add_rank(module: nn.Module, args: tuple[Batch, ...]) -> None:
        if module in layers and args and isinstance(args[0], Tensor):
            ranks[module].add(args[0].ndim)

    with attached([hooks_of_all.register_module_forward_pre_hook(add_rank)]):
        yield ranks


def is_linear(module: nn.Module, record: Record | None) -> bool:
    """Whether a convolution or linear layer, or an instance of a subclass, is linear in its weight and bias.

    A subclass may change the input before the sum, such as pad it, but must return the sum unchanged.
    """
    if type(module) in RANKS:
        return "forward" not in vars(module)
    total = sum_of(module, record)
    return total is not None and [user.op for user in total.users] == ["output"]


def sum_of(module: nn.Module, record: Record | None) -> Node | None:
    """The operation in a forward that reads weight and bias, if it is one of ``SUMS`` and the only one; else None."""
    if parametrize.is_parametrized(module) or any(map(is_lazy, module.parameters())):
        return None
    weight = module._parameters["weight"]
    assert weight is not None  # noqa: S101 - layers in RANKS have a weight
    bias = module._parameters.get("bias")
    module._parameters["bias"] = nn.Parameter(weight.new_zeros(channels(module, "before")))
    try:  # traced with a bias, which shows whether the forward would use one
        flow = _graph_of(module, record)
    except TraceError:
        return None
    finally:
        module._parameters["bias"] = bias
    attributes = {str(node.target): node for node in flow.nodes if node.op == "get_attr"}
    users = {user for node in attributes.values() for user in node.users}
    if attributes.keys() != {"weight", "bias"} or len(users) != 1:
        return None
    [operation] = users
    is_sum = operation.op == "call_function" and operation.target in SUMS and not operation.kwargs
    return operation if is_sum and operation.args[1:3] == (attributes["weight"], attributes["bias"]) else None


def _graph_of(module: nn.Module, record: Record | None) -> Graph:
    try:
        return traced(module)
    except TraceError:
        if record is None:
            raise
        return record(module)
